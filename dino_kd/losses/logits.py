"""Distillation of class scores: KD, DKD, DIST, standardised logits, hard labels, averaged teachers.

Every loss is a float32 scalar: summed over the classes, averaged over the batch. A weight thus
means the same for any number of classes. docs/distill_losses.md converts published weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kd.losses.numerics import kl_rows, require_same_shape

_EPS = 1e-8  # of a variance or a squared length


def standardise_logits(logits: Tensor) -> Tensor:
    """Rows of logits ``[B, Y]`` with mean 0 and variance 1, float32 (Sun et al. 2024, 2403.01427).

    ``(z - mean(z)) / sqrt(var(z) + 1e-8)`` with the variance divided by Y. A constant row is 0.
    """
    values = logits.float()
    variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
    return (values - mean) * (variance + _EPS).rsqrt()


def kd_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, standardise: bool = False
) -> Tensor:
    """Hinton et al. 2015: ``T^2 mean_b sum_k p_t (log p_t - log p_s)``, ``p = softmax(z / T)``.

    Args:
        student: logits ``[B, Y]``.
        teacher: logits ``[B, Y]``, without gradient.
        temperature: T > 0.
        standardise: z-score every row of both first.

    Returns:
        A float32 scalar >= 0; 0 for equal logits. ValueError for shapes that differ.
    """
    require_same_shape(student, teacher, "B Y")
    student, teacher = student.float(), teacher.detach().float()
    if standardise:
        student, teacher = standardise_logits(student), standardise_logits(teacher)
    return temperature**2 * _kl_at(student, teacher, temperature).mean()


def _kl_at(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(p_t || p_s) of every row, ``[B]``."""
    return kl_rows(
        F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    )


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    shares: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled KD (Zhao et al. 2022, 2203.08679), without the cross-entropy to labels.

    ::

        y = argmax(shares[b])                            # the target class
        b = (p_y, 1 - p_y)                               # target against the rest
        q = softmax of the other Y - 1 logits
        L_b = T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s))

    A row whose largest share is <= 0.5 (an even mix, or no label) has no target class and
    counts as plain KD, ``T^2 KL(p_t || p_s) = T^2 (KL(b) + (1 - p_t,y) KL(q))``.

    Args:
        student: logits ``[B, Y]``, Y >= 3: with two classes ``q`` is constant.
        teacher: logits ``[B, Y]``, without gradient.
        shares: ``[B, Y]``, class shares of each image: one-hot, mixed, or zeros without label.
        alpha: weight of the target term.
        beta: weight of the term of the other classes.
        temperature: T > 0.

    Returns:
        A float32 scalar >= 0; 0 for equal logits. ValueError for Y < 3 or shapes that differ.
    """
    require_same_shape(student, teacher, "B Y")
    require_same_shape(student, shares, "B Y", "shares")
    if student.shape[1] < 3:
        raise ValueError(
            f"dkd needs at least 3 classes, got {student.shape[1]}: "
            "with two, there is one class besides the target; use kd"
        )
    student, teacher = student.float(), teacher.detach().float()
    largest, target = shares.detach().max(1)  # [B], [B]
    is_target = F.one_hot(target, student.shape[1]).bool()  # [B, Y]
    of_student = _decoupled(student / temperature, target, is_target)
    of_teacher = _decoupled(teacher / temperature, target, is_target)
    binary = kl_rows(of_teacher[0], of_student[0])  # [B]
    # the target's own entry is finite, and has no weight
    weights = of_teacher[1].masked_fill(is_target, -math.inf).exp()  # [B, Y]
    others = (weights * (of_teacher[1] - of_student[1])).sum(1)  # [B]
    plain = _kl_at(student, teacher, temperature)  # [B]
    rows = torch.where(largest > 0.5, alpha * binary + beta * others, plain)
    return temperature**2 * rows.mean()


def _decoupled(scaled: Tensor, target: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, 2]``: log of target's and rest's share; ``[B, Y]``: log shares within the rest."""
    log_total = torch.logsumexp(scaled, 1, keepdim=True)  # [B, 1]
    log_rest = torch.logsumexp(scaled.masked_fill(is_target, -math.inf), 1, keepdim=True)
    of_target = scaled.gather(1, target[:, None])  # [B, 1]
    return torch.cat([of_target, log_rest], 1) - log_total, scaled - log_rest


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST (Huang et al. 2022, 2205.10536): correlations of probabilities, not their values.

    ``T^2 (beta (1 - mean_b r(p_s[b, :], p_t[b, :])) + gamma (1 - mean_k r(p_s[:, k], p_t[:, k])))``
    with Pearson's r. The second term compares images within a class and wants 64 rows or more.

    Args:
        student: logits ``[B, Y]``.
        teacher: logits ``[B, Y]``, without gradient.
        beta: weight of the relation between classes, within each image.
        gamma: weight of the relation between images, within each class.
        temperature: T > 0.

    Returns:
        A float32 scalar in 0..2 T^2 (beta + gamma); 0 for equal logits. ValueError for shapes
        that differ.
    """
    require_same_shape(student, teacher, "B Y")
    of_student = F.softmax(student.float() / temperature, -1)  # [B, Y]
    of_teacher = F.softmax(teacher.detach().float() / temperature, -1)  # [B, Y]
    inter = 1 - _pearson(of_student, of_teacher, 1).mean()
    intra = 1 - _pearson(of_student, of_teacher, 0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Correlation along `dim`; 1 where both are constant, near 0 where one is.

    ``(a.b + eps) / sqrt((a.a + eps) (b.b + eps))`` of centred values: the cosine of vectors with
    one more coordinate, so never outside -1..1. Values are first divided by their largest, since
    1e-8 would be larger than the variance of most classes among a thousand.
    """
    a, b = (_centred(values, dim) for values in (a, b))
    product = (a * b).sum(dim) + _EPS
    return product * ((a.square().sum(dim) + _EPS).rsqrt() * (b.square().sum(dim) + _EPS).rsqrt())


def _centred(probs: Tensor, dim: int) -> Tensor:
    largest = probs.detach().amax(dim, keepdim=True).clamp(min=1e-20)
    scaled = probs / largest
    return scaled - scaled.mean(dim, keepdim=True)


def hard_label_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of logits ``[B, Y]`` with the teacher's class (DeiT, 2012.12877, eq. 3).

    ``mean_b -log softmax(student)[argmax(teacher)]``, a float32 scalar >= 0. ValueError for shapes
    that differ.
    """
    require_same_shape(student, teacher, "B Y")
    return F.cross_entropy(student.float(), teacher.detach().argmax(1))


def soft_cross_entropy(logits: Tensor, shares: Tensor, labelled_share: float = 1.0) -> Tensor:
    """``mean_b -sum_k shares log softmax(logits)``, over the share of images with a label.

    Args:
        logits: ``[B, Y]``.
        shares: ``[B, Y]``, rows that sum to 1, or to 0 for an image without label.
        labelled_share: expected share of rows with a label, 0 < share <= 1. A constant of the
            data, not of the batch, so that the mean over processes and micro-batches is right.

    Returns:
        A float32 scalar >= 0. ValueError for shapes that differ or a share outside 0..1.
    """
    require_same_shape(logits, shares, "B Y", "shares")
    if not 0 < labelled_share <= 1:
        raise ValueError(f"labelled_share must be in 0..1 and not 0, got {labelled_share}")
    rows = -(shares.detach().float() * F.log_softmax(logits.float(), -1)).sum(1)  # [B]
    return rows.mean() / labelled_share


def mean_probability_logits(
    logits: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """Logits of an ensemble: log of the mean of probabilities (MEAL V2, Shen & Savvides 2020).

    Args:
        logits: one ``[B, Y]`` for each teacher.
        weights: one positive number for each; only their ratios count. None: all the same.

    Returns:
        Float32 ``[B, Y]``, without gradient; its softmax is the mean of the teachers'. ValueError
        for an empty list, shapes that differ, or weights that are not positive numbers.
    """
    if not logits:
        raise ValueError("an ensemble needs the logits of at least one teacher, got none")
    weights = [1.0] * len(logits) if weights is None else weights
    if len(weights) != len(logits) or min(weights) <= 0:
        raise ValueError(f"{len(logits)} teachers need as many weights above 0, got {weights}")
    for one in logits:
        require_same_shape(logits[0], one, "B Y")
    shares = [math.log(weight / sum(weights)) for weight in weights]
    logs = [
        F.log_softmax(one.detach().float(), -1) + share
        for one, share in zip(logits, shares, strict=True)
    ]
    return torch.logsumexp(torch.stack(logs), 0)  # of [n, B, Y]
