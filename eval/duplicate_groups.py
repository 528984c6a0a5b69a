"""From pairs of duplicates to groups, leakage, and the files that a person reads."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.images import BrokenImage
from dino_kd.data.pictures import save_contact_sheet, tile
from dino_kd.duplicates import groups_of
from dino_kd.files import write_atomic

_SHOWN_GROUPS, _SHOWN_IMAGES = 20, 8
_TILE = 128  # pixels


@dataclass
class Pictures:
    """N images of one or two sets.

    Attributes:
        sets: the data sets by name.
        names: the set of each image.
        indices: int64 ``[N]``, its position there.
        grey: uint8 ``[N, 32, 32]`` thumbnails.
        hashes: uint8 ``[N, 32]`` of the pixels.
        areas: int64 ``[N]``, pixels of the picture.
    """

    sets: dict[str, ImageDataset]
    names: list[str]
    indices: Tensor
    grey: Tensor
    hashes: Tensor
    areas: Tensor

    def path(self, image: int) -> str:
        """Where it lies."""
        return self.sets[self.names[image]].path(int(self.indices[image]))

    def class_name(self, image: int) -> str | None:
        """Its class; None in a set without labels."""
        dataset = self.sets[self.names[image]]
        if dataset.labels is None or dataset.class_names is None:
            return None
        return dataset.class_names[int(dataset.labels[int(self.indices[image])])]

    def read(self, image: int) -> np.ndarray:
        """uint8 [H, W, C]. Raises BrokenImage."""
        return self.sets[self.names[image]].read(int(self.indices[image]))


@dataclass
class Findings:
    """What was found, the worst group first.

    Attributes:
        pictures: the images that the numbers below refer to.
        metrics: counts; None where there are no labels.
        groups: images of each group, of two or more.
        rows: (group, kind, cosine, appearance, image, image) of every pair; None for exact ones.
        keep: train images without those that a group has too many, or that are also in test.
    """

    pictures: Pictures
    metrics: dict[str, Any]
    groups: list[list[int]]
    rows: list[tuple[int, str, float | None, float | None, int, int]]
    keep: list[int]

    def describe_groups(self, limit: int = 1000) -> list[list[dict[str, Any]]]:
        """The first groups as plain values for JSON; the CSV holds all."""
        return [[self._describe(image) for image in group] for group in self.groups[:limit]]

    def _describe(self, image: int) -> dict[str, Any]:
        return {
            "set": self.pictures.names[image],
            "path": self.pictures.path(image),
            "class": self.pictures.class_name(image),
        }


def judge(pictures: Pictures, first: Tensor, pairs: Tensor, scores: Tensor) -> Findings:
    """Group the images and count.

    Args:
        pictures: N images.
        first: int64 ``[N]``, the first image of equal pixels, as `same_rows` gives it.
        pairs: int64 ``[P, 2]`` of near-duplicates among those first ones.
        scores: ``[P, 2]``, cosine and appearance of each pair.
    """
    copies = (first != torch.arange(len(first))).nonzero()[:, 0]
    equal = torch.stack([first[copies], copies], 1)  # [E, 2]
    root = groups_of(torch.cat([equal, pairs]), len(first))
    members: dict[int, list[int]] = defaultdict(list)
    for image in torch.cat([equal, pairs]).unique().tolist():
        members[int(root[image])].append(image)
    classes = {r: {pictures.class_name(i) for i in group} for r, group in members.items()}
    order = sorted(members, key=lambda r: _badness(pictures, members[r], classes[r]))
    number = {r: position + 1 for position, r in enumerate(order)}
    rows: list[tuple[int, str, float | None, float | None, int, int]] = [
        (number[int(root[a])], "exact", None, None, a, b) for a, b in equal.tolist()
    ]
    rows += [
        (number[int(root[a])], "near", round(cosine, 4), round(alike, 4), a, b)
        for (a, b), (cosine, alike) in zip(pairs.tolist(), scores.tolist(), strict=True)
    ]
    keep = _keep(pictures, [members[r] for r in order])
    trains = sum(name == "train" for name in pictures.names)
    seen = [sum(pictures.names[i] == "train" for i in members[r]) for r in order]
    labelled = all(dataset.labels is not None for dataset in pictures.sets.values())
    metrics = {
        "exact_images": len(equal.unique()),
        "exact_pairs": len(equal),
        "near_pairs": len(pairs),
        "groups": len(order),
        "largest_group": max((len(group) for group in members.values()), default=0),
        "train_extra": sum(max(0, count - 1) for count in seen),
        "train_kept": len(keep),
        "train_images": trains,
        "conflicts": sum(len(classes[r] - {None}) > 1 for r in order) if labelled else None,
    }
    if "test" in pictures.sets:
        metrics |= _leakage(pictures, first, pairs, scores, labelled)
    return Findings(pictures, metrics, [members[r] for r in order], sorted(rows), keep)


def _badness(
    pictures: Pictures, group: list[int], classes: set[str | None]
) -> tuple[bool, bool, int, int]:
    """Sorts conflicting labels first, then leakage, then size."""
    sets = {pictures.names[image] for image in group}
    return len(classes - {None}) < 2, len(sets) < 2, -len(group), group[0]


def _keep(pictures: Pictures, groups: list[list[int]]) -> list[int]:
    """Train images: of every group the largest picture, none when test has it too."""
    dropped: set[int] = set()
    for group in groups:
        train = [image for image in group if pictures.names[image] == "train"]
        dropped.update(train)
        if train and len(train) == len(group):
            dropped.remove(max(train, key=lambda image: (int(pictures.areas[image]), -image)))
    return [
        image
        for image, name in enumerate(pictures.names)
        if name == "train" and image not in dropped
    ]


def _leakage(
    pictures: Pictures, first: Tensor, pairs: Tensor, scores: Tensor, labelled: bool
) -> dict[str, Any]:
    """Test images with a train image of equal pixels, or of a pair with their own pixels."""
    equal: dict[int, int] = {}  # first image of equal pixels -> a train image among them
    for image, name in enumerate(pictures.names):
        if name == "train":
            equal.setdefault(int(first[image]), image)
    near: dict[int, tuple[float, int]] = {}  # the train image that looks most like it
    for (a, b), (_, alike) in zip(pairs.tolist(), scores.tolist(), strict=True):
        for one, other in ((a, b), (b, a)):
            if other in equal:
                near[one] = max(near.get(one, (-2.0, 0)), (alike, equal[other]))
    leaked = exact = same = 0
    for image, name in enumerate(pictures.names):
        pixels = int(first[image])
        if name != "test" or not (pixels in equal or pixels in near):
            continue
        leaked += 1
        exact += pixels in equal
        partner = equal[pixels] if pixels in equal else near[pixels][1]
        same += pictures.class_name(image) == pictures.class_name(partner)
    return {
        "leaked": leaked,
        "leaked_exact": exact,
        "leaked_same_class": same if labelled else None,
    }


def write_findings(
    findings: Findings, sets: dict[str, ImageDataset], output: Path, notes: list[str]
) -> list[str]:
    """The pairs, the picture and the list beside `output`; sentences about what was written.

    What cannot be written, because images are no files of their own, becomes a note.
    """
    csv_file = output.with_name(f"{output.stem}.pairs.csv")
    _write_bytes(csv_file, _csv(findings))
    written = [f"pairs written to {csv_file}"]
    if findings.groups:
        sheet = output.with_name(f"{output.stem}.png")
        draw(findings, sheet)
        written.append(f"picture of the worst groups written to {sheet}")
    train = sets["train"]
    if Path(train.path(0)).is_file() or Path(train.path(len(train) - 1)).is_file():
        keep = output.with_name(f"{output.stem}.keep.txt")
        lines = [os.path.abspath(findings.pictures.path(i)) for i in findings.keep]  # noqa: PTH100
        _write_bytes(keep, b"".join(os.fsencode(line) + b"\n" for line in lines))
        written.append(
            f"{len(lines):,} of {findings.metrics['train_images']:,} train images to keep: "
            f"train={keep}"
        )
    else:
        notes.append("no list of images to keep: those of train are no files of their own")
    return written


def _csv(findings: Findings) -> bytes:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    head = ["group", "kind", "cosine", "appearance"]
    out.writerow([*head, "set_a", "path_a", "class_a", "set_b", "path_b", "class_b"])
    pictures = findings.pictures
    for group, kind, cosine, alike, a, b in findings.rows:
        ends: list[str | None] = []
        for image in (a, b):
            ends += [pictures.names[image], pictures.path(image), pictures.class_name(image)]
        out.writerow([group, kind, cosine, alike, *ends])
    return text.getvalue().encode("utf-8", "surrogateescape")


def _write_bytes(path: Path, data: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, write)


def draw(findings: Findings, path: Path) -> None:
    """The first groups as a PNG, a row for each, numbered as in the CSV."""
    shown = findings.groups[:_SHOWN_GROUPS]
    width = min(_SHOWN_IMAGES, max(len(group) for group in shown))

    def picture(group: list[int], place: int) -> np.ndarray:
        try:
            return tile(findings.pictures.read(group[place]) if place < len(group) else None, _TILE)
        except BrokenImage:  # it was readable a minute ago
            return tile(None, _TILE)

    columns = [
        (str(place + 1), [picture(group, place) for group in shown]) for place in range(width)
    ]
    names = [f"group {number + 1}" for number in range(len(shown))]
    save_contact_sheet(columns, path, row_names=names)
