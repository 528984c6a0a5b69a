"""The self-distillation objective of DINO (Caron et al. 2021, arXiv 2104.14294, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kd.distributed import all_reduce_sum


def center_and_sharpen(teacher_logits: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """Teacher probabilities ``softmax((g_t - c) / tau_t)``, float32, without gradient.

    Args:
        teacher_logits: ``[..., K]``.
        center: ``[K]``, the running mean of teacher logits.
        teacher_temp: temperature tau_t > 0.
    """
    return F.softmax((teacher_logits.detach().float() - center) / teacher_temp, dim=-1)


def dino_cross_entropy(
    student_logits: Tensor, teacher_probs: Tensor, student_temp: float
) -> Tensor:
    """Mean cross-entropy of every student crop against every *other* global crop's target.

    ::

        for v in range(S):                    # student crops, the G global ones first
            for u in range(G):                # teacher's global crops
                if u != v:                    # never the same view
                    L += -sum(P_t[u] * log_softmax(s[v] / student_temp)) / pairs

    averaged over the batch. Computed once per student crop: with ``Q_v`` the sum of the other
    crops' targets and ``n_v`` their number, the pair terms add up to
    ``n_v * logsumexp(z_v) - z_v . Q_v``; no [S, G, B, K] tensor exists.

    Args:
        student_logits: ``[S, B, K]``, any float type; global crops first.
        teacher_probs: ``[G, B, K]``, rows summing to 1; G <= S.
        student_temp: temperature > 0.

    Returns:
        A float32 scalar; about ln K for an untrained network.
    """
    num_student, num_global = len(student_logits), len(teacher_probs)
    pairs = num_global * num_student - num_global
    all_targets = teacher_probs.sum(0)  # [B, K]
    loss = teacher_probs.new_zeros(())
    for v in range(num_student):
        scaled = student_logits[v].float() / student_temp  # [B, K]
        is_global = v < num_global
        targets = all_targets - teacher_probs[v] if is_global else all_targets  # [B, K]
        num_targets = num_global - 1 if is_global else num_global
        terms = num_targets * torch.logsumexp(scaled, -1) - (scaled * targets).sum(-1)  # [B]
        loss = loss + terms.mean()
    return loss / pairs


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
        flat = teacher_logits.detach().float().flatten(0, -2)
        self.total += flat.sum(0)
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
