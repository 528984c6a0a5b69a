"""What the heads of a probe are trained on: features of a bank, or of fresh crops at every step.

Which image stands where in which step follows from (seed, epoch) alone, in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.images import BrokenImage
from dino_kd.data.loader import CropBatch, crop_batches, epoch_order
from dino_kd.data.multicrop import supervised_policy
from dino_kd.distributed import rank, world_size
from dino_kd.errors import CheckpointError
from dino_kd.features import OUTPUT, FeatureBank, crop_features

from .subject import Subject

# In this order the parts of every input below are neighbours: columns of one matrix, no copies.
_PARTS = ("block-4", "block-3", "block-2", OUTPUT, "mean")
INPUTS: dict[str, tuple[str, ...]] = {
    "last1": (OUTPUT,),
    "last1+mean": (OUTPUT, "mean"),
    "last4": _PARTS[:4],
    "last4+mean": _PARTS,
}
_SAME = 1e-2  # relative; bf16 rounds to 4e-3, different features differ by far more
_COMPARED_IMAGES = 512
_SCORED_ELEMENTS = 2**24  # logits held at once


@dataclass(frozen=True)
class Layout:
    """Which parts of the features stand in which columns, and which columns an input sees."""

    widths: dict[str, int]  # of each part, in order
    inputs: dict[str, tuple[str, ...]]  # the parts of each input, in order

    @property
    def parts(self) -> list[str]:
        """The parts, in the order of their columns."""
        return list(self.widths)

    def columns(self) -> dict[str, slice]:
        """The columns of each input."""
        ends = dict(zip(self.parts, np.cumsum(list(self.widths.values())).tolist(), strict=True))
        found = {}
        for name, parts in self.inputs.items():
            first = self.parts.index(parts[0])
            assert self.parts[first : first + len(parts)] == list(parts), "parts are neighbours"
            found[name] = slice(ends[parts[0]] - self.widths[parts[0]], ends[parts[-1]])
        return found

    def only(self, name: str) -> Layout:
        """The layout of one input alone."""
        parts = self.inputs[name]
        return Layout({part: self.widths[part] for part in parts}, {name: parts})


def parts_of(inputs: Sequence[str]) -> list[str]:
    """The parts that some inputs need, in the order of their columns."""
    return [part for part in _PARTS if any(part in INPUTS[name] for name in inputs)]


def layout_of(inputs: Sequence[str], bank: FeatureBank, where: Tensor) -> tuple[Layout, list[str]]:
    """The layout for a network, each distinct input once; a sentence for each that was dropped.

    Parts that coincide in the rows `where` of `bank` (up to 512 of them) count as one: the mean
    patch of a ResNet is its output, and a network of two blocks has no third last one.
    """
    rows = where[:_COMPARED_IMAGES]
    kept: dict[str, Tensor] = {}
    stands_for: dict[str, str] = {}
    for part in (OUTPUT, "mean", "block-2", "block-3", "block-4"):
        if part not in parts_of(inputs):
            continue
        values = bank.part(part)[rows]
        same = (name for name, other in kept.items() if _coincide(values, other))
        stands_for[part] = next(same, part)
        if stands_for[part] == part:
            kept[part] = values
    distinct: dict[str, tuple[str, ...]] = {}
    notes = []
    for name in dict.fromkeys(inputs):
        chosen = {stands_for[part] for part in INPUTS[name]}
        parts = tuple(part for part in _PARTS if part in chosen)
        twin = next((other for other, taken in distinct.items() if taken == parts), "")
        if not twin:
            distinct[name] = parts
        else:
            notes.append(f"{name} equals {twin} for this network and is left out")
    used = [part for part in _PARTS if any(part in parts for parts in distinct.values())]
    return Layout({part: bank.part(part).shape[1] for part in used}, distinct), notes


def _coincide(values: Tensor, other: Tensor) -> bool:
    if values.shape != other.shape:
        return False
    return bool((values - other).norm() <= _SAME * other.norm())


@dataclass
class Rows:
    """Some images of a bank: features and labels, ready to be taken by position.

    Attributes:
        parts: float32 ``[N, D_part]`` each, in the order of the layout's columns.
        labels: int64 ``[N]``.
        where: int64 ``[n]``, the rows of them that count; the bank itself is never copied.
        device: where what is taken goes.
    """

    parts: list[Tensor]
    labels: Tensor
    where: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.where)

    def take(self, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Features ``[b, D]`` and labels ``[b]`` at some of the positions 0..n-1."""
        rows = self.where[positions]
        features = torch.cat([part[rows].to(self.device) for part in self.parts], dim=1)
        return features, self.labels[rows].to(self.device)

    def batches(self, num_logits: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them in order, so many at once that `num_logits` logits each stay small."""
        size = max(1, min(4096, _SCORED_ELEMENTS // num_logits))
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def rows_of(bank: FeatureBank, layout: Layout, where: Tensor, device: torch.device) -> Rows:
    """The images of a labelled bank in the rows `where`.

    On a GPU the whole bank moves there when it takes at most half of the free memory.
    """
    assert bank.labels is not None  # checked when the dataset was opened
    parts = [bank.part(name) for name in layout.parts]
    if device.type == "cuda":
        size = sum(part.numel() * part.element_size() for part in parts)
        if 2 * size <= torch.cuda.mem_get_info(device)[0]:
            parts = [part.to(device) for part in parts]
    return Rows(parts, bank.labels, where, device)


def cached_batches(
    rows: Rows, *, batch_size: int, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every step: global batches of full size, in the epoch's order."""
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_order(seed, epoch, len(rows)))
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            yield rows.take(batch.tensor_split(world_size())[rank()])


def augmented_batches(
    subject: Subject,
    dataset: ImageDataset,
    layout: Layout,
    broken: dict[str, BrokenImage],
    *,
    batch_size: int,
    total_steps: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every step: features of fresh random crops of `dataset`.

    What cannot be read is added to `broken`, by path. Raises CheckpointError for features that are
    not finite, DataError as `crop_batches`.
    """
    crops = crop_batches(
        dataset,
        supervised_policy(subject.size),
        batch_size=batch_size,
        seed=seed,
        start_step=0,
        total_steps=total_steps,
        rank=rank(),
        world_size=world_size(),
        num_workers=subject.num_workers,
        pin_memory=subject.device.type == "cuda",
    )
    labels = torch.as_tensor(dataset.labels)
    try:
        stream: Iterator[tuple[dict[str, Tensor], CropBatch]]
        if subject.backbone is None:
            stream = (
                ({OUTPUT: b.crops.global_crops[0].flatten(1).float() / 255}, b) for b in crops
            )
        else:
            stream = crop_features(
                subject.backbone,
                crops,
                batch_size=subject.batch_size,
                device=subject.device,
                precision=subject.precision,
                parts=layout.parts,
            )
        for made, batch in stream:
            features = torch.cat([made[name] for name in layout.parts], dim=1).to(subject.device)
            if not torch.isfinite(features).all():
                raise CheckpointError(
                    f"backbone: {subject.description['source']} gives features that are not "
                    "finite on crops of the train images; its weights are damaged"
                )
            broken.update((image.path, image) for image in batch.broken)
            yield features, labels[batch.indices].to(subject.device)
    finally:
        crops.close()
