"""Score a frozen backbone by linear classifiers on its features.

    dino-kd linear backbone=runs/x train=cifar10:/data:train test=cifar10:/data:test
    python -m eval.linear backbone=pixels train=/images/train test=/images/test
    torchrun --nproc_per_node=4 -m eval.linear mode=augmented backbone=timm:NAME train=... test=...

A grid of heads trains at once; a held-out part of the training images chooses the winner, the test
images only score it. docs/probes.md describes the protocol.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dino_kd.config import load_settings
from dino_kd.data.dataset import labels_as, require_labels, subset
from dino_kd.data.splits import labelled_part
from dino_kd.distributed import is_main_process, process_group
from dino_kd.features import FeatureBank
from dino_kd.linear import Tally, choose_head
from dino_kd.models.linear_head import (
    LinearHead,
    fraction_name,
    head_file,
    save_linear_head,
)
from dino_kd.schema import LinearConfig

from .probe import LR_BATCH, MOMENTUM, Probe
from .probe_features import rows_of
from .results import (
    Stopwatch,
    closing_lines,
    describe_images,
    features_line,
    make_result,
    notes_on_sets,
    result_path,
    save_result,
    title,
)
from .subject import open_images, open_subject


def main(argv: list[str]) -> int:
    """`dino-kd linear a.b=c ...`; returns the exit code."""
    settings = load_settings(LinearConfig, argv, command="linear")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


def score(settings: LinearConfig, device: torch.device) -> dict[str, Any]:
    """Train and score the heads; every process of a torchrun job calls this, the main one reports.

    Returns the result as it is written to JSON (empty on other processes).

    Raises:
        UserError: no such backbone, labels absent or of other classes, too few images, every head
            diverged.
    """
    watch = Stopwatch()
    output = result_path(settings, f"linear{fraction_name(settings.fraction)}")
    subject = open_subject(settings, device)
    train = open_images(settings, "train", subject.channels)
    test = open_images(settings, "test", subject.channels)
    require_labels(train, "train")
    assert train.class_names is not None  # it has labels
    test_labels = torch.from_numpy(labels_as(test, train.class_names, "test"))
    if settings.fraction < 1:
        assert train.labels is not None  # required before
        train = subset(train, labelled_part(train.labels, settings.fraction, settings.seed))
    probe = Probe(settings, subject, train)
    probe.extract()
    queries = subject.features(test, "test", probe.extracted)
    queries.labels = test_labels[queries.indices]
    watch.lap("features")
    probe.train_all()
    watch.lap("training")
    head = probe.final_head()
    watch.lap("retraining")
    if not is_main_process():
        return {}
    metrics = dict(evaluate(head, queries))
    inputs = describe_inputs(probe, queries)
    watch.lap("scoring")
    name, rate = probe.winner
    result = make_result(
        "linear",
        settings,
        metrics=metrics | {"held_out_top1": probe.scores[name][rate].top1},
        protocol=subject.protocol | training_protocol(probe),
        backbone=subject.description,
        data={"train": describe_train(probe), "test": describe_images(test, queries)},
        device=device,
        seconds=watch.seconds,
        notes=[*probe.notes, *notes_on_rates(probe), *notes_on_sets(train, test)],
    )
    result["winner"] = {
        "input": name,
        "parts": list(head.parts),
        "learning_rate": settings.learning_rates[rate],
        "peak_learning_rate": probe.rates[rate],
        "retrained": probe.retrains,
    }
    result |= {"inputs": inputs, "heads": describe_heads(probe)}
    print(table(result, settings))
    if output is not None:
        save_linear_head(head, head_path(settings, output))
        print(f"head written to {head_path(settings, output)}")
    save_result(result, output)
    return result


def evaluate(head: LinearHead, queries: FeatureBank) -> Iterator[tuple[str, float]]:
    """Yield ``("linear_top1", percent)`` and ``("linear_top5", percent)`` of one head."""
    assert queries.labels is not None  # set from the class names of train
    tally = Tally(1)
    with torch.no_grad():
        for rows in torch.arange(len(queries.features)).split(4096):
            logits = head({name: queries.part(name)[rows] for name in head.parts})
            tally.add(logits[:, None], queries.labels[rows])
    (found,) = tally.scores()
    yield "linear_top1", found.top1
    yield "linear_top5", found.top5


def training_protocol(probe: Probe) -> dict[str, Any]:
    """How the heads were trained, and how one of them was chosen."""
    settings = probe.settings
    return {
        "mode": settings.mode,
        "augmentation": "none"
        if probe.is_cached
        else "random resized crop, scale 0.08 to 1, aspect 3/4 to 4/3, bicubic; horizontal flip",
        "inputs": {name: list(parts) for name, parts in probe.layout.inputs.items()},
        "learning_rates": settings.learning_rates,
        "learning_rate_rule": f"rate * train_batch / {LR_BATCH}, cosine to 0, no warm-up",
        "optimiser": f"SGD, momentum {MOMENTUM}, no weight decay, heads start from zero",
        "epochs": settings.epochs,
        "train_batch": probe.batch_size,
        "fraction": settings.fraction,
        "held_out": settings.held_out,
        "choice": "held-out top-1, then held-out cross-entropy",
        "retrained_on_all_images": probe.retrains,
        "seed": settings.seed,
    }


def describe_train(probe: Probe) -> dict[str, Any]:
    """The training images: what fitted the heads, what chose among them, what was broken."""
    fit, held_out = (probe.readable(p) for p in (probe.split.fit, probe.split.held_out))
    return {
        "spec": probe.train.spec,
        "images": fit + held_out,
        "fit": fit,
        "held_out": held_out,
        "classes": len(probe.class_names),
        "broken": len(probe.broken),
        "broken_paths": [str(b) for b in [*probe.broken.values()][:20]],
        "cached": probe.bank.cached and probe.is_cached,
    }


def describe_heads(probe: Probe) -> list[dict[str, Any]]:
    """Every head of the grid with its held-out scores; null for one that diverged."""
    heads = []
    for name, scores in probe.scores.items():
        for rate, score, finite in zip(
            probe.settings.learning_rates, scores, probe.finite[name], strict=True
        ):
            whole = finite and math.isfinite(score.cross_entropy)
            heads.append(
                {
                    "input": name,
                    "learning_rate": rate,
                    "held_out_top1": score.top1 if whole else None,
                    "held_out_cross_entropy": score.cross_entropy if whole else None,
                    "diverged": not whole,
                }
            )
    return heads


def describe_inputs(probe: Probe, queries: FeatureBank) -> list[dict[str, Any]]:
    """For each input its best head by the held-out images, and that head's test top-1.

    Null where every head of an input has diverged. No other head sees the test images.
    """
    rows = rows_of(queries, probe.layout, torch.arange(len(queries.features)), probe.subject.device)
    rates = probe.settings.learning_rates
    found = []
    for name, scores in probe.scores.items():
        best = choose_head({name: scores}, probe.finite)
        row: dict[str, Any] = {"input": name, "learning_rate": None}
        row |= {"held_out_top1": None, "test_top1": None}
        if best is not None:
            tally = Tally(1)
            for features, labels in rows.batches(len(rates) * len(probe.class_names)):
                chosen = probe.grid.logits(features, name)[:, best[1] : best[1] + 1]
                tally.add(chosen, labels)
            row["learning_rate"] = rates[best[1]]
            row["held_out_top1"] = scores[best[1]].top1
            row["test_top1"] = tally.scores()[0].top1
        found.append(row)
    return found


def notes_on_rates(probe: Probe) -> list[str]:
    """Sentences about a winner at the edge of the grid, and about heads that diverged."""
    notes = []
    rates, (name, position) = probe.settings.learning_rates, probe.winner
    best = rates[position]
    if len(set(rates)) > 1 and best in (min(rates), max(rates)):
        edge, factors = ("smallest", (0.1, 0.3)) if best == min(rates) else ("largest", (3, 10))
        further = ", ".join(f"{best * factor:.3g}" for factor in factors)
        notes.append(
            f"the best learning rate of {name}, {best:g}, is the {edge} of the grid; a better one "
            f"may lie beyond: add {further} to learning_rates"
        )
    diverged = sum(head["diverged"] for head in describe_heads(probe))
    if diverged:
        total = len(rates) * len(probe.scores)
        notes.append(f"{diverged} of {total} heads diverged and were left out")
    return notes


def head_path(settings: LinearConfig, output: Path) -> Path:
    """eval/linear_head_BRANCH.safetensors of a run directory, else OUTPUT_head.safetensors."""
    if settings.output is None:
        return output.with_name(head_file(settings.branch, settings.fraction))
    return output.with_name(f"{output.stem}_head.safetensors")


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of a suite shows."""
    return [("linear probe top-1 %", f"{result['metrics']['linear_top1']:.2f}")]


def table(result: dict[str, Any], settings: LinearConfig) -> str:
    """The numbers for the console."""
    data, seconds, metrics = result["data"], result["seconds"], result["metrics"]
    winner = result["winner"]
    lines = [
        title("linear probe", settings, result["backbone"]),
        f"{'input':<12}  {'best lr':>8}  {'held-out %':>10}  {'test %':>7}",
    ]
    for row in result["inputs"]:
        if row["learning_rate"] is None:
            lines.append(f"{row['input']:<12}  every head diverged")
            continue
        mark = "  <- chosen" if row["input"] == winner["input"] else ""
        lines.append(
            f"{row['input']:<12}  {row['learning_rate']:>8g}  {row['held_out_top1']:>10.2f}  "
            f"{row['test_top1']:>7.2f}{mark}"
        )
    trained = "all" if winner["retrained"] else "the"
    count = data["train"]["images" if winner["retrained"] else "fit"]
    lines += [
        f"linear top-1 {metrics['linear_top1']:.2f} %, top-5 {metrics['linear_top5']:.2f} %: "
        f"{winner['input']} at {winner['learning_rate']:g}, trained on {trained} {count:,} images"
        + ("" if winner["retrained"] else " that were not held out"),
        f"{data['test']['images']:,} test images, {data['train']['fit']:,} train and "
        f"{data['train']['held_out']:,} choose among {len(result['heads'])} heads, "
        f"{data['train']['classes']} classes; {features_line(result)}, "
        f"training {seconds['training'] + seconds['retraining']:.1f} s",
    ]
    return "\n".join(lines + closing_lines(result))


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
