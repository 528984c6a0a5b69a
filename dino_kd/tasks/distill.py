"""Distillation as a Task: a student learns from labels and from frozen teachers, term by term."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_kd.data.mixing import Answers, Views
from dino_kd.losses.logits import kd_loss, mean_probability_logits
from dino_kd.models.backbone import Backbone
from dino_kd.models.batch_norm import BatchNormStatistics
from dino_kd.models.ema import update_teacher
from dino_kd.models.taps import taps
from dino_kd.tasks.teacher import Teacher

_CLASSIFIER_STD = 0.01
LABEL_TERM = "ce"


class Student(nn.Module):
    """A backbone and the classifiers on it.

    Args:
        backbone: what is shipped.
        num_classes: Y; None: no classifier.
        with_token: a second classifier on the distillation token, which the network then has.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int | None, *, with_token: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = _linear(backbone.embed_dim, num_classes)
        self.token_classifier = _linear(backbone.embed_dim, num_classes) if with_token else None

    def answers(self, pixels: Tensor, names: Sequence[str]) -> Answers:
        """What `names` asks for, of images float ``[B, C, H, W]`` in 0..255.

        As `Teacher.answers`; with a distillation token "logits" are those of the class token and
        "token_logits" those of the distillation token.
        """
        return self.answers_to(self.backbone.preprocess(pixels), names)

    def answers_to(self, x: Tensor, names: Sequence[str]) -> Answers:
        """As `answers`, of normalised images ``[B, C, H, W]``."""
        source = "prefix" if self.token_classifier is not None else "output"
        wanted = [name for name in names if name not in ("logits", "token_logits")]
        asks_logits = len(wanted) < len(names)
        made = taps(self.backbone, x, [*wanted, *([source] if asks_logits else [])])
        if "logits" in names:
            assert self.classifier is not None  # whoever asks has checked
            made["logits"] = self.classifier(
                made["prefix"][:, 0] if self.token_classifier is not None else made["output"]
            )
        if "token_logits" in names:
            assert self.token_classifier is not None
            made["token_logits"] = self.token_classifier(made["prefix"][:, 1])
        return made

    def logits(self, pixels: Tensor) -> Tensor:
        """Class scores ``[B, Y]`` of images in 0..255; of two classifiers the mean."""
        return self.logits_of(self.backbone.preprocess(pixels))

    def logits_of(self, x: Tensor) -> Tensor:
        """As `logits`, of normalised images ``[B, C, H, W]``."""
        if self.token_classifier is None:
            return self.answers_to(x, ["logits"])["logits"]
        made = self.answers_to(x, ["logits", "token_logits"])
        return (made["logits"] + made["token_logits"]) / 2


class DistillTask(nn.Module):
    """A student follows frozen teachers; the loss is the weighted sum of named terms.

    Teachers are no part of this module's parameters, state or training mode.

    Args:
        student: trained.
        teachers: each answers to the same images; may be empty (labels alone).
        terms: by name; ``ce`` is the one that reads labels alone. A name may end in ``@N``: the
            term then reads teacher N, else teacher 0. "logits" are the mean of all teachers' that
            have them, as probabilities, by the teachers' weights.
        ema: momentum of the moving average of the student; 0: none.
    """

    def __init__(
        self,
        student: Student,
        teachers: Sequence[Teacher],
        terms: Mapping[str, nn.Module],
        *,
        ema: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = nn.ModuleDict(terms)
        self.teachers = tuple(teachers)  # a tuple: not registered
        self.average = copy.deepcopy(student).requires_grad_(False) if ema else None
        self.ema = ema
        self.student_taps = needed_taps(terms.values(), "student_taps")
        self.teacher_taps = [self._asked_of(number) for number in range(len(self.teachers))]
        self._statistics = BatchNormStatistics(self)
        self.train()

    @property
    def skips_parameters(self) -> bool:
        """Whether some layers get no gradient: those behind the maps, when nothing else is read."""
        return not {"output", "logits", "token_logits"} & set(self.student_taps)

    @property
    def product(self) -> Student:
        """What is saved and scored: the moving average, if there is one."""
        return self.student if self.average is None else self.average

    def train(self, mode: bool = True) -> DistillTask:
        """The moving average only ever copies: it stays in eval mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def answers(self, views: Views, pixels: Tensor) -> list[Answers]:
        """Every teacher's, from the batch when it brings them, else from the teachers."""
        if views.answers:
            return views.answers
        return [
            teacher.answers(pixels, names)
            for teacher, names in zip(self.teachers, self.teacher_taps, strict=True)
        ]

    def forward(self, views: Views, values: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch; reads ``values["weight/NAME"]`` and ``["measure"]``."""
        self._statistics.remember()
        pixels = views.pixels()  # [B, C, H, W]
        answers = [dict(one) for one in self.answers(views, pixels)]
        scored = [one["logits"].float() for one in answers if "logits" in one]
        if len(scored) > 1:
            asked = zip(self.teachers, answers, strict=True)
            weights = [teacher.weight for teacher, one in asked if "logits" in one]
            mean = mean_probability_logits(scored, weights)
            answers = [{**one, "logits": mean} for one in answers]
        student = self.student.answers(pixels, self.student_taps)
        losses = {
            name: term(student, answers[teacher_of(name)] if answers else {}, views)
            for name, term in self.terms.items()
        }
        parts = {name: values[f"weight/{name}"] * loss for name, loss in losses.items()}
        total = torch.stack(list(parts.values())).sum()
        if not values.get("measure"):
            return total, {}
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        for name, term in self.terms.items():
            told = term.measure()  # type: ignore[operator]
            metrics |= {f"{key}/{name}": value for key, value in told.items()}
        if scored and "logits" in student:
            metrics |= fidelity(student["logits"].detach().float(), answers[0]["logits"].float())
        if values.get("compare_gradients"):
            metrics |= self._gradient_cosine(parts)
        return total, metrics

    def _gradient_cosine(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cosine of the labels' and the teachers' gradients in the student's backbone."""
        teaching = [loss for name, loss in parts.items() if name != LABEL_TERM]
        if LABEL_TERM not in parts or not teaching:
            return {}
        weights = [p for p in self.student.backbone.parameters() if p.requires_grad]
        gradients = [
            torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for loss in (parts[LABEL_TERM], torch.stack(teaching).sum())
        ]
        first, second = (
            torch.cat([
                (torch.zeros_like(w) if g is None else g).flatten().float()
                for g, w in zip(one, weights, strict=True)
            ])
            for one in gradients
        )  # fmt: skip
        return {
            "gradient_cosine": F.cosine_similarity(first, second, dim=0),
            "gradient_ratio": second.norm() / first.norm().clamp(min=1e-12),
        }

    @torch.no_grad()
    def after_step(self, values: dict[str, float], skipped: bool) -> None:
        """Settle batch-norm statistics, the terms' memories, and the moving average."""
        self._statistics.settle(skipped)
        for term in self.terms.values():
            term.after_step(skipped)  # type: ignore[operator]
        if self.average is not None and not skipped:
            update_teacher(self.student, self.average, self.ema, "copy")

    def _asked_of(self, number: int) -> list[str]:
        """What the terms of one teacher read; logits are asked of all that have them."""
        mine = [term for name, term in self.terms.items() if teacher_of(name) == number]
        names = needed_taps(mine, "teacher_taps")
        reads_logits = "logits" in needed_taps(self.terms.values(), "teacher_taps")
        if reads_logits and self.teachers[number].head is not None and "logits" not in names:
            names.append("logits")
        return [name for name in names if name != "logits" or self.teachers[number].head]


def _linear(width: int, num_classes: int | None) -> nn.Linear | None:
    if num_classes is None:
        return None
    layer = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(layer.weight, std=_CLASSIFIER_STD)
    nn.init.zeros_(layer.bias)
    return layer


def needed_taps(terms: Iterable[nn.Module], attribute: str) -> list[str]:
    """The taps that some terms read, each once."""
    return list(dict.fromkeys(name for term in terms for name in getattr(term, attribute)))


def teacher_of(name: str) -> int:
    """The number of the teacher that a term of this name reads."""
    return int(name.partition("@")[2] or 0)


def fidelity(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Agreement on the best class in percent, and mean KL(teacher || student) in nats."""
    agree = (student.argmax(1) == teacher.argmax(1)).float().mean()
    return {"agreement": 100 * agree, "kl": kd_loss(student, teacher)}
