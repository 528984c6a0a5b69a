"""The labelled images of a fine-tuning: which are trained on, held out, scored; and as batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_kd.data.dataset import ImageDataset, labels_as, require_labels, subset
from dino_kd.data.loader import crop_batches
from dino_kd.data.multicrop import supervised_policy
from dino_kd.data.specs import make_dataset
from dino_kd.data.splits import holdout, labelled_part
from dino_kd.distributed import processes_here, rank, world_size
from dino_kd.engine.hooks import BrokenImages
from dino_kd.errors import DataError
from dino_kd.presets import Span, loader_processes
from dino_kd.rundir import check_readable, refuse_run_inside, watched
from dino_kd.schema import FinetuneConfig
from dino_kd.tasks.classify import LabelledImages


@dataclass
class LabelledSets:
    """Three sets with the classes of the training images; labels are int64 [N].

    `held_out` is empty unless weights are chosen by it.
    """

    class_names: list[str]
    train: ImageDataset
    train_labels: Tensor
    held_out: ImageDataset
    held_out_labels: Tensor
    test: ImageDataset
    test_labels: Tensor


def open_labelled_sets(settings: FinetuneConfig, channels: int) -> LabelledSets:
    """Open, draw and check the images. Raises UserError."""
    whole, test = (
        make_dataset(
            getattr(settings, name), channels=channels, download=settings.download, where=name
        )
        for name in ("train", "test")
    )
    require_labels(whole, "train")
    assert whole.labels is not None and whole.class_names is not None  # noqa: PT018 - it has labels
    test_labels = labels_as(test, whole.class_names, "test")
    for dataset, name in ((whole, "train"), (test, "test")):
        refuse_run_inside(settings.run_dir, getattr(settings, name))
        check_readable(dataset, name)
    counts = np.bincount(whole.labels, minlength=len(whole.class_names))
    if not counts.all():
        raise DataError(
            f"train: {whole.spec} has no image of class {whole.class_names[counts.argmin()]!r}"
        )
    used = labelled_part(whole.labels, settings.fraction, settings.seed)
    fit, held_out = used, used[:0]
    if settings.select == "best":
        kept, spared = holdout(whole.labels[used], settings.holdout, settings.seed)
        fit, held_out = used[kept], used[spared]
        if not len(held_out):
            raise DataError(
                f"holdout: every class has a single image among the {len(used)} that are used of "
                f"{whole.spec}, so none can be held out; use select=last or a larger fraction"
            )
    return LabelledSets(
        whole.class_names,
        whole if len(fit) == len(whole) else subset(whole, fit),
        torch.from_numpy(whole.labels[fit]),
        subset(whole, held_out),
        torch.from_numpy(whole.labels[held_out]),
        test,
        torch.from_numpy(test_labels),
    )


def training_batches(
    settings: FinetuneConfig,
    sets: LabelledSets,
    size: tuple[int, int],
    span: Span,
    start_step: int,
    device: torch.device,
    broken: BrokenImages,
) -> Iterator[LabelledImages]:
    """This process's share of every batch from `start_step` on, with its labels.

    Broken images are reported to `broken`; the first batch of a new run is drawn as crops.png.
    """
    augment = settings.augment
    batches = crop_batches(
        sets.train,
        supervised_policy(size, augment.scale, augment.horizontal_flip),
        batch_size=settings.optim.batch_size,
        seed=settings.seed,
        start_step=start_step,
        total_steps=span.total_steps,
        rank=rank(),
        world_size=world_size(),
        num_workers=loader_processes(settings.num_workers, processes_here()),
        pin_memory=device.type == "cuda",
    )
    with closing(watched(batches, broken, settings.run_dir, start_step)) as seen:
        for batch in seen:
            yield LabelledImages.of(batch, sets.train_labels)
