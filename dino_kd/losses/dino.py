"""The self-distillation objective of DINO (Caron et al. 2021, arXiv 2104.14294, section 3.1)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_kd.distributed import all_reduce_sum

_BLOCK = 2**18  # numbers that are worked on at a time: 1 MB, what the cache of a core holds
_HEADROOM = 4096.0  # the kept gradient is larger by this: fp16 rounds a probability of 1/K coarsely


def center_and_sharpen(teacher_logits: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """Teacher probabilities ``softmax((g_t - c) / tau_t)``, float32, without gradient.

    Args:
        teacher_logits: ``[..., K]``.
        center: ``[K]``, the running mean of teacher logits.
        teacher_temp: temperature tau_t > 0.
    """
    centred = teacher_logits.detach().float() - center  # [..., K]
    return F.softmax(centred.div_(teacher_temp), dim=-1)


def dino_cross_entropy(
    student_logits: Tensor, teacher_probs: Tensor, student_temp: float, *, compiled: bool = False
) -> Tensor:
    """Mean cross-entropy of every student crop against every *other* global crop's target.

    ::

        for v in range(S):                    # student crops, the G global ones first
            for u in range(G):                # teacher's global crops
                if u != v:                    # never the same view
                    L += -sum(P_t[u] * log_softmax(s[v] / student_temp)) / pairs

    averaged over the batch. Computed once per student crop: with ``Q_v`` the sum of the other
    crops' targets and ``n_v`` their number, the pair terms of ``z = s[v] / student_temp`` add up to
    ``n_v * logsumexp(z) - z . Q_v``, and their gradient by z is ``n_v * softmax(z) - Q_v``. The
    forward pass writes that gradient at once, a few rows at a time while they are in the cache:
    it is all that is kept for the backward pass. (One gradient; no second derivative.)

    Args:
        student_logits: ``[S, B, K]``, any float type; global crops first.
        teacher_probs: ``[G, B, K]``, rows summing to 1, without gradient; G <= S.
        student_temp: temperature > 0.
        compiled: let torch.compile fuse everything into one region; the first call takes long.

    Returns:
        A scalar of the type of `teacher_probs`, float32, also under autocast; about ln K for an
        untrained network.
    """
    return _CrossEntropy.apply(student_logits, teacher_probs, student_temp, compiled)


class _CrossEntropy(torch.autograd.Function):
    """`dino_cross_entropy`: keeps a gradient of the size and type of the logits, nothing else."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_probs: Tensor, temp: float, compiled: bool
    ) -> Tensor:
        with torch.autocast(student_logits.device.type, enabled=False):
            make = _compiled_region() if compiled else _by_rows
            total, gradient = make(student_logits, teacher_probs, temp)
        ctx.save_for_backward(gradient)
        num_student, batch, _ = student_logits.shape
        terms = batch * len(teacher_probs) * (num_student - 1)
        ctx.share = 1 / (temp * terms * _HEADROOM)
        return total / terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer * ctx.share), None, None, None


def _by_rows(logits: Tensor, probs: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Loss sum and gradient of `_terms`, over all crops ``[S, B, K]``, block by block."""
    num_global, batch, num_prototypes = probs.shape
    rows = max(1, _BLOCK // num_prototypes) if logits.device.type == "cpu" else batch
    gradient = torch.empty_like(logits)
    total = probs.new_zeros(())
    for start in range(0, batch, rows):
        block = slice(start, start + rows)
        all_targets = probs[:, block].sum(0)  # [rows, K]
        for v in range(len(logits)):
            is_global = v < num_global
            targets = all_targets - probs[v, block] if is_global else all_targets
            num_targets = num_global - 1 if is_global else num_global
            terms, made = _terms(logits[v, block], targets, num_targets, temp)
            total += terms
            gradient[v, block] = made
    return total, gradient


def _all_at_once(logits: Tensor, probs: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """As `_by_rows` without a loop, for a compiler that forms no tensor in between."""
    num_global = len(probs)
    all_targets = probs.sum(0)  # [B, K]
    own, first = _terms(logits[:num_global], all_targets - probs, num_global - 1, temp)
    others, rest = _terms(logits[num_global:], all_targets, num_global, temp)
    # Each in the logits' type before they meet: the whole is never formed in float32.
    return own + others, torch.cat([first.to(logits.dtype), rest.to(logits.dtype)])


@functools.cache
def _compiled_region() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    return torch.compile(_all_at_once)


def _terms(logits: Tensor, targets: Tensor, count: int, temp: float) -> tuple[Tensor, Tensor]:
    """Sum of ``count * logsumexp(z) - z . targets`` and its gradient by z, times `_HEADROOM`."""
    scaled = logits.to(targets.dtype) / temp  # [..., K]
    probs = torch.softmax(scaled, -1)
    # The largest logit and its probability give the normaliser without another pass of exp.
    normaliser = scaled.amax(-1) - probs.amax(-1).log()  # [...]
    terms = count * normaliser - (scaled * targets).sum(-1)  # [...]
    return terms.sum(), probs.mul_(count * _HEADROOM).sub_(targets, alpha=_HEADROOM)


class Center(nn.Module):
    """Running mean of teacher logits, ``[K]``; prevents one prototype from winning everywhere.

    Micro-batches `observe`; one `commit` per optimiser step applies
    ``c <- momentum * c + (1 - momentum) * mean`` with the mean over all crops, micro-batches and
    processes, so that accumulation and data parallelism give the same centre. `discard` forgets
    a step that was skipped.
    """

    center: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("total", torch.zeros(num_prototypes), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def observe(self, teacher_logits: Tensor) -> None:
        """Add logits ``[..., K]`` to the mean of the coming commit."""
        flat = teacher_logits.detach().flatten(0, -2)
        self.total += flat.sum(0, dtype=torch.float32)
        self.count += len(flat)

    @torch.no_grad()
    def commit(self) -> None:
        """Move the centre by the observed mean; a no-op when nothing was observed."""
        packed = all_reduce_sum(torch.cat([self.total, self.count[None]]))  # [K + 1]
        mean = packed[:-1] / packed[-1].clamp(min=1)
        moved = torch.lerp(mean, self.center, self.momentum)
        self.center.copy_(torch.where(packed[-1] > 0, moved, self.center))
        self.discard()

    def discard(self) -> None:
        """Forget what was observed since the last commit."""
        self.total.zero_()
        self.count.zero_()
