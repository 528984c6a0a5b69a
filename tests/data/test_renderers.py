"""Every back-end against the Pillow reference; the batch's draws against the single image's."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

from dino_kd.data import renderers
from dino_kd.data.compiler import CannotCompileError, compilers
from dino_kd.data.multicrop import (
    JITTER_ORDERS,
    BatchParams,
    CropPolicy,
    crop_rng,
    render_crops,
    sample_crops,
)
from dino_kd.data.renderers import PillowRenderer, Renderer, make_renderer, sample_batch
from dino_kd.errors import ConfigError

SMALL = CropPolicy(global_size=(12, 10), local_size=(6, 8), num_local_crops=3)
SIZES = [(40, 50), (33, 17), (1, 1), (4, 400), (64, 64)]
TINY = CropPolicy(global_size=(32, 32), local_size=(16, 16), num_local_crops=6)
PLAIN = CropPolicy(
    jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0), horizontal_flip=0.0
)
ALONE = {
    "bicubic": {},
    "bilinear": {"interpolation": "bilinear"},
    "mirrored": {"horizontal_flip": 1.0},
    "upside down": {"vertical_flip": 1.0},
    "turned around": {"horizontal_flip": 1.0, "vertical_flip": 1.0},
    "brightness": {"jitter": 1.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
    "contrast": {"jitter": 1.0, "brightness": 0.0, "saturation": 0.0, "hue": 0.0},
    "saturation": {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "hue": 0.0},
    "hue": {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0},
    "any hue": {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.5},
    "grey": {"grayscale": 1.0},
    "blur": {"blur": (1.0, 1.0, 1.0)},
    "wide blur": {"blur": (1.0, 1.0, 1.0), "blur_sigma": (2.0, 9.0)},
    "grey and blur": {"grayscale": 1.0, "blur": (1.0, 1.0, 1.0)},
    "solarize": {"solarize": (1.0, 1.0, 1.0), "solarize_threshold": 90},
    "blur and solarize": {"blur": (1.0, 1.0, 1.0), "solarize": (1.0, 1.0, 1.0)},
    "everything": {"jitter": 1.0, "grayscale": 0.2, "blur": (1.0, 0.5, 0.5),
                   "solarize": (0.2, 0.2, 0.2), "horizontal_flip": 0.5, "vertical_flip": 0.5},
}  # fmt: skip


def natural(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with the statistics of photographs: power falls with the square of frequency.

    The bands agree mostly, some regions are dark and some are cut off at white.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    falloff = 1 / np.maximum(frequency, 1 / max(height, width, 8))
    bands = []
    common = rng.normal(size=(height, width))
    for _ in range(3):
        spectrum = np.fft.fft2(0.8 * common + 0.4 * rng.normal(size=(height, width)))
        band = np.fft.ifft2(spectrum * falloff).real
        bands.append((band - band.mean()) / max(band.std(), 1e-9))
    levels = 110 + 60 * np.stack(bands, axis=2) + rng.uniform(-30, 30, 3)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def buffers(policy: CropPolicy, batch: int) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.zeros((policy.num_global_crops, batch, 3, *policy.global_size), np.uint8),
        np.zeros((policy.num_local_crops, batch, 3, *policy.local_size), np.uint8),
    )


def rendered(renderer: Renderer, images: list[np.ndarray], params: BatchParams) -> list[np.ndarray]:
    made = buffers(params.policy, len(images))
    renderer.render(images, params, *made, range(len(images)))
    return list(made)


def agreement(renderer: Renderer, images: list[np.ndarray], params: BatchParams) -> float:
    """PSNR in dB of all crops together against Pillow's."""
    errors = [
        np.square(ours.astype(np.float64) - theirs).ravel()
        for ours, theirs in zip(
            rendered(renderer, images, params),
            rendered(PillowRenderer(), images, params),
            strict=True,
        )
    ]
    mean = np.concatenate(errors).mean()
    return float(10 * np.log10(255**2 / mean)) if mean else np.inf


@pytest.fixture(scope="module", params=["native", "torch", "device"])
def fast(request: pytest.FixtureRequest) -> Renderer:
    if request.param == "native":
        try:
            compilers()
        except CannotCompileError as error:
            pytest.skip(str(error))
    return make_renderer(request.param)


@pytest.mark.parametrize("policy", [CropPolicy(), SMALL, CropPolicy(num_global_crops=1)])
def test_a_batch_draws_what_each_image_draws_alone(policy: CropPolicy) -> None:
    """Equal to the last bit, whichever images share the batch."""
    sizes = SIZES * 20
    indices = [7 * i for i in range(len(sizes))]
    params = sample_batch(policy, sizes, 5, 3, indices)
    assert len(params) == len(sizes)
    for row, (size, index) in enumerate(zip(sizes, indices, strict=True)):
        assert params.crops_of(row) == sample_crops(policy, *size, crop_rng(5, 3, index))


@pytest.mark.parametrize("name", ["native", "torch", "device", "pillow"])
def test_crops_land_in_the_slots_that_are_told(name: str) -> None:
    if name == "native" and not shutil.which("g++"):
        pytest.skip("no compiler")
    images = [natural(*size, seed) for seed, size in enumerate(SIZES)]
    params = sample_batch(SMALL, SIZES, 1, 0, range(5))
    large, little = buffers(SMALL, 6)
    slots = [3, 0, 5, 1, 4]
    make_renderer(name).render(images, params, large, little, slots)
    for row, slot in enumerate(slots):
        crops = render_crops(images[row], params.crops_of(row))
        for ours, theirs in zip([*large[:, slot], *little[:, slot]], crops, strict=True):
            assert np.abs(ours.astype(int) - theirs).max() <= (0 if name == "pillow" else 8)
    assert not large[:, 2].any()
    assert not little[:, 2].any()


@pytest.mark.parametrize(
    ("policy", "size"), [(CropPolicy(), (300, 400)), (TINY, (32, 32))], ids=["photo", "32 px"]
)
def test_the_whole_recipe_is_the_references_up_to_rounding(
    fast: Renderer, policy: CropPolicy, size: tuple[int, int]
) -> None:
    images = [natural(*size, seed) for seed in range(4 if size[0] > 100 else 60)]
    params = sample_batch(policy, [size] * len(images), 0, 0, range(len(images)))
    assert agreement(fast, images, params) > (50 if fast.name == "torch" else 52)


@pytest.mark.parametrize("operation", ALONE)
@pytest.mark.parametrize("box", [(40, 50), (120, 90), (7, 33)], ids=["same", "down", "up"])
def test_each_operation_is_the_references(
    fast: Renderer, operation: str, box: tuple[int, int]
) -> None:
    """Odd sizes, more and fewer pixels than the box has; sizes that are no multiple of 16."""
    policy = dataclasses.replace(
        PLAIN, global_size=(40, 50), local_size=(19, 13), num_local_crops=3, **ALONE[operation]
    )
    images = [natural(121, 91, seed) for seed in range(3)]
    params = sample_batch(policy, [(121, 91)] * 3, 2, 0, range(3))
    params.boxes[...] = [1, 1, *box]
    assert agreement(fast, images, params) > 50


def test_all_24_orders_of_the_colour_changes_are_kept(fast: Renderer) -> None:
    policy = dataclasses.replace(PLAIN, jitter=1.0, global_size=(16, 16), num_local_crops=0)
    images = [natural(20, 20, 1)] * 24
    params = sample_batch(policy, [(20, 20)] * 24, 0, 0, [0] * 24)
    params.jitter_order[:] = np.arange(len(JITTER_ORDERS))[:, None]
    assert agreement(fast, images, params) > 50


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (3, 500)])
@pytest.mark.parametrize("out", [(1, 1), (5, 3), (33, 47)])
def test_the_smallest_pictures_and_crops(
    fast: Renderer, size: tuple[int, int], out: tuple[int, int]
) -> None:
    """Boxes of one pixel, crops of one pixel: nothing is read or written outside."""
    policy = CropPolicy(global_size=out, local_size=out, num_local_crops=2, blur=(1.0, 1.0, 1.0))
    images = [natural(*size, 3)] * 8
    params = sample_batch(policy, [size] * 8, 0, 0, range(8))
    assert agreement(fast, images, params) > 46


@pytest.mark.parametrize("fast", ["native", "torch"], indirect=True)
def test_other_channel_counts_are_left_to_pillow(fast: Renderer) -> None:
    image = natural(30, 30, 0)[:, :, :2].copy()
    params = sample_batch(SMALL, [(30, 30)], 0, 0, [0])
    large, little = np.zeros((2, 1, 2, 12, 10), np.uint8), np.zeros((3, 1, 2, 6, 8), np.uint8)
    fast.render([image], params, large, little, [0])
    crops = render_crops(image, params.crops_of(0))
    np.testing.assert_array_equal(large[:, 0], crops[:2])
    np.testing.assert_array_equal(little[:, 0], crops[2:])


def test_views_of_arrays_are_read_as_they_are(fast: Renderer) -> None:
    """Strided, turned and read-only images."""
    image = natural(60, 50, 0)[::2, ::-1]
    image.flags.writeable = False
    params = sample_batch(TINY, [image.shape[:2]], 0, 0, [0])
    assert agreement(fast, [image], params) > 48


def test_threads_do_not_disturb_each_other(fast: Renderer) -> None:
    images = [natural(50 + seed, 64, seed) for seed in range(6)]
    params = [sample_batch(TINY, [i.shape[:2]] * 20, 0, 0, range(20)) for i in images]
    alone = [rendered(fast, [i] * 20, p) for i, p in zip(images, params, strict=True)]
    together: dict[int, list[np.ndarray]] = {}

    def work(number: int) -> None:
        together[number] = rendered(fast, [images[number]] * 20, params[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, crops in enumerate(alone):
        for ours, theirs in zip(together[number], crops, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_kernel_refuses_what_lies_outside() -> None:
    if not shutil.which("g++"):
        pytest.skip("no compiler")
    native = make_renderer("native")
    image, made = natural(20, 20, 0), buffers(SMALL, 2)
    params = sample_batch(SMALL, [(20, 20)], 0, 0, [0])
    for slot in (-1, 2):
        with pytest.raises(ValueError, match="outside"):
            native.render([image], params, *made, [slot])
    for box in ([0, 0, 21, 20], [-1, 0, 5, 5], [0, 0, 0, 5], [15, 0, 6, 5], [0, 2**31, 1, 1]):
        params.boxes[0, 0] = box
        with pytest.raises(ValueError, match="outside"):
            native.render([image], params, *made, [0])
    with pytest.raises(ValueError, match="contiguous uint8"):
        native.render([image], params, made[0][:, :, :, ::2], made[1], [0])


@pytest.mark.parametrize("fast", ["native", "torch"], indirect=True)
def test_buffers_that_are_not_contiguous_are_refused(fast: Renderer) -> None:
    params = sample_batch(SMALL, [(20, 20)], 0, 0, [0])
    large, little = buffers(SMALL, 2)
    with pytest.raises(ValueError, match="contiguous"):
        fast.render([natural(20, 20, 0)], params, large[:, ::2], little[:, ::2], [0])


def test_renderers_travel_to_worker_processes(fast: Renderer) -> None:
    images = [natural(30, 30, 0)]
    params = sample_batch(TINY, [(30, 30)], 0, 0, [0])
    copy = pickle.loads(pickle.dumps(fast))
    assert (copy.name, copy.releases_gil) == (fast.name, fast.releases_gil)
    for ours, theirs in zip(
        rendered(copy, images, params), rendered(fast, images, params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_the_kernel_is_faster_than_pillow() -> None:
    """Eight to twenty times as fast on an idle machine; a third of that is asked for."""
    if not shutil.which("g++"):
        pytest.skip("no compiler")
    native, images = make_renderer("native"), [natural(40, 40, seed) for seed in range(30)]
    params = sample_batch(TINY, [(40, 40)] * 30, 0, 0, range(30))

    def seconds(renderer: Renderer) -> float:
        started = time.process_time()
        rendered(renderer, images, params)
        return time.process_time() - started

    assert min(seconds(PillowRenderer()) for _ in range(3)) > 3 * min(
        seconds(native) for _ in range(3)
    )


def test_names() -> None:
    assert make_renderer("pillow").name == "pillow"
    assert make_renderer("torch").name == "torch"
    with pytest.raises(ConfigError, match=r"unknown renderer 'nativ'; did you mean 'native'"):
        make_renderer("nativ")


def test_without_a_compiler_auto_says_so_and_native_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise CannotCompileError("no C++ compiler is installed (looked for g++)")

    monkeypatch.setattr(renderers, "NativeRenderer", fail)
    notes: list[str] = []
    assert make_renderer("auto", notes.append).name == "torch"
    assert make_renderer("auto").name == "torch"
    assert len(notes) == 1
    assert "no C++ compiler is installed" in notes[0]
    with pytest.raises(ConfigError, match=r"data.renderer=native.*Install g\+\+.*renderer=auto"):
        make_renderer("native")


def test_a_picture_from_disk(fast: Renderer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """What decoding gives (read-only memory of Pillow's) can be rendered."""
    Image.fromarray(natural(48, 64, 5)).save(tmp_path / "a.png")
    image = np.asarray(Image.open(tmp_path / "a.png"))
    params = sample_batch(TINY, [(48, 64)], 0, 0, [0])
    assert agreement(fast, [image], params) > 48
