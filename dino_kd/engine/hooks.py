"""Things that happen between steps without the loop knowing them.

A hook is called after every step as ``hook(steps_done, task, row)``; `row` holds the metrics of
that step when it is a logged one, else it is empty. What it returns is added to the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dino_kd.classifiers import accuracy, learn_scaling
from dino_kd.data.dataset import ImageDataset, labels_as
from dino_kd.data.images import BrokenImage
from dino_kd.distributed import all_gather_objects, broadcast
from dino_kd.engine.schedules import is_time
from dino_kd.engine.signals import StopFlag
from dino_kd.features import FeatureBank
from dino_kd.knn import knn_accuracy
from dino_kd.logistic import fit_logistic
from dino_kd.models.backbone import Backbone


class KnnMonitor:
    """Scores a backbone by weighted k-NN every so many steps, with `eval.knn`'s own functions.

    On request also by the logistic regression of `eval.logreg`, on the same features: what a
    linear classifier reads from them, for a few seconds a score.

    Args:
        backbone: the network to score, usually the teacher's.
        bank, queries: labelled data sets; `queries` is never trained on. Classes match by name.
        extract: `extract_features` with the evaluation's size, precision and loader bound.
        every: steps between scores; the last step is always scored.
        total_steps: length of the run.
        k: neighbours.
        logreg_c: inverse penalty of the regression, on standardised features; None: without it.
        max_images: at most this many images of each set are used, evenly spaced.
        say: receives one sentence per score.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: ImageDataset,
        queries: ImageDataset,
        *,
        extract: Callable[..., FeatureBank],
        every: int,
        total_steps: int,
        k: int,
        logreg_c: float | None = None,
        max_images: int,
        say: Callable[[str], None],
    ) -> None:
        assert bank.class_names is not None  # the caller has checked the labels
        assert bank.labels is not None
        self.bank_labels = torch.from_numpy(bank.labels)
        self.query_labels = torch.from_numpy(labels_as(queries, bank.class_names, "monitor.test"))
        self.backbone, self.bank, self.queries, self.extract = backbone, bank, queries, extract
        self.every, self.total_steps, self.k, self.max_images = every, total_steps, k, max_images
        self.logreg_c, self.say = logreg_c, say

    def __call__(self, done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        if not is_time(done, self.every, self.total_steps):
            return {}
        scores = self.score()
        words = [f"k-NN (k={self.k}) {scores['knn_top1']:.2f} %"]
        if "logreg_top1" in scores:
            words.append(f"logistic regression {scores['logreg_top1']:.2f} %")
        self.say(f"step {done}: {', '.join(words)}")
        return scores

    def score(self) -> dict[str, float]:
        """Top-1 in percent, ``knn_top1`` and where it is asked for ``logreg_top1``."""
        with torch.compiler.set_stance("force_eager"):  # not a program for every size of batch
            bank, queries = (
                self.extract(self.backbone, data, indices=evenly_spaced(len(data), self.max_images))
                for data in (self.bank, self.queries)
            )
        labels, truth = self.bank_labels[bank.indices], self.query_labels[queries.indices]
        result = knn_accuracy(queries.features, truth, bank.features, labels, ks=[self.k])
        scores = {"knn_top1": result[self.k]["top1"]}
        if self.logreg_c is not None:
            scaling = learn_scaling("standard", bank.features)
            num_classes = len(self.bank.class_names or ())
            (model,) = fit_logistic(
                scaling.apply(bank.features), labels, num_classes, [self.logreg_c]
            )
            found = accuracy(model.logits(scaling.apply(queries.features)), truth)
            scores["logreg_top1"] = found["top1"]
        return scores


class BrokenImages:
    """Collects broken images on all processes, lists them, and stops the run when there are many.

    `record` is called where batches are taken; `exchange` shares what was found, at every logged
    step and before every save, so that all processes count the same.
    """

    def __init__(
        self,
        write: Callable[[list[tuple[str, str]]], object],
        stop: StopFlag,
        *,
        run_dir: Path,
        num_images: int,
        max_share: float,
        known: Iterable[str] = (),
        setting: str = "data.max_broken_share",
    ) -> None:
        self.write, self.stop = write, stop
        self.run_dir, self.num_images, self.max_share = run_dir, num_images, max_share
        self.setting = setting
        self.paths: set[str] = set(known)
        self.new: list[BrokenImage] = []

    def record(self, found: Iterable[BrokenImage]) -> None:
        """Remember what this process found."""
        self.new.extend(found)

    def __call__(self, done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        if not row:  # all ranks log the same steps
            return {}
        self.exchange()
        if self.too_many():
            self.stop.request(self.verdict())
        return {"broken_images": float(len(self.paths))}

    def exchange(self) -> None:
        """Share and list what is new; every process must call it."""
        unseen = {b.path: b for b in all_gather_objects(self.new) if b.path not in self.paths}
        self.new = []
        self.paths.update(unseen)
        self.write([(b.path, b.reason) for b in unseen.values()])

    def verdict(self) -> str:
        """The sentence that ends a run with too many broken images."""
        return (
            f"{len(self.paths)} of {self.num_images} images cannot be read, more than "
            f"{self.setting}={self.max_share}; the first is {min(self.paths)}, all are in "
            f"{self.run_dir}/broken_images.txt. Remove or replace them, or go on with a larger "
            f"{self.setting} and resume=true"
        )

    def too_many(self) -> bool:
        """Whether that sentence is true."""
        return len(self.paths) > self.max_share * self.num_images


class BestWeights:
    """Scores the task every so many steps and keeps a copy of its best weights.

    Args:
        score: top-1 in percent on images that are not trained on; every process calls it.
        every: steps between scores; the last step is always scored.
        total_steps: length of the run.
        say: receives one sentence per score.
        on_better: called after a better score than all before; of equals the earlier stays.

    Attributes:
        best: ``step``, ``top1`` and the ``task``'s state on the CPU; None before the first score.
            It belongs into every checkpoint.
    """

    def __init__(
        self,
        score: Callable[[], float],
        *,
        every: int,
        total_steps: int,
        say: Callable[[str], None],
        on_better: Callable[[], None],
    ) -> None:
        self.score, self.every, self.total_steps = score, every, total_steps
        self.say, self.on_better = say, on_better
        self.best: dict[str, Any] | None = None

    def __call__(self, done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        if not is_time(done, self.every, self.total_steps):
            return {}
        top1 = broadcast(self.score())  # all processes keep the same weights
        if self.best is None or top1 > self.best["top1"]:
            state = {
                name: value.detach().cpu().clone() for name, value in task.state_dict().items()
            }
            self.best = {"step": done, "top1": top1, "task": state}
            self.on_better()
        best = self.best
        self.say(
            f"step {done}: held-out top-1 {top1:.2f} % "
            f"(best {best['top1']:.2f} % at step {best['step']})"
        )
        return {"holdout_top1": top1}


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """Up to `at_most` different indices from 0 to count - 1; class folders stay balanced."""
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(int).tolist()
