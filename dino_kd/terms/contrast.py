"""Terms that remember other images: SEED's queue, CRD's memory, and the teacher's prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_kd.data.mixing import Answers, Views
from dino_kd.losses.contrast import FeatureQueue, MemoryBank, crd_loss, queue_loss
from dino_kd.losses.prototypes import prototype_loss, sinkhorn
from dino_kd.models.head import DINOHead
from dino_kd.terms.features import projector
from dino_kd.terms.term import Term


class QueueTerm(Term):
    """Similarities to past teacher features (SEED).

    Args:
        width, teacher_width: of the pooled features.
        size: of the queue.
        student_temp, teacher_temp: of the two softmaxes.
    """

    student_taps = ("output",)
    teacher_taps = ("output",)

    def __init__(
        self, width: int, teacher_width: int, *, size: int, student_temp: float, teacher_temp: float
    ) -> None:
        super().__init__()
        self.projector = projector(width, teacher_width, hidden_dim=width, layers=2)
        self.queue = FeatureQueue(size, teacher_width)
        self.student_temp, self.teacher_temp = student_temp, teacher_temp

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """Mean over the batch; this step's features enter the queue after it."""
        target = teacher["output"].float()
        self.queue.observe(target)
        return queue_loss(
            self.projector(student["output"]), target, self.queue.queue,
            student_temp=self.student_temp, teacher_temp=self.teacher_temp,
        )  # fmt: skip

    def after_step(self, skipped: bool) -> None:
        """Append this step's features."""
        self.queue.discard() if skipped else self.queue.commit()


class ContrastTerm(Term):
    """Tell an image's own embedding from those of many others (CRD).

    Args:
        width, teacher_width: of the pooled features.
        num_images: of the data set.
        dim: of the embeddings.
        negatives: others for each image.
        temperature, momentum: of the scores, and of what is remembered.
    """

    student_taps = ("output",)
    teacher_taps = ("output",)

    def __init__(
        self,
        width: int,
        teacher_width: int,
        *,
        num_images: int,
        dim: int,
        negatives: int,
        temperature: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.embed_teacher = nn.Linear(teacher_width, dim)
        self.bank = MemoryBank(num_images, dim, momentum)
        self.negatives, self.temperature = negatives, temperature

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """Mean over the batch. The teacher's embedding trains, the teacher does not."""
        ours = self.embed(student["output"])
        theirs = self.embed_teacher(teacher["output"].to(ours.dtype))
        indices = views.indices.to(ours.device)
        drawn = self.bank.negatives(indices, self.negatives)  # [B, negatives]
        others = self.bank.student[drawn], self.bank.teacher[drawn]
        z = self.bank.normalisers(ours, theirs, *others, temperature=self.temperature)
        self.bank.observe(indices, ours, theirs)
        return crd_loss(
            ours, theirs, *others, temperature=self.temperature,
            num_images=len(self.bank.student), z_student=z[0], z_teacher=z[1],
        )  # fmt: skip

    def after_step(self, skipped: bool) -> None:
        """Remember this step's embeddings."""
        self.bank.discard() if skipped else self.bank.commit()


class PrototypeTerm(Term):
    """The distribution over the prototypes of the teacher's own DINO head.

    The teacher's probabilities are balanced over the batches of all processes (Sinkhorn), which
    takes the place of the centre of its pretraining.

    Args:
        width: of the student's pooled features.
        num_prototypes: K of the teacher's head.
        hidden_dim: of the student's head.
        student_temp, teacher_temp: of the two softmaxes.
    """

    student_taps = ("output",)
    teacher_taps = ("prototypes",)

    def __init__(
        self,
        width: int,
        num_prototypes: int,
        *,
        hidden_dim: int,
        student_temp: float,
        teacher_temp: float,
    ) -> None:
        super().__init__()
        self.head = DINOHead(width, num_prototypes, hidden_dim=hidden_dim, num_layers=2)
        self.student_temp, self.teacher_temp = student_temp, teacher_temp

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """KL divergence, mean over the batch."""
        with torch.no_grad():
            probs = sinkhorn(teacher["prototypes"], self.teacher_temp)  # [B, K]
        return prototype_loss(self.head(student["output"]), probs, self.student_temp)
