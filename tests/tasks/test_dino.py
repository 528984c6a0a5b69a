"""The DINO task: accumulation, skipped steps, batch norm, and a whole step against plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dino_kd.data.multicrop import Crops
from dino_kd.distributed import process_group
from dino_kd.engine.loop import FitOptions, Progress, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.signals import StopFlag
from dino_kd.models.backbone import create_backbone
from dino_kd.models.head import DINOHead
from dino_kd.tasks.dino import DinoTask
from tests.two_ranks import on_two_ranks

VALUES = {"teacher_temp": 0.04, "momentum": 0.9, "measure": 1.0}


def make_task(buffers="own", name="vit_tiny_patch16_224", batch_norm=False):
    torch.manual_seed(0)
    args = {"depth": 2, "embed_dim": 24, "num_heads": 2} if name.startswith("vit") else None
    patch = 4 if name.startswith("vit") else None
    backbone = create_backbone(name, img_size=16, patch_size=patch, args=args)
    head = DINOHead(
        backbone.embed_dim, 32, hidden_dim=16, bottleneck_dim=8, num_layers=2, batch_norm=batch_norm
    )
    return DinoTask(backbone, head, buffers=buffers)


def make_crops(batch, num_local=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def images(n, side):
        shape = (n, batch, 3, side, side)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return Crops(images(2, 16), images(num_local, 8))


SCHEDULES = {
    "lr": lambda s: 1e-3,
    "weight_decay": lambda s: 0.1,
    "momentum": lambda s: 0.9,
    "teacher_temp": lambda s: 0.04,
    "freeze_last_layer": lambda s: float(s == 0),
}


def train(task, batches, accumulate, optimizer="adamw", schedules=SCHEDULES):
    """Steps of `fit`; returns the losses."""
    groups = parameter_groups(task.student, task.student.head.prototype_parameters())
    losses = []

    class Quiet:
        numbers = staticmethod(lambda step, values: losses.append(values["loss"]))
        warn = progress = staticmethod(lambda *a: None)

    fit(
        task,
        iter(batches),
        make_optimizer(optimizer, groups),
        schedules,
        FitOptions(
            len(batches), 64, torch.device("cpu"), accumulate=accumulate, clip_grad=3.0, log_every=1
        ),
        progress=Progress(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        log=Quiet(),
        save=lambda p: None,
        stop=StopFlag(),
    )
    return losses


def test_a_batch_of_64_equals_4_micro_batches_of_16():
    """Student, teacher and centre after three optimiser steps."""
    whole, split = make_task(), make_task()
    batches = [make_crops(64, seed=s) for s in range(3)]
    train(whole, batches, accumulate=1)
    train(split, batches, accumulate=4)
    before = make_task().state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-3, atol=2e-5, msg=name)
    for name in ("student.backbone.net.blocks.0.mlp.fc1.weight", "center.center"):
        assert (whole.state_dict()[name] - before[name]).abs().max() > 1e-3


def plain_step(task, crops, optimizer, center):
    """One step as the paper writes it, on the task's networks; returns loss and new centre."""
    groups = [crops.global_crops, crops.local_crops]

    def outputs(network, groups):
        features = [
            network.backbone.net(network.backbone.preprocess(group.flatten(0, 1)))
            for group in groups
        ]
        return network.head(torch.cat(features)).unflatten(0, (-1, crops.global_crops.shape[1]))

    with torch.no_grad():
        teacher = outputs(task.teacher, groups[:1])
        targets = torch.softmax((teacher - center) / 0.04, dim=-1)
        center = 0.9 * center + 0.1 * teacher.flatten(0, 1).mean(0)
    log_probs = torch.log_softmax(outputs(task.student, groups) / 0.1, dim=-1)
    terms = [
        -(targets[u] * log_probs[v]).sum(-1).mean() for u in range(2) for v in range(4) if u != v
    ]
    loss = torch.stack(terms).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(task.student.parameters(), 3.0)
    optimizer.step()
    with torch.no_grad():
        for ours, theirs in zip(task.student.parameters(), task.teacher.parameters(), strict=True):
            theirs.copy_(0.9 * theirs + 0.1 * ours)
    return loss.item(), center


def test_three_steps_equal_a_plain_implementation():
    """Loss to 1e-5; student, teacher and centre to 1e-5 of their size, in float32 by SGD."""
    ours, plain = make_task(), make_task()
    batches = [make_crops(8, seed=s) for s in range(3)]
    optimizer = torch.optim.SGD(plain.student.parameters(), lr=0.005, momentum=0.9)
    center, expected = torch.zeros(32), []
    for crops in batches:
        loss, center = plain_step(plain, crops, optimizer, center)
        expected.append(loss)
    plain.center.center.copy_(center)
    schedules = {
        "lr": lambda s: 0.005, "weight_decay": lambda s: 0.0, "momentum": lambda s: 0.9,
        "teacher_temp": lambda s: 0.04, "freeze_last_layer": lambda s: 0.0,
    }  # fmt: skip
    found = train(ours, batches, accumulate=1, optimizer="sgd", schedules=schedules)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in plain.state_dict().items():
        error = (ours.state_dict()[name] - value).norm()
        assert error <= 1e-5 * value.norm() + 1e-7, name


def share(crops, rank):
    half = slice(rank * 4, rank * 4 + 4)
    return Crops(crops.global_crops[:, half], crops.local_crops[:, half])


def gradients(task, crops, values, **options):
    """Of the student, and of the mean over processes where there are `options` for DDP."""
    shared = DistributedDataParallel(task, **options) if options else task
    shared(crops, values)[0].backward()
    return {name: parameter.grad for name, parameter in task.student.named_parameters()}


def check_frozen_step(rank):
    """A frozen and a free step under DDP, with and without its search for unused parameters."""
    crops = make_crops(8)
    cases = [VALUES | {"freeze_last_layer": 1.0}, VALUES]
    alone = [gradients(make_task(), crops, values) for values in cases]
    with process_group("cpu"):
        for search in (False, True):
            for values, expected in zip(cases, alone, strict=True):
                part = share(crops, rank)
                found = gradients(make_task(), part, values, find_unused_parameters=search)
                if expected["head.last_layer"] is None:  # nothing, or zeros that the loop drops
                    unmoved = found.pop("head.last_layer")
                    assert unmoved is None or not unmoved.any()
                for name, gradient in found.items():
                    torch.testing.assert_close(
                        gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name
                    )


@pytest.mark.dist
def test_a_frozen_last_layer_in_two_processes_equals_one():
    on_two_ranks(check_frozen_step)


def test_a_frozen_last_layer_stays_and_everything_else_learns_the_same():
    """Against a step that computes its gradient and forgets it."""
    frozen, dropped = make_task(), make_task()
    crops = make_crops(4)
    frozen(crops, VALUES | {"freeze_last_layer": 1.0})[0].backward()
    dropped(crops, VALUES)[0].backward()
    for name, parameter in dropped.student.named_parameters():
        found = frozen.student.get_parameter(name).grad
        assert found is None if name == "head.last_layer" else torch.equal(found, parameter.grad)


def test_teacher_and_center_move_by_their_momentum():
    task = make_task()
    crops = make_crops(8)
    teacher_before = copy.deepcopy(task.teacher)
    task(crops, VALUES)
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(0.5)
        backbone, head = teacher_before.backbone, teacher_before.head
        logits = head(backbone(backbone.preprocess(crops.global_crops.flatten(0, 1))))
    task.after_step(VALUES, skipped=False)
    torch.testing.assert_close(task.center.center, 0.1 * logits.mean(0), rtol=1e-4, atol=1e-6)
    for name, old in teacher_before.named_parameters():
        new = dict(task.teacher.named_parameters())[name]
        student = dict(task.student.named_parameters())[name]
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)


def test_the_teacher_gets_no_gradient_and_is_no_alias_of_the_student():
    task = make_task()
    loss, _ = task(make_crops(4), VALUES)
    loss.backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert all(p.grad is not None for p in task.student.parameters())
    student = {p.data_ptr() for p in task.student.parameters()}
    assert student.isdisjoint(p.data_ptr() for p in task.teacher.parameters())


@pytest.mark.parametrize("buffers", ["own", "ema", "copy"])
def test_a_skipped_step_leaves_teacher_center_and_batch_norm(buffers):
    task = make_task(buffers, "resnet18_cifar", batch_norm=True)
    task(make_crops(4), VALUES)
    task.after_step(VALUES, skipped=False)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    task(make_crops(4, seed=1), VALUES)
    task.after_step(VALUES, skipped=True)
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_features_that_are_not_finite_end_no_run():
    """Not even where the step is measured, which takes singular values of them."""
    task = make_task()
    with torch.no_grad():
        task.teacher.backbone.net.norm.bias.fill_(float("nan"))
    before = copy.deepcopy(task.student.state_dict())
    losses = train(task, [make_crops(4)] * 2, 1)
    assert [loss != loss for loss in losses] == [True, True]
    for name, value in task.student.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_own_statistics_come_from_the_teachers_global_crops():
    """buffers=own: after one forward, running_mean = 0.1 * batch mean of the teacher's input."""
    task = make_task("own", "resnet18_cifar")
    crops = make_crops(6)
    backbone = task.teacher.backbone
    with torch.no_grad():
        stem = backbone.net.conv1(backbone.preprocess(crops.global_crops.flatten(0, 1)))
    task(crops, VALUES)
    torch.testing.assert_close(
        backbone.net.bn1.running_mean, 0.1 * stem.mean((0, 2, 3)), rtol=1e-4, atol=1e-6
    )


def test_copied_statistics_are_the_students():
    task = make_task("copy", "resnet18_cifar")
    task(make_crops(6), VALUES)
    assert task.teacher.backbone.net.bn1.running_mean.abs().max() == 0
    task.after_step(VALUES, skipped=False)
    student, teacher = (getattr(task, b).backbone.net.bn1 for b in ("student", "teacher"))
    assert torch.equal(student.running_mean, teacher.running_mean)
    assert student.running_mean.abs().max() > 0


def test_no_local_crops_is_fine():
    loss, metrics = make_task()(make_crops(4, num_local=0), VALUES)
    assert torch.isfinite(loss)
    assert metrics["kl"].item() == pytest.approx(
        loss.item() - metrics["teacher_entropy"].item(), abs=1e-5
    )


def test_teacher_has_no_drop_path():
    torch.manual_seed(0)
    backbone = create_backbone(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, drop_path=0.5,
        args={"depth": 2, "embed_dim": 24, "num_heads": 2},
    )  # fmt: skip
    task = DinoTask(backbone, DINOHead(24, 8, hidden_dim=8, bottleneck_dim=4, num_layers=2))
    x = task.teacher.backbone.preprocess(make_crops(8).global_crops[0])
    assert torch.equal(task.teacher.backbone(x), task.teacher.backbone(x))
    assert not torch.equal(task.student.backbone(x), task.student.backbone(x))
