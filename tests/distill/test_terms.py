"""From settings to terms: every kind is built as asked; what does not fit is refused at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dino_kd.config import load_settings
from dino_kd.distill.terms import make_terms, needs_labels, needs_logits
from dino_kd.errors import ConfigError
from dino_kd.losses.standardise import PhiS, Standardise
from dino_kd.models.backbone import create_backbone
from dino_kd.models.head import DINOHead
from dino_kd.schema import DistillConfig
from dino_kd.tasks.teacher import Teacher

VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2}


def settings(*words):
    base = ["data.train=x", "run_dir=y", "teacher.backbone=z", "terms.preset=none"]
    return load_settings(DistillConfig, [*base, *words], command="distill")


def make_backbone(name, size):
    torch.manual_seed(0)
    is_vit = name.startswith(("vit", "deit"))
    return create_backbone(
        name, img_size=size, patch_size=8 if is_vit else None, args=VIT if is_vit else None
    )


def make_teacher(name="vit_tiny_patch16_224", size=32, weight=1.0, classes=3):
    backbone = make_backbone(name, size)
    return Teacher(
        backbone, (size, size), head=nn.Linear(backbone.embed_dim, classes), weight=weight,
        prototypes=DINOHead(backbone.embed_dim, 16, hidden_dim=8, bottleneck_dim=4), name="guide",
    )  # fmt: skip


def build(words, student="resnet18", teachers=None, size=64, classes=3, images=100):
    return make_terms(
        settings(*words), make_backbone(student, size),
        [make_teacher(size=size)] if teachers is None else teachers,
        num_images=images, num_classes=classes, labelled_share=0.5,
    )  # fmt: skip


EVERYTHING = [
    f"terms.{name}.weight={weight}"
    for weight, name in enumerate(
        ["ce", "logit_kd", "dkd", "dist", "feature_kd", "cosine_kd", "attention_kd", "relation_kd",
         "queue_kd", "prototype_kd", "crd"], start=1,
    )
]  # fmt: skip


def test_every_term_with_its_weight():
    made, weights = build(EVERYTHING)
    assert list(made) == list(weights)
    assert len(made) == 11
    assert weights["ce"] == 1
    assert weights["crd"] == 11
    assert made["ce"].labelled_share == 0.5
    assert made["queue_kd"].queue.queue.shape == (25, 24)  # a quarter of the images
    assert made["crd"].bank.student.shape == (100, 128)
    assert made["prototype_kd"].head.num_prototypes == 16


def test_the_map_of_the_student_that_fits_the_teachers_grid():
    """64 px: the ViT has 8 x 8 places, ResNet has that at stride 8; 3 x 3 fits none exactly."""
    made, _ = build(["terms.feature_kd.weight=1"])
    assert made["feature_kd"].student_taps == ("map-8",)
    coarse = make_teacher(size=24)  # 3 x 3: the coarsest that is finer is 4 x 4
    made, _ = build(["terms.feature_kd.weight=1"], teachers=[coarse])
    assert made["feature_kd"].student_taps == ("map-16",)
    fine = make_teacher(size=512)  # 64 x 64, finer than anything
    made, _ = build(["terms.feature_kd.weight=1"], teachers=[fine])
    assert made["feature_kd"].student_taps == ("map-2",)
    made, _ = build(["terms.feature_kd.weight=1", "terms.feature_kd.student_tap=map-32"])
    assert made["feature_kd"].student_taps == ("map-32",)
    assert made["feature_kd"].projector[0].weight.shape == (24, 512, 1, 1)
    made, _ = build(["terms.relation_kd.weight=1", "terms.relation_kd.tokens=1"])
    assert made["relation_kd"].student_taps == ("output", "map-8")


@pytest.mark.parametrize(
    ("words", "count", "kind"),
    [([], 1, Standardise), ([], 2, PhiS), (["terms.standardise=phi_s"], 1, PhiS),
     (["terms.standardise=columns"], 2, Standardise)],
)  # fmt: skip
def test_how_features_are_standardised(words, count, kind):
    teachers = [make_teacher(size=64) for _ in range(count)]
    made, _ = build(["terms.feature_kd.weight=1", *words], teachers=teachers)
    assert all(isinstance(term.standardise, kind) for term in made.values())


def test_terms_on_features_are_shared_among_teachers_and_logits_are_not():
    teachers = [make_teacher(size=64), make_teacher("resnet18", 64, weight=3.0)]
    made, weights = build(
        ["terms.cosine_kd.weight=2", "terms.logit_kd.weight=5", "terms.prototype_kd.weight=7"],
        teachers=teachers,
    )
    assert weights == {
        "cosine_kd": 0.5, "cosine_kd@1": 1.5, "logit_kd": 5.0, "prototype_kd": 7.0,
    }  # fmt: skip
    assert made["cosine_kd"].projector[-1].out_features == 24
    assert made["cosine_kd@1"].projector[-1].out_features == 512


def test_labels_alone_need_no_teacher():
    made, weights = build(["terms.ce.weight=1"], teachers=[])
    assert (list(made), weights) == (["ce"], {"ce": 1.0})


def test_which_terms_need_labels_and_logits():
    terms = settings(*EVERYTHING, "terms.token_kd.weight=1").terms
    assert needs_labels(terms) == ["ce", "dkd"]
    assert needs_logits(terms) == ["logit_kd", "dkd", "dist", "token_kd"]
    assert needs_logits(settings("terms.preset=label_free").terms) == []


TOKEN = ["terms.token_kd.weight=1", "terms.ce.weight=1"]


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (["terms.dkd.weight=1"], {"classes": 2}, "terms.dkd: .*needs more than 2; there are 2"),
        (TOKEN, {}, "terms.token_kd: resnet18 has no distillation token.*deit_tiny_distilled"),
        (TOKEN[:1], {"student": "deit_tiny_distilled_patch16_224"}, "would learn from nothing"),
        (
            ["terms.feature_kd.weight=1", "terms.feature_kd.student_tap=map-7"], {},
            "terms.feature_kd: resnet18 has no 'map-7'; it has map-2, map-4, map-8, map-16",
        ),
        (
            ["terms.feature_kd.weight=1", "terms.feature_kd.student_tap=outptu"], {},
            "unknown tap 'outptu'; did you mean 'output'",
        ),
        (
            ["terms.feature_kd.weight=1", "terms.feature_kd.student_tap=output"], {},
            "terms.feature_kd: student_tap='output' is no map.*map-32",
        ),
        (["terms.attention_kd.weight=1"], {"size": 32}, "map-32 of resnet18 has a single place"),
        (
            ["terms.attention_kd.weight=1", "terms.attention_kd.strides=[8]"],
            {"teachers": "coarse"}, "the map of guide has a single place",
        ),
        (
            ["terms.attention_kd.weight=1", "terms.attention_kd.teacher_map=attention"],
            {"teachers": "cnn"}, "terms.attention_kd: .*resnet18",
        ),
        (["terms.attention_kd.weight=1", "terms.attention_kd.strides=[64]"], {}, "no 'map-64'"),
        (
            ["terms.relation_kd.weight=1", "terms.relation_kd.distance=0",
             "terms.relation_kd.angle=0"], {}, "terms.relation_kd: distance, angle, .* are all 0",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(words, more, message):
    kinds = {"coarse": ("vit_tiny_patch16_224", 8), "cnn": ("resnet18", 64)}
    if kind := more.get("teachers"):
        more = {**more, "teachers": [make_teacher(*kinds[kind])]}
    with pytest.raises(ConfigError, match=message):
        build(words, **more)


def test_a_student_with_a_token_gets_its_term():
    made, _ = build(TOKEN, student="deit_tiny_distilled_patch16_224")
    assert made["token_kd"].student_taps == ("token_logits",)
    logits = torch.tensor([[3.0, 1.0, 0.0]])
    answers = {"token_logits": logits}, {"logits": 5 * logits}
    hard = made["token_kd"](*answers, None)
    assert hard.item() == pytest.approx(-logits.log_softmax(1)[0, 0].item())
    soft, _ = build([*TOKEN, "terms.token_kd.kind=soft"], student="deit_tiny_distilled_patch16_224")
    assert soft["token_kd"](*answers, None) != hard


def test_all_problems_are_told_at_once():
    words = ["terms.dkd.weight=1", *TOKEN, "terms.attention_kd.weight=1"]
    with pytest.raises(ConfigError) as error:
        build(words, size=32, classes=2)
    for name in ("terms.dkd:", "terms.token_kd:", "terms.attention_kd:"):
        assert name in str(error.value)
