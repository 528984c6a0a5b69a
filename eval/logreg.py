"""Score a frozen backbone by multinomial logistic regression on its features.

    dino-kd logreg backbone=runs/x train=cifar10:/data:train test=cifar10:/data:test
    python -m eval.logreg backbone=pixels train=/images/train test=/images/test
    torchrun --nproc_per_node=4 -m eval.logreg backbone=timm:NAME train=... test=...

The strength of the penalty is chosen on held-out training images; the test images are scored once.
docs/few_labels.md describes the protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dino_kd.classifiers import accuracy, learn_scaling
from dino_kd.config import load_settings
from dino_kd.data.splits import holdout
from dino_kd.distributed import is_main_process, process_group
from dino_kd.errors import DataError
from dino_kd.features import FeatureBank
from dino_kd.logistic import LogisticFit, fit_logistic
from dino_kd.schema import LogregConfig

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
    """`dino-kd logreg a.b=c ...`; returns the exit code."""
    settings = load_settings(LogregConfig, argv, command="logreg")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: LogregConfig, device: torch.device) -> dict[str, Any]:
    """Score one backbone; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, labels absent or of other classes, no readable image, no
            image can be held out.
    """
    watch = Stopwatch()
    output = result_path(settings, "logreg")
    sets = open_labelled(settings, device)
    bank, queries = sets.features()
    watch.lap("features")
    split = hold_out(bank, settings)  # on every process, so that all of them meet its error
    if not is_main_process():
        return {}
    use = solver_device(device)
    sweep = sweep_c(bank, split, len(sets.class_names), settings, use)
    watch.lap("sweep")
    chosen = choose_c(sweep)
    fit, metrics = refit(bank, queries, chosen, len(sets.class_names), settings, use)
    watch.lap("refit")
    result = make_result(
        "logreg",
        settings,
        metrics=metrics | held_out_metrics(chosen),
        protocol=sets.subject.protocol | protocol(settings, split, chosen),
        backbone=sets.subject.description,
        data=sets.describe(bank, queries),
        device=device,
        seconds=watch.seconds,
        notes=[*solver_notes(sweep, fit, chosen, settings), *sets.notes(bank)],
    )
    result["sweep"] = [row.about() for row in sweep]
    print(table(result, settings))
    save_result(result, output)
    return result


@dataclass
class Split:
    """Rows of the bank that fit, and rows that choose c; the latter empty when there is one c."""

    fit: Tensor
    held_out: Tensor


@dataclass
class SweptC:
    """One c of the sweep: how the search ended, and percent correct of the held-out images."""

    fit: LogisticFit
    top1: float
    top5: float

    def about(self) -> dict[str, Any]:
        """Its row in the JSON."""
        return {
            "c": self.fit.c,
            "held_out_top1": self.top1,
            "held_out_top5": self.top5,
            **search_summary(self.fit),
        }


def hold_out(bank: FeatureBank, settings: LogregConfig) -> Split:
    """Divide the training images. Raises DataError when none can be spared."""
    assert bank.labels is not None  # checked when the datasets were opened
    if len(settings.c) == 1:
        return Split(torch.arange(len(bank.labels)), torch.arange(0))
    fit, held_out = holdout(bank.labels.numpy(), settings.held_out, settings.seed)
    if not len(held_out):
        raise DataError(
            "train: every class has a single readable image, so none can be held out to choose c; "
            "give one value, such as c=1"
        )
    return Split(torch.from_numpy(fit), torch.from_numpy(held_out))


def sweep_c(
    bank: FeatureBank, split: Split, num_classes: int, settings: LogregConfig, use: torch.device
) -> list[SweptC]:
    """Fit every c, ascending, each from the one before; percent correct on the held-out images."""
    assert bank.labels is not None
    if not len(split.held_out):
        return []
    features = bank.features[split.fit].to(use)
    scaling = learn_scaling(settings.scaling, features)
    held_out = scaling.apply(bank.features[split.held_out].to(use))
    held_out_labels = bank.labels[split.held_out].to(use)
    cs = sorted(set(settings.c))
    fits = fit_logistic(
        scaling.apply(features),
        bank.labels[split.fit].to(use),
        num_classes,
        cs,
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
    )
    swept = []
    for fit in tqdm(fits, desc="c", total=len(cs), disable=None, leave=False):
        found = accuracy(fit.logits(held_out), held_out_labels)
        swept.append(SweptC(fit, found["top1"], found["top5"]))
    return swept


def choose_c(sweep: list[SweptC]) -> SweptC | None:
    """The best on the held-out images, the smallest c among equals; None without a sweep."""
    return max(sweep, key=lambda row: (row.top1, -row.fit.c), default=None)


def refit(
    bank: FeatureBank,
    queries: FeatureBank,
    chosen: SweptC | None,
    num_classes: int,
    settings: LogregConfig,
    use: torch.device,
) -> tuple[LogisticFit, dict[str, Any]]:
    """Fit all training images with the chosen c, and score the test images."""
    assert bank.labels is not None
    c = settings.c[0] if chosen is None else chosen.fit.c
    features = bank.features.to(use)
    scaling = learn_scaling(settings.scaling, features)
    (fit,) = fit_logistic(
        scaling.apply(features),
        bank.labels.to(use),
        num_classes,
        [c],
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
    )
    queries_scaled = FeatureBank(
        scaling.apply(queries.features.to(use)), queries.labels, queries.indices
    )
    return fit, dict(evaluate(fit, queries_scaled))


def evaluate(fit: LogisticFit, queries: FeatureBank) -> Iterator[tuple[str, float]]:
    """Yield ``("logreg_top1", percent)`` and ``("logreg_top5", percent)`` of scaled features."""
    assert queries.labels is not None
    labels = queries.labels.to(queries.features.device)
    for name, percent in accuracy(fit.logits(queries.features), labels).items():
        yield f"logreg_{name}", percent


def held_out_metrics(chosen: SweptC | None) -> dict[str, float]:
    """What the chosen c scored where it was chosen."""
    return {} if chosen is None else {"held_out_top1": chosen.top1, "held_out_top5": chosen.top5}


def search_summary(fit: LogisticFit) -> dict[str, Any]:
    """How a search ended."""
    return {
        "loss": fit.loss,
        "iterations": fit.iterations,
        "gradient": fit.gradient,
        "converged": fit.converged,
    }


def protocol(settings: LogregConfig, split: Split, chosen: SweptC | None) -> dict[str, Any]:
    """How features become a class."""
    return {
        "classifier": "multinomial logistic regression, intercept not penalised",
        "loss": "sum of cross-entropies + |W|^2 / (2 c)",
        "scaling": settings.scaling,
        "c": settings.c[0] if chosen is None else chosen.fit.c,
        "c_tried": sorted(set(settings.c)),
        "c_chosen_on": f"{len(split.held_out)} held-out training images"
        if chosen
        else "not chosen",
        "fitted_for_choice": len(split.fit) if chosen else 0,
        "refitted_on": "all training images",
        "solver": "L-BFGS along the principal axes",
        "tolerance": settings.tolerance,
    }


def solver_notes(
    sweep: list[SweptC], fit: LogisticFit, chosen: SweptC | None, settings: LogregConfig
) -> list[str]:
    """Sentences about a choice at the edge of the grid and about searches that did not end."""
    found = []
    if chosen is not None:
        edges = {sweep[0].fit.c: "smallest", sweep[-1].fit.c: "largest"}
        if chosen.fit.c in edges:
            found.append(
                f"the chosen c = {chosen.fit.c:g} is the {edges[chosen.fit.c]} that was tried: a "
                "better one may lie beyond; widen c"
            )
    unfinished = [row.fit for row in sweep if not row.fit.converged]
    if unfinished:
        cs = ", ".join(f"{each.c:g}" for each in unfinished)
        found.append(f"the search for c = {cs} {unfinished_in_words(unfinished[-1], settings)}")
    if not fit.converged:
        found.append(f"the final fit {unfinished_in_words(fit, settings)}")
    return found


def unfinished_in_words(fit: LogisticFit, settings: LogregConfig) -> str:
    """Why a search ended early, and which setting helps."""
    remedy = (
        "raise max_iterations"
        if fit.iterations >= settings.max_iterations
        else "single precision goes no further: raise tolerance"
    )
    return (
        f"did not converge: gradient {fit.gradient:.2g} after {fit.iterations} steps, "
        f"tolerance={settings.tolerance:g}; {remedy}"
    )


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows."""
    return [("logistic regression top-1 %", f"{result['metrics']['logreg_top1']:.2f}")]


def table(result: dict[str, Any], settings: LogregConfig) -> str:
    """The numbers for the console."""
    data, seconds, metrics = result["data"], result["seconds"], result["metrics"]
    lines = [title("logistic regression", settings, result["backbone"])]
    if result["sweep"]:
        lines.append(f"{'c':>8}  {'held-out top-1 %':>16}  {'steps':>5}")
    for row in result["sweep"]:
        mark = "  <- chosen" if row["c"] == result["protocol"]["c"] else ""
        lines.append(f"{row['c']:8.3g}  {row['held_out_top1']:16.2f}  {row['iterations']:5}{mark}")
    lines.append(
        f"test: top-1 {metrics['logreg_top1']:.2f} %, top-5 {metrics['logreg_top5']:.2f} % "
        f"with c = {result['protocol']['c']:g}"
    )
    lines.append(
        f"{data['test']['images']:,} test images, {data['train']['images']:,} to learn from, "
        f"{data['train']['classes']} classes; {features_line(result)}, "
        f"sweep {seconds['sweep']:.1f} s, refit {seconds['refit']:.1f} s"
    )
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
