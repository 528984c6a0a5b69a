"""Small folders of structured images, and a tiny network, for the tests of several evaluators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import save_backbone

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
QUIET = ["device=cpu", "num_workers=0", "cache=off"]


def picture(seed: int, side: int = 48) -> Image.Image:
    """Soft random shapes: like a photo in that neighbouring pixels agree."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def write_set(root: Path, count: int, seed: int = 0, classes: tuple[str, ...] = ()) -> Path:
    """`count` PNGs, in `classes` by turns, or flat."""
    for i in range(count):
        folder = root / classes[i % len(classes)] if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        picture(1000 * seed + i).save(folder / f"{i:03d}.png")
    return root


def write_backbone(folder: Path, seed: int = 0) -> Path:
    """A ViT for 16 px with random weights."""
    torch.manual_seed(seed)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=TINY)
    save_backbone(backbone, folder)
    return folder
