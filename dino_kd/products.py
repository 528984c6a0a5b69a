"""Float32 matrix products on a CPU by oneDNN, where torch's own are slower.

torch multiplies float32 matrices by MKL, which takes the widest instructions of Intel's processors
alone. oneDNN, a part of the same torch, takes those of any: with the AVX-512 of an AMD Zen 5 it is
2.2 times as fast (docs/results.md). The operator is the one that torch.compile's code for CPUs
calls for linear layers. Sums are float32 in both and differ by rounding.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dino_kd.hardware import cpu_is_intel

OPERATOR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # some builds lack it
_SMALLEST = 2**18  # multiplications from which the longer way through Python is worth it


@functools.cache
def by_onednn() -> bool:
    """Whether this process multiplies float32 matrices by oneDNN.

    It follows from processor and torch alone, so that a resumed run rounds as the first one did.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or cpu_is_intel():
        return False
    if OPERATOR is None or not torch.backends.mkl.is_available():
        return False
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    with contextlib.suppress(RuntimeError, TypeError):  # a torch that calls it otherwise
        return torch.equal(_multiply(x, weight, None), x @ weight.T)
    return False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with gradients (no second ones), as `F.linear`.

    Args:
        x: ``[..., D]``.
        weight: ``[K, D]``.
        bias: ``[K]``.

    Anything but large float32 matrices on a CPU, outside autocast and compilation, goes to
    `F.linear` itself.
    """
    if not _is_worth_it(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _multiply(x, weight, bias)
    made: Tensor = _Linear.apply(x, weight, bias)
    return made


class Linear(nn.Linear):
    """A linear layer by `linear`; a layer becomes one, and none again, by its `__class__`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """``[..., D]`` to ``[..., K]``."""
        return linear(input, self.weight, self.bias)


LINEAR = (nn.Linear, Linear)  # exactly these: others compute something else


def _is_worth_it(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) >= _SMALLEST
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and by_onednn()
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = OPERATOR(x, weight, bias, "none", [], "")
    return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, len(weight))  # [n, K]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _multiply(rows, weight.T, None).view_as(x) if needs_x else None,
            _multiply(rows.T, x.reshape(len(rows), -1).T, None) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
