"""The smallest run that is still a real one: settings shared by the tests of the stories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

TINY = [
    "device=cpu", "data.num_workers=0", "crops.preset=small", "crops.num_local_crops=2",
    "model.backbone=vit_tiny_patch16_224", "model.patch_size=8",
    "model.args={depth: 1, embed_dim: 32, num_heads: 2}",
    "head.num_prototypes=64", "head.hidden_dim=32", "head.bottleneck_dim=16", "head.num_layers=2",
    "optim.batch_size=16", "optim.length=8", "optim.base_lr=0.01", "optim.precision=fp32",
    "log.log_every=1", "log.save_every=3", "log.tensorboard=false",
]  # fmt: skip


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers that follow from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TensorSizes(TorchDispatchMode):
    """A block whose every new tensor is noted: ``with TensorSizes() as seen`` its elements."""

    def __enter__(self) -> list[int]:
        super().__enter__()
        self.seen: list[int] = []
        return self.seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.append(out.numel())
        return out


def write_images(folder: Path, count: int = 40, classes: int = 2, side: int = 40) -> Path:
    """JPEGs of noise whose brightness tells the class: folder/class_0/000.jpg ..."""
    rng = np.random.default_rng(0)
    for index in range(count):
        label = index % classes
        pixels = rng.integers(0, 120, (side, side, 3)) + 120 * label // max(classes - 1, 1)
        path = folder / f"class_{label}" / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def read_metrics(run_dir: Path) -> list[dict]:
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    """Rows less what the clock decides."""
    clock = ("images_per_s", "data_wait")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]
