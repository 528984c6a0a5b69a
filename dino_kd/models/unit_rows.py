"""The rows of a large matrix at length 1, in the type of the product that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2**18  # numbers that are worked on at a time: 1 MB, what the cache of a core holds


def unit_rows(rows: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``rows[k] / max(|rows[k]|, eps)``, as `F.normalize` and a cast to `dtype` give it.

    For u = v / |v| and a gradient g by u, the gradient by v is (g - u (g . u)) / |v|. Both ways
    are written out block by block, while the rows are in the cache, and keep nothing but the
    lengths; the graph of the plain operations goes through the whole matrix a dozen times, which
    for 65,536 prototypes lies far outside the cache (docs/results.md).
    (One gradient; no second derivative.)

    Args:
        rows: ``[K, D]``, any float type; lengths and quotients are float32.
        eps: smallest length that is divided by.
        dtype: of the result.
    """
    return _UnitRows.apply(rows, eps, dtype)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32)
        ctx.save_for_backward(rows, lengths)
        ctx.eps = eps
        made = torch.empty_like(rows, dtype=dtype)
        for block in _blocks(rows):
            made[block] = rows[block].float() / lengths[block].clamp(min=eps)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, lengths = ctx.saved_tensors
        made = torch.empty_like(rows)
        for block in _blocks(rows):
            length = lengths[block].clamp(min=ctx.eps)
            unit = rows[block].float() / length
            along = (gradient[block] * unit).sum(1, keepdim=True)  # [k, 1]
            along *= lengths[block] >= ctx.eps  # a length that is held at eps does not change
            made[block] = torch.addcmul(gradient[block].float(), unit, along, value=-1) / length
        return made, None, None


def _blocks(rows: Tensor) -> list[slice]:
    size = max(1, _BLOCK // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    return [slice(start, start + size) for start in range(0, len(rows), size)]
