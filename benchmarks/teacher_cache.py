"""What does the cache of teachers' answers save, and does it change the training?

python benchmarks/teacher_cache.py                                  generated images, a minute
python benchmarks/teacher_cache.py --data PHOTOS --teacher runs/x   own images, own teacher

Three runs of `dino-kd distill` from the same seed, over two rounds: with the live teacher, filling
the cache, reading it. Printed are the median processor time of a step, its ratio to the live
teacher's, and how far the losses are from those of the run that filled the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_kd.config import load_settings
from dino_kd.distill import story
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import save_backbone
from dino_kd.runlog import RunLog
from dino_kd.schema import DistillConfig

_WORDS = [
    "data.num_workers=0", "student.backbone=mobilenetv3_small_100", "recalibrate=0",
    "optim.precision=fp32", "log.tensorboard=false", "log.log_every=1", "terms.preset=none",
    "terms.cosine_kd.weight=2", "terms.feature_kd.weight=1", "terms.relation_kd.weight=0.5",
]  # fmt: skip


def write_photos(folder: Path, count: int, side: int) -> Path:
    """JPEGs of smooth noise: they decode and compress like photographs, and mean nothing."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg")
    return folder


def write_teacher(folder: Path, size: int) -> Path:
    """A ViT-S/16 of random weights: its cost counts here, not its knowledge."""
    torch.manual_seed(0)
    save_backbone(create_backbone("vit_small_patch16_224", img_size=size), folder)
    return folder


class StepTimes:
    """Processor seconds between the ends of steps, read where the log gets its rows."""

    def __init__(self) -> None:
        self.ends = [time.process_time()]
        self.losses: list[float] = []

    def row(self, numbers: Mapping[str, float]) -> None:
        """Note one step."""
        self.ends.append(time.process_time())
        self.losses.append(numbers["loss"])

    @property
    def step(self) -> float:
        """Median seconds of a step, the first two left out."""
        costs = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(costs[2:])


def run(words: list[str], run_dir: Path, cache: str) -> StepTimes:
    """One distillation; what its log was told of every step."""
    times, told = StepTimes(), RunLog.numbers

    def numbers(self: RunLog, step: int, row: Mapping[str, float]) -> None:
        times.row(row)
        told(self, step, row)

    RunLog.numbers = numbers  # type: ignore[assignment, method-assign]
    try:
        given = [*words, f"run_dir={run_dir}", f"cache={cache}"]
        with contextlib.redirect_stdout(io.StringIO()):  # the table is what is to be read
            story.distill(load_settings(DistillConfig, given, command="distill"))
    finally:
        RunLog.numbers = told  # type: ignore[method-assign]
    return times


def rounds(words: list[str], root: Path, count: int) -> Iterator[dict[str, StepTimes]]:
    """Live, filling, reading, in turn; every round fills a cache of its own."""
    for number in range(count):
        cache = str(root / f"cache{number}")
        yield {
            name: run(words, root / f"{number}-{name}", "off" if name == "live" else cache)
            for name in ("live", "fill", "read")
        }


def main() -> None:
    """Run, compare, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="images; default: 64 generated ones")
    parser.add_argument("--teacher", help="what teacher.backbone takes; default: ViT-S/16, random")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = asked.data or write_photos(root / "photos", 64, asked.size)
        teacher = asked.teacher or write_teacher(root / "teacher", asked.size)
        words = [
            *_WORDS, f"data.train={data}", f"teacher.backbone={teacher}", "data.labels=0",
            f"student.image_size={asked.size}", f"optim.batch_size={asked.batch}",
            f"optim.length={asked.steps}",
        ]  # fmt: skip
        made = list(rounds(words, root, asked.rounds))
    print(f"a step of {asked.batch} images of {asked.size} px, processor time, one thread")
    filled = np.array(made[0]["fill"].losses)
    for name in ("live", "fill", "read"):
        step = statistics.median(one[name].step for one in made)
        ratio = statistics.median(one["live"].step / one[name].step for one in made)
        away = max(float(np.abs(np.array(one[name].losses) / filled - 1).max()) for one in made)
        print(f"  {name:<6}{step * 1e3:9.1f} ms   x{ratio:.2f}   losses differ by {away:.1e}")


if __name__ == "__main__":
    main()
