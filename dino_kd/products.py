"""Matrix products on a CPU by oneDNN, where torch's own way to them is slower.

Float32: torch multiplies by MKL, which takes the widest instructions of Intel's processors alone.
oneDNN, a part of the same torch, takes those of any: with the AVX-512 of an AMD Zen 5 it is 2.2
times as fast (docs/results.md). bf16: both ways are oneDNN's, but torch writes the bias into the
result before the product, and here it is added within; so is GELU, where no gradient is asked for.
The operator is the one that torch.compile's code for CPUs calls for linear layers. Sums are float32
in all of them and differ by rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dino_kd.hardware import cpu_has_bf16, cpu_is_intel

OPERATOR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # some builds lack it
_SMALLEST = 2**18  # multiplications from which the longer way through Python is worth it


@functools.cache
def is_faster(dtype: torch.dtype) -> bool:
    """Whether this process calls oneDNN itself for linear layers in that type on the CPU.

    It follows from processor and torch alone, so that a resumed run rounds as the first one did.
    """
    if dtype == torch.bfloat16:
        return cpu_has_bf16() and _works(dtype)
    if dtype != torch.float32 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return not cpu_is_intel() and torch.backends.mkl.is_available() and _works(dtype)


def _works(dtype: torch.dtype) -> bool:
    """Whether this torch has the operator, and takes what `_multiply` gives it."""
    if OPERATOR is None:
        return False
    x = torch.arange(6, dtype=dtype).view(2, 3)
    weight = torch.arange(12, dtype=dtype).view(4, 3)
    with contextlib.suppress(RuntimeError, TypeError):
        return torch.equal(_multiply(x, weight, None), x @ weight.T)
    return False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with gradients (no second ones), as `F.linear`.

    Args:
        x: ``[..., D]``.
        weight: ``[K, D]``.
        bias: ``[K]``.

    Anything but large matrices on a CPU, in float32 or in bf16 (by autocast or throughout), and
    whatever is being compiled, goes to `F.linear` itself.
    """
    dtype = _dtype(x, weight, bias)
    if dtype is None:
        return F.linear(x, weight, bias)
    if dtype == torch.bfloat16:
        x, weight, bias = _low(x), _low(weight), None if bias is None else _low(bias)
    if not torch.is_grad_enabled():
        return _multiply(x, weight, bias)
    made: Tensor = _Linear.apply(x, weight, bias)
    return made


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``gelu(linear(x, weight, bias))``, the exact one, within a single product in bf16.

    None with gradients, which need what GELU was given, and where `linear` takes another way.
    """
    if torch.is_grad_enabled() or _dtype(x, weight, bias) != torch.bfloat16:
        return None
    return _multiply(_low(x), _low(weight), None if bias is None else _low(bias), "gelu")


Copies = dict[tuple[Tensor, bool], Tensor]
_copies: ContextVar[Copies | None] = ContextVar("_copies", default=None)  # inside `low_copies`


@contextlib.contextmanager
def low_copies() -> Iterator[None]:
    """Within, `linear` turns a parameter into bf16 once, however often it multiplies by it.

    For passes between which no parameter changes. Their gradients meet in bf16, as autocast's do.
    """
    token = _copies.set({})
    try:
        yield
    finally:
        _copies.reset(token)


def _low(x: Tensor) -> Tensor:
    """`x` in bf16, with its gradient."""
    if x.dtype == torch.bfloat16:
        return x
    copies = _copies.get()
    if copies is None or not isinstance(x, nn.Parameter):
        return x.to(torch.bfloat16)
    key = x, torch.is_grad_enabled()  # a copy without a graph is of no use to a pass that has one
    if key not in copies:
        copies[key] = x.to(torch.bfloat16)
    return copies[key]


class Linear(nn.Linear):
    """A linear layer by `linear`; a layer becomes one, and none again, by its `__class__`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """``[..., D]`` to ``[..., K]``."""
        return linear(input, self.weight, self.bias)


LINEAR = (nn.Linear, Linear)  # exactly these: others compute something else


def _dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What oneDNN is asked to multiply in; None where torch does it, or says why it cannot."""
    if x.device.type != "cpu" or x.numel() * len(weight) < _SMALLEST:
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.shape[-1] != weight.shape[1]:
        return None
    dtype, dtypes = x.dtype, {t.dtype for t in (x, weight, bias) if t is not None}
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        dtypes = dtypes - {torch.float32} | {dtype}  # autocast turns float32 into it
    return dtype if dtypes == {dtype} and is_faster(dtype) else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    made: Tensor = OPERATOR(x, weight, bias, then, [], "none")
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
            _product(rows, weight).view_as(x) if needs_x else None,
            _product(rows.T, x.reshape(len(rows), -1)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, which has no bias: in bf16 torch's own does it as well."""
    return left @ right if left.dtype == torch.bfloat16 else _multiply(left, right.T, None)
