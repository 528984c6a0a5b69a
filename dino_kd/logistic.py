"""Multinomial logistic regression by L-BFGS in the coordinates where it is well conditioned.

The objective is scikit-learn's. Features are rotated onto their principal axes once; there the
curvature is nearly diagonal, so that dividing by it takes the steps that plain L-BFGS needs
hundreds of iterations to find (benchmarks/logreg.py). The optimum is the same: a rotation leaves
the penalty alone, and the scale of the unknowns is only how they are searched for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_kd.classifiers import CHUNK, LinearClassifier

HISTORY = 20  # pairs of steps that L-BFGS remembers
_SCORES = 2**26  # of images for classes, held at a time: 256 MB in float32


@dataclass
class LogisticFit(LinearClassifier):
    """A fitted classifier and how the search for it ended.

    Attributes:
        c: inverse strength of the penalty.
        loss: mean cross-entropy plus penalty, in nats.
        gradient: largest entry of the gradient in the search's coordinates, where the curvature is
            at most about one.
        iterations: steps of L-BFGS.
        converged: the gradient fell below the tolerance.
    """

    c: float = 1.0
    loss: float = 0.0
    gradient: float = 0.0
    iterations: int = 0
    converged: bool = True


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    cs: Sequence[float],
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
) -> Iterator[LogisticFit]:
    """Fit one classifier for each C in the order given, each started from the one before.

    Minimises ``sum_i -log softmax(W x_i + b)[y_i] + |W|^2 / (2 C)`` over W and b; b is free. For
    two classes W still has two rows; scikit-learn has one there, and its C is twice this one.

    Args:
        features: ``[N, D]`` on any device; the heavy products run in their dtype, sums in double.
        labels: int64 ``[N]``, 0..Y-1; a class without images is never predicted.
        num_classes: Y.
        cs: inverse strengths of the penalty, more than 0; ascending order starts best.
        tolerance: largest entry of the gradient of the mean loss, see `LogisticFit`.
        max_iterations: of L-BFGS, for each C.
    """
    seen, compact = torch.unique(labels, return_inverse=True)
    axes = _principal_axes(features)
    rotated = axes.rotate(features)
    start = torch.zeros(len(seen), rotated.shape[1] + 1, dtype=torch.float64, device=labels.device)
    start[:, -1] = torch.log(torch.bincount(compact).double() / len(labels))
    for c in cs:
        problem = _Problem(rotated, compact, len(seen), axes.variances, 1.0 / (c * len(labels)))
        start, iterations = _minimise(problem, start, tolerance, max_iterations)
        loss, gradient = problem.loss_and_gradient(start / problem.scale)
        largest = float(gradient.abs().max())
        weight = start.new_zeros(num_classes, features.shape[1])
        weight[seen] = start[:, :-1] @ axes.directions.T
        bias = start.new_full((num_classes,), -torch.inf)
        bias[seen] = start[:, -1] - weight[seen] @ axes.mean
        # the intercepts share one free constant
        bias -= bias[seen].mean()
        yield LogisticFit(
            weight,
            bias,
            c=c,
            loss=float(loss),
            gradient=largest,
            iterations=iterations,
            converged=largest <= tolerance,
        )


@dataclass
class _Axes:
    mean: Tensor  # float64 [D]
    directions: Tensor  # float64 [D, R], orthonormal columns
    variances: Tensor  # float64 [R], of the features along them

    def rotate(self, features: Tensor) -> Tensor:
        """Coordinates ``[N, R]`` along the axes; the products run in the dtype of `features`."""
        mean, directions = self.mean.to(features.dtype), self.directions.to(features.dtype)
        return torch.cat([(part - mean) @ directions for part in features.split(CHUNK)])


def _principal_axes(features: Tensor) -> _Axes:
    """Axes that hold all the variance; at most min(N, D), fewer when some have none."""
    mean = features.mean(0, dtype=torch.float64)
    count, width = features.shape
    if count < width:  # few images: their span is all that the optimum can use
        centred = features.double() - mean
        gram = centred @ centred.T  # [N, N]
    else:
        gram = mean.new_zeros(width, width)
        for part in features.split(CHUNK):
            part = part - mean.to(part.dtype)
            gram += part.T @ part
    variances, vectors = torch.linalg.eigh(gram / count)
    kept = variances > 1e-10 * variances.max().clamp_min(1e-300)
    variances, vectors = variances[kept], vectors[:, kept]
    if count < width:
        # qr: orthonormal again after the division by small numbers
        vectors = torch.linalg.qr(centred.T @ vectors / (variances * count).sqrt()).Q
    return _Axes(mean, vectors, variances)


class _Problem:
    """Mean loss and gradient in coordinates whose curvature is at most about one.

    The unknowns are ``[Y, R + 1]``: weights along the axes, divided by `scale`, and the intercept.
    """

    def __init__(
        self, rotated: Tensor, labels: Tensor, num_classes: int, variances: Tensor, penalty: float
    ) -> None:
        self.rotated, self.labels, self.penalty = rotated, labels, penalty
        # p (1 - p) at p = 1 / Y: the curvature of the loss where the search begins
        curvature = max(num_classes - 1, 1) / num_classes**2
        scale = (curvature * variances + penalty).rsqrt()
        self.scale = torch.cat([scale, scale.new_full((1,), curvature**-0.5)])  # [R + 1]

    def loss_and_gradient(self, unknowns: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``[Y, R + 1]`` scaled unknowns."""
        count, dtype = len(self.labels), self.rotated.dtype
        values = unknowns * self.scale
        weight, bias = values[:, :-1], values[:, -1]
        loss = self.penalty / 2 * weight.square().sum()
        gradient = torch.cat([self.penalty * weight, torch.zeros_like(bias[:, None])], 1)
        rows = max(1, _SCORES // len(bias))  # of millions of images not all scores at once
        for x, labels in zip(self.rotated.split(rows), self.labels.split(rows), strict=True):
            logits = torch.addmm(bias.to(dtype), x, weight.to(dtype).T)  # [n, Y]
            log_sum = logits.logsumexp(1, keepdim=True)
            at_label = logits.gather(1, labels[:, None])
            loss = loss + (log_sum - at_label).sum(dtype=torch.float64) / count
            residual = logits.sub_(log_sum).exp_()  # probs [n, Y]
            residual.scatter_add_(1, labels[:, None], -torch.ones_like(at_label))
            # residual.T first: five times as fast on a CPU as x.T @ residual
            gradient[:, :-1] += (residual.T @ x).double() / count
            gradient[:, -1] += residual.sum(0, dtype=torch.float64) / count
        return loss, gradient * self.scale


def _minimise(
    problem: _Problem, start: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Values ``[Y, R + 1]`` at the minimum, and the steps to it."""
    # scipy's search rather than torch's: that one imports torch's compiler first, for seconds
    from scipy.optimize import minimize

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        unknowns = torch.from_numpy(flat).to(start.device).view_as(start)
        loss, gradient = problem.loss_and_gradient(unknowns)
        return float(loss), gradient.cpu().numpy().reshape(-1)

    found = minimize(
        loss_and_gradient,
        (start / problem.scale).cpu().numpy().reshape(-1),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations + 20,
            "maxcor": HISTORY,
            "gtol": tolerance,
            "ftol": 0.0,  # the gradient decides
        },
    )
    unknowns = torch.from_numpy(found.x).to(start.device).view_as(start)
    return unknowns * problem.scale, int(found.nit)
