"""What every distillation loss shares: float32 arithmetic, safe unit vectors, refused shapes."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORTEST = 1e-8  # squared length; below it a vector is scaled by 1e4 and not to length 1


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which matrix products of float32 stay float32."""
    return torch.autocast(tensor.device.type, enabled=False)


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors of length 1 along `dim`, float32; shorter ones than 1e-4 become ``v / 1e-4``.

    A floor of 1e-12, as in ``F.normalize``, has gradients of 1e12 at zero: infinite in float16.
    """
    values = vectors.float()
    return values * values.square().sum(dim, keepdim=True).clamp(min=_SHORTEST).rsqrt()


def kl_rows(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    """``sum_k p_t (log p_t - log p_s)`` over the last axis of finite log probabilities."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def require_same_shape(student: Tensor, teacher: Tensor, axes: str, other: str = "teacher") -> None:
    """Raise ValueError unless both have one shape with the axes named, e.g. ``B Y``."""
    if student.shape != teacher.shape or student.ndim != len(axes.split()):
        raise ValueError(
            f"student and {other} must both be [{', '.join(axes.split())}], "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )


def require_rows(student: Tensor, teacher: Tensor, least: int = 1) -> None:
    """Raise ValueError unless both are matrices with the same number of rows, >= `least`."""
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            "student [B, D] and teacher [B, E] must have the same number of rows, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if len(student) < least:
        raise ValueError(f"relations between images need at least {least} rows, got {len(student)}")
