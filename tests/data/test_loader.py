"""Batches against a brute-force reading of their definition; ranks, workers and resume agree."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from dino_kd.data import crop_maker
from dino_kd.data.loader import (
    CropBatch,
    EvalTransform,
    crop_batches,
    epoch_order,
    image_batches,
    steps_per_epoch,
)
from dino_kd.data.multicrop import (
    CropPolicy,
    Crops,
    crop_rng,
    render_crops,
    sample_crops,
    supervised_policy,
)
from dino_kd.data.pictures import save_crop_picture
from dino_kd.data.renderers import PillowRenderer, make_renderer
from dino_kd.errors import ConfigError, DataError
from tests.in_memory import Memory, assert_same

POLICY = CropPolicy(global_size=(8, 6), local_size=(4, 4), num_local_crops=3)
EDGE = CropPolicy(global_size=(8, 8), local_size=(4, 4), num_local_crops=0)


class Failing(Memory):
    def read(self, index: int) -> np.ndarray:
        raise DataError("the disk has gone")


class Killed(Memory):
    def read(self, index: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Signalled(Memory):
    """Every read sends this process what a cluster sends before it takes the machine back."""

    def read(self, index: int) -> np.ndarray:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), name)
        return super().read(index)


def batches(dataset: Memory, **changes: object) -> list[CropBatch]:
    """By processes where `num_workers` is given; tests/data/test_threads.py has the threads."""
    options = {
        "batch_size": 4, "seed": 7, "start_step": 0, "total_steps": 8, "workers": "processes",
        **changes,
    }  # fmt: skip
    return list(crop_batches(dataset, POLICY, **options))  # type: ignore[arg-type]


def test_batches_follow_their_definition() -> None:
    """Brute force: permutation per epoch, slices of it, each image rendered by itself."""
    data = Memory(11)
    made = batches(data, renderer=PillowRenderer())
    assert len(made) == 8
    for step, batch in enumerate(made):
        epoch, number = divmod(step, 2)  # 11 images hold two batches of 4
        expected = epoch_order(7, epoch, 11)[number * 4 : number * 4 + 4]
        assert batch.indices.tolist() == expected.tolist()
        assert batch.crops.global_crops.shape == (2, 4, 3, 8, 6)
        assert batch.crops.local_crops.shape == (3, 4, 3, 4, 4)
        for slot, index in enumerate(expected.tolist()):
            image = data.images[index]
            params = sample_crops(POLICY, *image.shape[:2], crop_rng(7, epoch, index))
            rendered = render_crops(image, params)
            np.testing.assert_array_equal(batch.crops.global_crops[:, slot], rendered[:2])
            np.testing.assert_array_equal(batch.crops.local_crops[:, slot], rendered[2:])


@pytest.mark.parametrize("name", ["auto", "torch", "pillow"])
def test_large_images_are_rendered_as_small_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many images share a call changes nothing."""
    options = {"batch_size": 8, "total_steps": 2, "renderer": make_renderer(name)}
    together = batches(Memory(11), **options)
    monkeypatch.setattr(crop_maker, "_GATHERED_BYTES", 1)
    assert_same(together, batches(Memory(11), **options))


def test_epochs_are_different_permutations() -> None:
    orders = [epoch_order(3, epoch, 100).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(4, 0, 100).tolist() != orders[0]
    assert steps_per_epoch(11, 4) == 2


def test_two_ranks_make_one_ranks_batch() -> None:
    data = Memory(11, broken=(2, 5))
    whole = batches(data)
    parts = [batches(data, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch.indices, torch.cat([first.indices, second.indices]))
        together = torch.cat([first.crops.global_crops, second.crops.global_crops], 1)
        assert torch.equal(batch.crops.global_crops, together)
        assert len(batch.broken) == len(first.broken) + len(second.broken)


@pytest.mark.parametrize("start", [1, 2, 5])
def test_starting_at_a_step_equals_skipping(start: int) -> None:
    data = Memory(11, broken=(4,))
    assert_same(batches(data, start_step=start), batches(data)[start:])


@pytest.mark.dist
def test_workers_give_identical_bytes() -> None:
    data = Memory(11, broken=(4,))
    assert_same(batches(data, num_workers=2), batches(data))


def test_loading_leaves_the_global_generators_alone() -> None:
    """Resumed runs make other numbers of loaders; the network's randomness must not notice."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batches(Memory(8))
    list(image_batches(Memory(4), range(4), EvalTransform((4, 4)), batch_size=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_broken_images_are_replaced_and_listed() -> None:
    data = Memory(8, broken=(3,))
    made = batches(data, total_steps=4, renderer=PillowRenderer())
    listed = [str(broken) for batch in made for broken in batch.broken]
    assert listed.count("memory[3]: cut") >= 2  # once in each of two epochs
    assert all(3 not in batch.indices.tolist() for batch in made)
    assert_same(made, batches(data, total_steps=4, renderer=PillowRenderer()))
    batch = next(b for b in made if b.broken)
    order = epoch_order(7, made.index(batch) // 2, 8)
    slot = order[(made.index(batch) % 2) * 4 :].tolist().index(3)
    image = data.images[int(batch.indices[slot])]
    params = sample_crops(POLICY, *image.shape[:2], crop_rng(7, made.index(batch) // 2, 3))
    np.testing.assert_array_equal(
        batch.crops.global_crops[:, slot], render_crops(image, params)[:2]
    )


def test_a_data_set_of_broken_images_stops_the_run() -> None:
    with pytest.raises(DataError, match=r"21 images in a row cannot be read.*memory\[\d\]: cut"):
        batches(Memory(4, broken=(0, 1, 2, 3)))


def test_mistakes_are_told_before_the_first_batch() -> None:
    """crop_batches itself raises, not the first next()."""
    options = {"seed": 0, "start_step": 0, "total_steps": 1}
    with pytest.raises(DataError, match=r"has 3 images, fewer than one batch of 4"):
        crop_batches(Memory(3), POLICY, batch_size=4, **options)
    with pytest.raises(ConfigError, match="4 images and 3 processes"):
        crop_batches(Memory(9), POLICY, batch_size=4, world_size=3, **options)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.dist)])
def test_user_errors_come_out_as_themselves(workers: int) -> None:
    with pytest.raises(DataError) as caught:
        batches(Failing(8), num_workers=workers)
    assert str(caught.value) == "the disk has gone"


@pytest.mark.dist
def test_a_killed_worker_is_told_in_plain_words() -> None:
    with pytest.raises(DataError, match=r"data-loading process died.*data\.num_workers"):
        batches(Killed(8), num_workers=1)


@pytest.mark.dist
def test_workers_ignore_the_signals_that_end_a_run() -> None:
    data = Signalled(8)
    assert_same(batches(data, num_workers=1, total_steps=2), batches(Memory(8), total_steps=2))


@pytest.mark.dist
def test_closing_ends_the_workers() -> None:
    """In the middle of a run, and quickly."""
    import multiprocessing

    before = set(multiprocessing.active_children())
    running = crop_batches(
        Memory(8), POLICY, batch_size=4, seed=0, start_step=0, total_steps=10**6, num_workers=2,
        workers="processes",
    )  # fmt: skip
    next(running)
    assert len(set(multiprocessing.active_children()) - before) == 2
    begin = time.perf_counter()
    running.close()
    assert set(multiprocessing.active_children()) <= before
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_and_no_local_crops(channels: int) -> None:
    made = next(
        crop_batches(
            Memory(4, channels=channels), EDGE, batch_size=4, seed=0, start_step=0, total_steps=1
        )
    )
    assert made.crops.global_crops.shape == (2, 4, channels, 8, 8)
    assert made.crops.local_crops.shape == (0, 4, channels, 4, 4)
    assert made.to("cpu").crops.batch_size == 4


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.dist)])
def test_image_batches_leave_out_broken_images(workers: int) -> None:
    data = Memory(7, broken=(1, 4, 5))
    told: list[str] = []
    made = list(
        image_batches(
            data, [6, 1, 0, 4, 5, 2], EvalTransform((4, 4)), batch_size=2, num_workers=workers,
            on_broken=lambda broken: told.append(broken.path),
        )
    )  # fmt: skip
    assert [indices.tolist() for _, indices in made] == [[6], [0], [2]]
    assert [images.shape for images, _ in made] == [(1, 3, 4, 4)] * 3
    assert told == ["memory[1]", "memory[4]", "memory[5]"]
    np.testing.assert_array_equal(made[1][0][0], EvalTransform((4, 4))(data.images[0]))


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (33, 33)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_eval_transform_equals_torchvision(size: tuple[int, int], mode: str) -> None:
    """Resize(32) and CenterCrop of torchvision on a PIL picture."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = F.resize(Image.fromarray(image), 32, F.InterpolationMode(mode))
    expected = np.asarray(F.center_crop(picture, [28, 24])).transpose(2, 0, 1)
    np.testing.assert_array_equal(EvalTransform((28, 24), 32, mode)(image), expected)


@pytest.mark.parametrize("resize", [None, 8])
def test_eval_transform_covers_its_size(resize: int | None) -> None:
    """Without resize, or with one too small: the smallest picture that covers 32 x 24, cut."""
    image = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(image).resize((80, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(picture.crop((28, 0, 52, 32))).transpose(2, 0, 1)
    np.testing.assert_array_equal(EvalTransform((32, 24), resize)(image), expected)


def test_eval_transform_passes_fitting_images_and_takes_each_band_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 5), dtype=np.uint8)
    np.testing.assert_array_equal(EvalTransform((8, 8))(image), image.transpose(2, 0, 1))
    small = EvalTransform((4, 4))(image)
    np.testing.assert_array_equal(small[3], EvalTransform((4, 4))(image[:, :, 3:4])[0])


@pytest.mark.parametrize(("channels", "locals_"), [(3, 4), (1, 0), (5, 2)])
def test_crop_picture_shows_every_crop_enlarged(
    tmp_path: Path, channels: int, locals_: int
) -> None:
    """Each crop has a colour of its own; the sheet must hold it in the right number of pixels."""
    globals_ = torch.zeros(2, 3, channels, 32, 32, dtype=torch.uint8)
    globals_ += (torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1, 1) + 60) * 2
    small = torch.full((locals_, 3, channels, 16, 16), 200, dtype=torch.uint8)
    save_crop_picture(Crops(globals_, small), tmp_path / "sub" / "crops.png", max_images=2)
    sheet = np.asarray(Image.open(tmp_path / "sub" / "crops.png"))
    for crop, image, shown in ((0, 0, True), (0, 1, True), (1, 1, True), (1, 2, False)):
        level = int(globals_[crop, image, 0, 0, 0])
        found = (sheet == level).all(axis=2).sum()
        assert (found >= 128 * 128) == shown
    assert ((sheet == 200).all(axis=2).sum() >= locals_ * 2 * 64 * 64) or locals_ == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_one_global_crop_is_a_batch_of_single_views(workers: int) -> None:
    policy = supervised_policy((8, 8))
    batches = list(
        crop_batches(
            Memory(10), policy, batch_size=4, seed=0, start_step=0, total_steps=4,
            num_workers=workers,
        )
    )  # fmt: skip
    assert [batch.crops.global_crops.shape for batch in batches] == [(1, 4, 3, 8, 8)] * 4
    assert batches[0].crops.local_crops.shape[0] == 0
