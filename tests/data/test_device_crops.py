"""Crops rendered on a device, here a CPU: against Pillow, and against themselves by other ways.

tests/data/test_renderers.py holds each operation against Pillow's.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dino_kd.data import device_crops
from dino_kd.data.crop_maker import CropMaker
from dino_kd.data.decoded import DecodedBatch, packed_pixels
from dino_kd.data.device_crops import DeviceRenderer, rendered, similar_images
from dino_kd.data.device_resize import filter_weights, resized_crops
from dino_kd.data.loader import CropBatch, crop_batches
from dino_kd.data.multicrop import CropPolicy, Crops, sample_batch
from dino_kd.data.renderers import make_renderer
from dino_kd.engine.compilation import compiler_works
from dino_kd.errors import ConfigError
from tests.data.test_renderers import PLAIN, agreement, natural
from tests.in_memory import Memory, assert_same

CPU = torch.device("cpu")
TINY = CropPolicy(global_size=(32, 32), local_size=(16, 16), num_local_crops=6)
LITTLE = CropPolicy(global_size=(12, 10), local_size=(6, 8), num_local_crops=3)
MIXED = [(33, 47), (64, 20), (9, 9), (40, 40), (21, 64), (50, 31), (12, 13), (1, 1)]


class Half(DeviceRenderer):
    """The products as a GPU makes them: numbers of 16 bits, sums of 32."""

    def crops_of(self, batch: DecodedBatch) -> Crops:
        return rendered(batch, self.device, dtype=torch.float16)


def decoded(sizes: list[tuple[int, int]], policy: CropPolicy, first: int = 0) -> DecodedBatch:
    """Images of these sizes; image i is the same whatever stands before it."""
    numbers = range(first, first + len(sizes))
    images = [natural(*size, number) for size, number in zip(sizes, numbers, strict=True)]
    params = sample_batch(policy, sizes, 0, 0, numbers)
    return DecodedBatch(packed_pixels(images), np.array(sizes), params)


def assert_equal(ours: Crops, theirs: Crops) -> None:
    assert torch.equal(ours.global_crops, theirs.global_crops)
    assert torch.equal(ours.local_crops, theirs.local_crops)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("policy", "sizes"),
    [
        (CropPolicy(), [(465, 400)] * 2),
        (TINY, [(32, 32)] * 60),
        (CropPolicy(num_local_crops=3), [(60, 50), (400, 465), (96, 224)]),
    ],
    ids=["photos", "32 px", "small beside large"],
)
def test_the_whole_recipe_is_pillows_up_to_rounding(
    policy: CropPolicy, sizes: list[tuple[int, int]], interpolation: str
) -> None:
    """64 dB in float32 and 56 in half precision when it was written."""
    policy = dataclasses.replace(policy, interpolation=interpolation, vertical_flip=0.3)
    images = [natural(*size, seed) for seed, size in enumerate(sizes)]
    params = sample_batch(policy, sizes, 0, 0, range(len(sizes)))
    assert agreement(make_renderer("device"), images, params) > 60
    assert agreement(Half(), images, params) > 53


def test_boxes_at_the_borders_of_the_image() -> None:
    """All corners, the whole image, and one row or column of it."""
    size = (40, 30)
    boxes = [(0, 0, 11, 13), (29, 0, 11, 13), (0, 17, 11, 13), (29, 17, 11, 13), (0, 0, 40, 30),
             (39, 0, 1, 30), (0, 29, 40, 1), (39, 29, 1, 1)]  # fmt: skip
    policy = dataclasses.replace(PLAIN, global_size=(16, 24), num_local_crops=0)
    for h_flip, v_flip in itertools.product((0.0, 1.0), repeat=2):
        flipping = dataclasses.replace(policy, horizontal_flip=h_flip, vertical_flip=v_flip)
        params = sample_batch(flipping, [size] * len(boxes), 0, 0, range(len(boxes)))
        params.boxes[:] = np.array(boxes)[:, None]
        images = [natural(*size, seed) for seed in range(len(boxes))]
        assert agreement(make_renderer("device"), images, params) > 60


@pytest.mark.parametrize(("name", "support"), [("bicubic", 2.0), ("bilinear", 1.0)])
@pytest.mark.parametrize(("begin", "length", "out"), [(3, 20, 7), (0, 5, 16), (9, 31, 31)])
def test_weights_are_pillows_filter_written_out(
    name: str, support: float, begin: int, length: int, out: int
) -> None:
    """Against a loop over pixels, in double precision."""

    def kernel(x: float) -> float:
        if name == "bilinear":
            return max(0.0, 1 - x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    expected = np.zeros((out, 40))
    scale = length / out
    wide = max(1.0, scale)
    for made in range(out):
        center = (made + 0.5) * scale
        for seen in range(length):
            if abs(seen + 0.5 - center) < support * wide:
                expected[made, begin + seen] = kernel(abs(seen + 0.5 - center) / wide)
    expected /= expected.sum(1, keepdims=True)
    place, extent = torch.tensor([begin]), torch.tensor([length])
    for flipped in (False, True):
        turned = torch.tensor([flipped])
        weights = filter_weights(place, extent, turned, out, 40, name)[0].numpy()
        np.testing.assert_allclose(weights[::-1] if flipped else weights, expected, atol=5e-5)


def test_a_batch_in_pieces_is_the_batch_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: neither padding nor neighbours matter."""
    whole = rendered(decoded(MIXED, LITTLE), CPU)
    for pieces in (2, 4, 8):
        size = len(MIXED) // pieces
        parts = [
            rendered(decoded(MIXED[i : i + size], LITTLE, first=i), CPU)
            for i in range(0, len(MIXED), size)
        ]
        for part, ours in zip(parts, whole.chunk(pieces), strict=True):
            assert_equal(part, ours)
    monkeypatch.setattr(device_crops, "_TOGETHER", 40_000)
    assert len(similar_images(np.array(MIXED), LITTLE)) > 3
    assert_equal(rendered(decoded(MIXED, LITTLE), CPU), whole)


def test_sums_are_exact_whatever_their_order() -> None:
    """To the last bit: products in float32 and in float64, weights anywhere in a line."""
    image = torch.from_numpy(natural(375, 500, 0)).permute(2, 0, 1)[None]
    boxes = torch.tensor([[[0, 0, 375, 500], [100, 7, 211, 307], [3, 2, 50, 40]]])
    flips = torch.tensor([[[False, False], [True, False], [False, True]]])
    for name in ("bicubic", "bilinear"):
        single, double = (
            resized_crops(image, boxes, flips, (96, 96), name, dtype)
            for dtype in (torch.float32, torch.float64)
        )
        assert torch.equal(single, double)
        lengths = torch.arange(1, 301)
        short, long = (
            filter_weights(torch.full_like(lengths, begin), lengths, lengths < 0, 31, size, name)
            for begin, size in ((0, 300), (137, 450))
        )
        assert torch.equal(short, long[..., 137:437])
        assert not long[..., :137].any()


def test_groups_hold_every_image_once_and_keep_large_ones_apart() -> None:
    sizes = np.array([(300, 400), (4000, 3000), (400, 300), (8000, 9000), (500, 500)])
    groups = similar_images(sizes, CropPolicy())
    assert sorted(row for rows in groups for row in rows.tolist()) == list(range(5))
    assert [rows.tolist() for rows in groups] == [[0, 2, 4], [1], [3]]


def test_mixed_precision_around_it_changes_nothing() -> None:
    batch = decoded(MIXED, LITTLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rendered(batch, CPU)
    assert_equal(inside, rendered(batch, CPU))


def test_nothing_waits_for_the_device() -> None:
    """No operation whose result the host must know, such as a number or how many are true."""
    seen: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Names():
        rendered(decoded(MIXED, LITTLE), CPU)
    assert "bmm" in seen
    assert not seen & {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"}


def test_without_local_crops() -> None:
    crops = rendered(decoded(MIXED, dataclasses.replace(LITTLE, num_local_crops=0)), CPU)
    assert crops.local_crops.shape == (0, len(MIXED), 3, 6, 8)
    assert torch.equal(crops.global_crops, rendered(decoded(MIXED, LITTLE), CPU).global_crops)


@pytest.mark.slow
def test_fused_changes_are_the_same_changes() -> None:
    if not compiler_works("cpu"):
        pytest.skip("no compiler here")
    policy = dataclasses.replace(TINY, jitter=1.0, solarize=(0.5, 0.5, 0.5))
    batch = decoded([(32, 32)] * 8, policy)
    assert_equal(rendered(batch, CPU, compiled=True), rendered(batch, CPU))


@pytest.mark.gpu
def test_a_gpu_renders_the_same_crops() -> None:
    batch = decoded([(100, 120), (64, 64), (200, 90)], CropPolicy(num_local_crops=4))
    ours, theirs = rendered(batch, torch.device("cuda")), rendered(batch, CPU)
    for a, b in zip(
        (ours.global_crops, ours.local_crops),
        (theirs.global_crops, theirs.local_crops),
        strict=True,
    ):
        error = (a.cpu().double() - b.double()).square().mean()
        assert 10 * torch.log10(255**2 / error) > 50


# --- in the loader


def batches(data: Memory, renderer: str = "device", **changes: object) -> list[CropBatch]:
    options = {
        "batch_size": 8, "seed": 7, "start_step": 0, "total_steps": 5, "num_workers": 0,
        "policy": LITTLE, **changes,
    }  # fmt: skip
    return list(crop_batches(data, renderer=make_renderer(renderer), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_the_bytes_of_the_main_thread(threads: int) -> None:
    data = Memory(23, broken=(4, 9))
    ours = batches(data, num_workers=threads)
    assert any(batch.broken for batch in ours)
    assert_same(ours, batches(data))


@pytest.mark.dist
def test_processes_give_the_bytes_of_the_main_thread() -> None:
    data = Memory(23, broken=(4, 9))
    assert_same(batches(data, num_workers=2, workers="processes"), batches(data))


def test_the_same_crops_as_any_other_renderers() -> None:
    """Images, replacements of broken ones, places and numbers; pixels up to rounding."""
    data = Memory(23, broken=(4, 9))
    for ours, theirs in zip(batches(data), batches(data, "pillow"), strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert [str(b) for b in ours.broken] == [str(b) for b in theirs.broken]
        error = (ours.crops.global_crops.double() - theirs.crops.global_crops).square().mean()
        assert 10 * torch.log10(255**2 / error) > 50


def test_steps_ranks_and_crop_sizes_that_change() -> None:
    data = Memory(23)

    def policy(step: int) -> CropPolicy:
        return dataclasses.replace(LITTLE, global_size=(8 + step, 9), num_local_crops=step % 2)

    whole = batches(data, policy=policy)
    assert [batch.crops.global_crops.shape[3] for batch in whole] == [8, 9, 10, 11, 12]
    assert_same(batches(data, policy=policy, start_step=2), whole[2:])
    parts = [batches(data, policy=policy, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for half, ours in zip(halves, batch.crops.chunk(2), strict=True):
            assert_equal(half.crops, ours)


def test_a_set_of_pixels_is_read_in_one_call() -> None:
    class Pixels(Memory):
        def read_block(self, indices: np.ndarray) -> np.ndarray:
            return np.stack([np.resize(self.images[index], (9, 9, 3)) for index in indices])

        def read(self, index: int) -> np.ndarray:
            raise AssertionError("read one by one")

    made = batches(Pixels(23), num_workers=2, workers="threads", total_steps=2)
    assert_same(made, batches(Pixels(23), total_steps=2))


def test_closing_ends_the_loader() -> None:
    running = crop_batches(
        Memory(23), LITTLE, batch_size=8, seed=0, start_step=0, total_steps=10**6, num_workers=2,
        renderer=make_renderer("device"),
    )  # fmt: skip
    next(running)
    running.close()
    with pytest.raises(StopIteration):
        next(running)


def test_images_that_are_read_only_or_turned_are_packed_as_they_are() -> None:
    picture = np.asarray(Image.fromarray(natural(12, 9, 0)))
    turned = natural(20, 14, 1)[::2, ::-1]
    pixels = packed_pixels([picture, turned]).numpy()
    np.testing.assert_array_equal(pixels[: 12 * 9].reshape(12, 9, 3), picture)
    np.testing.assert_array_equal(pixels[12 * 9 :].reshape(10, 14, 3), turned)


@pytest.mark.parametrize("workers", [0, 2])
def test_other_channel_counts_are_refused_in_a_sentence(workers: int) -> None:
    with pytest.raises(ConfigError, match=r"device renders RGB.*2 channels.*renderer=auto"):
        batches(Memory(23, channels=2), num_workers=workers)


def test_what_loader_processes_send_holds_images_not_crops() -> None:
    data = Memory(23)
    made = CropMaker(data, 7, make_renderer("device")).__getitems__((0, np.arange(4), LITTLE))
    assert isinstance(made, DecodedBatch)
    assert made.pixels.shape == (sum(i.shape[0] * i.shape[1] for i in data.images[:4]), 3)
