"""Distillation through the teacher's own prototypes: cross-entropy, and balanced assignments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kd.distributed import all_gather_rows
from dino_kd.losses.numerics import require_same_shape


def prototype_loss(
    student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1
) -> Tensor:
    """``mean_b KL(p_t || softmax(s / student_temp))``: the cross-entropy of DINO less H(p_t).

    Its gradient is that of the cross-entropy; its value says how far the student is.

    Args:
        student_logits: ``[B, K]``; B = 0 (no masked token) gives 0.
        teacher_probs: ``[B, K]``, rows that sum to 1, without gradient.
        student_temp: temperature > 0.

    Returns:
        A float32 scalar >= 0; 0 for equal probabilities. ValueError for shapes that differ.
    """
    require_same_shape(student_logits, teacher_probs, "B K")
    log_student = F.log_softmax(student_logits.float() / student_temp, -1)
    total = F.kl_div(log_student, teacher_probs.detach().float(), reduction="sum")
    return total / max(len(student_logits), 1)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher probabilities that use every prototype equally (Cuturi 2013; SwAV, 2006.09882).

    ::

        q = exp(logits / temperature)
        repeat: q /= q.sum over the images of all processes     # each prototype as often
                q /= q.sum over the prototypes                  # each image once

    in logarithms, so that no sum is 0 and nothing overflows.

    Args:
        logits: ``[B, K]``; processes may hold different numbers of rows, none included.
        temperature: > 0.
        iterations: >= 1.

    Returns:
        Float32 ``[B, K]`` without gradient; rows sum to 1, columns to about B / K. ValueError for
        other shapes or no iteration.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [B, K], got {list(logits.shape)}")
    if iterations < 1:
        raise ValueError(f"sinkhorn needs at least one iteration, got {iterations}")
    logs = logits.float() / temperature  # [B, K]
    for _ in range(iterations):
        mine = torch.logsumexp(logs, 0)  # [K]
        everyone = torch.logsumexp(all_gather_rows(mine[None]), 0)
        # without any image anywhere there is nothing to balance, and no row to be wrong
        logs = F.log_softmax(logs - everyone, -1)
    return logs.exp()
