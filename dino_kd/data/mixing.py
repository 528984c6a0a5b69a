"""Mixup and CutMix as drawn parameters, and a batch of single views with what belongs to it.

Drawing and applying are apart, as for crops: the mix of a batch follows from (seed, step, rank)
alone, so teacher and student, a cache of the teacher and a resumed run see the same images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dino_kd.data.loader import CropBatch
from dino_kd.data.multicrop import stream

_MIX_KEY = 0x6D6978  # "mix": keeps this stream apart from others of the same seed
Answers = dict[str, Tensor]


@dataclass(frozen=True)
class MixPolicy:
    """Which batches are mixed, and how.

    Attributes:
        mixup, cutmix: parameter of the Beta distribution of the share; 0: never.
        share: of the batches that are mixed; by one of the two at even odds when both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Mix:
    """How every image of a batch is mixed with its partner.

    Attributes:
        own: share of the image itself in 0..1; the rest is its partner's.
        box: CutMix: (top, left, height, width) in pixels that show the partner; None: mixup.
    """

    own: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(
    policy: MixPolicy, height: int, width: int, seed: int, step: int, rank: int
) -> Mix | None:
    """The mix of one process's batch of one step; None: it stays as it is."""
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(policy, kind)]
    rng = stream(_MIX_KEY, seed, step, rank)
    if not kinds or rng.random() >= policy.share:
        return None
    kind = kinds[int(rng.integers(len(kinds)))]
    own = float(rng.beta(*[getattr(policy, kind)] * 2))
    if kind == "mixup":
        return Mix(own)
    # As in the paper: a box of the other image's share around a uniform centre, cut at the border.
    half = np.sqrt(1 - own) / 2
    row, column = rng.random() * height, rng.random() * width
    top, bottom = (int(np.clip(row + s * half * height, 0, height)) for s in (-1, 1))
    left, right = (int(np.clip(column + s * half * width, 0, width)) for s in (-1, 1))
    area = (bottom - top) * (right - left)
    return Mix(1 - area / (height * width), (top, left, bottom - top, right - left))


@dataclass
class Views:
    """One view of each of B images, its partner in a mix, its label, and teachers' answers.

    Attributes:
        images: uint8 ``[B, C, H, W]``.
        labels: int64 ``[B]``; -1: no label is known.
        indices: int64 ``[B]``, which images of the data set.
        mix: None: images stay as they are.
        partners, partner_labels: what is mixed in, of the same shapes; None: each image's neighbour
            in the batch, which the device finds for itself.
        answers: of each teacher to the mixed images, when they come from a cache; by name.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    mix: Mix | None = None
    partners: Tensor | None = None
    partner_labels: Tensor | None = None
    answers: list[Answers] = field(default_factory=list)

    @classmethod
    def of(cls, batch: CropBatch, labels: Tensor, mix: Mix | None) -> Views:
        """The single global crop of every image.

        `labels` are those of all images ``[N]``. An image that stands in for a broken one brings
        its own label.
        """
        (images,) = batch.crops.global_crops
        return cls(images, labels[batch.indices], batch.indices, mix)

    def pixels(self) -> Tensor:
        """The mixed images, float32 ``[B, C, H, W]`` in 0..255."""
        pixels = self.images.float()
        if self.mix is None:
            return pixels
        partners = _neighbours(self.images) if self.partners is None else self.partners
        if self.mix.box is None:
            return pixels.mul_(self.mix.own).add_(partners, alpha=1 - self.mix.own)
        top, left, height, width = self.mix.box
        rows, columns = slice(top, top + height), slice(left, left + width)
        pixels[..., rows, columns] = partners[..., rows, columns].float()
        return pixels

    def shares(self, num_classes: int) -> Tensor:
        """Class shares ``[B, Y]`` of the mixed images; what has no label adds nothing."""
        own = _one_hot(self.labels, num_classes)
        if self.mix is None:
            return own
        partners = self.partner_labels
        other = _one_hot(_neighbours(self.labels) if partners is None else partners, num_classes)
        return self.mix.own * own + (1 - self.mix.own) * other

    def to(self, device: torch.device) -> Views:
        """The same batch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def chunk(self, n: int) -> list[Views]:
        """Split into `n` equal parts, as views. Raises ValueError if B % n != 0."""
        count = len(self.labels)
        if n < 1 or count % n:
            raise ValueError(f"{count} images cannot be split into {n} equal parts")
        if n == 1:
            return [self]  # whose partners the device finds
        size, whole = count // n, self
        if self.mix is not None and self.partners is None:  # a part lacks some of the neighbours
            whole = replace(
                self,
                partners=_neighbours(self.images),
                partner_labels=_neighbours(self.labels),
            )
        return [
            whole._each(lambda tensor, i=i: tensor[i : i + size])  # type: ignore[misc]
            for i in range(0, count, size)
        ]

    def _each(self, change) -> Views:  # type: ignore[no-untyped-def]
        kept = {
            name: change(value) if isinstance(value := getattr(self, name), Tensor) else value
            for name in ("images", "labels", "indices", "partners", "partner_labels")
        }
        answers = [{name: change(v) for name, v in one.items()} for one in self.answers]
        return replace(self, **kept, answers=answers)


def _neighbours(rows: Tensor) -> Tensor:
    """For each row the one before it; for the first the last."""
    return rows.roll(1, 0)


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot rows ``[B, Y]`` float32; a row of zeros for -1."""
    known = (labels >= 0).float()
    return F.one_hot(labels.clamp(min=0), num_classes).float() * known[:, None]
