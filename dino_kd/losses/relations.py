"""Distillation of relations between images, or between the tokens of one: no projector needed.

Student and teacher may have different widths. Every loss is a float32 scalar, the mean over the
pairs that mean something: an image against itself never counts. docs/distill_losses.md converts
published weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kd.hardware import widest
from dino_kd.losses.numerics import kl_rows, require_rows, unit, without_autocast

_NEAR = 1e-12  # squared distance, in units of the batch's variance; below it: duplicates


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD (Park et al. 2019, 1904.05068), distances in units of their mean.

    ::

        d[i, j] = |z_i - z_j|;   psi = d / mean(d[i != j])
        L = mean over i != j of smooth_l1(psi_s, psi_t)

    Args:
        student: ``[B, D]``, B >= 2.
        teacher: ``[B, E]``, without gradient.

    Returns:
        A float32 scalar >= 0; 0 when all distances agree up to one factor. Duplicates pull with
        no gradient. ValueError for other shapes.
    """
    require_rows(student, teacher, 2)
    with without_autocast(student):
        psi = []
        for features in (student, teacher.detach()):
            distances = _squared_distances(_gram(features)).clamp(min=_NEAR).sqrt()
            psi.append(distances / _mean_of_others(distances))
        return _mean_of_others(F.smooth_l1_loss(psi[0], psi[1], reduction="none")).float()


def rkd_angle_loss(student: Tensor, teacher: Tensor, max_anchors: int = 128) -> Tensor:
    """RKD (Park et al. 2019, 1904.05068), angles of triplets of different images.

    ::

        e[i, j] = (z_i - z_j) / |z_i - z_j|
        L = mean over i, j, k, all different, of smooth_l1(e_s[i,j].e_s[k,j], e_t[i,j].e_t[k,j])

    Triplets with two equal images (in either network) have no angle and do not count.

    Args:
        student: ``[B, D]``, B >= 3.
        teacher: ``[B, E]``, without gradient.
        max_anchors: only the first rows of the batch take part; memory grows with their cube, 17
            MB a float64 tensor at 128.

    Returns:
        A float32 scalar >= 0; 0 when all angles agree. ValueError for other shapes.
    """
    require_rows(student, teacher, 3)
    if max_anchors < 3:
        raise ValueError(f"an angle needs 3 images, got max_anchors={max_anchors}")
    student, teacher = student[:max_anchors], teacher[:max_anchors].detach()
    apart = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    with without_autocast(student):
        cosines = []
        for features in (student, teacher):
            gram = _gram(features)
            distances = _squared_distances(gram)
            # [i, j, k]: (z_i - z_j).(z_k - z_j)
            inner = gram[:, None, :] - gram[:, :, None] - gram[None] + gram.diag()[None, :, None]
            inverse = distances.clamp(min=_NEAR).rsqrt()
            cosines.append(inner * inverse[:, :, None] * inverse[None])
            apart = apart & (distances.detach() > _NEAR)
        valid = apart[:, :, None] & apart[None] & apart[:, None, :]
        losses = F.smooth_l1_loss(cosines[0], cosines[1], reduction="none")
        return ((losses * valid).sum() / valid.sum().clamp(min=1)).float()


def _gram(features: Tensor) -> Tensor:
    """``Z Z^T`` in float64 of centred features with mean squared length 1 (0 if all are equal).

    Distances come as differences of its entries; in float32 (which Apple's MPS is left with), or
    TF32 on a GPU, near images would have none. The divisor has no gradient: neither form of RKD
    depends on the scale.
    """
    centred = widest(features.float())
    centred = centred - centred.mean(0)
    size = centred.detach().square().sum(1).mean().sqrt()
    centred = centred / torch.where(size > 0, size, 1)
    return centred @ centred.T


def _mean_of_others(pairs: Tensor) -> Tensor:
    """The mean of ``[B, B]`` without its diagonal.

    By a sum: picking them out would make the host wait for a GPU, to learn how many there are.
    """
    count = len(pairs)
    return (pairs.sum() - pairs.diagonal().sum()) / (count * (count - 1))


def _squared_distances(gram: Tensor) -> Tensor:
    lengths = gram.diag()
    return lengths[:, None] + lengths[None, :] - 2 * gram


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving KD (Tung & Mori 2019, 1907.09682) with centred cosines.

    ``mean over i != j of (c_s[i, j] - c_t[i, j])^2`` with c the cosine of features less the mean
    of the batch. The published form keeps the mean and the diagonal, and normalises rows.

    Args:
        student: ``[B, D]``, B >= 2.
        teacher: ``[B, E]``, without gradient.

    Returns:
        A float32 scalar in 0..4; 0 for equal similarities, about 1/D + 1/E for unrelated ones.
        ValueError for other shapes.
    """
    require_rows(student, teacher, 2)
    with without_autocast(student):
        of_student, of_teacher = (
            unit(features - features.mean(0))
            for features in (student.float(), teacher.detach().float())
        )
        difference = of_student @ of_student.T - of_teacher @ of_teacher.T  # [B, B]
        return _mean_of_others(difference.square())


def token_relation_loss(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    """How alike the tokens of one image are: attention without queries and keys.

    ``mean_b,i KL(softmax(c_t[i, :] / T) || softmax(c_s[i, :] / T))``, c the cosine of two tokens.

    Args:
        student: ``[B, C, h, w]``.
        teacher: ``[B, E, h, w]`` on the same grid (resample first), without gradient.
        temperature: T > 0.

    Returns:
        A float32 scalar >= 0; 0 for equal relations. ValueError for another grid.
    """
    if student.ndim != 4 or teacher.ndim != 4 or _grid(student) != _grid(teacher):
        raise ValueError(
            "student [B, C, h, w] and teacher [B, E, h, w] must have the same batch and grid, "
            f"got {list(student.shape)} and {list(teacher.shape)}; resample one of them"
        )
    with without_autocast(student):
        logs = []
        for features in (student, teacher.detach()):
            tokens = unit(features.flatten(2).mT)  # [B, P, C]
            logs.append(F.log_softmax(tokens @ tokens.mT / temperature, -1))  # [B, P, P]
        return kl_rows(logs[1], logs[0]).mean()


def _grid(features: Tensor) -> tuple[int, int, int]:
    batch, _, height, width = features.shape
    return batch, height, width
