"""From settings to the terms of the loss, each checked against student, teachers and labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import nn

from dino_kd.errors import ConfigError, UserError
from dino_kd.losses.logits import dist_loss, hard_label_loss, kd_loss
from dino_kd.losses.standardise import PhiS, Standardise
from dino_kd.models.backbone import Backbone
from dino_kd.models.taps import check_taps, map_strides, tap_shapes
from dino_kd.schema import DistillConfig, TermSettings, TermsSettings
from dino_kd.tasks.teacher import Teacher
from dino_kd.terms.attention import AttentionTerm
from dino_kd.terms.contrast import ContrastTerm, PrototypeTerm, QueueTerm
from dino_kd.terms.features import CosineTerm, FeatureTerm
from dino_kd.terms.logits import DecoupledTerm, LabelTerm, LogitTerm, TokenTerm
from dino_kd.terms.relations import RelationTerm

LOGIT_TERMS = ("logit_kd", "dkd", "dist", "token_kd")
LABEL_TERMS = ("ce", "dkd")
_PER_TEACHER = ("feature_kd", "cosine_kd", "attention_kd", "relation_kd", "queue_kd", "crd")
_MAX_QUEUE = 65_536


def needs_labels(terms: TermsSettings) -> list[str]:
    """The terms that are on and read labels."""
    return [name for name in terms.weights() if name in LABEL_TERMS]


def needs_logits(terms: TermsSettings) -> list[str]:
    """The terms that are on and read the teacher's logits."""
    return [name for name in terms.weights() if name in LOGIT_TERMS]


def make_terms(
    settings: DistillConfig,
    student: Backbone,
    teachers: Sequence[Teacher],
    *,
    num_images: int,
    num_classes: int | None,
    labelled_share: float,
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Every term that is on, and its weight; names end in ``@N`` for teachers after the first.

    Draws projectors from torch's global generator. The weight of a term on features is shared
    among several teachers by their own weights.

    Raises:
        ConfigError: a term that student, teacher or classes cannot serve; all of them at once.
    """
    made: dict[str, nn.Module] = {}
    weights: dict[str, float] = {}
    problems: list[str] = []
    total = sum(teacher.weight for teacher in teachers)
    for name, weight in settings.terms.weights().items():
        each = teachers if name in _PER_TEACHER else teachers[:1]
        for number, teacher in enumerate(each or [None]):  # type: ignore[list-item]
            key = f"{name}@{number}" if number else name
            try:
                made[key] = _make_term(
                    name, settings, student, teacher, num_images, num_classes, labelled_share,
                    several=len(teachers) > 1,
                )  # fmt: skip
            except UserError as error:
                problems.append(f"terms.{name}: {error}")
            shared = teacher.weight / total if teacher and len(each) > 1 else 1.0
            weights[key] = weight * shared
    if problems:
        raise ConfigError(problems)
    return made, weights


def _make_term(
    name: str,
    settings: DistillConfig,
    student: Backbone,
    teacher: Teacher | None,
    num_images: int,
    num_classes: int | None,
    labelled_share: float,
    *,
    several: bool,
) -> nn.Module:
    terms = settings.terms
    if name == "ce":
        return LabelTerm(labelled_share, settings.augment.label_smoothing)
    assert teacher is not None  # every other term has one
    width, teacher_width = student.embed_dim, teacher.backbone.embed_dim
    if name == "cosine_kd":
        cosine = terms.cosine_kd
        return CosineTerm(width, teacher_width, hidden_dim=cosine.hidden_dim, layers=cosine.layers)
    if name == "queue_kd":
        queue = terms.queue_kd
        size = min(_MAX_QUEUE, max(1, num_images // 4)) if queue.size == "auto" else queue.size
        return QueueTerm(
            width, teacher_width, size=int(size),
            student_temp=queue.student_temp, teacher_temp=queue.teacher_temp,
        )  # fmt: skip
    if name == "crd":
        crd = terms.crd
        return ContrastTerm(
            width, teacher_width, num_images=num_images, dim=crd.dim, negatives=crd.negatives,
            temperature=crd.temperature, momentum=crd.momentum,
        )  # fmt: skip
    if name == "prototype_kd":
        prototypes = terms.prototype_kd
        assert teacher.prototypes is not None
        return PrototypeTerm(
            width, teacher.prototypes.num_prototypes, hidden_dim=prototypes.hidden_dim,
            student_temp=prototypes.student_temp, teacher_temp=prototypes.teacher_temp,
        )  # fmt: skip
    if name in ("feature_kd", "attention_kd", "relation_kd"):
        return _map_term(name, terms, student, teacher, several=several)
    return _logit_term(name, terms, student, num_classes)


def _map_term(
    name: str, terms: TermsSettings, student: Backbone, teacher: Teacher, *, several: bool
) -> nn.Module:
    """A term on maps."""
    if name == "attention_kd":
        attention = terms.attention_kd
        taps = [f"map-{stride}" for stride in attention.strides]
        check_taps(student, taps)
        check_taps(teacher.backbone, [attention.teacher_map])
        _refuse_single_places(student, taps, teacher)
        return AttentionTerm(taps, attention.teacher_map, attention.form)
    if name == "relation_kd":
        relation = terms.relation_kd
        values = relation.model_dump(exclude=set(TermSettings.model_fields))
        if not any(values[key] for key in ("distance", "angle", "similarity", "tokens")):
            raise ConfigError("distance, angle, similarity and tokens are all 0; give one of them")
        tap = _fitting_map(student, teacher) if relation.tokens else "map"
        return RelationTerm(**values, student_map=tap)
    hint = terms.feature_kd
    tap = _fitting_map(student, teacher) if hint.student_tap == "auto" else hint.student_tap
    shape = tap_shapes(student, [tap])[tap]
    if len(shape) != 3:
        known = ", ".join(f"map-{stride}" for stride in map_strides(student))
        raise ConfigError(
            f"student_tap={tap!r} is no map with channels; {student.name} has {known}"
        )
    channels = teacher.shapes(["map"])["map"][0]
    rotate = terms.standardise == "phi_s" or (terms.standardise == "auto" and several)
    return FeatureTerm(tap, shape[0], channels, PhiS(channels) if rotate else Standardise(channels))


def _logit_term(
    name: str, terms: TermsSettings, student: Backbone, num_classes: int | None
) -> nn.Module:
    """A term on logits."""
    if name == "dkd":
        if num_classes is not None and num_classes <= 2:
            raise ConfigError(
                f"it splits the classes into the true one and the others, and needs more than 2; "
                f"there are {num_classes}. Use logit_kd or dist"
            )
        dkd = terms.dkd
        return DecoupledTerm(alpha=dkd.alpha, beta=dkd.beta, temperature=dkd.temperature)
    if name == "dist":
        return LogitTerm(
            functools.partial(
                dist_loss, beta=terms.dist.beta, gamma=terms.dist.gamma,
                temperature=terms.dist.temperature,
            )
        )  # fmt: skip
    if name == "token_kd":
        if getattr(student.net, "dist_token", None) is None:
            raise ConfigError(
                f"{student.name} has no distillation token; use a student such as "
                "deit_tiny_distilled_patch16_224, or logit_kd"
            )
        if not {"ce", "logit_kd", "dkd", "dist"} & terms.weights().keys():
            raise ConfigError(
                "the class token's classifier, half of the answer, would learn from nothing; give "
                "terms.ce.weight or terms.logit_kd.weight too"
            )
        soft = functools.partial(kd_loss, temperature=terms.token_kd.temperature)
        loss: Callable = hard_label_loss if terms.token_kd.kind == "hard" else soft
        return TokenTerm(loss)
    logit = terms.logit_kd
    return LogitTerm(
        functools.partial(kd_loss, temperature=logit.temperature, standardise=logit.standardise)
    )


def _refuse_single_places(student: Backbone, taps: Sequence[str], teacher: Teacher) -> None:
    """A map of one place has nothing to look away from. Raises ConfigError."""
    grids = {f"{tap} of {student.name}": shape for tap, shape in tap_shapes(student, taps).items()}
    grids[f"the map of {teacher.name}"] = teacher.shapes(["map"])["map"]
    for name, shape in grids.items():
        if max(shape[-2:]) == 1:
            raise ConfigError(
                f"{name} has a single place, so there is nothing to attend to; use finer "
                "terms.attention_kd.strides, or larger images"
            )


def _fitting_map(student: Backbone, teacher: Teacher) -> str:
    """The student's map whose grid is the teacher's, else the coarsest that is finer, else finest.

    A grid that is too fine is averaged, which loses less than stretching a coarse one.
    """
    if not map_strides(student):
        raise ConfigError(f"{student.name} does not show its stages; choose another student")
    wanted = teacher.shapes(["map"])["map"][1:]
    names = [f"map-{stride}" for stride in map_strides(student)]
    grids = {name: shape[1:] for name, shape in tap_shapes(student, names).items()}
    finer = [name for name in names if min(grids[name]) >= min(wanted)]
    return finer[-1] if finer else names[0]
