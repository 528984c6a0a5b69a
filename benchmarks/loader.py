"""From files to batches of crops on all cores: how fast, against a plain torch DataLoader?

The reference is the original recipe as its paper gives it: Pillow and torchvision transforms, one
float32 tensor per crop, two worker processes, default collate.

python benchmarks/loader.py [--data FOLDER_OF_PHOTOS] [--small FOLDER_OF_SMALL_IMAGES] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.folder import FolderImages
from dino_kd.data.loader import crop_batches
from dino_kd.data.multicrop import CropPolicy
from dino_kd.data.packed import packed
from dino_kd.data.renderers import make_renderer

WORKERS = 2
BATCH = 64
PHOTOS = CropPolicy()
SMALL = CropPolicy(global_size=(32, 32), local_size=(16, 16), num_local_crops=6)
Run = Callable[[], int]


class Reference(Dataset[list[torch.Tensor]]):
    """Crops of one image, float32 [3, h, w] each, by the original recipe."""

    def __init__(self, files: list[str], policy: CropPolicy) -> None:
        self.files, self.policy = files, policy
        colour = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(0.5),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                transforms.RandomGrayscale(0.2),
            ]
        )
        finish = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

        def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
            return transforms.Compose(
                [
                    transforms.RandomResizedCrop(
                        size, scale, interpolation=transforms.InterpolationMode.BICUBIC
                    ),
                    colour,
                    transforms.RandomApply([transforms.Lambda(_blur)], blur),
                    transforms.RandomApply([transforms.Lambda(ImageOps.solarize)], solarize),
                    finish,
                ]
            )

        large, little = policy.global_size[0], policy.local_size[0]
        self.crops = [
            crop(large, policy.global_scale, 1.0, 0.0),
            crop(large, policy.global_scale, 0.1, 0.2),
        ] + [crop(little, policy.local_scale, 0.5, 0.0)] * policy.num_local_crops

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with Path(self.files[index]).open("rb") as file:
            image = Image.open(file).convert("RGB")
        return [crop(image) for crop in self.crops]


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def reference(files: list[str], policy: CropPolicy, images: int) -> Run:
    """One pass of `images` images through the plain loader."""

    def run() -> int:
        many = [files[i % len(files)] for i in range(images)]
        loader = DataLoader(
            Reference(many, policy), BATCH, shuffle=True, num_workers=WORKERS, drop_last=True
        )
        return sum(len(batch[0]) for batch in loader)

    return run


def ours(
    dataset: ImageDataset,
    policy: CropPolicy,
    images: int,
    workers: str = "auto",
    renderer: str = "auto",
    batch: int = BATCH,
) -> Run:
    """About `images` images by this library's loader."""

    def run() -> int:
        batches = crop_batches(
            dataset, policy, batch_size=batch, seed=0, start_step=0, total_steps=images // batch,
            num_workers=WORKERS, workers=workers, renderer=make_renderer(renderer),
        )  # fmt: skip
        return sum(len(batch.indices) for batch in batches)

    return run


def compare(title: str, rivals: dict[str, Run], rounds: int) -> None:
    """Interleaved rounds; medians of images per second and of ratios to the first rival."""
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    processor: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, run in rivals.items():
            begin, used = time.perf_counter(), _processor_time()
            images = run()
            if number:  # the first round warms up
                wall[name].append((time.perf_counter() - begin) / images)
                processor[name].append((_processor_time() - used) / images)
    first = next(iter(rivals))
    print(f"{title}; {WORKERS} workers, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"  {'':<44}{'images/s':>10}{'wall':>9}{'processor time':>24}")
    for name in rivals:
        speed = 1 / statistics.median(wall[name])
        used = statistics.median(processor[name]) * 1e3
        print(
            f"  {name:<44}{speed:10,.0f}{_ratio(wall[first], wall[name]):>9}"
            f"{used:13.3f} ms{_ratio(processor[first], processor[name]):>8}"
        )


def _ratio(reference: list[float], other: list[float]) -> str:
    return f"x{statistics.median(a / b for a, b in zip(reference, other, strict=True)):.2f}"


def _processor_time() -> float:
    """Seconds of this process and of its ended children, user and system."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def generated(folder: Path, count: int, height: int, width: int) -> str:
    """`count` JPEGs with the detail of photographs."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 12, (height, width, 1))
        pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        path = folder / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return str(folder)


def rivals(
    folder: str, pack: Path, policy: CropPolicy, images: tuple[int, int], batch: int
) -> dict[str, Run]:
    """The ways to load the images of a folder; `images` per run of the reference, and of ours."""
    files = FolderImages(folder)
    pack_of_it = packed(files, str(pack), limit_gb=5, say=lambda _: None)
    plain, many = images
    return {
        "DataLoader, Pillow, float32 crops": reference(
            [files.path(index) for index in range(len(files))], policy, plain
        ),
        "ours, processes, Pillow": ours(files, policy, plain, "processes", "pillow"),
        "ours, processes": ours(files, policy, many, "processes", batch=batch),
        "ours, threads": ours(files, policy, many, "threads", batch=batch),
        "ours, threads, data.pack": ours(pack_of_it, policy, many, "threads", batch=batch),
    }


def main() -> None:
    """Photographs, then small images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a folder of photographs")
    parser.add_argument("--small", help="a folder of small images, such as CIFAR's as JPEGs")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos = options.data or generated(folder / "photos", 128, 401, 465)
        small = options.small or generated(folder / "small", 2048, 32, 32)
        compare(
            "photographs, 2 x 224 + 8 x 96",
            rivals(photos, folder / "pack", PHOTOS, (128, 768), BATCH),
            options.rounds,
        )
        compare(
            "small images, 2 x 32 + 6 x 16",
            rivals(small, folder / "pack", SMALL, (1024, 8192), 256),
            options.rounds,
        )


if __name__ == "__main__":
    main()
