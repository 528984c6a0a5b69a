"""DINO pretraining as a Task: student, EMA teacher, centre (arXiv 2104.14294, algorithm 1)."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_kd.data.multicrop import Crops
from dino_kd.engine.health import perplexity, rankme_later
from dino_kd.engine.loop import Metric
from dino_kd.losses.dino import Center, center_and_sharpen, dino_cross_entropy
from dino_kd.models.backbone import Backbone
from dino_kd.models.batch_norm import BatchNormStatistics
from dino_kd.models.ema import update_teacher
from dino_kd.models.head import DINOHead
from dino_kd.models.low_weights import with_low_weights
from dino_kd.products import low_copies

TeacherBuffers = Literal["own", "ema", "copy"]


class Network(nn.Module):
    """A backbone and its projection head.

    Attributes:
        low_dtype: compute the backbone in this type throughout (`with_low_weights`); None: as
            autocast says.
        packs_crops: groups of crops of different sizes go through the backbone together
            (`models.packed_crops`).
    """

    def __init__(self, backbone: Backbone, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.low_dtype: torch.dtype | None = None
        self.packs_crops = False

    def features(self, groups: list[Tensor]) -> Tensor:
        """Features ``[S, B, D]`` of uint8 crop groups ``[crops, B, C, h, w]``, one size a group."""
        images = [self.backbone.preprocess(crops.flatten(0, 1)) for crops in groups]
        passes = [images] if self.packs_crops and len(images) > 1 else images
        if self.low_dtype is None:
            with low_copies():
                features = [self.backbone(pixels) for pixels in passes]  # [crops * B, D] each
        else:
            features = with_low_weights(self.backbone, passes, self.low_dtype)
        return torch.cat(features).unflatten(0, (-1, groups[0].shape[1]))

    def logits(self, features: Tensor, *, frozen: bool = False) -> Tensor:
        """Head outputs ``[S, B, K]`` of features ``[S, B, D]``, all crops in one pass."""
        return self.head(features.flatten(0, 1), frozen=frozen).unflatten(0, features.shape[:2])


class DinoTask(nn.Module):
    """The student learns from all crops to match the teacher, which sees the global crops only.

    Args:
        backbone: the student's network without head; the teacher starts as its copy.
        head: the student's projection head, likewise.
        student_temp: student temperature, fixed.
        center_momentum: EMA coefficient of the centre.
        buffers: what the teacher's batch-norm statistics are: "own" batches, or the student's
            averaged ("ema") or copied ("copy"). See `update_teacher`.

    Attributes:
        compiles_loss: fuse the loss with torch.compile; False unless set.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: DINOHead,
        *,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        buffers: TeacherBuffers = "own",
    ) -> None:
        super().__init__()
        self.compiles_loss = False
        self.student = Network(backbone, head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.center = Center(head.num_prototypes, center_momentum)
        self.student_temp = student_temp
        self.teacher_buffers = buffers
        self._statistics = BatchNormStatistics(self)
        self.train()

    def train(self, mode: bool = True) -> DinoTask:
        """The teacher is always in eval mode (no drop path), but with "own" batch-norm batches."""
        super().train(mode)
        self.teacher.eval()
        if mode and self.teacher_buffers == "own":
            for module in self.teacher.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
        return self

    def forward(self, crops: Crops, values: dict[str, float]) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of one micro-batch.

        Reads ``values["teacher_temp"]``, ``["freeze_last_layer"]`` and ``["measure"]``.
        """
        if self.training:
            self._statistics.remember()
        groups = [crops.global_crops]
        if len(crops.local_crops):
            groups.append(crops.local_crops)
        with torch.no_grad():
            teacher_features = self.teacher.features(groups[:1])  # [G, B, D]
            teacher_logits = self.teacher.logits(teacher_features)  # [G, B, K]
            self.center.observe(teacher_logits)
            teacher_probs = center_and_sharpen(
                teacher_logits, self.center.center, values["teacher_temp"]
            )  # [G, B, K]
        student_features = self.student.features(groups)  # [S, B, D]
        frozen = bool(values.get("freeze_last_layer"))
        student_logits = self.student.logits(student_features, frozen=frozen)  # [S, B, K]
        loss = dino_cross_entropy(
            student_logits, teacher_probs, self.student_temp, compiled=self.compiles_loss
        )
        if not values.get("measure"):
            return loss, {}
        entropy = torch.special.entr(teacher_probs).sum(-1).mean()
        return loss, {
            "teacher_entropy": entropy,
            "kl": loss.detach() - entropy,
            "prototypes_used": perplexity(teacher_probs.flatten(0, 1)),
            "center_norm": self.center.center.norm(),
            "rankme": rankme_later(teacher_features.flatten(0, 1)),
        }

    @torch.no_grad()
    def after_step(self, values: dict[str, float], skipped: bool) -> None:
        """Move teacher (by ``values["momentum"]``) and centre; undo what a skipped step left."""
        if skipped:
            self.center.discard()
        else:
            update_teacher(self.student, self.teacher, values["momentum"], self.teacher_buffers)
            self.center.commit()
        self._statistics.settle(skipped)
