"""Distillation step by step: who sees what, who learns, what is measured; by hand and autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dino_kd.data.loader import CropBatch
from dino_kd.data.mixing import Mix, Views
from dino_kd.data.multicrop import Crops
from dino_kd.engine.loop import FitOptions, Progress, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.signals import StopFlag
from dino_kd.losses.logits import kd_loss
from dino_kd.losses.standardise import Standardise
from dino_kd.models.backbone import create_backbone
from dino_kd.tasks.distill import DistillTask, Student
from dino_kd.tasks.teacher import Teacher
from dino_kd.terms.features import CosineTerm, FeatureTerm
from dino_kd.terms.logits import LabelTerm, LogitTerm, TokenTerm
from dino_kd.terms.relations import RelationTerm
from dino_kd.terms.term import Term

Y, SIDE = 4, 32
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
close = torch.testing.assert_close


def make_backbone(name="resnet18_cifar", seed=0, **more):
    torch.manual_seed(seed)
    is_vit = name.startswith(("vit", "deit"))
    return create_backbone(
        name, img_size=SIDE, patch_size=8 if is_vit else None, args=VIT if is_vit else None, **more
    )


def make_student(name="vit_tiny_patch16_224", **more):
    backbone = make_backbone(name, mean=(0.2, 0.3, 0.4), std=(0.3, 0.2, 0.1))
    return Student(backbone, Y, **more)


def make_teacher(name="vit_tiny_patch16_224", seed=1, head=True, **more):
    backbone = make_backbone(name, seed, mean=(0.6, 0.5, 0.4), std=(0.1, 0.2, 0.3))
    head = nn.Linear(backbone.embed_dim, Y) if head else None
    return Teacher(backbone, (SIDE, SIDE), head=head, **more)


def make_views(count=6, mix=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, SIDE, SIDE)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0, 3, -1, 1, 2, 2] * 4)
    batch = CropBatch(Crops(images[None], images[None, :0]), torch.arange(count))
    return Views.of(batch, labels, mix)


def make_terms(**more):
    return {
        "ce": LabelTerm(5 / 6),
        "logit_kd": LogitTerm(lambda s, t: kd_loss(s, t, 2.0)),
        **more,
    }


VALUES = {"weight/ce": 0.5, "weight/logit_kd": 3.0, "measure": 1.0}


def train(task, batches, **options):
    class Quiet:
        numbers = warn = progress = staticmethod(lambda *a: None)

    names = {f"weight/{name}": lambda step: 1.0 for name in task.terms}
    optimizer = make_optimizer("adamw", parameter_groups(task))
    fit(
        task,
        iter(batches),
        optimizer,
        {"lr": lambda s: 1e-3, "weight_decay": lambda s: 0.05, **names},
        FitOptions(len(batches), 6, torch.device("cpu"), **options),
        progress=Progress(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        log=Quiet(),
        save=lambda p: None,
        stop=StopFlag(),
    )
    return optimizer


def normalised(pixels, backbone):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    return (pixels / 255 - mean) / std


# --- the plumbing


@pytest.mark.parametrize("mix", [None, Mix(0.3), Mix(0.75, (3, 5, 16, 16))], ids=str)
def test_teacher_and_student_see_the_same_mixed_images_each_in_its_own_normalisation(mix):
    student, teacher = make_student(), make_teacher()
    task = DistillTask(student, [teacher], make_terms())
    seen = {}
    for name, one in (("student", student), ("teacher", teacher)):
        one.backbone.net.patch_embed.register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0].detach().clone()})
        )
    views = make_views(mix=mix)
    source = views.images.clone()
    task(views, VALUES)
    pixels = source.float()
    if mix is not None:
        partners = source.roll(1, 0).float()
        if mix.box is None:
            pixels = 0.3 * pixels + 0.7 * partners
        else:
            pixels[..., 3:19, 5:21] = partners[..., 3:19, 5:21]
    close(seen["student"], normalised(pixels, student.backbone), rtol=1e-4, atol=1e-4)
    close(seen["teacher"], normalised(pixels, teacher.backbone), rtol=1e-4, atol=1e-4)
    assert torch.equal(views.images, source)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18_cifar"])
def test_a_teacher_is_the_same_after_training(name):
    """Batch norms of a CNN included; it is in no state, no optimiser, no average, no train()."""
    teacher = make_teacher(name)
    terms = make_terms(cosine_kd=CosineTerm(24, teacher.backbone.embed_dim, hidden_dim=8, layers=2))
    task = DistillTask(make_student(), [teacher], terms, ema=0.9)
    before = teacher.fingerprint()
    start = copy.deepcopy(task.state_dict())
    optimizer = train(task, [make_views(seed=s) for s in range(5)])
    assert teacher.fingerprint() == before
    assert not teacher.training
    assert not any(module.training for module in teacher.modules())
    task.train()
    assert not teacher.training
    assert all(module.training for module in task.student.modules())
    assert {name.split(".")[0] for name in task.state_dict()} == {"student", "terms", "average"}
    mine = {id(p) for p in teacher.parameters()}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not mine & trained
    assert not mine & {id(p) for p in task.parameters()}
    assert trained == {id(p) for p in [*task.student.parameters(), *task.terms.parameters()]}
    moved = [n for n, v in task.state_dict().items() if not torch.equal(v, start[n])]
    assert {name.split(".")[0] for name in moved} == {"student", "terms", "average"}


def test_gradients_reach_the_student_and_the_projectors_only():
    teacher = make_teacher()
    terms = make_terms(cosine_kd=CosineTerm(24, 24, hidden_dim=8, layers=2))
    task = DistillTask(make_student(), [teacher], terms)
    task(make_views(), {**VALUES, "weight/cosine_kd": 1.0})[0].backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
    assert all(p.grad is None for p in teacher.parameters())


def test_the_loss_is_the_weighted_sum_and_is_told_without_weights():
    student, teacher = make_student(), make_teacher()
    task = DistillTask(student, [teacher], make_terms())
    views = make_views(mix=Mix(0.7))
    total, metrics = task(views, VALUES)
    pixels = views.pixels()
    with torch.no_grad():
        ours = student.classifier(student.backbone(normalised(pixels, student.backbone)))
        theirs = teacher.head(teacher.backbone(normalised(pixels, teacher.backbone)))
    ce = -(views.shares(Y) * ours.log_softmax(1)).sum(1).mean() / (5 / 6)
    kd = 4 * F.kl_div((ours / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="batchmean")
    close(metrics["loss/ce"], ce, rtol=1e-4, atol=1e-5)
    close(metrics["loss/logit_kd"], kd, rtol=1e-4, atol=1e-5)
    close(total.detach(), 0.5 * ce + 3 * kd, rtol=1e-4, atol=1e-5)
    close(metrics["agreement"], 100 * (ours.argmax(1) == theirs.argmax(1)).float().mean())
    kl = F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction="batchmean")
    close(metrics["kl"], kl, rtol=1e-4, atol=1e-5)
    assert task(views, {**VALUES, "measure": 0.0})[1] == {}
    assert "gradient_cosine" not in metrics


def test_gradients_of_labels_and_teacher_are_compared_in_the_backbone():
    task = DistillTask(make_student(), [make_teacher()], make_terms())
    views = make_views()
    _, metrics = task(views, {**VALUES, "compare_gradients": 1.0})
    found = []
    for name in ("ce", "logit_kd"):
        task.zero_grad()
        only = {f"weight/{other}": 0.0 for other in task.terms}
        task(views, {**only, f"weight/{name}": VALUES[f"weight/{name}"]})[0].backward()
        weights = task.student.backbone.net.parameters()
        found.append(torch.cat([p.grad.flatten().double() for p in weights]))
    labels, taught = found
    cosine = labels @ taught / labels.norm() / taught.norm()
    assert metrics["gradient_cosine"].item() == pytest.approx(cosine.item(), abs=1e-4)
    ratio = (taught.norm() / labels.norm()).item()
    assert metrics["gradient_ratio"].item() == pytest.approx(ratio, rel=1e-3)
    assert -0.99 < cosine < 0.99


def test_comparing_gradients_does_not_change_the_step():
    task = DistillTask(make_student(), [make_teacher()], make_terms())
    found = []
    for compare in (0.0, 1.0):
        task.zero_grad()
        task(make_views(), {**VALUES, "compare_gradients": compare})[0].backward()
        found.append([p.grad.clone() for p in task.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("names", [("ce",), ("logit_kd",)])
def test_there_is_nothing_to_compare_with_one_side_alone(names):
    terms = {name: make_terms()[name] for name in names}
    task = DistillTask(make_student(), [make_teacher()] if "ce" not in names else [], terms)
    _, metrics = task(make_views(), {**VALUES, "compare_gradients": 1.0})
    assert "gradient_cosine" not in metrics
    assert ("agreement" in metrics) == ("ce" not in names)


def test_losses_are_float32_under_autocast_and_near_those_without():
    terms = make_terms(
        cosine_kd=CosineTerm(24, 24, hidden_dim=8, layers=2),
        feature_kd=FeatureTerm("map-8", 24, 24, Standardise(24)),
        relation_kd=RelationTerm(distance=1, angle=2, similarity=1, tokens=1, max_anchors=4),
    )
    values = {f"weight/{name}": 1.0 for name in terms} | {"measure": 1.0}
    task = DistillTask(make_student(), [make_teacher()], terms)
    exact, expected = task(make_views(), values)
    with torch.autocast("cpu", torch.bfloat16):
        total, metrics = task(make_views(), values)
    assert total.dtype == torch.float32
    for name in terms:
        assert metrics[f"loss/{name}"].dtype == torch.float32
        close(metrics[f"loss/{name}"], expected[f"loss/{name}"], rtol=0.1, atol=0.02)
    close(total, exact, rtol=0.1, atol=0.02)


def test_cached_answers_replace_the_teachers():
    teacher = make_teacher()
    task = DistillTask(make_student(), [teacher], make_terms())
    views = make_views(mix=Mix(0.4))
    expected, _ = task(views, VALUES)
    cached = make_views(mix=Mix(0.4))
    cached.answers = [teacher.answers(cached.pixels(), ["logits"])]
    teacher.answers = None  # whoever asks it, fails
    assert torch.equal(task(cached, VALUES)[0], expected)


# --- several teachers


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_logits_of_several_teachers_are_the_weighted_mean_of_probabilities(weights):
    teachers = [make_teacher(seed=s) for s in (1, 2)]
    for teacher, weight in zip(teachers, weights, strict=True):
        teacher.weight = weight
    seen = []
    task = DistillTask(
        make_student(), teachers, {"logit_kd": LogitTerm(lambda s, t: seen.append(t) or s.sum())}
    )
    task(make_views(), VALUES)
    pixels = make_views().pixels()
    expected = [t.answers(pixels, ["logits"])["logits"].softmax(1) for t in teachers]
    mean = sum(w * p for w, p in zip(weights, expected, strict=True)) / sum(weights)
    close(seen[0].softmax(1), mean)


def test_a_term_of_another_teacher_reads_that_one():
    teachers = [make_teacher(seed=1, head=False), make_teacher("resnet18_cifar", 2, head=False)]
    task = DistillTask(
        make_student(),
        teachers,
        {
            "relation_kd": RelationTerm(distance=1, angle=0, similarity=0, tokens=0, max_anchors=4),
            "relation_kd@1": RelationTerm(
                distance=1, angle=0, similarity=0, tokens=0, max_anchors=4
            ),
        },
    )
    assert task.teacher_taps == [["output"], ["output"]]
    values = {"weight/relation_kd": 1.0, "weight/relation_kd@1": 2.0, "measure": 1.0}
    total, metrics = task(make_views(), values)
    pixels = make_views().pixels()
    student = task.student.answers(pixels, ["output"])
    for number, name in enumerate(("relation_kd", "relation_kd@1")):
        answers = teachers[number].answers(pixels, ["output"])
        close(metrics[f"loss/{name}"], task.terms[name](student, answers, make_views()))
    close(total, metrics["loss/relation_kd"] + 2 * metrics["loss/relation_kd@1"])


def test_each_teacher_is_asked_for_what_its_terms_read_and_all_for_logits():
    with_head, without = make_teacher(seed=1), make_teacher(seed=2, head=False)
    third = make_teacher(seed=3)
    terms = make_terms(**{"feature_kd@1": FeatureTerm("map-8", 24, 24, Standardise(24))})
    task = DistillTask(make_student(), [with_head, without, third], terms)
    assert task.teacher_taps == [["logits"], ["map"], ["logits"]]


# --- the average


def test_the_product_is_the_recursion_of_the_average():
    task = DistillTask(make_student("resnet18_cifar"), [make_teacher()], make_terms(), ema=0.7)
    assert task.product is task.average
    expected = {n: v.clone() for n, v in task.student.state_dict().items()}
    for step in range(3):
        train(task, [make_views(seed=step)])
        assert not task.average.training
        for name, value in task.student.state_dict().items():
            statistic = "running" in name or "num_batches" in name
            keep = 0.0 if statistic else 0.7  # statistics are copied
            if value.is_floating_point():
                expected[name] = keep * expected[name] + (1 - keep) * value
    for name, value in task.average.state_dict().items():
        if value.is_floating_point():
            close(value, expected[name], rtol=1e-4, atol=1e-6)
    alone = DistillTask(make_student(), [], {"ce": LabelTerm(1.0)})
    assert alone.product is alone.student


def test_a_skipped_step_leaves_student_average_and_memories_alone():
    class Nan(Term):
        student_taps = ("output",)
        teacher_taps = ("output",)
        forgotten = 0

        def forward(self, student, teacher, views):
            return student["output"].sum() * float("nan")

        def after_step(self, skipped):
            self.forgotten += skipped

    term = Nan()
    task = DistillTask(make_student("resnet18_cifar"), [make_teacher()], {"x": term}, ema=0.5)
    before = copy.deepcopy(task.state_dict())
    train(task, [make_views()])
    assert all(torch.equal(v, before[n]) for n, v in task.state_dict().items())
    assert term.forgotten == 1


# --- students


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18_cifar"])
@torch.no_grad()
def test_logits_of_a_student_are_the_classifier_on_its_output(name):
    student = make_student(name).eval()
    pixels = make_views().pixels()
    before = pixels.clone()
    output = student.backbone(normalised(pixels, student.backbone))
    expected = output @ student.classifier.weight.T + student.classifier.bias
    close(student.logits(pixels), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pixels, before)


@torch.no_grad()
def test_a_student_with_a_distillation_token_has_two_heads_and_answers_with_their_mean():
    student = make_student("deit_tiny_distilled_patch16_224", with_token=True).eval()
    pixels = make_views().pixels()
    tokens = student.backbone.net.forward_features(normalised(pixels, student.backbone))
    made = student.answers(pixels, ["logits", "token_logits"])
    close(made["logits"], student.classifier(tokens[:, 0]), rtol=1e-4, atol=1e-5)
    close(made["token_logits"], student.token_classifier(tokens[:, 1]), rtol=1e-4, atol=1e-5)
    mean = (student.classifier(tokens[:, 0]) + student.token_classifier(tokens[:, 1])) / 2
    close(student.logits(pixels), mean, rtol=1e-4, atol=1e-5)


def test_the_token_learns_from_the_teacher_and_the_class_token_from_labels():
    student = make_student("deit_tiny_distilled_patch16_224", with_token=True)
    terms = {"ce": LabelTerm(1.0), "token_kd": TokenTerm(lambda s, t: kd_loss(s, t, 1.0))}
    task = DistillTask(student, [make_teacher()], terms)
    task(make_views(), {"weight/ce": 1.0, "weight/token_kd": 0.0})[0].backward()
    assert student.classifier.weight.grad.abs().sum() > 0
    assert student.token_classifier.weight.grad.abs().sum() == 0
    task.zero_grad()
    task(make_views(), {"weight/ce": 0.0, "weight/token_kd": 1.0})[0].backward()
    assert student.classifier.weight.grad.abs().sum() == 0
    assert student.token_classifier.weight.grad.abs().sum() > 0


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    """Without batch norm; labels are counted over all images, not by micro-batch."""
    found = []
    for accumulate in (1, 2):
        task = DistillTask(make_student(), [make_teacher()], make_terms())
        train(task, [make_views(mix=Mix(0.6))], accumulate=accumulate)
        found.append(task.student.state_dict())
    for name, value in found[0].items():
        close(found[1][name], value, rtol=1e-3, atol=1e-4)


def test_layers_behind_the_last_map_that_is_read_are_announced():
    """DistributedDataParallel must know of them, or it waits for gradients that never come."""
    for taps, skips in ((("map-8",), True), (("map-8", "output"), False), (("logits",), False)):
        term = Term()
        term.student_taps = taps
        backbone = create_backbone("test_resnet", img_size=32)
        task = DistillTask(Student(backbone, 3), [], {"a": term})
        assert task.skips_parameters is skips
