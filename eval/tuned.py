"""What a fine-tuning is made of, how its network is scored, and what it says and writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_kd.data.dataset import ImageDataset
from dino_kd.distributed import processes_here, world_size
from dino_kd.errors import CheckpointError
from dino_kd.features import FeatureBank, default_resize, extract_features
from dino_kd.models.classifier_file import CLASSIFIER_FILE, write_classifier
from dino_kd.presets import Span, loader_processes
from dino_kd.pretrained import backbone_hash, save_backbone
from dino_kd.runlog import RunLog
from dino_kd.schema import FinetuneConfig
from dino_kd.tasks.classify import ClassifyTask, class_places

from .labelled import LabelledSets
from .results import describe_images, make_result


@dataclass
class Run:
    """One fine-tuning: what it is made of, and where it writes.

    `origin` describes the backbone it started from; `notes` are sentences for the result.
    """

    settings: FinetuneConfig
    device: torch.device
    origin: dict[str, Any]
    sets: LabelledSets
    span: Span
    task: ClassifyTask
    optimizer: torch.optim.Optimizer
    log: RunLog
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.settings.run_dir)


def save_networks(run: Run) -> None:
    """The backbone as a timm folder, and the classifier beside it with the names of its classes."""
    save_backbone(run.task.backbone, run.folder / "backbone")
    write_classifier(run.folder, run.sets.class_names, run.task.classifier)


def place_classes(run: Run, dataset: ImageDataset, labels: Tensor) -> tuple[Tensor, FeatureBank]:
    """For every readable image how many classes stand before the true one, int64 [N]; in fp32.

    Every process returns all of them. Raises CheckpointError when the network gives NaN.
    """
    backbone, classifier = run.task.backbone, run.task.classifier
    bank = extract_features(
        backbone,
        dataset,
        size=backbone.img_size,
        resize=run.settings.resize,
        num_workers=loader_processes(run.settings.num_workers, processes_here()),
        device=run.device,
    )
    places = []
    with torch.no_grad():
        truths = labels[bank.indices].split(1024)
        for features, truth in zip(bank.features.split(1024), truths, strict=True):
            logits = classifier(features.to(run.device)).cpu()  # [n, Y]
            if not torch.isfinite(logits).all():
                raise CheckpointError("the network's scores are not finite: training diverged")
            places.append(class_places(logits, truth))
    return torch.cat(places), bank


def evaluate(places: Tensor) -> Iterator[tuple[str, float]]:
    """Yield ``("top1", percent)`` and ``("top5", percent)``; top5 is top-Y for Y < 5 classes."""
    for k in (1, 5):
        yield f"top{k}", 100.0 * (places < k).double().mean().item()


def describe_run(run: Run) -> list[str]:
    """What trains where, for how long, and how fast: three sentences for the log."""
    settings, span, backbone = run.settings, run.span, run.task.backbone
    millions = sum(p.numel() for p in run.task.parameters()) / 1e6
    rates = [group["lr_scale"] for group in run.optimizer.param_groups]
    peak = settings.optim.base_lr * settings.optim.batch_size / settings.optim.lr_batch
    held = f"{len(run.sets.held_out):,} held out, " if len(run.sets.held_out) else ""
    return [
        f"{backbone.name} from {settings.backbone} at {backbone.img_size[0]} x "
        f"{backbone.img_size[1]} px ({millions:.1f} M parameters), {len(run.sets.class_names)} "
        f"classes, on {world_size()} x {run.device.type} in {settings.optim.precision}",
        f"{span.num_images:,} training images, {held}{len(run.sets.test):,} test images; "
        f"{span.steps_per_epoch:,} steps an epoch, {span.total_steps:,} in all "
        f"({span.total_steps / span.steps_per_epoch:.1f} epochs), warm-up {span.warmup:,}",
        f"peak learning rate {peak:.3g} in the classifier, {peak * min(rates):.3g} in the first "
        f"layer (layer decay {settings.optim.layer_decay:g})",
        *(f"note: {note}" for note in [*run.origin["notes"], *run.notes]),
    ]


def report(
    run: Run, metrics: dict[str, float], bank: FeatureBank, step: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """The result as it is written to JSON."""
    settings, backbone = run.settings, run.task.backbone
    return make_result(
        "finetune",
        settings,
        metrics=metrics,
        protocol={
            "weights": settings.select,
            "step": step,
            "steps": run.span.total_steps,
            "epochs": round(run.span.total_steps / run.span.steps_per_epoch, 2),
            "image_size": list(backbone.img_size),
            "resize": settings.resize or default_resize(backbone.img_size),
            "interpolation": "bicubic",
            "precision": "fp32",
        },
        backbone=run.origin | {"finetuned_sha256": backbone_hash(backbone)},
        data={
            "train": {
                "spec": settings.train,
                "images": len(run.sets.train),
                "classes": len(run.sets.class_names),
                "fraction": settings.fraction,
                "held_out": len(run.sets.held_out),
            },
            "test": describe_images(run.sets.test, bank),
        },
        device=run.device,
        seconds=seconds,
        notes=run.notes,
    )


def table(run: Run, result: dict[str, Any]) -> list[str]:
    """The numbers for the console and train.log, and what to do next."""
    metrics, chosen, test = result["metrics"], result["protocol"], result["data"]["test"]
    lines = [
        f"done: top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} % on {test['images']:,} "
        f"test images, with the {chosen['weights']} weights (step {chosen['step']:,} of "
        f"{chosen['steps']:,})"
    ]
    if test["broken"]:
        lines.append(
            f"{test['broken']} broken test images left out, such as {test['broken_paths'][0]}"
        )
    return [
        *lines,
        f"result: {run.folder}/eval/finetune.json",
        f"backbone: {run.folder}/backbone, classifier: {run.folder}/{CLASSIFIER_FILE}",
    ]
