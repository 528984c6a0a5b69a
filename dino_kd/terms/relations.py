"""Relations: between the images of a batch, and between the places of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from dino_kd.data.mixing import Answers, Views
from dino_kd.losses.maps import coarser_grid, resample_map
from dino_kd.losses.relations import (
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_loss,
    token_relation_loss,
)
from dino_kd.terms.term import Term


class RelationTerm(Term):
    """A weighted sum of relations; widths of student and teacher may differ.

    Relations between images are those of one process's micro-batch.

    Args:
        distance, angle, similarity, tokens: weights, see `losses.relations`; 0: left out.
        max_anchors: images among which angles are taken.
        student_map: the map whose places are compared when tokens > 0.
    """

    def __init__(
        self,
        *,
        distance: float,
        angle: float,
        similarity: float,
        tokens: float,
        max_anchors: int,
        student_map: str = "map",
    ) -> None:
        super().__init__()
        self.distance, self.angle, self.similarity = distance, angle, similarity
        self.tokens, self.max_anchors, self.student_map = tokens, max_anchors, student_map
        self.student_taps = ("output", student_map) if tokens else ("output",)
        self.teacher_taps = ("output", "map") if tokens else ("output",)

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """Mean over pairs, triples and places."""
        ours, theirs = student["output"], teacher["output"]  # [B, D], [B, E]
        losses = []
        if self.distance:
            losses.append(self.distance * rkd_distance_loss(ours, theirs))
        if self.angle:
            losses.append(self.angle * rkd_angle_loss(ours, theirs, self.max_anchors))
        if self.similarity:
            losses.append(self.similarity * similarity_loss(ours, theirs))
        if self.tokens:
            maps = student[self.student_map], teacher["map"]
            grid = coarser_grid(*maps)
            ours, theirs = (resample_map(m, grid) for m in maps)
            losses.append(self.tokens * token_relation_loss(ours, theirs))
        return torch.stack(losses).sum()
