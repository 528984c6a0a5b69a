"""The images of a distillation: which have labels, and the batches of views."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_kd.data.dataset import ImageDataset, labels_as, require_labels, subset
from dino_kd.data.loader import crop_batches
from dino_kd.data.mixing import MixPolicy, Views, draw_mix
from dino_kd.data.multicrop import CropPolicy, supervised_policy
from dino_kd.data.packed import pack_folder
from dino_kd.data.renderers import Renderer
from dino_kd.data.specs import make_dataset
from dino_kd.data.splits import labelled_part
from dino_kd.distributed import processes_here, rank, world_size
from dino_kd.engine.hooks import BrokenImages
from dino_kd.errors import DataError
from dino_kd.presets import loader_processes
from dino_kd.rundir import check_readable, refuse_run_inside, watched
from dino_kd.schema import DistillConfig


@dataclass
class TrainingImages:
    """What is trained on and scored.

    Attributes:
        train: N images.
        labels: int64 ``[N]``; -1 where none is used.
        class_names: of the labels; None when none is used.
        test, test_labels: scored at the end; None when no test set is given.
    """

    train: ImageDataset
    labels: Tensor
    class_names: list[str] | None
    test: ImageDataset | None = None
    test_labels: Tensor | None = None

    @property
    def labelled_share(self) -> float:
        """Part of the images that have a label."""
        return float((self.labels >= 0).float().mean())


def open_images(
    settings: DistillConfig, *, labels_for: list[str], only_labelled: bool = False
) -> TrainingImages:
    """Open and check the data sets, and draw which labels are used.

    Args:
        settings: resolved or not.
        labels_for: the terms that read labels.
        only_labelled: keep the labelled images alone, as a student without teacher must.

    Raises:
        UserError: no such images, or no labels where a term needs them.
    """
    data = settings.data
    dataset = make_dataset(data.train, channels=3, download=data.download, where="data.train")
    refuse_run_inside(settings.run_dir, data.train)
    check_readable(dataset, "data.train")
    pack_folder(data.pack)  # a mistake in it is told now
    labels, names = _draw_labels(settings, dataset, labels_for)
    images = TrainingImages(dataset, torch.from_numpy(labels), names)
    if only_labelled:
        kept = np.flatnonzero(labels >= 0)
        images = TrainingImages(
            dataset if len(kept) == len(labels) else subset(dataset, kept),
            torch.from_numpy(labels[kept]),
            names,
        )
    if data.test is not None:
        images.test = make_dataset(data.test, channels=3, download=data.download, where="data.test")
        require_labels(images.test, "data.test")
        check_readable(images.test, "data.test")
        if dataset.class_names is not None and images.test.class_names is not None:
            known = labels_as(images.test, dataset.class_names, "data.test")
            images.test_labels = torch.from_numpy(known)
    return images


def _draw_labels(
    settings: DistillConfig, dataset: ImageDataset, labels_for: list[str]
) -> tuple[np.ndarray, list[str] | None]:
    """Labels int64 [N], -1 for none, and the class names; (all -1, None) without labels."""
    share = settings.data.labels
    hint = "set data.labels to a share above 0, or terms.preset=label_free"
    if share == 0 and labels_for:
        raise DataError(f"data.labels=0, but terms.{labels_for[0]} needs labels; {hint}")
    if dataset.labels is None and (labels_for or share not in ("auto", 0)):
        named = f"terms.{labels_for[0]}" if labels_for else f"data.labels={share}"
        raise DataError(
            f"data.train: {dataset.spec} has no labels (one folder for each class), and {named} "
            "needs them; give a labelled set, or terms.preset=label_free"
        )
    if dataset.labels is None or share == 0 or not labels_for:
        return np.full(len(dataset), -1, dtype=np.int64), None
    part = 1.0 if share == "auto" else float(share)
    used = labelled_part(dataset.labels, part, settings.data.label_seed)
    labels = np.full(len(dataset), -1, dtype=np.int64)
    labels[used] = dataset.labels[used]
    return labels, dataset.class_names


def view_policies(settings: DistillConfig, size: tuple[int, int]) -> tuple[CropPolicy, MixPolicy]:
    """What may happen to a training image of `size` (height, width), alone and in its batch."""
    augment = settings.augment
    crops = supervised_policy(size, augment.scale, augment.horizontal_flip)
    return crops, MixPolicy(augment.mixup, augment.cutmix, augment.mix_share)


def view_batches(
    settings: DistillConfig,
    images: TrainingImages,
    size: tuple[int, int],
    renderer: Renderer,
    *,
    start_step: int,
    total_steps: int,
    device: torch.device,
    broken: BrokenImages,
) -> Generator[Views, None, None]:
    """This process's share of every batch from `start_step` on, mixed as the step has drawn.

    Broken images are reported to `broken`; the first batch of a new run is drawn as crops.png.
    """
    crops, mixes = view_policies(settings, size)
    batches = crop_batches(
        images.train,
        crops,
        batch_size=settings.optim.batch_size,
        seed=settings.seed,
        start_step=start_step,
        total_steps=total_steps,
        rank=rank(),
        world_size=world_size(),
        num_workers=loader_processes(settings.data.num_workers, processes_here()),
        pin_memory=device.type == "cuda",
        workers=settings.data.workers,
        renderer=renderer,
    )
    with closing(watched(batches, broken, settings.run_dir, start_step)) as seen:
        for step, batch in enumerate(seen, start=start_step):
            mix = draw_mix(mixes, *size, settings.seed, step, rank())
            yield Views.of(batch, images.labels, mix)
