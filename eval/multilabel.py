"""Images with several labels: the file that names them, and the scores of predicted labels.

A CSV file in UTF-8 with two columns, ``path,label1|label2``; a first line ``path,labels`` is a
heading. Relative paths count from the folder of the file; an image without labels has an empty
second column.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino_kd.data.dataset import ImageDataset
from dino_kd.errors import DataError, did_you_mean

SEPARATOR = "|"
_HEADING = ["path", "labels"]
THRESHOLD = 0.5  # a label is predicted from this share of the votes on


@dataclass
class LabelFile:
    """The labels of images by absolute path; label l is `names[l]`."""

    path: str
    names: list[str]
    rows: dict[str, list[int]] = field(repr=False)

    def matrix(self, dataset: ImageDataset, where: str) -> Tensor:
        """bool ``[N, L]`` of the images of `dataset`, which the setting `where` names.

        Raises:
            DataError: an image is not in the file.
        """
        having = torch.zeros(len(dataset), len(self.names), dtype=torch.bool)
        missing = []
        for index in range(len(dataset)):
            path = _absolute(dataset.path(index))
            if path in self.rows:
                having[index, self.rows[path]] = True
            else:
                missing.append(path)
        if missing:
            shown = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
            near = did_you_mean(missing[0], self.rows) if len(self.rows) <= 1000 else ""
            raise DataError(
                f"labels: {self.path} lacks {len(missing)} of the {len(dataset)} images of "
                f"{where}: {shown}{near or '.'} Relative paths count from the folder of the file."
            )
        return having


def read_labels(file: str) -> LabelFile:
    """Read a label file.

    Raises:
        DataError: it cannot be read, names nothing, or a line has another form; with its number.
    """
    path = Path(file).expanduser()
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            lines = csv.reader(opened, strict=True)
            numbered = [(lines.line_num, line) for line in lines if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"labels: {path} cannot be read ({reason}); it is a CSV file in UTF-8 with a line "
            "'path,label1|label2' for each image"
        ) from error
    if numbered and [cell.strip().lower() for cell in numbered[0][1]] == _HEADING:
        numbered = numbered[1:]
    words: dict[str, list[str]] = {}
    folder = path.absolute().parent
    for number, line in numbered:
        image, labels = _parse(line, f"{path}, line {number}")
        image = _absolute(folder / image)
        if image in words:
            raise DataError(f"labels: {path}, line {number}: {image} stands there twice")
        words[image] = labels
    names = sorted({label for labels in words.values() for label in labels})
    if not names:
        raise DataError(f"labels: {path} names no label; write 'path,label1|label2' for each image")
    position = {name: place for place, name in enumerate(names)}
    rows = {image: [position[label] for label in labels] for image, labels in words.items()}
    return LabelFile(str(path), names, rows)


def _parse(line: list[str], where: str) -> tuple[str, list[str]]:
    """The path and the labels of one line."""
    if len(line) != 2 or not line[0].strip():
        raise DataError(
            f"labels: {where}: expected 'path,label1|label2', got {','.join(line)!r}; a path with "
            'a comma stands in "quotes"'
        )
    words = [word.strip() for word in line[1].split(SEPARATOR)]
    if words == [""]:
        return line[0].strip(), []
    if "" in words:
        raise DataError(f"labels: {where}: an empty label in {line[1]!r}")
    return line[0].strip(), words


def _absolute(path: str | Path) -> str:
    """One spelling for one file; links are not followed."""
    return os.path.abspath(path)  # noqa: PTH100 - also without '..', once per image


def evaluate(scores: dict[int, Tensor], truth: Tensor) -> Iterator[tuple[str, float]]:
    """Yield ``("knnK_map", percent)`` and ``("knnK_micro_f1", percent)`` for every k.

    Args:
        scores: ``[Q, L]`` in 0..1 for every k.
        truth: bool ``[Q, L]``.
    """
    having = truth.cpu().numpy()
    for k, shares in scores.items():
        values = shares.cpu().numpy()
        yield f"knn{k}_map", 100 * mean_average_precision(having, values)
        yield f"knn{k}_micro_f1", 100 * micro_f1(having, values >= THRESHOLD)


def mean_average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Average precision of each label that has a positive image, averaged over these labels.

    Args:
        truth: bool ``[Q, L]``, with a positive somewhere.
        scores: ``[Q, L]``.

    Returns:
        in 0..1.
    """
    present = np.flatnonzero(truth.any(axis=0))
    return float(np.mean([average_precision(truth[:, y], scores[:, y]) for y in present]))


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """The sum over distinct scores of (recall gained there) * (precision down to there).

    Equal scores count as one step, so that the order of the images does not matter.

    Args:
        truth: bool ``[Q]``, with a positive somewhere.
        scores: ``[Q]``.

    Returns:
        in 0..1.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each step
    found = np.cumsum(truth[order])[last]  # positives down to each step
    gained = np.diff(found, prepend=0)
    return float((gained * found / (last + 1)).sum() / found[-1])


def micro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) over all images and labels together; both bool ``[Q, L]``."""
    both = int((truth & predicted).sum())
    total = int(truth.sum()) + int(predicted.sum())
    return 2 * both / total if total else 0.0


def notes_on_labels(names: Sequence[str], bank: Tensor, truth: Tensor) -> list[str]:
    """Sentences about labels that only one side has.

    Args:
        names: of the labels.
        bank: bool ``[M, L]``, images that vote.
        truth: bool ``[Q, L]``, images that are scored.
    """
    votes, tested = bank.any(dim=0), truth.any(dim=0)
    found = []
    for chosen, words in (
        (~tested & votes, "labels have no scored image and are left out of mAP"),
        (tested & ~votes, "labels have no image that votes, so they are never predicted"),
    ):
        if chosen.any():
            absent = [
                name for name, is_absent in zip(names, chosen.tolist(), strict=True) if is_absent
            ]
            shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
            found.append(f"{len(absent)} {words}: {shown}")
    return found
