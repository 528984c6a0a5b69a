"""Where to look: the student's energy maps against one map of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dino_kd.data.mixing import Answers, Views
from dino_kd.losses.maps import attention_loss, coarser_grid, energy_map, resample_map
from dino_kd.terms.term import Term


class AttentionTerm(Term):
    """Mean over some maps of the student, each at the coarser of its grid and the teacher's.

    Args:
        student_taps: the student's maps, such as "map-16".
        teacher_tap: "attention", "energy" or "similarity", see `models.taps`.
        form: "kl" or "l2", see `attention_loss`.
    """

    def __init__(
        self, student_taps: Sequence[str], teacher_tap: str, form: Literal["kl", "l2"]
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps, self.form = tuple(student_taps), (teacher_tap,), form

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """Mean over the batch and the maps."""
        losses = []
        target = teacher[self.teacher_taps[0]].float()  # [B, h, w]
        for name in self.student_taps:
            ours = energy_map(student[name])  # [B, h, w]
            grid = coarser_grid(ours, target)
            ours, theirs = (resample_map(m[:, None], grid)[:, 0] for m in (ours, target))
            losses.append(attention_loss(ours, theirs, form=self.form))
        return torch.stack(losses).mean()
