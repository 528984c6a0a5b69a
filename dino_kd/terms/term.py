"""What a term of the distillation loss is."""

from __future__ import annotations

from torch import Tensor, nn

from dino_kd.data.mixing import Answers, Views


class Term(nn.Module):
    """One summand of the loss; a module, so that its projectors train with the student.

    This one learns and remembers nothing; others redefine what they need.

    Attributes:
        student_taps, teacher_taps: the outputs it compares, named as in `models.taps`, and
            "logits" and "prototypes".
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """The loss at weight 1: float32, mean over the batch."""
        raise NotImplementedError

    def fit(self, answers: Answers) -> None:
        """Before the first step: learn scales from the teacher's answers to some images."""

    def measure(self) -> dict[str, Tensor]:
        """Numbers about the last batch, such as the R2 of a projector."""
        return {}

    def after_step(self, skipped: bool) -> None:
        """Commit what was observed; `skipped`: forget it."""


def learns_scales(term: nn.Module) -> bool:
    """Whether its `fit` reads anything; answers to many images are kept for nothing else."""
    return getattr(type(term), "fit", None) is not Term.fit
