"""From the scores of all arms to one table and one sentence: does distillation help?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dino_kd.metrics.paired import (
    accuracy_interval,
    bootstrap_difference,
    gap_recovered,
    mcnemar,
    seed_noise,
)

ORDER = ("scratch", "scratch_plus", "kd", "control")
_NAMES = {"top1": "top-1", "knn20_top1": "k-NN"}
_PARTNERS = {"scratch_plus": "equal time", "scratch": "equal steps"}


@dataclass(frozen=True)
class Scored:
    """One network on the test images.

    Attributes:
        metrics: top1, knn20_top1, agreement (percent), kl (nats); what there is.
        hits: for "top1" and "knn20_top1" whether each of the N images is right, bool ``[N]``.
        steps, seconds: of its training; None for a teacher.
    """

    metrics: Mapping[str, float]
    hits: Mapping[str, np.ndarray]
    steps: int | None = None
    seconds: float | None = None


def judge(
    arms: Mapping[str, Sequence[Scored]], teacher: Scored, *, student: str, seeds: Sequence[int]
) -> dict[str, Any]:
    """Rows, differences, gap, noise and verdict of one student, as they are written to JSON.

    Args:
        arms: by name, one entry for each of `seeds`, all on the same N images.
        teacher: on the same images.
        student: its name.
        seeds: of the arms.

    The measure is top-1 where every arm has class scores, else k-NN.
    """
    everyone = [one for several in arms.values() for one in several]
    measure = "top1" if all("top1" in one.hits for one in everyone) else "knn20_top1"
    present = [arm for arm in ORDER if arm in arms]
    hits = {arm: np.stack([one.hits[measure] for one in arms[arm]]) for arm in present}
    rows = [_row("teacher", [teacher], measure)]
    rows += [_row(arm, arms[arm], measure) for arm in present]
    differences = {
        arm: _difference(hits["kd"], hits[arm]) for arm in present if arm != "kd" and "kd" in hits
    }
    noise = seed_noise(hits["scratch"]) if "scratch" in hits else None
    gap = None
    if "kd" in hits and "scratch" in hits and measure in teacher.metrics:
        accuracy = {arm: 100 * float(hits[arm].mean()) for arm in ("kd", "scratch")}
        gap = gap_recovered(accuracy["kd"], accuracy["scratch"], teacher.metrics[measure])
    return {
        "student": student,
        "measure": measure,
        "test_images": len(next(iter(hits.values()))[0]),
        "seeds": list(seeds),
        "rows": rows,
        "differences": differences,
        "gap_recovered": gap,
        "seed_noise": noise,
        "verdict": verdict(differences, noise, measure, seeds=len(seeds)),
    }


def verdict(
    differences: Mapping[str, Mapping[str, float]],
    noise: Mapping[str, float] | None,
    measure: str,
    *,
    seeds: int = 1,
) -> dict[str, str] | None:
    """A name for programs and a sentence for people; None when kd has nothing to be held against.

    Equal time counts before equal steps. A gain that the control teacher brings too is no
    knowledge; a difference below what other seeds make is inconclusive: means over n seeds move by
    1 / sqrt(n) of what one seed does.
    """
    control = differences.get("control")
    partner = next((arm for arm in _PARTNERS if arm in differences), None)
    what = _NAMES[measure]
    if partner is None:
        return None if control is None else _against_control(control, what)
    found = differences[partner]
    said = f"{_points(found)} of {what} over {_PARTNERS[partner]} ({_interval(found)})"
    floor = 0.0 if noise is None else noise["difference"] / math.sqrt(seeds)
    if 0 < abs(found["points"]) < floor:
        beside = f"another seed alone makes {noise['difference']:.1f}"  # type: ignore[index]
        several = f", {floor:.1f} in the mean of {seeds}" if seeds > 1 else ""
        return _made("INCONCLUSIVE", f"inconclusive: {said}, but {beside}{several}")
    if found["high"] < 0:
        return _made("HURTS", f"distillation hurts: {said}")
    if found["low"] <= 0:
        return _made("NO-EFFECT", f"no effect that these images can show: {said}")
    if control is not None and control["low"] <= 0:
        beside = f"kd is {_points(control)} from it ({_interval(control)})"
        return _made(
            "NOT-KNOWLEDGE",
            f"no knowledge: the control teacher helps as much; {said}, but {beside}",
        )
    over = f"; {_points(control)} over a control teacher" if control else ""
    return _made("HELPS", f"distillation helps: {said}{over}")


def as_lines(result: Mapping[str, Any]) -> list[str]:
    """The table in Markdown, then differences, gap, noise and verdict, a line each."""
    measure = _NAMES[result["measure"]]
    head = ["arm", "steps", "training s", "top-1 % (95 % CI)", "k-NN %", "agreement %", "KL nats"]
    lines = [
        f"{result['student']}: {result['test_images']:,} test images, "
        f"seeds {', '.join(map(str, result['seeds']))}",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
    ]
    for row in result["rows"]:
        top = row.get("top1")
        cells = [
            row["arm"], _shown(row["steps"], ",.0f"), _shown(row["seconds"], ",.1f"),
            "" if top is None else f"{top['value']:.2f} ({top['low']:.2f} to {top['high']:.2f})",
            _shown(row["knn20_top1"], ".2f"), _shown(row["agreement"], ".1f"),
            _shown(row["kl"], ".3f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for arm, found in result["differences"].items():
        lines.append(
            f"- kd - {arm}: {_points(found)} of {measure} ({_interval(found)}), "
            f"McNemar p = {found['mcnemar_p']:.2g}"
        )
    if "scratch" in result["differences"]:
        gap = result["gap_recovered"]
        told = "undefined: the teacher is not 1 point better than scratch"
        lines.append(f"- gap recovered: {told if gap is None else f'{100 * gap:.0f} %'}")
    if result["seed_noise"]:
        noise = result["seed_noise"]
        lines.append(
            f"- another seed of scratch alone: {noise['difference']:.2f} points, "
            f"{noise['churn']:.1f} % of the images change"
        )
    lines += [f"- {line}" for line in result.get("notes", [])]
    if result["verdict"]:
        lines += ["", f"**{result['verdict']['sentence']}**"]
    return lines


def _row(arm: str, scored: Sequence[Scored], measure: str) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [one.metrics[name] for one in scored if name in one.metrics]
        return statistics.fmean(values) if len(values) == len(scored) else None

    def of_training(name: str) -> float | None:
        values = [value for one in scored if (value := getattr(one, name)) is not None]
        return statistics.fmean(values) if values else None

    row: dict[str, Any] = {"arm": arm, "steps": of_training("steps")}
    row["seconds"] = of_training("seconds")
    for name in ("top1", "knn20_top1"):
        if all(name in one.hits for one in scored):
            estimate = accuracy_interval(np.stack([one.hits[name] for one in scored]))
            row[name] = estimate._asdict() if name == "top1" else estimate.value
            if name == "knn20_top1":
                row["knn20_top1_interval"] = [estimate.low, estimate.high]
    row.setdefault("knn20_top1", None)
    return row | {name: mean(name) for name in ("agreement", "kl")}


def _difference(kd: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Points, interval, and the largest p over the seeds: no seed speaks for another."""
    value, low, high = bootstrap_difference(kd, other)
    p = max(mcnemar(a, b) for a, b in zip(kd, other, strict=True))
    return {"points": value, "low": low, "high": high, "mcnemar_p": p}


def _against_control(control: Mapping[str, float], what: str) -> dict[str, str]:
    said = f"{_points(control)} of {what} over a control teacher ({_interval(control)})"
    if control["high"] < 0:
        return _made("HURTS", f"the control teacher is the better one: {said}")
    if control["low"] <= 0:
        return _made("NOT-KNOWLEDGE", f"no knowledge: the control teacher helps as much: {said}")
    return _made("KNOWLEDGE", f"the teacher's knowledge arrives: {said}; no arm without teacher")


def _made(name: str, sentence: str) -> dict[str, str]:
    return {"name": name, "sentence": sentence}


def _points(found: Mapping[str, float]) -> str:
    return f"{found['points']:+.1f} points"


def _interval(found: Mapping[str, float]) -> str:
    return f"95 % CI {found['low']:.1f} to {found['high']:.1f}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
