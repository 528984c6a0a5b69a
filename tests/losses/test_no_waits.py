"""No loss function asks what a number is: on a GPU the host would wait for the answer.

CRD's memory bank does, which must find images that were seen twice.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dino_kd.losses import contrast, dino, logits, maps, prototypes, relations

ROWS = (6, 5)  # [B, Y] or [B, D]
GRIDS = (6, 5, 4, 4)  # [B, C, h, w]
MAPS = (6, 5, 4)  # [B, h, w]
LOSSES = [
    (logits.kd_loss, ROWS, (2.0,)),
    (logits.dist_loss, ROWS, ()),
    (logits.hard_label_loss, ROWS, ()),
    (maps.hint_loss, GRIDS, ()),
    (maps.cosine_loss, ROWS, ()),
    (maps.attention_loss, MAPS, ()),
    (relations.rkd_distance_loss, ROWS, ()),
    (relations.rkd_angle_loss, ROWS, ()),
    (relations.similarity_loss, ROWS, ()),
    (relations.token_relation_loss, GRIDS, ()),
]


def without_values():
    """Tensors that have shapes only: whatever needs a value raises."""
    return FakeTensorMode()


@pytest.mark.parametrize(
    ("loss", "shape", "more"), LOSSES, ids=[loss.__name__ for loss, *_ in LOSSES]
)
def test_a_loss_of_student_and_teacher(loss, shape, more):
    with without_values():
        student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
        loss(student, teacher, *more).backward()
        assert student.grad.shape == shape


def test_the_others():
    with without_values():
        student, teacher = (torch.randn(ROWS, requires_grad=True) for _ in range(2))
        queue = torch.randn(32, 5)
        total = logits.dkd_loss(student, teacher.detach(), torch.rand(ROWS))
        total = total + contrast.queue_loss(student, teacher.detach(), queue)
        negatives = torch.randn(6, 8, 5)
        total = total + contrast.crd_loss(
            student, teacher, negatives, negatives,
            temperature=0.1, num_images=100, z_student=torch.ones(()), z_teacher=torch.ones(()),
        )  # fmt: skip
        total = total + prototypes.prototype_loss(student, prototypes.sinkhorn(teacher, 0.1), 0.1)
        crops = torch.randn(4, 6, 8, requires_grad=True)
        targets = dino.center_and_sharpen(torch.randn(2, 6, 8), torch.zeros(8), 0.04)
        total = total + dino.dino_cross_entropy(crops, targets, 0.1)
        total.backward()


def test_a_read_number_would_be_noticed():
    with without_values(), pytest.raises(DataDependentOutputException):
        torch.randn(3).sum().item()


def test_no_loss_is_left_out():
    tested = {loss for loss, *_ in LOSSES} | {
        logits.dkd_loss, contrast.queue_loss, contrast.crd_loss, prototypes.prototype_loss,
    }  # fmt: skip
    found = {
        function
        for module in (contrast, logits, maps, prototypes, relations)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.endswith("_loss")
    }
    assert found == tested
