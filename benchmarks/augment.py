"""How many images does one core read, decode and augment in a second, against the usual way?

    python benchmarks/augment.py [--data FOLDER ...] [--images N] [--rounds N]

The usual way is a loader's worker as DINO-like recipes write it: Pillow decodes, torchvision's
transforms cut and colour one crop after the other, and each crop becomes a normalised float tensor.
Ours gives bytes, which the device normalises. Processor time of one thread, interleaved rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T

from dino_kd.data.images import decode_image
from dino_kd.data.multicrop import CropPolicy
from dino_kd.data.renderers import PillowRenderer, Renderer, make_renderer, sample_batch
from dino_kd.errors import ConfigError

BATCH = 64


@dataclass
class Task:
    """One kind of images and the crops that are made of them."""

    title: str
    files: list[Path]
    policy: CropPolicy


class Blurred:
    """Pillow's Gaussian with a random radius."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def usual_transforms(policy: CropPolicy) -> list[T.Compose]:
    """One chain for each crop of an image, as the paper gives the recipe."""

    def chain(size: tuple[int, int], scale: tuple[float, float], kind: int) -> T.Compose:
        jitter = T.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue)
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(policy.horizontal_flip),
                T.RandomApply([jitter], policy.jitter),
                T.RandomGrayscale(policy.grayscale),
                T.RandomApply([Blurred()], policy.blur[kind]),
                T.RandomApply([ImageOps.solarize], policy.solarize[kind]),
                T.ToTensor(),
                T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    return [
        chain(policy.global_size, policy.global_scale, 0),
        chain(policy.global_size, policy.global_scale, 1),
        *[chain(policy.local_size, policy.local_scale, 2)] * policy.num_local_crops,
    ]


def usual_way(task: Task) -> None:
    """All crops of all files, float32."""
    transforms = usual_transforms(task.policy)
    for file in task.files:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        for transform in transforms:
            transform(picture)


def buffers(policy: CropPolicy, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for the crops of a batch, used again and again."""
    return (
        np.empty((policy.num_global_crops, batch, 3, *policy.global_size), np.uint8),
        np.empty((policy.num_local_crops, batch, 3, *policy.local_size), np.uint8),
    )


def ours(task: Task, renderer: Renderer, arrays: list[np.ndarray] | None = None) -> None:
    """All crops of all files, uint8, in batches; of `arrays` instead of files when given."""
    made = buffers(task.policy, BATCH)
    for begin in range(0, len(task.files), BATCH):
        indices = range(begin, min(begin + BATCH, len(task.files)))
        if arrays is None:
            images = [decode_image(task.files[index], 3) for index in indices]
        else:
            images = [arrays[index] for index in indices]
        sizes = [image.shape[:2] for image in images]
        params = sample_batch(task.policy, sizes, 0, 0, indices)
        renderer.render(images, params, *made, range(len(images)))


def agreement(task: Task, renderer: Renderer) -> float:
    """PSNR in dB of the crops of the first images against the Pillow renderer's."""
    images = [decode_image(file, 3) for file in task.files[:BATCH]]
    params = sample_batch(task.policy, [i.shape[:2] for i in images], 0, 0, range(len(images)))
    crops = []
    for each in (renderer, PillowRenderer()):
        made = buffers(task.policy, len(images))
        each.render(images, params, *made, range(len(images)))
        crops.append(np.concatenate([group.ravel() for group in made]).astype(np.float64))
    error = np.square(crops[0] - crops[1]).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def measure(task: Task, rounds: int) -> None:
    """Print images per second of one core, the ratio to the usual way, and the agreement."""
    rivals: dict[str, Callable[[], None]] = {"torchvision on Pillow": lambda: usual_way(task)}
    quality: dict[str, str] = {}
    for name in ("pillow", "torch", "native"):
        try:
            renderer = make_renderer(name)
        except ConfigError as error:
            print(f"  {name}: {error}")
            continue
        rivals[f"renderer={name}"] = lambda r=renderer: ours(task, r)  # type: ignore[misc]
        quality[f"renderer={name}"] = f"{agreement(task, renderer):.1f} dB"
    if max(task.policy.global_size) <= 64 and "renderer=native" in rivals:
        arrays = [decode_image(file, 3) for file in task.files]
        rivals["renderer=native, images in memory"] = lambda: ours(task, renderer, arrays)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()  # warm-up
    for _ in range(rounds):
        for name, run in rivals.items():
            started = time.process_time()
            run()
            times[name].append(time.process_time() - started)
    first = times["torchvision on Pillow"]
    print(task.title)
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
        speed = len(task.files) / statistics.median(seconds)
        print(f"  {name:<36} {speed:9.0f} images/s   x{ratio:5.2f}   {quality.get(name, '')}")


def natural(height: int, width: int, seed: int) -> Image.Image:
    """A picture with the statistics of photographs: power falls with the square of frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    falloff = 1 / np.maximum(frequency, 1 / max(height, width))
    common = rng.normal(size=(height, width))
    bands = []
    for _ in range(3):
        mixed = np.fft.fft2(0.8 * common + 0.4 * rng.normal(size=(height, width)))
        band = np.fft.ifft2(mixed * falloff).real
        bands.append(110 + 60 * (band - band.mean()) / band.std())
    return Image.fromarray(np.clip(np.rint(np.stack(bands, 2)), 0, 255).astype(np.uint8))


def generated(folder: Path, number: int) -> list[Path]:
    """Three folders of JPEG files: photographs, thumbnails, tiny pictures."""
    folders = []
    for name, size, quality, count in (
        ("photos 465 x 400", (400, 465), 92, number),
        ("224 px", (224, 224), 75, number),
        ("32 px", (32, 32), 90, 20 * number),
    ):
        folders.append(folder / name)
        folders[-1].mkdir()
        for seed in range(count):
            natural(*size, seed).save(folders[-1] / f"{seed:05}.jpg", quality=quality)
    return folders


def task_of(folder: Path, number: int) -> Task:
    """The crops that suit the images of a folder: 2 x 32 + 6 x 16 up to 64 px."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    with Image.open(files[0]) as first:
        is_tiny = max(first.size) <= 64
    count = min(len(files), number * 20 if is_tiny else number)
    files = files[:: len(files) // count][:count]
    if is_tiny:
        policy = CropPolicy(global_size=(32, 32), local_size=(16, 16), num_local_crops=6)
    else:
        policy = CropPolicy()
    shape = f"2 x {policy.global_size[0]} + {policy.num_local_crops} x {policy.local_size[0]}"
    return Task(f"{folder.name}: {count} images, {shape}", files, policy)


def main() -> None:
    """Generated images, or the given folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", help="folders of images")
    parser.add_argument("--images", type=int, default=24, help="large ones; 20 x as many tiny ones")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for each in options.data or generated(Path(folder), options.images):
            measure(task_of(each, options.images), options.rounds)


if __name__ == "__main__":
    main()
