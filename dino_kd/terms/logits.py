"""Terms on logits: labels, and what the teacher makes of the classes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dino_kd.data.mixing import Answers, Views
from dino_kd.losses.logits import dkd_loss, soft_cross_entropy
from dino_kd.terms.term import Term


class LabelTerm(Term):
    """Cross-entropy with the labels; images without one add nothing.

    Args:
        labelled_share: part of the images that have a label, above 0. Dividing by it makes the
            weight mean the same for any part, in any batch, on any number of processes.
        label_smoothing: share of a label that is spread over all classes.
    """

    student_taps = ("logits",)

    def __init__(self, labelled_share: float, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.labelled_share, self.label_smoothing = labelled_share, label_smoothing

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """Mean over the labelled images."""
        logits = student["logits"]
        shares = views.shares(logits.shape[1])  # [B, Y]
        spread = shares.sum(1, keepdim=True) / shares.shape[1]
        shares = shares + self.label_smoothing * (spread - shares)
        return soft_cross_entropy(logits, shares, self.labelled_share)


class LogitTerm(Term):
    """Any loss of student and teacher logits ``[B, Y]``."""

    student_taps = ("logits",)
    teacher_taps = ("logits",)

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """Mean over the batch."""
        return self.loss(student[self.student_taps[0]], teacher["logits"])


class DecoupledTerm(Term):
    """DKD: needs to know which class is the true one."""

    student_taps = ("logits",)
    teacher_taps = ("logits",)

    def __init__(self, *, alpha: float, beta: float, temperature: float) -> None:
        super().__init__()
        self.weights = {"alpha": alpha, "beta": beta, "temperature": temperature}

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """Mean over the batch."""
        shares = views.shares(student["logits"].shape[1])
        return dkd_loss(student["logits"], teacher["logits"], shares, **self.weights)


class TokenTerm(LogitTerm):
    """A distillation token's own logits against the teacher's."""

    student_taps = ("token_logits",)
