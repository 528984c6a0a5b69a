"""Score a frozen backbone by classifiers that see only a few labels, over several draws.

    dino-kd fewshot backbone=runs/x train=cifar10:/data:train test=cifar10:/data:test
    python -m eval.fewshot backbone=pixels train=... test=... shots=[1,5] classifier=prototype
    torchrun --nproc_per_node=4 -m eval.fewshot backbone=timm:NAME train=... test=...

Nothing is chosen by the test images: each classifier has one fixed setting. docs/few_labels.md
describes the protocol.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino_kd import knn
from dino_kd.classifiers import accuracy, learn_scaling, nearest_mean, ridge
from dino_kd.config import load_settings
from dino_kd.data.splits import draw_fraction, draw_shots, fraction_of
from dino_kd.distributed import is_main_process, process_group
from dino_kd.errors import DataError
from dino_kd.features import FeatureBank
from dino_kd.lengths import parse_length
from dino_kd.logistic import fit_logistic
from dino_kd.schema import FewshotConfig

from .labelled_features import open_labelled, solver_device
from .results import (
    Stopwatch,
    closing_lines,
    features_line,
    make_result,
    result_path,
    save_result,
    title,
)


def main(argv: list[str]) -> int:
    """`dino-kd fewshot a.b=c ...`; returns the exit code."""
    settings = load_settings(FewshotConfig, argv, command="fewshot")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: FewshotConfig, device: torch.device) -> dict[str, Any]:
    """Score one backbone; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, labels absent or of other classes, no readable image, a class
            with fewer images than asked for.
    """
    watch = Stopwatch()
    output = result_path(settings, "fewshot")
    sets = open_labelled(settings, device)
    assert sets.train.labels is not None  # checked when it was opened
    check_shots(sets.train.labels, sets.class_names, settings, "images")
    bank, queries = sets.features()
    assert bank.labels is not None
    labels = bank.labels.numpy()
    # again, on every process: broken images have no features
    check_shots(labels, sets.class_names, settings, "readable images")
    watch.lap("features")
    if not is_main_process():
        return {}
    use = solver_device(device)
    results = score_draws(bank, queries, len(sets.class_names), settings, use)
    metrics = dict(evaluate(results))
    watch.lap("classifiers")
    result = make_result(
        "fewshot",
        settings,
        metrics=metrics,
        protocol=sets.subject.protocol | protocol(settings),
        backbone=sets.subject.description,
        data=sets.describe(bank, queries),
        device=device,
        seconds=watch.seconds,
        notes=[
            *fraction_notes(labels, sets.class_names, settings),
            *solver_notes(results),
            *sets.notes(bank),
        ],
    )
    result["draws"] = [drawn.about() for drawn in results]
    print(table(result, settings))
    save_result(result, output)
    return result


@dataclass
class Budget:
    """How many labels a classifier sees: a number per class, or a share such as ``1%``."""

    amount: int | str

    @property
    def key(self) -> str:
        """In the names of metrics: ``shots5`` or ``share1%``."""
        return f"{'shots' if isinstance(self.amount, int) else 'share'}{self.amount}"

    @property
    def in_words(self) -> str:
        """In tables."""
        return f"{self.amount} per class" if isinstance(self.amount, int) else f"{self.amount}"

    def draw(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Rows int64, ascending, that follow from the labels, the amount and `seed` alone."""
        if isinstance(self.amount, int):
            return draw_shots(labels, self.amount, seed)
        return draw_fraction(labels, share_of(self.amount), seed)


@dataclass
class Drawn:
    """One draw of labelled images: percent correct of the test images."""

    budget: Budget
    seed: int
    images: int
    sha256: str
    top1: float
    top5: float
    converged: bool

    def about(self) -> dict[str, Any]:
        """Its row in the JSON."""
        return {
            "labels": self.budget.key,
            "seed": self.seed,
            "images": self.images,
            "sha256": self.sha256,
            "top1": self.top1,
            "top5": self.top5,
            "converged": self.converged,
        }


def budgets(settings: FewshotConfig) -> list[Budget]:
    """Everything that was asked for, once each, in ascending order."""
    shares = {share_of(text): text for text in settings.fractions}
    return [
        *(Budget(n) for n in sorted(set(settings.shots))),
        *(Budget(shares[share]) for share in sorted(shares)),
    ]


def share_of(text: str) -> float:
    """``1%`` is 0.01."""
    return parse_length(text).amount / 100


def score_draws(
    bank: FeatureBank,
    queries: FeatureBank,
    num_classes: int,
    settings: FewshotConfig,
    use: torch.device,
) -> list[Drawn]:
    """Draw, learn and score: every budget with every seed."""
    assert bank.labels is not None
    assert queries.labels is not None
    labels = bank.labels.numpy()
    seeds = range(settings.seed, settings.seed + settings.draws)
    wanted = [(budget, seed) for budget in budgets(settings) for seed in seeds]
    test, truth = queries.features.to(use), queries.labels.to(use)
    results = []
    for budget, seed in tqdm(wanted, desc="draws", disable=None, leave=False):
        rows = torch.from_numpy(budget.draw(labels, seed))
        chosen = bank.indices[rows].numpy()
        found, converged = learn_and_score(
            bank.features[rows].to(use),
            bank.labels[rows].to(use),
            test,
            truth,
            num_classes,
            settings,
        )
        results.append(
            Drawn(
                budget,
                seed,
                len(rows),
                hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
                found["top1"],
                found["top5"],
                converged,
            )
        )
    return results


def learn_and_score(
    features: Tensor,
    labels: Tensor,
    test: Tensor,
    truth: Tensor,
    num_classes: int,
    settings: FewshotConfig,
) -> tuple[dict[str, float], bool]:
    """Percent correct of the test images, and whether the classifier's search converged."""
    scaling = learn_scaling(settings.scaling, features)
    features, test = scaling.apply(features).double(), scaling.apply(test)
    if settings.classifier == "knn":
        found = knn.knn_accuracy(
            test,
            truth,
            features.to(test.dtype),
            labels,
            ks=[settings.k],
            temperature=settings.temperature,
        )
        return found[settings.k], True
    if settings.classifier == "prototype":
        return accuracy(nearest_mean(features, labels, num_classes).logits(test), truth), True
    if settings.classifier == "ridge":
        fitted = ridge(features, labels, num_classes, settings.alpha)
        return accuracy(fitted.logits(test), truth), True
    (fit,) = fit_logistic(features, labels, num_classes, [settings.c])
    return accuracy(fit.logits(test), truth), fit.converged


def check_shots(
    labels: np.ndarray, class_names: list[str], settings: FewshotConfig, what: str
) -> None:
    """Raise DataError when a class has fewer images than the largest number of shots."""
    wanted = max(settings.shots, default=1)
    counts = np.bincount(labels, minlength=len(class_names))
    short = np.flatnonzero(counts < wanted)
    if not len(short):
        return
    smallest = int(short[np.argmin(counts[short])])
    others = f", and {len(short) - 1} more classes have too few" if len(short) > 1 else ""
    raise DataError(
        f"shots: {wanted} labelled images per class were asked for, but class "
        f"{class_names[smallest]!r} has {counts[smallest]} {what} in train{others}; "
        f"use shots of at most {counts[smallest]}, or add images"
        if counts[smallest]
        else f"train: class {class_names[smallest]!r} has no {what}{others}; add images to it, or "
        "take it out"
    )


def evaluate(results: list[Drawn]) -> Iterator[tuple[str, float | None]]:
    """Yield the summary over draws of each budget: ``shots5_top1`` is the mean, in percent.

    ``_sd`` is the standard deviation of single draws, ``_ci95`` half the width of the 95 %
    interval of the mean (Student's t); both are None for one draw.
    """
    for key in dict.fromkeys(drawn.budget.key for drawn in results):
        same = [drawn for drawn in results if drawn.budget.key == key]
        for name, values in (
            ("top1", [drawn.top1 for drawn in same]),
            ("top5", [drawn.top5 for drawn in same]),
        ):
            deviation = statistics.stdev(values) if len(values) > 1 else None
            yield f"{key}_{name}", statistics.fmean(values)
            yield f"{key}_{name}_sd", deviation
            yield f"{key}_{name}_min", min(values)
            yield f"{key}_{name}_max", max(values)
            yield f"{key}_{name}_ci95", half_interval(deviation, len(values))


def half_interval(deviation: float | None, count: int) -> float | None:
    """Half the 95 % interval of a mean of `count` values, by Student's t."""
    if deviation is None:
        return None
    from scipy.special import stdtrit  # scipy.stats takes seconds to import

    return float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)


def protocol(settings: FewshotConfig) -> dict[str, Any]:
    """How a few labels become a class."""
    own: dict[str, dict[str, Any]] = {
        "logreg": {"c": settings.c, "loss": "sum of cross-entropies + |W|^2 / (2 c)"},
        "ridge": {"alpha": settings.alpha, "loss": "sum of squares + alpha |W|^2"},
        "knn": {"k": settings.k, "temperature": settings.temperature, "distance": "cosine"},
        "prototype": {"distance": "Euclidean"},
    }
    return {
        "classifier": settings.classifier,
        **own[settings.classifier],
        "scaling": settings.scaling,
        "labels": [budget.in_words for budget in budgets(settings)],
        "draws": settings.draws,
        "seeds": [settings.seed, settings.seed + settings.draws - 1],
        "nested": True,
        "interval": "95 % of the mean over draws, Student's t; the test images are fixed",
    }


def fraction_notes(
    labels: np.ndarray, class_names: list[str], settings: FewshotConfig
) -> list[str]:
    """The sentence about every share that would leave a class without a label."""
    counts = np.bincount(labels, minlength=len(class_names))
    found = []
    for budget in budgets(settings):
        if isinstance(budget.amount, int):
            continue
        empty = [
            y for y, n in enumerate(counts) if n and not fraction_of(n, share_of(budget.amount))
        ]
        if empty:
            first = empty[0]
            found.append(
                f"{budget.amount} of {len(empty)} classes is less than half an image (such as "
                f"{class_names[first]!r}, {counts[first]} images): one image of each is used"
            )
    return found


def solver_notes(results: list[Drawn]) -> list[str]:
    """The sentence about searches that did not end."""
    stopped = [drawn for drawn in results if not drawn.converged]
    if not stopped:
        return []
    first = stopped[0]
    return [
        f"logistic regression did not converge in {len(stopped)} of {len(results)} draws, such as "
        f"{first.budget.in_words}, seed {first.seed}; use a smaller c"
    ]


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows: every budget's mean and interval."""
    return [
        (f"few-shot top-1 %, {label}", in_numbers(result["metrics"], key))
        for key, label in labels_of(result).items()
    ]


def labels_of(result: dict[str, Any]) -> dict[str, str]:
    """The budgets of a result: the name in the metrics, and in words."""
    keys = dict.fromkeys(drawn["labels"] for drawn in result["draws"])
    return dict(zip(keys, result["protocol"]["labels"], strict=True))


def in_numbers(metrics: dict[str, Any], key: str) -> str:
    """Such as ``41.20 +- 0.83``."""
    interval = metrics[f"{key}_top1_ci95"]
    more = "" if interval is None else f" +- {interval:.2f}"
    return f"{metrics[f'{key}_top1']:.2f}{more}"


def table(result: dict[str, Any], settings: FewshotConfig) -> str:
    """The numbers for the console."""
    data, seconds, metrics = result["data"], result["seconds"], result["metrics"]
    images = {drawn["labels"]: drawn["images"] for drawn in result["draws"]}
    lines = [
        title(f"few labels ({settings.classifier})", settings, result["backbone"]),
        f"{'labels':>14}  {'images':>7}  {'top-1 %':>8}  {'+- 95 %':>7}  {'sd':>5}  {'min':>6}  "
        f"{'max':>6}  {'top-5 %':>8}",
    ]
    for key, label in labels_of(result).items():
        top1 = f"{key}_top1"
        spread = [
            "-" if metrics[f"{top1}_{name}"] is None else f"{metrics[f'{top1}_{name}']:.2f}"
            for name in ("ci95", "sd", "min", "max")
        ]
        lines.append(
            f"{label:>14}  {images[key]:7,}  {metrics[top1]:8.2f}  {spread[0]:>7}  {spread[1]:>5}  "
            f"{spread[2]:>6}  {spread[3]:>6}  {metrics[f'{key}_top5']:8.2f}"
        )
    draws = f"{settings.draws} draws" if settings.draws > 1 else "1 draw, so no interval"
    lines.append(
        f"{draws}; {data['test']['images']:,} test images, drawn from "
        f"{data['train']['images']:,}, {data['train']['classes']} classes; "
        f"{features_line(result)}, classifiers {seconds['classifiers']:.1f} s"
    )
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
