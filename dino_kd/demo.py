"""Pretrain on generated images and show what was learned: a table, crops, attention maps.

    dino-kd demo [run_dir=runs/demo]

The same story as `dino-kd pretrain pretrain/demo`, then the k-NN of raw pixels, of the untrained
and of the pretrained network on images it has never seen. No download; a few minutes on two cores.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino_kd.config import command_of, load_settings
from dino_kd.data.synthetic import SyntheticImages, make_synthetic
from dino_kd.errors import ConfigError
from dino_kd.features import FeatureBank, extract_features, pixel_features
from dino_kd.files import write_json
from dino_kd.knn import knn_accuracy
from dino_kd.models.backbone import Backbone
from dino_kd.pretrain import pretrain
from dino_kd.pretrained import load_backbone
from dino_kd.schema import PretrainConfig
from dino_kd.visualize import attention_iou, save_attention_picture

BANK, QUERIES = "textures:train:1000", "textures:test:1000"  # labelled; QUERIES are held out
NEIGHBOURS = 20
SHOWN = 8  # images in the attention picture
DEFAULT_RUN_DIR = "runs/demo"


def main(argv: list[str]) -> int:
    """`dino-kd demo [run_dir=...] [a.b=c ...]`; settings go to the pretraining."""
    given = any(word.startswith("run_dir=") for word in argv)
    words = ["pretrain/demo", *([] if given else [f"run_dir={DEFAULT_RUN_DIR}"]), *argv]
    demo(load_settings(PretrainConfig, words, command="demo"), start_over=not given)
    return 0


def demo(settings: PretrainConfig, *, start_over: bool = False) -> dict[str, float]:
    """Pretrain, score, draw, and print; returns the numbers written to ``eval/demo.json``.

    `start_over` deletes an earlier demo in run_dir first, finished or not.
    """
    started = time.monotonic()
    run_dir = Path(settings.run_dir)
    if start_over and (run_dir / "config.yaml").is_file():
        refuse_others(run_dir)
        shutil.rmtree(run_dir)
    if not settings.data.train.startswith("synthetic:textures"):
        raise ConfigError(
            f"data.train: the demo needs synthetic:textures, got {settings.data.train!r}; "
            "for other images use dino-kd pretrain"
        )
    print("Pretraining without labels ...")
    pretrain(settings)

    bank, queries = make_synthetic(BANK), make_synthetic(QUERIES)
    before = load_backbone(str(run_dir), branch="untrained")
    after = load_backbone(str(run_dir))
    size = after.img_size
    scores = {
        "raw pixels": knn(pixel_features(bank, size=size), pixel_features(queries, size=size)),
        "untrained network": knn_of(before, bank, queries),
        "pretrained network": knn_of(after, bank, queries),
    }
    images, masks = images_and_masks(queries, 500)
    overlap = {
        "untrained network": attention_iou(before, images, masks),
        "pretrained network": attention_iou(after, images, masks),
    }
    picture = run_dir / "attention.png"
    save_attention_picture(
        {"untrained": before, "pretrained": after}, images[:SHOWN], picture, masks=masks[:SHOWN]
    )
    numbers = {
        "chance_top1": 100 / len(bank.class_names or []),
        **{f"{name.replace(' ', '_')}_knn{NEIGHBOURS}_top1": v for name, v in scores.items()},
        **{
            f"{name.replace(' ', '_')}_attention_iou_{kind}": value
            for name, values in overlap.items()
            for kind, value in values.items()
        },
        "seconds": time.monotonic() - started,
    }
    write_json(run_dir / "eval" / "demo.json", numbers)
    print(table(scores, overlap, numbers))
    print(f"augmented crops: {run_dir}/crops.png\nattention maps:  {picture}")
    print(f"numbers:         {run_dir}/eval/demo.json\nbackbone:        {run_dir}/backbone")
    print("next, your own pictures:")
    print("  dino-kd pretrain pretrain/folder data.train=/path/to/pictures run_dir=runs/mine")
    return numbers


def refuse_others(run_dir: Path) -> None:
    """Raise ConfigError when `run_dir`, which would be deleted, holds a run that is no demo."""
    is_demo = command_of(run_dir) == "pretrain" and load_settings(
        PretrainConfig, [str(run_dir)], command="pretrain"
    ).data.train.startswith("synthetic:textures")
    if not is_demo:
        raise ConfigError(
            f"{run_dir} holds a run that is no demo, and a new demo would replace it; move it, or "
            "name another folder: dino-kd demo run_dir=FOLDER"
        )


def knn_of(backbone: Backbone, bank: SyntheticImages, queries: SyntheticImages) -> float:
    """Top-1 of a network's features, percent."""
    size = backbone.img_size
    return knn(
        extract_features(backbone, bank, size=size), extract_features(backbone, queries, size=size)
    )


def knn(bank: FeatureBank, queries: FeatureBank) -> float:
    """Top-1 of the weighted vote, percent."""
    assert bank.labels is not None
    assert queries.labels is not None
    result = knn_accuracy(
        queries.features, queries.labels, bank.features, bank.labels, ks=[NEIGHBOURS]
    )
    return result[NEIGHBOURS]["top1"]


def images_and_masks(dataset: SyntheticImages, count: int) -> tuple[Tensor, Tensor]:
    """The first images uint8 ``[N, 3, H, W]`` and their object masks bool ``[N, H, W]``."""
    images = np.stack([dataset.read(i) for i in range(count)]).transpose(0, 3, 1, 2)
    masks = np.stack([dataset.mask(i) for i in range(count)])
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(masks)


def table(
    scores: dict[str, float], overlap: dict[str, dict[str, float]], numbers: dict[str, float]
) -> str:
    """The result as text."""
    titles = ("held-out generated images", "k-NN top-1", "attention IoU", "best head")
    lines = ["", "{:<26}{:>12}{:>16}{:>12}".format(*titles)]
    lines.append(f"{'chance':<26}{numbers['chance_top1']:>10.1f} %")
    for name, top1 in scores.items():
        line = f"{name:<26}{top1:>10.1f} %"
        if name in overlap:
            line += f"{overlap[name]['mean']:>16.2f}{overlap[name]['best_head']:>12.2f}"
        lines.append(line)
    lines.append(f"in {numbers['seconds'] / 60:.1f} minutes\n")
    return "\n".join(lines)
