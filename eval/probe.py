"""A grid of linear heads on one frozen backbone: features, training, the choice of a winner.

Every process takes the same steps; the main one scores, and tells the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino_kd.data.dataset import ImageDataset, subset
from dino_kd.data.images import BrokenImage
from dino_kd.data.splits import holdout
from dino_kd.distributed import all_gather_objects, is_main_process, on_main, world_size
from dino_kd.engine.schedules import cosine
from dino_kd.errors import ConfigError, DataError
from dino_kd.features import FeatureBank
from dino_kd.linear import LinearGrid, Score, choose_head, score_grid, train_grid
from dino_kd.models.linear_head import HeadOrigin, LinearHead
from dino_kd.schema import LinearConfig

from .probe_features import (
    Layout,
    Rows,
    augmented_batches,
    cached_batches,
    layout_of,
    parts_of,
    rows_of,
)
from .subject import Subject

LR_BATCH = 256  # images that the learning rates are meant for
MOMENTUM = 0.9
_FULL_BATCH = 1024  # of the DINO paper
_STEPS_PER_EPOCH = 16  # at least, where `train_batch` is auto


@dataclass(frozen=True)
class Split:
    """Positions in the training set: what heads fit, and what chooses among them."""

    fit: np.ndarray
    held_out: np.ndarray


def split_train(settings: LinearConfig, train: ImageDataset) -> Split:
    """Hold out a stratified part of the training images. Raises DataError when none can be."""
    assert train.labels is not None  # checked when the dataset was opened
    fit, held_out = holdout(train.labels, settings.held_out, settings.seed)
    if len(held_out) == 0:
        raise DataError(
            f"train: {train.spec} has one image for each class ({len(train)} in all), so none can "
            "be held out to choose a learning rate; add images"
        )
    return Split(fit, held_out)


def choose_batch(settings: LinearConfig, train: ImageDataset, images: int) -> int:
    """Images of one step over all processes; `auto` leaves 16 steps an epoch or more.

    Raises ConfigError when there are fewer `images`, or when the processes cannot share a batch
    of crops evenly.
    """
    power_of_two = 2 ** max(0, (images // _STEPS_PER_EPOCH).bit_length() - 1)
    auto = settings.train_batch == "auto"
    batch = min(_FULL_BATCH, power_of_two) if auto else int(settings.train_batch)
    if batch > images:
        raise ConfigError(
            f"train_batch: expected at most {images}, the images of {train.spec} that are not "
            f"held out, got {batch}; auto fits it to them"
        )
    if settings.mode == "augmented" and batch % world_size():
        raise ConfigError(
            f"train_batch: {batch} images do not divide into {world_size()} processes; "
            f"use a multiple of {world_size()}, or mode=cached"
        )
    return batch


class Probe:
    """One evaluation, in the order `extract`, `train_all`, `final_head`.

    Attributes:
        batch_size: images of one step over all processes.
        retrains: the winner is trained once more on all training images.
        extracted: the parts of the features that are needed of any image.
        layout: the inputs that are distinct for this network.
        bank: features of the training images (augmented: of the held-out ones).
        grid, scores, finite: the heads, their held-out scores, and which are made of numbers.
        winner: (input, position of the learning rate).
        broken: training images that could not be read.
        notes: sentences for the reader of the result.
    """

    extracted: list[str]
    layout: Layout
    bank: FeatureBank
    grid: LinearGrid
    scores: dict[str, list[Score]]
    finite: dict[str, list[bool]]
    winner: tuple[str, int]

    def __init__(self, settings: LinearConfig, subject: Subject, train: ImageDataset) -> None:
        self.settings = settings
        self.subject = subject
        self.train = train
        self.split = split_train(settings, train)
        self.batch_size = choose_batch(settings, train, len(self.split.fit))
        self.rates = [rate * self.batch_size / LR_BATCH for rate in settings.learning_rates]
        self.is_cached = settings.mode == "cached"
        self.retrains = self.is_cached if settings.retrain == "auto" else settings.retrain
        self.broken: dict[str, BrokenImage] = {}
        self.notes: list[str] = []

    @property
    def class_names(self) -> list[str]:
        """The name of each class of the training images."""
        return self.train.class_names or []

    def extract(self) -> None:
        """Features of centre crops: of all training images, or of the held-out ones alone.

        Raises DataError when too few of them can be read.
        """
        inputs, parts = self.settings.inputs, parts_of(self.settings.inputs)
        if self.subject.backbone is None:
            inputs, parts = ["last1"], []
            if len(self.settings.inputs) > 1:
                self.notes.append("pixels have one input only, called last1 here")
        self.extracted = parts
        if self.is_cached:
            self.bank = self.subject.features(self.train, "train", parts)
        else:
            chosen = self.split.held_out
            self.bank = self.subject.features(subset(self.train, chosen), "train", parts)
            self.bank.indices = torch.from_numpy(chosen)[self.bank.indices]
        self.broken = {image.path: image for image in self.bank.broken}
        held_out = self._places(self.split.held_out)
        fit = self._places(self.split.fit)
        if len(held_out) == 0:
            raise DataError(
                f"train: none of the {len(self.split.held_out)} held-out images of "
                f"{self.train.spec} can be read; mend them, or change seed"
            )
        if self.is_cached and len(fit) < self.batch_size:
            raise DataError(
                f"train: {len(fit)} images of {self.train.spec} can be read and are not held out, "
                f"fewer than train_batch={self.batch_size}"
            )
        self.layout, notes = layout_of(inputs, self.bank, held_out)
        self.notes += notes

    def train_all(self) -> None:
        """Train every head, score them on the held-out images, choose.

        Raises ConfigError when all have diverged.
        """
        self.grid = self._train(self.layout, self.rates, self.split.fit, "heads")
        self.finite = {name: self.grid.is_finite(name) for name in self.layout.inputs}

        def choose() -> tuple[dict[str, list[Score]], tuple[str, int]]:
            rows = self._rows(self.layout, self.split.held_out)
            batches = rows.batches(len(self.rates) * len(self.class_names))
            scores = score_grid(self.grid, batches)
            winner = choose_head(scores, self.finite)
            if winner is None:
                raise ConfigError(
                    "learning_rates: every head diverged; use rates below "
                    f"{min(self.settings.learning_rates):g}"
                )
            return scores, winner

        self.scores, self.winner = on_main(choose)

    def final_head(self) -> LinearHead:
        """The winner, trained once more on all training images where the settings say so."""
        name, rate = self.winner
        weight, bias = self.grid.head(name, rate)
        if self.retrains:
            alone = self.layout.only(name)
            whole = np.arange(len(self.train))
            grid = self._train(alone, [self.rates[rate]], whole, "winner")
            if grid.is_finite(name)[0]:
                weight, bias = grid.head(name, 0)
            else:
                self.retrains = False
                self.notes.append("the winner diverged on all training images; kept as chosen")
        parts = self.layout.inputs[name]
        widths = [self.layout.widths[part] for part in parts]
        head = LinearHead(parts, widths, self.class_names, self._origin())
        head.linear.load_state_dict({"weight": weight, "bias": bias})
        return head.eval()

    def readable(self, images: np.ndarray) -> int:
        """How many of some training images are not known to be broken."""
        if self.is_cached:
            return len(self._places(images))
        return len(images) - sum(self.train.path(int(i)) in self.broken for i in images)

    def _train(
        self, layout: Layout, rates: list[float], images: np.ndarray, name: str
    ) -> LinearGrid:
        """New heads, trained on the training images at the positions `images`."""
        settings, device = self.settings, self.subject.device
        grid = LinearGrid(
            layout.columns(), len(self.class_names), rates, momentum=MOMENTUM, device=device
        )
        available = len(self._places(images)) if self.is_cached else len(images)
        steps = settings.epochs * (available // self.batch_size)
        if self.is_cached:
            batches = cached_batches(
                self._rows(layout, images),
                batch_size=self.batch_size,
                epochs=settings.epochs,
                seed=settings.seed,
            )
        else:
            batches = augmented_batches(
                self.subject,
                subset(self.train, images),
                layout,
                self.broken,
                batch_size=self.batch_size,
                total_steps=steps,
                seed=settings.seed,
            )
        # on a terminal only, and from the main process
        hidden = None if is_main_process() else True
        with tqdm(total=steps, desc=name, unit="step", disable=hidden, leave=False) as bar:
            train_grid(
                grid,
                batches,
                batch_size=self.batch_size,
                schedule=cosine(1.0, 0.0, steps),
                on_step=bar.update,
            )
        if not self.is_cached:
            self.broken = {b.path: b for b in all_gather_objects([*self.broken.values()])}
        return grid

    def _places(self, images: np.ndarray) -> Tensor:
        """The rows of the bank that hold the training images at the positions `images`."""
        return torch.from_numpy(np.flatnonzero(np.isin(self.bank.indices.numpy(), images)))

    def _rows(self, layout: Layout, images: np.ndarray) -> Rows:
        return rows_of(self.bank, layout, self._places(images), self.subject.device)

    def _origin(self) -> HeadOrigin:
        about = self.subject.description
        return HeadOrigin(
            backbone=about["source"],
            sha256=about.get("sha256", ""),
            image_size=self.subject.size,
            mean=tuple(about.get("mean", ())),
            std=tuple(about.get("std", ())),
        )
