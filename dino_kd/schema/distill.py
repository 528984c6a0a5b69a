"""Settings of `dino-kd distill`: teacher, student, terms of the loss, and the arms of a comparison.

A weight means the same for any batch size, number of classes or grid (docs/distill.md).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dino_kd.schema.base import (
    Auto,
    Interval,
    InWords,
    PositiveFloat,
    PositiveInt,
    RunLength,
    RunSettings,
    Settings,
    Share,
    ShareRange,
    Size,
    Text,
    setting,
)
from dino_kd.schema.finetune import AugmentSettings, SupervisedOptimSettings
from dino_kd.schema.pretrain import DataSettings, LogSettings

NonNegative = Annotated[float, Field(ge=0)]
Arm = Literal["scratch", "scratch_plus", "kd", "control"]


def _split_at_commas(value: Any) -> Any:
    """'scratch,kd' as a list, a single number as a list of one; everything else as it is."""
    if type(value) is int:
        return [value]
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class DistillDataSettings(DataSettings):
    """Which images, and how many of their labels."""

    labels: Auto | Share = setting(
        "auto",
        "Share of the images of each class whose label is used; the others teach by the teacher's "
        "answers alone. 0: no labels; auto: all labels that are there.",
    )
    label_seed: Annotated[int, Field(ge=0)] = setting(
        0, "Seed of the draw of labelled images: the same for every `seed` of the run."
    )
    test: Text | None = setting(
        None,
        "Labelled images that the student is scored on at the end; never used for training.",
        free=True,
    )


class StudentSettings(Settings):
    """The network that is shipped."""

    backbone: Text = setting("resnet18", "Any timm model name, CNN or ViT.")
    image_size: Size = setting(224, "Side of its input.", unit="px")
    drop_path: Annotated[float, Field(ge=0, lt=1)] = setting(0.0, "Stochastic depth.")
    args: dict[str, Any] = setting({}, "Further keyword arguments of the timm model.")
    init_from: Text | None = setting(
        None, "Start from this backbone instead of random weights; accepts what `backbone` does."
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "Momentum of a moving average of the student, which is then what is saved; 0: off."
    )


class DistillTeacherSettings(Settings):
    """A frozen network to learn from."""

    backbone: Text = setting(
        ...,
        "Run directory, 'local-dir:PATH', 'timm:NAME', 'torchvision:NAME', or a DINO or DINOv2 "
        "checkpoint file.",
        examples=["runs/pretrained"],
    )
    branch: Literal["teacher", "student", "untrained"] = setting(
        "teacher", "Which network of a run directory."
    )
    head: Text = setting(
        "auto",
        "Where its logits come from: a file that 'dino-kd linear' wrote, or 'timm' for the "
        "classifier of a timm model; auto: the classifier of a fine-tuning run, else the linear "
        "head in the run's eval folder; read only when a term needs logits.",
    )
    image_size: Size | None = setting(
        None,
        "Side of the image it is given, resampled from the student's; none: the side it was "
        "trained at. A /14 ViT at 196 px matches the grids of CNNs at 224.",
        unit="px",
    )
    weight: PositiveFloat = setting(1.0, "Its share among several teachers.")


class TermSettings(Settings):
    """What every term of the loss has."""

    weight: NonNegative = setting(0.0, "Weight in the loss; 0: off.")
    rise: Share = setting(
        0.0, "Share of the run, at its start, in which the weight rises linearly from 0."
    )
    fade: Share = setting(
        0.0, "Share of the run, at its end, in which the weight falls linearly to 0."
    )


class LogitKDSettings(TermSettings):
    """Hinton's distillation (arXiv 1503.02531) from the teacher's logits."""

    temperature: PositiveFloat = setting(2.0, "Temperature of both softmaxes.")
    standardise: bool = setting(
        True, "Z-score every row of logits before its softmax (arXiv 2403.01427)."
    )


class DKDSettings(TermSettings):
    """Decoupled distillation (arXiv 2203.08679); needs labels and more than two classes."""

    rise: Share = setting(
        0.08,
        "Share of the run, at its start, in which the weight rises linearly from 0; published: 20 "
        "of 240 epochs.",
    )
    alpha: NonNegative = setting(1.0, "Weight of the target class against all others.")
    beta: NonNegative = setting(8.0, "Weight of the distribution over the other classes.")
    temperature: PositiveFloat = setting(4.0, "Temperature of both softmaxes.")


class DISTSettings(TermSettings):
    """Correlation within and between classes (DIST, arXiv 2205.10536)."""

    beta: NonNegative = setting(1.0, "Weight of the correlation over classes.")
    gamma: NonNegative = setting(1.0, "Weight of the correlation over the batch.")
    temperature: PositiveFloat = setting(1.0, "Temperature of both softmaxes.")


class FeatureKDSettings(TermSettings):
    """Dense hints (FitNets, arXiv 1412.6550): the teacher's map from the student's."""

    fade: Share = setting(
        0.2, "Share of the run, at its end, in which the weight falls linearly to 0."
    )
    student_tap: Text = setting(
        "auto", "Map of the student, 'map-STRIDE'; auto: the one whose grid fits the teacher's."
    )


class CosineKDSettings(TermSettings):
    """Regression of the pooled feature's direction (SimReg, arXiv 2201.05131)."""

    layers: Annotated[int, Field(ge=1, le=8)] = setting(4, "Linear layers of the projector.")
    hidden_dim: PositiveInt = setting(512, "Width of its hidden layers.")


class AttentionKDSettings(TermSettings):
    """Where to look: maps of the student against one of the teacher's."""

    teacher_map: Literal["attention", "energy", "similarity"] = setting(
        "similarity",
        "attention: of the class token, mean of the heads; energy: of the tokens before the last "
        "norm (of a CNN: of its last map); similarity: cosine of pooled feature and patch.",
    )
    form: Literal["kl", "l2"] = setting(
        "kl", "kl: as distributions; l2: as unit vectors (arXiv 1612.03928)."
    )
    strides: list[PositiveInt] = setting([16, 32], "Which maps of the student.", unit="px")


class RelationKDSettings(TermSettings):
    """Relations between images, or between the places of one; no projector is needed."""

    distance: NonNegative = setting(1.0, "Weight of pairwise distances (RKD, arXiv 1904.05068).")
    angle: NonNegative = setting(2.0, "Weight of angles of triples (RKD).")
    similarity: NonNegative = setting(
        0.0, "Weight of the centred cosine matrix (after arXiv 1907.09682)."
    )
    tokens: NonNegative = setting(0.0, "Weight of the similarities of places within an image.")
    max_anchors: Annotated[int, Field(ge=3)] = setting(
        128, "Angles are taken among this many images of a batch.", unit="images"
    )


class QueueKDSettings(TermSettings):
    """Similarity to a queue of past features (SEED, arXiv 2101.04731)."""

    size: Auto | PositiveInt = setting(
        "auto", "Features in the queue; auto: a quarter of the images, at most 65,536."
    )
    student_temp: PositiveFloat = setting(0.2, "Temperature of the student's softmax.")
    teacher_temp: PositiveFloat = setting(0.07, "Temperature of the teacher's softmax.")


class PrototypeKDSettings(TermSettings):
    """The teacher's own DINO head: logit distillation without labels."""

    student_temp: PositiveFloat = setting(0.1, "Temperature of the student's softmax.")
    teacher_temp: PositiveFloat = setting(0.07, "Temperature of the teacher's softmax.")
    hidden_dim: PositiveInt = setting(1024, "Width of the hidden layers of the student's head.")


class TokenKDSettings(TermSettings):
    """A distillation token with a classifier of its own (DeiT, arXiv 2012.12877)."""

    kind: Literal["hard", "soft"] = setting(
        "hard", "hard: the teacher's best class; soft: its probabilities."
    )
    temperature: PositiveFloat = setting(3.0, "Temperature of kind=soft.")


class CRDSettings(TermSettings):
    """Contrastive representation distillation (arXiv 1910.10699)."""

    dim: PositiveInt = setting(128, "Width of the embeddings.")
    negatives: PositiveInt = setting(4096, "Other images that each one is told from.")
    temperature: PositiveFloat = setting(0.07, "Temperature.")
    momentum: Share = setting(0.5, "Momentum of the remembered embeddings.")


class TermsSettings(Settings):
    """The loss: a sum of named terms. `preset` fills in the weights that are not given."""

    preset: Literal["labels", "label_free", "none"] = setting(
        "labels",
        "labels: cross-entropy, the teacher's logits and features; label_free: its features; "
        "none: only what is given.",
    )
    standardise: Literal["auto", "columns", "phi_s"] = setting(
        "auto",
        "How a teacher's features become targets of unit variance. columns: each by itself; "
        "phi_s: by a rotation (PHI-S, arXiv 2410.01680); auto: phi_s for several teachers.",
    )
    ce: TermSettings = setting(TermSettings(), "Cross-entropy with the labels.")
    logit_kd: LogitKDSettings = LogitKDSettings()
    dkd: DKDSettings = DKDSettings()
    dist: DISTSettings = DISTSettings()
    feature_kd: FeatureKDSettings = FeatureKDSettings()
    cosine_kd: CosineKDSettings = CosineKDSettings()
    attention_kd: AttentionKDSettings = AttentionKDSettings()
    relation_kd: RelationKDSettings = RelationKDSettings()
    queue_kd: QueueKDSettings = QueueKDSettings()
    prototype_kd: PrototypeKDSettings = PrototypeKDSettings()
    token_kd: TokenKDSettings = TokenKDSettings()
    crd: CRDSettings = CRDSettings()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        for name, weight in TERM_PRESETS.get(values.get("preset", "labels"), {}).items():
            given = values.get(name, {})
            if isinstance(given, dict):
                filled[name] = {"weight": weight, **given}
        return filled

    @model_validator(mode="after")
    def _some_term(self) -> TermsSettings:
        if not self.weights():
            raise ValueError(
                "every weight is 0, so there is no loss; give one, such as logit_kd.weight=1, or "
                "preset=labels or label_free"
            )
        return self

    def weights(self) -> dict[str, float]:
        """The terms that are on, in the order of their definition."""
        terms = {
            name: value
            for name in type(self).model_fields
            if isinstance(value := getattr(self, name), TermSettings)
        }
        return {name: value.weight for name, value in terms.items() if value.weight > 0}


TERM_PRESETS: dict[str, dict[str, float]] = {
    "labels": {"ce": 0.1, "logit_kd": 4.0, "cosine_kd": 2.0, "feature_kd": 1.0},
    "label_free": {"cosine_kd": 1.0, "relation_kd": 0.5},
    "none": {},
}


class DistillAugmentSettings(AugmentSettings):
    """What happens to a training image: teacher and student see the same result."""

    scale: ShareRange = setting((0.25, 1.0), "Area range of the crop.", unit="share of image")
    mixup: NonNegative = setting(0.2, "Mixup: parameter of the Beta distribution; 0: off.")
    mix_share: Share = setting(
        0.5, "Share of the batches that are mixed, by mixup or CutMix at even odds."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "Share of the labels' target that is spread over all classes; logit terms smooth too."
    )


class DistillOptimSettings(SupervisedOptimSettings):
    """Optimiser, schedules and length of the run."""

    length: RunLength = setting(
        "300ep", "Length of the run; patience beats a finer loss.", unit="steps or 'ep'"
    )
    base_lr: PositiveFloat = setting(1e-3, "Peak learning rate per `lr_batch` images.")


class FidelitySettings(Settings):
    """How closely the student follows the teacher, while it trains."""

    every: Interval = setting(
        "2%",
        "How often the gradients of labels and teacher are compared; costs two backward passes.",
        unit="steps, 'ep' or '%'",
        free=True,
    )


class DistillConfig(RunSettings):
    """`dino-kd distill`: teach a small network what a backbone knows."""

    data: DistillDataSettings
    student: StudentSettings = StudentSettings()
    teacher: DistillTeacherSettings
    more_teachers: list[DistillTeacherSettings] = setting([], "Further teachers.")
    terms: TermsSettings = TermsSettings()
    augment: DistillAugmentSettings = DistillAugmentSettings()
    optim: DistillOptimSettings = DistillOptimSettings()
    fidelity: FidelitySettings = FidelitySettings()
    log: LogSettings = LogSettings()
    cache: Text = setting(
        "off",
        "Folder that keeps the teacher's answers to exactly these views; auto: "
        "~/.cache/dino_kd/teachers; off: none.",
        free=True,
    )
    cache_limit: PositiveFloat = setting(
        20.0, "Size of that folder; what was not used longest is deleted first.", unit="GB",
        free=True,
    )  # fmt: skip
    recalibrate: Annotated[int, Field(ge=0)] = setting(
        2048,
        "After mixed batches, batch-norm statistics of the saved student are taken from this many "
        "unmixed training images; 0: left as they are.",
        unit="images",
    )
    arms: Annotated[
        list[Arm],
        BeforeValidator(_split_at_commas),
        InWords("names with commas: scratch, scratch_plus, kd, control"),
    ] = setting(
        [],
        "Train these in folders of run_dir and compare them. scratch: labels alone, equal steps; "
        "scratch_plus: equal wall-clock; kd: distilled; control: from a teacher of random weights.",
        free=True,
    )
    seeds: Annotated[
        list[Annotated[int, Field(ge=0)]],
        BeforeValidator(_split_at_commas),
        InWords("whole numbers with commas"),
    ] = setting([0], "Seeds of the arms; when only `seed` is given, that one.", free=True)
    students: Annotated[
        list[Text], BeforeValidator(_split_at_commas), InWords("timm names with commas")
    ] = setting(
        [], "Several students, one after the other, from one pass of the teacher.", free=True
    )
