"""Write the features of images to a file, for other programs and for `dino-kd search`.

    dino-kd embed backbone=runs/x data=/images output=features.safetensors
    python -m eval.embed backbone=runs/x data=/images output=patches.safetensors parts=[cls,patches]
    torchrun --nproc_per_node=4 -m eval.embed backbone=runs/x data=/images output=features.parquet

docs/embed.md lists the formats and what lies in the files.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dino_kd.config import load_settings
from dino_kd.data.dataset import ImageDataset, subset
from dino_kd.data.images import BrokenImage
from dino_kd.distributed import is_main_process, on_main, process_group
from dino_kd.errors import ConfigError, DataError, UserError, unknown_name
from dino_kd.features import OUTPUT, FeatureBank, NothingReadable
from dino_kd.schema import EmbedConfig

from .embeddings import (
    CLS,
    FORMATS,
    INDEX,
    Embeddings,
    check_parquet,
    write_embeddings,
    write_index,
)
from .results import Stopwatch, title, versions
from .subject import Subject, open_images, open_subject

_SHARD_BYTES = 10**9  # of single precision, which is what lies in memory
_BYTES = {"fp32": 4, "fp16": 2}


def main(argv: list[str]) -> int:
    """`dino-kd embed a.b=c ...`; returns the exit code."""
    settings = load_settings(EmbedConfig, argv, command="embed")
    with process_group(settings.device) as device:
        embed(settings, device)
    return 0


def embed(settings: EmbedConfig, device: torch.device) -> dict[str, Any]:
    """Write the file or files; every process of a torchrun job calls this, the main one writes.

    Returns what was written: ``files``, ``images``, ``about``.

    Raises:
        UserError: no such backbone, part or format; no readable image; no room on the disk.
    """
    watch = Stopwatch()
    output = check_output(settings)
    subject = open_subject(settings, device)
    if subject.backbone is None and settings.parts != [CLS]:
        raise ConfigError(f"parts: pixels have cls only, got {', '.join(settings.parts)}")
    images = open_images(settings, "data", subject.channels)
    plan = make_plan(settings, subject, images, output)
    if is_main_process():
        print(title("features", settings, subject.description))
        print(plan.describe(), flush=True)
    on_main(lambda: check_room(plan, output))
    about = describe(settings, subject, images)
    files, broken, count = [], [], 0
    for name, bank in banks(plan, subject, images):
        broken += bank.broken
        if len(bank.indices):
            values = to_embeddings(bank, images, settings, about | {"broken": len(bank.broken)})
            on_main(functools.partial(write_embeddings, output.with_name(name), values))
            files.append({"file": name, "images": len(bank.indices)})
            count += len(bank.indices)
    if not files:
        raise DataError(f"data: {images.spec}: none of its {len(images)} images could be read")
    if len(plan.files) > 1:
        index = output.with_name(output.stem + INDEX)
        on_main(lambda: write_index(index, files, about | {"broken": len(broken)}))
    watch.lap("features")
    if is_main_process():
        print(report(output, files, count, broken, watch))
    return {"files": files, "images": count, "about": about}


@dataclass(frozen=True)
class EmbedPlan:
    """Which images go into which file, and how large it all is.

    Attributes:
        parts: the names in the file and the shape of each for one image.
        files: name, first image and the one after the last.
        total_bytes: of all files, without paths.
        dtype: as in the settings.
    """

    parts: dict[str, tuple[int, ...]]
    files: list[tuple[str, int, int]]
    total_bytes: int
    dtype: str

    def describe(self) -> str:
        """Such as "2,000 images x cls 384 + patches 196 x 384 in fp16: about 302 MB in 1 file"."""
        shapes = " + ".join(
            f"{name} {' x '.join(map(str, shape))}" for name, shape in self.parts.items()
        )
        count = len(self.files)
        return (
            f"{self.files[-1][2]:,} images x {shapes} in {self.dtype}: about "
            f"{size_in_words(self.total_bytes)} in {count} file{'s' if count > 1 else ''}"
        )


def check_output(settings: EmbedConfig) -> Path:
    """The path of the output. Raises ConfigError before anything expensive starts."""
    output = Path(settings.output).expanduser()
    if output.is_dir():
        raise ConfigError(f"output: {output} is a folder; give the name of a file in it")
    if output.suffix not in FORMATS:
        raise ConfigError(
            f"output: unknown format {output.suffix or output.name!r}; accepted are names that end "
            f"in {', '.join(FORMATS)}"
        )
    for name in settings.parts:
        if name not in (CLS, "mean", "patches") and not re.fullmatch(r"block-[1-9]\d*", name):
            choices = [CLS, "mean", "patches", *(f"block-{k}" for k in range(1, 5))]
            raise unknown_name("part", name, choices, where="parts")
    if len(set(settings.parts)) < len(settings.parts):
        raise ConfigError(f"parts: named twice: {', '.join(settings.parts)}")
    if output.suffix == ".npy" and len(settings.parts) > 1:
        raise ConfigError(
            f"output: an .npy file holds one part, got {', '.join(settings.parts)}; use "
            ".safetensors or .parquet, or one command for each part"
        )
    if output.suffix == ".parquet":
        check_parquet()
    return output


def make_plan(
    settings: EmbedConfig, subject: Subject, images: ImageDataset, output: Path
) -> EmbedPlan:
    """How the images are spread over files. Runs the network on one black image."""
    parts = part_shapes(subject, settings.parts)
    numbers = sum(math.prod(shape) for shape in parts.values())
    total = len(images)
    wanted = settings.shard_images
    size = max(1, _SHARD_BYTES // (4 * numbers)) if wanted == "auto" else wanted
    starts = range(0, total, min(size, total))
    names = [output.name]
    if len(starts) > 1:
        last = len(starts)
        names = [f"{output.stem}-{i:05d}-of-{last:05d}{output.suffix}" for i in range(last)]
    files = [
        (name, start, min(start + starts.step, total))
        for name, start in zip(names, starts, strict=True)
    ]
    return EmbedPlan(parts, files, total * numbers * _BYTES[settings.dtype], settings.dtype)


@torch.no_grad()
def part_shapes(subject: Subject, parts: list[str]) -> dict[str, tuple[int, ...]]:
    """What each part of one image looks like, without the batch."""
    if subject.backbone is None:
        return {CLS: (subject.channels * subject.size[0] * subject.size[1],)}
    black = torch.zeros(1, subject.channels, *subject.size, dtype=torch.uint8)
    backbone = subject.backbone  # in eval mode, as it was loaded
    made = backbone.parts(backbone.preprocess(black.to(subject.device)), library_names(parts))
    return {name: tuple(made[OUTPUT if name == CLS else name].shape[1:]) for name in parts}


def library_names(parts: list[str]) -> list[str]:
    """The names of `Backbone.parts` for those of the setting."""
    return [OUTPUT if name == CLS else name for name in parts]


def check_room(plan: EmbedPlan, output: Path) -> None:
    """Raise UserError when the disk has no room for the files."""
    folder = output.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < plan.total_bytes:
        raise UserError(
            f"output: {plan.describe()}, but {folder} has {size_in_words(free)} free; use "
            "dtype=fp16, fewer parts, or another disk"
        )


def banks(
    plan: EmbedPlan, subject: Subject, images: ImageDataset
) -> Iterator[tuple[str, FeatureBank]]:
    """The features for one file after the other; only one of them is in memory.

    Pooled features for a single file come from and go to the cache; others are too large for it.
    """
    parts = [name for name in library_names(list(plan.parts)) if name != OUTPUT]
    if len(plan.files) == 1 and "patches" not in parts:
        yield plan.files[0][0], subject.features(images, "data", parts)
        return
    uncached = replace(subject, cache=None)
    for number, (name, start, end) in enumerate(plan.files):
        shown = "data" if len(plan.files) == 1 else f"file {number + 1}/{len(plan.files)}"
        try:
            bank = uncached.features(subset(images, np.arange(start, end)), shown, parts)
        except NothingReadable as error:  # the other files may hold some
            nothing = torch.zeros(0, dtype=torch.int64)
            yield name, FeatureBank(torch.zeros(0, 1), None, nothing, error.broken)
            continue
        bank.indices = bank.indices + start
        yield name, bank


def to_embeddings(
    bank: FeatureBank, images: ImageDataset, settings: EmbedConfig, about: dict[str, Any]
) -> Embeddings:
    """The rows of one file. Raises ConfigError when fp16 cannot hold a value."""
    parts = {
        name: convert(bank.part(OUTPUT if name == CLS else name), settings)
        for name in settings.parts
    }
    labels = None
    if images.labels is not None:
        labels = torch.as_tensor(images.labels)[bank.indices]
    paths = [images.path(index) for index in bank.indices.tolist()]
    return Embeddings(parts, bank.indices, paths, labels, about)


def convert(values: Tensor, settings: EmbedConfig) -> Tensor:
    """Normalised and in the wanted precision, as the settings say."""
    if settings.normalize:
        values = F.normalize(values, dim=-1)
    if settings.dtype == "fp32":
        return values
    half = values.half()
    if not torch.isfinite(half).all():
        raise ConfigError(
            f"dtype: features reach {values.abs().max():.3g}, and fp16 ends at 65,504; use "
            "dtype=fp32 or normalize=true"
        )
    return half


def describe(settings: EmbedConfig, subject: Subject, images: ImageDataset) -> dict[str, Any]:
    """Where the features come from: what lies in every file as JSON."""
    return {
        "parts": settings.parts,
        "dtype": settings.dtype,
        "normalized": settings.normalize,
        "backbone": subject.description,
        "protocol": subject.protocol,
        "data": images.spec,
        "images_in_data": len(images),
        "class_names": images.class_names,
        "versions": versions(),
    }


def report(
    output: Path,
    files: list[dict[str, Any]],
    count: int,
    broken: list[BrokenImage],
    watch: Stopwatch,
) -> str:
    """What was written, for the console."""
    lines = [f"{count:,} images in {watch.seconds['features']:.1f} s"]
    if broken:
        lines.append(f"{len(broken)} broken images left out, such as {broken[0]}")
    if len(files) == 1 and files[0]["file"] == output.name:
        lines.append(f"written to {output}")
    else:
        lines.append(
            f"written to {output.with_name(files[0]['file'])} and so on, {len(files)} files; "
            f"{output.with_name(output.stem + INDEX)} lists them"
        )
    return "\n".join(lines)


def size_in_words(count: int) -> str:
    """Bytes as "1.2 GB", "15 MB" or "3 kB"."""
    if count >= 10**9:
        return f"{count / 10**9:.1f} GB"
    return f"{count / 10**6:.0f} MB" if count >= 10**6 else f"{count / 1000:.0f} kB"


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
