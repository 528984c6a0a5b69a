"""Does the student follow its teacher? Numbers of the log, and the sentences they justify."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

_IN_A_ROW = 3  # rows that must agree: one batch is no proof
_BALANCED = (0.1, 10.0)  # gradient of the teachers' terms over that of the labels
_LEAST_SPREAD = 0.01  # variance of a projection over its target's
_HIGH_KL = 0.5  # nats
_STILL_FALLING = 0.05  # share of the middle's KL that the last fifth must have gained
_STILL_RISING = 1.0  # points of agreement, likewise
_FOLLOWS = 90.0  # agreement in percent that is no gap, whatever the KL
_FEWEST_ROWS = 5


class _Point(NamedTuple):
    step: int
    kl: float
    agreement: float


class FidelityMonitor:
    """A hook that reads each row of metrics and warns once, in words, about each known trouble.

    Nothing is said in the first tenth of the run (at least 100 steps); a finding must hold in three
    rows in a row.

    Args:
        warn: takes a sentence.
        total_steps: of the run.
        past: rows of metrics with their "step", from before a resume: they count, and what they
            justified has been said.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        *,
        total_steps: int,
        past: Iterable[Mapping[str, float]] = (),
    ) -> None:
        self.warn = warn
        self.total_steps = total_steps
        self.quiet_until = max(100, total_steps // 10)
        self.said: set[str] = set()
        self.in_a_row: Counter[str] = Counter()
        self.points: list[_Point] = []
        for row in past:
            self.said.update(name for name, _ in self._found(int(row["step"]), row))

    def __call__(self, done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        for name, sentence in self._found(done, row):
            if name not in self.said:
                self.said.add(name)
                self.warn(f"step {done}: {sentence}")
        return {}

    def _found(self, done: int, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Names and sentences of what this row proves, together with those before it."""
        if not row:
            return
        if "kl" in row and "agreement" in row:
            self.points.append(_Point(done, row["kl"], row["agreement"]))
        if done < self.quiet_until:
            return
        for name, sentence in diagnose(row, done).items():
            self.in_a_row[name] = self.in_a_row[name] + 1 if sentence else 0
            if self.in_a_row[name] >= _IN_A_ROW:
                yield name, sentence
        if done == self.total_steps:
            steps, kl, agreement = zip(*self.points, strict=True) if self.points else ((), (), ())
            if sentence := capacity_gap(steps, kl, agreement, self.total_steps):
                yield "capacity", sentence


def diagnose(row: Mapping[str, float], done: int) -> dict[str, str]:
    """For every finding that one row of metrics can tell: a sentence, or "" when it is healthy.

    Gradients are in rows that compared them, ``r2/NAME`` and ``spread/NAME`` in those of terms
    with a projector; of what a row lacks nothing is told.
    """
    found: dict[str, str] = {}
    if "gradient_cosine" in row:
        cosine = row["gradient_cosine"]
        found["conflict"] = "" if cosine >= 0 else (
            f"labels and teacher pull in opposite directions (cosine of their gradients "
            f"{cosine:.2f}). Usual cures: terms.NAME.fade for the teacher's terms, a lower weight "
            "of the smaller goal, and a look at the teacher's accuracy on these images: its "
            "classes may be in another order"
        )  # fmt: skip
    if "gradient_ratio" in row:
        found["imbalance"] = _imbalance(row["gradient_ratio"])
    for key, value in row.items():
        kind, _, name = key.partition("/")
        if kind == "spread":
            found[f"collapsed/{name}"] = "" if value >= _LEAST_SPREAD else (
                f"the projector of {name} answers all images alike (its spread is {value:.4f} of "
                f"the teacher's): collapsed. Usual cures: a lower optim.base_lr, a longer "
                f"optim.warmup, a larger terms.{_setting(name)}.weight"
            )  # fmt: skip
        elif kind == "r2":
            found[f"unread/{name}"] = "" if value > 0 else (
                f"the projection of {name} is no nearer to the teacher's features than their mean "
                f"is (R2 {value:.2f}). Usual cures: a larger terms.{_setting(name)}.weight, a "
                "longer run, a finer map or another student"
            )  # fmt: skip
    skipped = row.get("skipped_steps", 0.0)
    found["skipped"] = "" if skipped <= 0.05 * done else (
        f"{skipped:.0f} of {done} steps were skipped because loss or gradient was not finite. "
        "Usual cures: optim.precision=bf16 or fp32, a lower optim.base_lr"
    )  # fmt: skip
    return found


def capacity_gap(
    steps: Sequence[int], kl: Sequence[float], agreement: Sequence[float], total_steps: int
) -> str:
    """A sentence when the student has stopped to approach its teacher far from it, else "".

    Compared are the means over the middle fifth of the run and over the last one. All of: KL in
    the last is above 0.5 nats, it has fallen by less than 5 %, agreement is below 90 % and has
    risen by less than 1 point. These are training images, so neither coverage nor overfitting is
    the reason; KL leaves the teacher's own entropy out, so a soft teacher is none either; and
    agreement does not see the scale of the logits, which `logit_kd.standardise` leaves free.

    Args:
        steps: of the rows, 1..total_steps.
        kl: KL(teacher || student) in nats.
        agreement: on the best class, in percent.
        total_steps: of the run. Fewer than 5 rows in a fifth tell nothing.
    """
    rows = list(zip(steps, kl, agreement, strict=True))
    middle = [row for row in rows if 0.4 < row[0] / total_steps <= 0.6]
    last = [row for row in rows if row[0] / total_steps > 0.8]
    if min(len(middle), len(last)) < _FEWEST_ROWS:
        return ""
    kl_before, kl_now = (statistics.fmean(row[1] for row in part) for part in (middle, last))
    agreed, agrees = (statistics.fmean(row[2] for row in part) for part in (middle, last))
    falls = kl_now <= (1 - _STILL_FALLING) * kl_before
    if kl_now <= _HIGH_KL or falls or agrees >= _FOLLOWS or agrees - agreed >= _STILL_RISING:
        return ""
    return (
        f"the student has stopped to approach its teacher: KL {kl_before:.2f} in the middle of the "
        f"run, {kl_now:.2f} nats in the last fifth, agreement {agreed:.0f} and {agrees:.0f} % of "
        "the training images. The gap is one of capacity or optimisation, not of data. Usual "
        "cures: a larger student, a smaller teacher or one in between, terms.dist instead of "
        "logit_kd, a higher optim.base_lr"
    )


def _imbalance(ratio: float) -> str:
    low, high = _BALANCED
    if low <= ratio <= high:
        return ""
    weak, strong = ("labels", "teacher") if ratio > high else ("teacher", "labels")
    cure = (
        "raise terms.ce.weight or lower the weights of the teacher's terms"
        if weak == "labels"
        else "raise the weights of the teacher's terms or lower terms.ce.weight"
    )
    return (
        f"the {weak} hardly count: the gradient of the teacher's terms is {ratio:.3g} times that "
        f"of the labels, so the {strong} alone decide{'s' if strong == 'teacher' else ''}. If that "
        f"is not what you want, {cure}"
    )


def _setting(name: str) -> str:
    """'cosine_kd@1' is set by terms.cosine_kd."""
    return name.partition("@")[0]
