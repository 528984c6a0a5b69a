"""Distillation of features: hints, cosine regression, attention maps; and grids made to fit.

Every loss is a float32 scalar that does not depend on batch size, width or grid: hints are divided
by the width, maps are normalised. docs/distill_losses.md converts published weights.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kd.losses.numerics import require_same_shape, unit

_EPS = 1e-8  # of a variance of values whose largest is 1
_EMPTY = 1e-12  # a map whose largest value is below has no shape


def hint_loss(student: Tensor, target: Tensor) -> Tensor:
    """FitNets (Romero et al. 2015, 1412.6550): ``mean_b,h,w |student - target|^2 / C``.

    Args:
        student: ``[B, C, h, w]`` after the projector, or pooled ``[B, D]``.
        target: the same shape, without gradient. Standardised, the loss starts near 1 for a
            student that predicts the mean, whatever the teacher.

    Returns:
        A float32 scalar >= 0; 0 for equal features. ValueError for shapes that differ.
    """
    require_same_shape(student, target, "B D" if student.ndim == 2 else "B C h w", "target")
    return F.mse_loss(student.float(), target.detach().float())


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean_b |s/|s| - t/|t||^2 = mean_b (2 - 2 cos)`` (SimReg, Navaneet et al. 2021, 2201.05131).

    Args:
        student: ``[B, D]`` after the head.
        teacher: ``[B, D]``, without gradient.

    Returns:
        A float32 scalar in 0..4; 0 for equal directions. ValueError for shapes that differ.
    """
    require_same_shape(student, teacher, "B D")
    return (unit(student) - unit(teacher.detach())).square().sum(-1).mean()


def energy_map(features: Tensor) -> Tensor:
    """``mean_c F^2``: where a map ``[B, C, h, w]`` is active, float32 ``[B, h, w]`` >= 0.

    Of a ViT take it before the last LayerNorm, after which every token has about the same energy.
    """
    _require_map(features)
    return features.float().square().mean(1)


def attention_loss(
    student_map: Tensor, teacher_map: Tensor, *, form: Literal["kl", "l2"] = "kl"
) -> Tensor:
    """Where the student looks, against where the teacher looks.

    ::

        l2: mean_b sum_hw (q_s/|q_s| - q_t/|q_t|)^2      # Zagoruyko & Komodakis 2017, 1612.03928
        kl: mean_b KL(A || softmax(q_s / std(q_s)))      # A = max(q_t, 0) / sum

    Args:
        student_map: ``[B, h, w]``, e.g. of `energy_map`.
        teacher_map: ``[B, h, w]``, without gradient; for "kl" attention, or a similarity whose
            negative values count as 0. A map without any positive value counts as uniform.
        form: "l2" is 0 for equal maps; "kl" is not, since it compares unlike quantities.

    Returns:
        A float32 scalar >= 0. ValueError for shapes that differ or another form.
    """
    require_same_shape(student_map, teacher_map, "B h w")
    student = student_map.float().flatten(1)  # [B, hw]
    teacher = teacher_map.detach().float().flatten(1)  # [B, hw]
    if form == "l2":
        difference = unit(_largest_one(student)) - unit(_largest_one(teacher))
        return difference.square().sum(1).mean()
    if form != "kl":
        raise ValueError(f"form must be 'kl' or 'l2', got {form!r}")
    positive = teacher.clamp(min=0)
    total = positive.sum(1, keepdim=True)  # [B, 1]
    target = torch.where(total > 0, positive / total.clamp(min=_EMPTY), 1 / teacher.shape[1])
    target = target / target.sum(1, keepdim=True)
    scaled = _largest_one(student)
    variance, mean = torch.var_mean(scaled, 1, correction=0, keepdim=True)
    log_student = F.log_softmax((scaled - mean) * (variance + _EPS).rsqrt(), 1)
    return F.kl_div(log_student, target, reduction="batchmean")


def _largest_one(values: Tensor) -> Tensor:
    """Rows divided by their largest size: energies of any scale meet the same floors.

    The divisor has no gradient: what follows does not depend on the scale of a row.
    """
    largest = values.detach().abs().amax(1, keepdim=True)
    return values * torch.where(largest > _EMPTY, largest.clamp(min=_EMPTY).reciprocal(), 0)


def coarser_grid(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The grid (h, w) of the one of two maps ``[..., h, w]`` that has fewer places."""
    grids = [(int(m.shape[-2]), int(m.shape[-1])) for m in (first, second)]
    return min(grids, key=lambda grid: grid[0] * grid[1])


def resample_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map ``[B, C, H, W]`` on the grid (rows, columns), float32 ``[B, C, h, w]``.

    The same grid: as is. A grid that divides it: mean over blocks. Else bilinear, antialiased
    where it shrinks; a larger grid is interpolated. A linear 1x1 projector and this commute.
    """
    _require_map(features)
    values = features.float()
    height, width = values.shape[2:]
    if (height, width) == tuple(grid):
        return values
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(values, (height // grid[0], width // grid[1]))
    return F.interpolate(values, grid, mode="bilinear", antialias=True)


@torch.no_grad()
def r_squared(prediction: Tensor, target: Tensor) -> Tensor:
    """``1 - SSE / SST`` over all columns together; how much of the target is predicted.

    Args:
        prediction: ``[B, D]`` or ``[B, C, h, w]``, whose columns are the channels.
        target: the same shape; SST is around the mean of every column in this batch.

    Returns:
        A float32 scalar <= 1, without gradient. A constant target gives 1 when met, else 0 (as in
        scikit-learn). ValueError for shapes that differ.
    """
    require_same_shape(prediction, target, "B D" if prediction.ndim == 2 else "B C h w", "target")
    wanted = target.float()
    across = [axis for axis in range(wanted.ndim) if axis != 1]
    error = (prediction.float() - wanted).square().sum()
    total = (wanted - wanted.mean(across, keepdim=True)).square().sum()
    undefined = (error == 0).float()
    return torch.where(total > 0, 1 - error / total.clamp(min=1e-30), undefined)


def _require_map(features: Tensor) -> None:
    if features.ndim != 4:
        raise ValueError(f"a map must be [B, C, h, w], got {list(features.shape)}")
