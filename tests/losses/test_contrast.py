"""Queue and memory bank against loops; two gloo processes against one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_kd.distributed import process_group
from dino_kd.losses.contrast import FeatureQueue, MemoryBank, crd_loss, queue_loss
from tests.tiny import draw
from tests.two_ranks import on_two_ranks


def sorted_rows(rows):
    return rows[torch.argsort(rows[:, 0])]


def test_queue_loss_is_the_numpy_loop():
    student, teacher, queue = draw(3, 5), draw(3, 5, seed=1), draw(7, 5, seed=2)
    unit = [(z / z.norm(dim=1, keepdim=True)).double().numpy() for z in (student, teacher, queue)]
    total = 0.0
    for s, t in zip(unit[0], unit[1], strict=True):
        scores = [np.concatenate([[z @ t], unit[2] @ z]) for z in (s, t)]
        target = np.exp(scores[1] / 0.05)
        target /= target.sum()
        log_p = scores[0] / 0.3 - np.log(np.exp(scores[0] / 0.3).sum())
        total -= (target * log_p).sum()
    loss = queue_loss(student, teacher, queue, student_temp=0.3, teacher_temp=0.05)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


def test_queue_loss_is_least_for_the_teachers_features():
    """At one temperature its least value is the entropy of the teacher's scores."""
    teacher, queue = draw(3, 5, seed=1), draw(7, 5, seed=2)
    equal = queue_loss(teacher, teacher, queue, student_temp=0.1, teacher_temp=0.1)
    t, q = F.normalize(teacher), F.normalize(queue)
    probs = F.softmax(torch.cat([torch.ones(3, 1), t @ q.T], 1) / 0.1, 1)
    torch.testing.assert_close(equal, -(probs * probs.log()).sum(1).mean())
    other = queue_loss(draw(3, 5), teacher, queue, student_temp=0.1, teacher_temp=0.1)
    assert other > equal


def test_only_the_student_learns_from_the_queue():
    student, teacher, queue = (draw(3, 5, seed=s).requires_grad_() for s in range(3))
    queue_loss(student, teacher, queue).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("value", ["wild", "zero", "duplicates"])
def test_extreme_half_precision_features_stay_finite(value):
    student = {
        "wild": 6e4 * draw(4, 5).sign(), "zero": torch.zeros(4, 5), "duplicates": torch.ones(4, 5),
    }[value].half().requires_grad_()  # fmt: skip
    negatives = F.normalize(draw(4, 6, 5), dim=2)
    for teacher in (student.detach(), -student.detach()):
        loss = queue_loss(student, teacher, negatives[0]) + crd_loss(
            student, teacher, negatives, negatives, num_images=10, z_student=9.0, z_teacher=7.0
        )
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.isfinite().all()


def test_a_repeated_batch_costs_the_same_and_autocast_changes_nothing():
    student, teacher, queue = draw(3, 5), draw(3, 5, seed=1), draw(7, 5, seed=2)
    loss = queue_loss(student, teacher, queue)
    repeated = queue_loss(student.repeat(2, 1), teacher.repeat(2, 1), queue)
    torch.testing.assert_close(repeated, loss)
    negatives = F.normalize(draw(3, 4, 5), dim=2)
    kwargs = {"num_images": 10, "z_student": 9.0, "z_teacher": 7.0}
    crd = crd_loss(student, teacher, negatives, negatives, **kwargs)
    twice = [z.repeat(2, *[1] * (z.ndim - 1)) for z in (student, teacher, negatives, negatives)]
    torch.testing.assert_close(crd_loss(*twice, **kwargs), crd)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(queue_loss(student, teacher, queue), loss)
        assert torch.equal(crd_loss(student, teacher, negatives, negatives, **kwargs), crd)


def test_the_queue_replaces_the_oldest_at_any_batch_size():
    torch.manual_seed(0)
    queue = FeatureQueue(7, 5)
    torch.testing.assert_close(queue.queue.norm(dim=1), torch.ones(7))
    history = queue.queue.clone()
    for step, size in enumerate((3, 3, 2, 7, 1, 11)):
        rows = 4 * draw(size, 5, seed=step)
        queue.observe(rows[: size // 2])
        queue.observe(rows[size // 2 :])
        queue.commit()
        history = torch.cat([history, F.normalize(rows)])[-7:]
        torch.testing.assert_close(sorted_rows(queue.queue), sorted_rows(history))


def test_a_queue_continues_from_its_state_and_forgets_a_skipped_step():
    queue, other = FeatureQueue(7, 5), FeatureQueue(7, 5)
    queue.observe(draw(5, 5))
    queue.commit()
    other.load_state_dict(queue.state_dict())
    queue.observe(draw(4, 5, seed=3))
    queue.discard()
    queue.commit()
    assert torch.equal(queue.queue, other.queue)
    for one in (queue, other):
        one.observe(draw(4, 5, seed=4))
        one.commit()
    assert torch.equal(queue.queue, other.queue)
    assert queue.pointer == other.pointer == 2


def nce(score, z, count, images):
    u = np.exp(score / 0.07) / z
    return u / (u + count / images)


def test_crd_is_the_numpy_loop_over_negatives():
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    s_neg, t_neg = (F.normalize(draw(3, 4, 5, seed=s), dim=2) for s in (2, 3))
    s, t = (F.normalize(z).double().numpy() for z in (student, teacher))
    total = 0.0
    for b in range(3):
        for anchor, positive, others, z in ((s, t, t_neg, 9.0), (t, s, s_neg, 7.0)):
            total -= math.log(nce(anchor[b] @ positive[b], z, 4, 10))
            for other in others[b].double().numpy():
                total -= math.log(1 - nce(anchor[b] @ other, z, 4, 10))
    loss = crd_loss(student, teacher, s_neg, t_neg, num_images=10, z_student=9.0, z_teacher=7.0)
    assert loss.item() == pytest.approx(total / 3, rel=1e-4)


def test_both_embeddings_learn_from_crd_and_nothing_else():
    student, teacher = (draw(3, 5, seed=s).requires_grad_() for s in range(2))
    negatives = F.normalize(draw(3, 4, 5, seed=2), dim=2).requires_grad_()
    z = torch.tensor(9.0, requires_grad=True)
    crd_loss(
        student, teacher, negatives, negatives, num_images=10, z_student=z, z_teacher=z
    ).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad.abs().sum() > 0
    assert negatives.grad is None
    assert z.grad is None


def test_negatives_are_every_other_image_equally_often():
    bank = MemoryBank(5, 3)
    indices = torch.tensor([0, 2, 4])
    drawn = bank.negatives(indices, 4000, torch.Generator().manual_seed(0))
    for row, own in zip(drawn, indices.tolist(), strict=True):
        counts = torch.bincount(row, minlength=5)
        assert counts[own] == 0
        others = counts[torch.arange(5) != own]
        assert (others - 1000).abs().max() < 140  # five standard deviations
    again = bank.negatives(indices, 4000, torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


def test_the_bank_moves_seen_images_only_and_a_repeated_one_by_the_mean():
    bank = MemoryBank(6, 5, momentum=0.25)
    before = bank.student.clone(), bank.teacher.clone()
    rows = [F.normalize(draw(3, 5, seed=s)) for s in range(2)]
    bank.observe(torch.tensor([4, 1]), 3 * rows[0][:2], 2 * rows[1][:2])
    bank.observe(torch.tensor([4]), rows[0][2:], rows[1][2:])
    bank.commit()
    for old, new, fresh in zip(before, (bank.student, bank.teacher), rows, strict=True):
        expected = old.clone()
        expected[1] = F.normalize(0.25 * old[1] + 0.75 * fresh[1], dim=0)
        expected[4] = F.normalize(0.25 * old[4] + 0.75 * (fresh[0] + fresh[2]) / 2, dim=0)
        torch.testing.assert_close(new, expected)
    kept = bank.student.clone()
    bank.observe(torch.tensor([4]), rows[0][2:], rows[1][2:])
    bank.discard()
    bank.commit()
    assert torch.equal(bank.student, kept)


def test_z_is_frozen_by_the_first_commit():
    bank = MemoryBank(6, 5)
    batch = (
        draw(2, 5),
        draw(2, 5, seed=1),
        bank.student[[0, 1]][:, None],
        bank.teacher[[2, 3]][:, None],
    )
    first = bank.normalisers(*batch)
    s, t = F.normalize(batch[0]), F.normalize(batch[1])
    scores = torch.stack([(s * t).sum(1), (s * batch[3][:, 0]).sum(1)])
    torch.testing.assert_close(first[0], 6 * (scores / 0.07).exp().mean(), rtol=1e-4, atol=0)
    bank.discard()
    assert bank.z_student == 0
    other = draw(2, 5, seed=5), *batch[1:]
    assert not torch.equal(bank.normalisers(*other)[0], first[0])
    bank.discard()
    bank.normalisers(*batch)
    bank.commit()
    assert torch.equal(bank.z_student, first[0])
    assert torch.equal(bank.z_teacher, first[1])
    assert torch.equal(bank.normalisers(*other)[0], first[0])
    copy = MemoryBank(6, 5)
    copy.load_state_dict(bank.state_dict())
    assert torch.equal(copy.normalisers(*other)[0], first[0])


def steps(store, part):
    """Three steps of two micro-batches with the rows of `part`; the bank sees an image twice."""
    for step in range(3):
        for micro in range(2):
            rows, images = (
                draw(4, 5, seed=10 * step + micro)[part],
                torch.tensor([0, 3, 5, 3])[part],
            )
            if isinstance(store, FeatureQueue):
                store.observe(rows)
            else:
                negatives = F.normalize(draw(4, 3, 5, seed=micro), dim=2)[part]
                store.normalisers(rows, rows.flip(1), negatives, negatives)
                store.observe(images + micro, rows, rows.flip(1))
        store.commit()
    return store


def check_stores(rank):
    alone = []
    for make in (lambda: FeatureQueue(9, 5), lambda: FeatureQueue(40, 5), lambda: MemoryBank(7, 5)):
        torch.manual_seed(0)
        alone.append((make, steps(make(), slice(None))))
    with process_group("cpu"):
        for make, expected in alone:
            torch.manual_seed(0)
            together = steps(make(), slice(rank, None, 2)).state_dict()
            for name, value in expected.state_dict().items():
                found = together[name]
                if name == "queue" and len(value) == 9:
                    # the last step's 8 are the same; which of the step before is left is not
                    shared = (torch.cdist(found, value) < 1e-5).any(1).sum()
                    assert shared >= 8
                    continue
                if name == "queue":
                    value, found = sorted_rows(value), sorted_rows(found)
                torch.testing.assert_close(found, value, msg=name)


@pytest.mark.dist
def test_two_processes_hold_what_one_holds():
    on_two_ranks(check_stores)


def test_shapes_that_do_not_fit_are_named():
    rows = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"queue must be \[M, 5\].* got \[7, 4\]"):
        queue_loss(rows, rows, torch.zeros(7, 4))
    with pytest.raises(ValueError, match="must both be"):
        queue_loss(rows, torch.zeros(2, 4), torch.zeros(7, 5))
    with pytest.raises(ValueError, match=r"features must be \[B, 5\], got \[2, 4\]"):
        FeatureQueue(7, 5).observe(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least one place, got 0"):
        FeatureQueue(0, 5)
    with pytest.raises(ValueError, match="at least two images, got 1"):
        MemoryBank(1, 5)
    with pytest.raises(ValueError, match=r"indices must be \[B\]"):
        MemoryBank(6, 5).observe(torch.zeros(3, dtype=torch.int64), rows, rows)
    right, wrong = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4)
    for negatives in ((right, wrong), (wrong, right)):
        with pytest.raises(ValueError, match=r"negatives must be \[B, K, D\]"):
            crd_loss(rows, rows, *negatives, num_images=9, z_student=1.0, z_teacher=1.0)
