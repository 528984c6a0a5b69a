"""Threads make the same bytes as processes, in order; memory comes back only when it is free."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_kd.data.crop_maker import CropMaker
from dino_kd.data.loader import (
    CropBatch,
    EvalTransform,
    crop_batches,
    image_batches,
    worker_kind,
)
from dino_kd.data.multicrop import CropPolicy
from dino_kd.data.renderers import make_renderer
from dino_kd.data.threads import AHEAD, BufferRing
from dino_kd.errors import ConfigError, DataError
from tests.in_memory import Memory as InMemory
from tests.in_memory import assert_same

ROOT = Path(__file__).resolve().parents[2]
POLICY = CropPolicy(global_size=(8, 6), local_size=(4, 4), num_local_crops=3)


class Memory(InMemory):
    """Some broken images, and reads that end in another order than they began."""

    def __init__(self, count: int = 23, broken: tuple[int, ...] = (4, 9)) -> None:
        super().__init__(count, broken)

    def read(self, index: int) -> np.ndarray:
        time.sleep((index * 7 % 5) * 1e-4)
        return super().read(index)

    def fingerprint(self) -> str:
        return "memory"


class Stuck(Memory):
    """The first read never comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def read(self, index: int) -> np.ndarray:
        self.released.wait(60)
        return super().read(index)


class Failing(Memory):
    """Gone from the second epoch on: the third batch of 8 of 23 images."""

    def __init__(self, error: Exception) -> None:
        super().__init__(broken=())
        self.error, self.reads = error, 0

    def read(self, index: int) -> np.ndarray:
        self.reads += 1
        if self.reads > 16:
            raise self.error
        return super().read(index)


def batches(data: Memory, **changes: object) -> list[CropBatch]:
    options = {
        "batch_size": 8, "seed": 7, "start_step": 0, "total_steps": 9, "num_workers": 3,
        "workers": "threads", **changes,
    }  # fmt: skip
    return list(crop_batches(data, POLICY, **options))  # type: ignore[arg-type]


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("loader-")]


@pytest.mark.parametrize("renderer", ["auto", "torch", "pillow"])
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_threads_give_the_bytes_of_the_main_thread(renderer: str, threads: int) -> None:
    """All batches are kept here: memory that is in use must not be written again."""
    ours = batches(Memory(), renderer=make_renderer(renderer), num_workers=threads)
    assert any(batch.broken for batch in ours)
    assert_same(ours, batches(Memory(), renderer=make_renderer(renderer), num_workers=0))
    assert not loader_threads()


@pytest.mark.dist
def test_threads_give_the_bytes_of_processes() -> None:
    assert_same(batches(Memory()), batches(Memory(), workers="processes", num_workers=2))


def test_starting_at_a_step_equals_skipping() -> None:
    assert_same(batches(Memory(), start_step=3), batches(Memory())[3:])


def test_two_ranks_make_one_ranks_batch() -> None:
    parts = [batches(Memory(), rank=rank, world_size=2) for rank in (0, 1)]
    for batch, first, second in zip(batches(Memory()), *parts, strict=True):
        assert torch.equal(batch.indices, torch.cat([first.indices, second.indices]))
        together = torch.cat([first.crops.global_crops, second.crops.global_crops], 1)
        assert torch.equal(batch.crops.global_crops, together)


def test_large_images_are_rendered_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches(Memory())
    monkeypatch.setattr("dino_kd.data.crop_maker._GATHERED_BYTES", 700)  # two or three images
    assert_same(batches(Memory()), whole)


def test_memory_comes_back_with_the_last_reference_to_it() -> None:
    ring = BufferRing()

    def place(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    first, local = ring.take((2, 3), (1, 4))
    assert first.shape == (2, 3)
    assert local.shape == (1, 4)
    assert place(first) == place(local)
    address = place(first)
    row = first[1].numpy()  # the smallest thing that somebody might keep
    del first, local
    other, _ = ring.take((2, 3), (1, 4))
    assert place(other) != address
    del row
    gc.collect()
    again, _ = ring.take((2, 3), (1, 4))
    assert place(again) == address


def test_a_batch_that_is_used_up_gives_its_memory_to_a_later_one() -> None:
    running = crop_batches(
        Memory(), POLICY, batch_size=8, seed=0, start_step=0, total_steps=40,
        num_workers=2, workers="threads",
    )  # fmt: skip
    places = {batch.crops.global_crops.untyped_storage().data_ptr() for batch in running}
    assert len(places) <= AHEAD + 2


def test_an_error_comes_out_where_its_batch_is_due() -> None:
    data = Failing(DataError("the disk has gone"))
    running = crop_batches(
        data, POLICY, batch_size=8, seed=0, start_step=0, total_steps=9,
        num_workers=1, workers="threads",
    )  # fmt: skip
    assert len([next(running), next(running)]) == 2
    with pytest.raises(DataError) as caught:
        next(running)
    assert str(caught.value) == "the disk has gone"
    frames = [frame.name for frame in caught.traceback]
    assert "read" not in frames  # no trace of the thread
    assert not loader_threads()


def test_a_programming_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        batches(Failing(ZeroDivisionError("bug")))
    assert "read" in [frame.name for frame in caught.traceback]


def test_a_data_set_of_broken_images_stops_the_run() -> None:
    with pytest.raises(DataError, match=r"21 images in a row cannot be read.*memory\[\d+\]: cut"):
        batches(Memory(broken=tuple(range(23))))


def test_closing_ends_the_threads_at_once() -> None:
    running = crop_batches(
        Memory(), POLICY, batch_size=8, seed=0, start_step=0, total_steps=10**6,
        num_workers=2, workers="threads",
    )  # fmt: skip
    next(running)
    assert len(loader_threads()) == 2
    begin = time.perf_counter()
    running.close()
    assert time.perf_counter() - begin < 2  # less than the patience with a stuck one
    assert not loader_threads()


def test_a_stuck_read_does_not_hold_up_the_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_kd.data.threads._PATIENCE", 0.2)
    # a shell that runs the tests in the background has SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    data = Stuck()
    running = crop_batches(
        data, POLICY, batch_size=8, seed=0, start_step=0, total_steps=9,
        num_workers=2, workers="threads",
    )  # fmt: skip
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C reaches the main thread while it waits
        next(running)
    assert time.perf_counter() - begin < 5
    data.released.set()
    signal.signal(signal.SIGINT, before)


@pytest.mark.dist
def test_a_stuck_read_does_not_hold_up_the_exit() -> None:
    script = """
import sys, time
sys.path.insert(0, "tests/data")
from test_threads import POLICY, Memory
from dino_kd.data.loader import crop_batches
class Late(Memory):
    def read(self, index):
        if self.__dict__.setdefault("reads", 0) >= 8:
            time.sleep(600)
        self.reads += 1
        return super().read(index)
running = crop_batches(Late(broken=()), POLICY, batch_size=8, seed=0, start_step=0, total_steps=9,
                       num_workers=1, workers="threads")
next(running)
print("seen", flush=True)
"""
    ran = subprocess.run(  # far sooner than the read would end
        [sys.executable, "-c", script], cwd=ROOT, timeout=300, capture_output=True, text=True
    )
    assert (ran.stdout, ran.returncode, ran.stderr) == ("seen\n", 0, "")


@pytest.mark.dist
def test_evaluation_forks_its_processes_while_threads_load() -> None:
    """As the k-NN monitor does in the middle of training."""
    data = Memory()
    running = crop_batches(
        data, POLICY, batch_size=8, seed=7, start_step=0, total_steps=30, num_workers=3,
        workers="threads",
    )  # fmt: skip
    made = [next(running)]
    views = [
        list(image_batches(data, range(23), EvalTransform((6, 6)), batch_size=4, num_workers=n))
        for n in (0, 2, 2, 2)
    ]
    for found in views[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], views[0][0], strict=True))
        assert len(found) == len(views[0])
    made += list(running)
    assert_same(made, batches(data, total_steps=30, num_workers=0))


def test_what_makes_a_batch_can_be_sent_to_a_process_that_is_not_forked() -> None:
    maker = CropMaker(Memory(broken=()), 7, make_renderer())
    sent = pickle.loads(pickle.dumps(maker))
    request = (0, np.arange(4), POLICY)
    assert_same([sent.__getitems__(request)], [maker.__getitems__(request)])


def test_what_makes_batches_follows_the_renderer() -> None:
    class Free:
        name, releases_gil = "free", True

    pillow = make_renderer("pillow")
    assert worker_kind("auto", Free()) == "threads"  # type: ignore[arg-type]
    assert worker_kind("auto", pillow) == "processes"
    assert worker_kind("threads", pillow) == "threads"
    assert worker_kind("processes", Free()) == "processes"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fibres"):
        worker_kind("fibres", pillow)


def test_a_set_of_pixels_is_read_and_rendered_in_one_call_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By counting calls; and many times as fast as Pillow image by image, in processor time."""
    renderer = make_renderer()
    if renderer.name != "native":
        pytest.skip("no compiler here")
    calls: list[int] = []

    class Counted:
        name, releases_gil = "counted", True

        def render(self, images: np.ndarray, *rest: object) -> None:
            calls.append(len(images))
            renderer.render(images, *rest)  # type: ignore[arg-type]

    data = Pixels()
    options = {"batch_size": 256, "total_steps": 4, "num_workers": 2}
    fast, begin = batches(data, renderer=Counted(), **options), time.process_time()
    assert calls == [128] * 8
    batches(data, renderer=renderer, **options)
    ours = time.process_time() - begin
    monkeypatch.delattr(Pixels, "read_block")
    assert_same(fast, batches(data, renderer=renderer, **options))
    begin = time.process_time()
    batches(data, renderer=make_renderer("pillow"), num_workers=0, batch_size=256, total_steps=2)
    assert (time.process_time() - begin) * 2 > 4 * ours


class Pixels(Memory):
    """512 images of 32 px that can be had at once."""

    def __init__(self) -> None:
        self.block = np.random.default_rng(0).integers(0, 256, (512, 32, 32, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.block)

    def read(self, index: int) -> np.ndarray:
        return self.block[index]

    def read_block(self, indices: np.ndarray) -> np.ndarray:
        return self.block[indices]
