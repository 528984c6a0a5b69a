"""Many linear classifiers on the same features at once: the grid of a linear probe.

All heads that share an input are one matrix, so a step costs two matrix products for each input,
however many learning rates there are. Gradients are written out; no autograd, no optimiser object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_kd.distributed import all_reduce_sum, is_grouped
from dino_kd.hardware import widest
from dino_kd.products import linear

TOP = 5


class LinearGrid:
    """Linear classifiers for every pair of (input, learning rate), trained by SGD together.

    A head is known by its input's name and the position of its learning rate, never by the rate's
    value. Heads do not touch each other: one that overflows leaves the others as they are. All
    start from zero; cross-entropy is convex in a linear head, so no chance is needed.

    Args:
        columns: for each input the columns of the features that it sees.
        num_classes: Y.
        learning_rates: R peak rates, the same for every input.
        momentum: of SGD; no weight decay.
        device: where the heads live.
    """

    def __init__(
        self,
        columns: Mapping[str, slice],
        num_classes: int,
        learning_rates: Sequence[float],
        *,
        momentum: float = 0.9,
        device: str | torch.device = "cpu",
    ) -> None:
        self.columns = dict(columns)
        self.num_classes = num_classes
        self.num_rates = len(learning_rates)
        self.momentum = momentum
        rates = torch.tensor(learning_rates, dtype=torch.float32, device=device)
        self._rates = rates.repeat_interleave(num_classes)  # [R * Y]
        width = len(self._rates)
        self._weight = {
            name: torch.zeros(part.stop - part.start, width, device=device)  # [D, R * Y]
            for name, part in self.columns.items()
        }
        self._bias = {name: torch.zeros(width, device=device) for name in self.columns}
        self._velocity = {
            name: (torch.zeros_like(self._weight[name]), torch.zeros_like(self._bias[name]))
            for name in self.columns
        }

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, batch_size: int, factor: float = 1.0) -> None:
        """One step of all heads on the mean cross-entropy of a batch.

            v = momentum * v + gradient;  w = w - factor * rate * v      (as torch.optim.SGD)

        Args:
            features: float32 ``[b, D]``, this process's share of the batch; b may be 0.
            labels: int64 ``[b]`` in 0..Y-1.
            batch_size: images of the batch over all processes.
            factor: of the learning rates at this step, 0..1.
        """
        mine = torch.arange(len(labels), device=labels.device)
        for name, columns in self.columns.items():
            x = features[:, columns]  # [b, D_input]
            slope = _softmax(self.logits(features, name))  # [b, R, Y]
            slope[mine, :, labels] -= 1  # gradient of the cross-entropy by the logits
            flat = slope.flatten(1)  # [b, R * Y]
            by_weight, by_bias = linear(x.T, flat.T), flat.sum(0)  # [D_input, R * Y], [R * Y]
            if is_grouped():
                together = all_reduce_sum(torch.cat([by_weight, by_bias[None]]))
                by_weight, by_bias = together[:-1], together[-1]
            weight_velocity, bias_velocity = self._velocity[name]
            weight_velocity.mul_(self.momentum).add_(by_weight, alpha=1 / batch_size)
            bias_velocity.mul_(self.momentum).add_(by_bias, alpha=1 / batch_size)
            self._weight[name].addcmul_(weight_velocity, self._rates, value=-factor)
            self._bias[name].addcmul_(bias_velocity, self._rates, value=-factor)

    @torch.no_grad()
    def logits(self, features: Tensor, name: str) -> Tensor:
        """Logits ``[N, R, Y]`` of all heads of one input, from features ``[N, D]``."""
        x = features[:, self.columns[name]]
        flat = linear(x, self._weight[name].T, self._bias[name])
        return flat.view(len(x), self.num_rates, self.num_classes)

    def head(self, name: str, rate: int) -> tuple[Tensor, Tensor]:
        """Copies of one head's weight ``[Y, D_input]`` and bias ``[Y]``, on the CPU."""
        chosen = slice(rate * self.num_classes, (rate + 1) * self.num_classes)
        weight = self._weight[name][:, chosen].T.contiguous().cpu()
        return weight, self._bias[name][chosen].clone().cpu()

    def is_finite(self, name: str) -> list[bool]:
        """For every learning rate of an input whether its head is still made of numbers."""
        weight = self._weight[name].view(-1, self.num_rates, self.num_classes)
        bias = self._bias[name].view(self.num_rates, self.num_classes)
        finite = weight.isfinite().all(-1).all(0) & bias.isfinite().all(-1)
        return finite.tolist()


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; written out below 16 classes, where torch's is slow.

    Measured on a CPU, 1000 x 26 x 10 values: 0.6 instead of 3.1 ms; from 20 classes on the
    opposite holds.
    """
    if logits.shape[-1] >= 16:
        return logits.softmax(-1)
    exponential = (logits - logits.amax(-1, keepdim=True)).exp_()
    return exponential.div_(exponential.sum(-1, keepdim=True))


@dataclass
class Score:
    """How well logits name the class: percent correct, and mean cross-entropy in nats."""

    top1: float
    top5: float
    cross_entropy: float


class Tally:
    """Sums up scores batch by batch, for H classifiers at once."""

    def __init__(self, heads: int) -> None:
        self._hits = torch.zeros(2, heads, dtype=torch.float64)  # top-1, top-5
        self._loss = torch.zeros(heads, dtype=torch.float64)
        self._count = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits ``[N, H, Y]`` and labels int64 ``[N]``.

        The lower class comes first among equal logits. Logits that are not numbers are errors.
        """
        truth = labels[:, None, None].expand(-1, logits.shape[1], 1)
        own = logits.gather(2, truth)  # [N, H, 1]
        classes = torch.arange(logits.shape[2], device=logits.device)
        before = (logits > own) | ((logits == own) & (classes < truth))
        place = before.sum(2)  # [N, H], 0 is the first
        is_number = logits.isfinite().all(2)
        hits = [((place < k) & is_number).sum(0) for k in (1, TOP)]
        loss = -F.log_softmax(logits.float(), dim=2).gather(2, truth).squeeze(2)
        self._hits += torch.stack(hits).cpu()
        self._loss += widest(loss).sum(0).cpu()
        self._count += len(labels)

    def scores(self) -> list[Score]:
        """One for each classifier."""
        percent = 100 * self._hits / self._count
        loss = self._loss / self._count
        rows = zip(percent[0].tolist(), percent[1].tolist(), loss.tolist(), strict=True)
        return [Score(*row) for row in rows]


def score_grid(
    grid: LinearGrid, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, list[Score]]:
    """The scores of all heads on batches of (features ``[b, D]``, labels ``[b]``)."""
    tallies = {name: Tally(grid.num_rates) for name in grid.columns}
    for features, labels in batches:
        for name, tally in tallies.items():
            tally.add(grid.logits(features, name), labels)
    return {name: tally.scores() for name, tally in tallies.items()}


def choose_head(
    scores: Mapping[str, Sequence[Score]], finite: Mapping[str, Sequence[bool]]
) -> tuple[str, int] | None:
    """(input, position of the learning rate) of the best head, None when all have diverged.

    The highest top-1; among equals the lowest cross-entropy, then the first.
    """
    best, winner = (-1.0, 0.0), None
    for name, rows in scores.items():
        for rate, score in enumerate(rows):
            if finite[name][rate] and math.isfinite(score.cross_entropy):
                rank = (score.top1, -score.cross_entropy)
                if winner is None or rank > best:
                    best, winner = rank, (name, rate)
    return winner


def train_grid(
    grid: LinearGrid,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    schedule: Callable[[int], float],
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Step through all `batches`, each this process's share of `batch_size` images.

    `schedule` maps the step, from 0, to the factor of the learning rates.
    """
    for step, (features, labels) in enumerate(batches):
        grid.step(features, labels, batch_size, schedule(step))
        on_step()
