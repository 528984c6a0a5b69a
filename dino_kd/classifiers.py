"""Linear classifiers of features in closed form (nearest class mean, ridge), and how they score.

The closed forms are those of scikit-learn's NearestCentroid and RidgeClassifier, tested against
them. Logistic regression, which has to be searched for, is in `logistic`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TOP = 5  # what "top-5" counts
CHUNK = 16384  # rows that are held in double precision at a time


@dataclass
class LinearClassifier:
    """``logits = features @ weight.T + bias``.

    Attributes:
        weight: float64 ``[Y, D]``.
        bias: float64 ``[Y]``; -inf for a class that was never seen, so that it is never chosen.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Scores float64 ``[N, Y]`` of features ``[N, D]``; the largest wins."""
        parts = [part.double() @ self.weight.T + self.bias for part in features.split(CHUNK)]
        return torch.cat(parts)


@dataclass
class Scaling:
    """What is done to features before a classifier sees them.

    Attributes:
        l2: divide every row by its length.
        mean: subtracted from every row, ``[D]``; None for nothing.
        deviation: then divides every row, ``[D]``; None for nothing.
    """

    l2: bool = False
    mean: Tensor | None = None
    deviation: Tensor | None = None

    def apply(self, features: Tensor) -> Tensor:
        """Scaled features ``[N, D]``, of the dtype that came in."""
        if self.l2:
            features = F.normalize(features, dim=-1)
        if self.mean is not None and self.deviation is not None:
            features = (features - self.mean) / self.deviation
        return features


def learn_scaling(kind: str, features: Tensor) -> Scaling:
    """The scaling `kind` for features ``[N, D]``.

    ``standard`` takes mean and standard deviation from `features` and leaves alone what does not
    vary; ``l2`` and ``none`` take nothing from them.
    """
    if kind == "l2":
        return Scaling(l2=True)
    if kind == "none":
        return Scaling()
    assert kind == "standard", kind
    mean = features.mean(0, dtype=torch.float64)
    squares = sum((part - mean).square().sum(0) for part in features.split(CHUNK))
    deviation = (squares / len(features)).sqrt()
    # what is constant up to rounding would otherwise become noise of size one
    flat = deviation <= 1e-6 * mean.abs().clamp_min(1e-30)
    deviation = torch.where(flat, torch.ones_like(deviation), deviation)
    return Scaling(mean=mean.to(features.dtype), deviation=deviation.to(features.dtype))


def nearest_mean(features: Tensor, labels: Tensor, num_classes: int) -> LinearClassifier:
    """The class whose mean is nearest, Euclidean, as a linear classifier.

    ``|x - m|^2 = |x|^2 - 2 (x.m - |m|^2 / 2)``, and ``|x|^2`` is the same for all classes.

    Args:
        features: ``[N, D]``.
        labels: int64 ``[N]``, 0..Y-1.
        num_classes: Y.
    """
    sums = features.new_zeros(num_classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, features.double())
    counts = torch.bincount(labels, minlength=num_classes)
    means = sums / counts.clamp_min(1)[:, None]  # [Y, D]
    bias = -(means * means).sum(1) / 2
    return LinearClassifier(means, bias.masked_fill(counts == 0, -torch.inf))


def ridge(features: Tensor, labels: Tensor, num_classes: int, alpha: float) -> LinearClassifier:
    """Least squares on targets of -1 and +1, one against the rest, with a free intercept.

    Minimises ``sum |X W^T + b - T|^2 + alpha |W|^2`` (b is not penalised), whichever of N and D
    is smaller deciding the system that is solved.

    Args:
        features: ``[N, D]``.
        labels: int64 ``[N]``, 0..Y-1.
        num_classes: Y.
        alpha: more than 0.
    """
    x = features.double()
    targets = 2.0 * F.one_hot(labels, num_classes).double() - 1.0  # [N, Y]
    mean, target_mean = x.mean(0), targets.mean(0)
    x, targets = x - mean, targets - target_mean
    if len(x) < x.shape[1]:
        gram = x @ x.T
        gram.diagonal().add_(alpha)
        weight = (x.T @ _solve(gram, targets)).T
    else:
        gram = x.T @ x
        gram.diagonal().add_(alpha)
        weight = _solve(gram, x.T @ targets).T
    bias = target_mean - weight @ mean
    unseen = torch.bincount(labels, minlength=num_classes) == 0
    return LinearClassifier(weight, bias.masked_fill(unseen, -torch.inf))


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """``{"top1": percent, "top5": percent}`` of logits ``[N, Y]``; top5 is top-Y for Y < 5.

    Classes with a score of -inf never count. Equal scores are ordered by lower class.
    """
    order = logits.sort(dim=1, descending=True, stable=True)
    places = order.indices[:, :TOP]
    hits = (places == labels[:, None]) & (order.values[:, :TOP] > -torch.inf)
    return {
        "top1": 100.0 * hits[:, 0].double().mean().item(),
        "top5": 100.0 * hits.any(dim=1).double().mean().item(),
    }


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """A symmetric positive definite system."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
