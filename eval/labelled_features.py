"""Two labelled sets and their features, for the evaluators that learn a classifier from one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino_kd.data.dataset import ImageDataset, labels_as, require_labels
from dino_kd.features import FeatureBank
from dino_kd.schema import LabelledSettings

from .results import describe_images, notes_on_sets
from .subject import Subject, open_images, open_subject


@dataclass
class LabelledSets:
    """The subject of an evaluation with its train and test images; labels count train's classes."""

    subject: Subject
    train: ImageDataset
    test: ImageDataset
    class_names: list[str]
    _test_labels: Tensor

    def features(self) -> tuple[FeatureBank, FeatureBank]:
        """Features and labels of train and test, complete on every process. Raises UserError."""
        bank = self.subject.features(self.train, "train")
        queries = self.subject.features(self.test, "test")
        queries.labels = self._test_labels[queries.indices]
        return bank, queries

    def describe(self, bank: FeatureBank, queries: FeatureBank) -> dict[str, Any]:
        """The `data` of a result."""
        return {
            "train": describe_images(self.train, bank),
            "test": describe_images(self.test, queries),
        }

    def notes(self, bank: FeatureBank) -> list[str]:
        """What a reader of the numbers should know about the sets."""
        found = notes_on_sets(self.train, self.test)
        assert bank.labels is not None  # the sets have labels
        counts = torch.bincount(bank.labels, minlength=len(self.class_names))
        unseen = [self.class_names[y] for y in (counts == 0).nonzero().flatten().tolist()]
        if unseen:
            found.append(
                f"{len(unseen)} classes have no readable train image and are never predicted: "
                f"{', '.join(unseen[:5])}{' ...' if len(unseen) > 5 else ''}"
            )
        return found


def open_labelled(settings: LabelledSettings, device: torch.device) -> LabelledSets:
    """Open what `settings` names.

    Raises:
        UserError: no such backbone, labels absent or of other classes.
    """
    subject = open_subject(settings, device)
    train = open_images(settings, "train", subject.channels)
    test = open_images(settings, "test", subject.channels)
    require_labels(train, "train")
    assert train.class_names is not None  # it has labels
    test_labels = torch.from_numpy(labels_as(test, train.class_names, "test"))
    return LabelledSets(subject, train, test, train.class_names, test_labels)


def solver_device(device: torch.device) -> torch.device:
    """Where the solvers run: CUDA or the CPU, as Apple's MPS has no double precision."""
    return device if device.type == "cuda" else torch.device("cpu")
