"""Every term is its loss function on the taps it names; what trains, is remembered, is measured."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dino_kd.data.mixing import Mix, Views
from dino_kd.losses.contrast import crd_loss, queue_loss
from dino_kd.losses.logits import dkd_loss, hard_label_loss, kd_loss
from dino_kd.losses.maps import attention_loss, cosine_loss
from dino_kd.losses.prototypes import prototype_loss, sinkhorn
from dino_kd.losses.relations import (
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_loss,
    token_relation_loss,
)
from dino_kd.losses.standardise import PhiS, Standardise
from dino_kd.terms.attention import AttentionTerm
from dino_kd.terms.contrast import ContrastTerm, PrototypeTerm, QueueTerm
from dino_kd.terms.features import CosineTerm, FeatureTerm, projector
from dino_kd.terms.logits import DecoupledTerm, LabelTerm, LogitTerm, TokenTerm
from dino_kd.terms.relations import RelationTerm
from dino_kd.terms.term import learns_scales
from tests.tiny import draw

B, D, DT, Y = 6, 5, 8, 4
close = torch.testing.assert_close


def make_views(labels=(0, 3, -1, 1, 2, 2), mix=None):
    labels = torch.tensor(labels)
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    views = Views(images, labels, torch.arange(len(labels)), mix)
    if mix is not None:
        views.partners, views.partner_labels = images.roll(1, 0), labels.roll(1, 0)
    return views


def outputs():
    return {"output": draw(B, D).requires_grad_()}, {"output": draw(B, DT, seed=1)}


def logits(key="logits"):
    return {key: draw(B, Y).requires_grad_()}, {"logits": 2 * draw(B, Y, seed=1)}


# --- logits and labels


def test_terms_on_logits_are_their_losses():
    student, teacher = logits()
    views = make_views(mix=Mix(0.8))
    close(
        LogitTerm(lambda s, t: kd_loss(s, t, 3.0))(student, teacher, views),
        kd_loss(student["logits"], teacher["logits"], 3.0),
    )
    shares = views.shares(Y)
    close(
        DecoupledTerm(alpha=0.5, beta=2.0, temperature=3.0)(student, teacher, views),
        dkd_loss(
            student["logits"], teacher["logits"], shares, alpha=0.5, beta=2.0, temperature=3.0
        ),
    )
    own, teacher = logits("token_logits")
    both = {**student, **own}
    term = TokenTerm(hard_label_loss)
    assert term.student_taps == ("token_logits",)
    loss = term(both, teacher, views)
    close(loss, F.cross_entropy(own["token_logits"], teacher["logits"].argmax(1)))
    loss.backward()
    assert student["logits"].grad is None
    assert own["token_logits"].grad is not None


@pytest.mark.parametrize("mix", [None, Mix(0.7)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_label_term_by_loops(mix, smoothing):
    """Shares of both labels, smoothed; rows without a label add nothing, and are no divisor."""
    student, _ = logits()
    labels = [0, 3, -1, 1, 2, 2]
    log_probs = student["logits"].detach().double().log_softmax(1).numpy()
    own = 1.0 if mix is None else mix.own
    total = 0.0
    for b in range(B):
        for label, part in ((labels[b], own), (labels[b - 1], 1 - own)):
            if label >= 0:
                for y in range(Y):
                    target = (1 - smoothing) * (y == label) + smoothing / Y
                    total -= part * target * log_probs[b, y]
    found = LabelTerm(5 / 6, smoothing)(student, {}, make_views(labels, mix))
    assert found.item() == pytest.approx(total / B / (5 / 6), rel=1e-5)


def test_a_weight_of_labels_means_the_same_for_any_share_of_them():
    """Mean over all draws of the labelled images = cross-entropy of fully labelled images."""
    student, _ = logits()
    labels = torch.tensor([0, 3, 1, 1, 2, 2])
    whole = LabelTerm(1.0)(student, {}, make_views(labels.tolist()))
    close(whole, F.cross_entropy(student["logits"], labels))
    found = []
    for kept in np.ndindex(2, 2, 2, 2, 2, 2):
        if sum(kept) == 2:  # a third of the images
            some = torch.where(torch.tensor(kept) > 0, labels, -1)
            found.append(LabelTerm(2 / 6)(student, {}, make_views(some.tolist())))
    close(torch.stack(found).mean(), whole)


def test_a_batch_without_any_label_costs_nothing_and_has_a_gradient():
    student, _ = logits()
    loss = LabelTerm(0.1)(student, {}, make_views([-1] * B))
    loss.backward()
    assert loss == 0
    assert not student["logits"].grad.any()


# --- features


def test_the_cosine_term_regresses_through_its_projector():
    torch.manual_seed(0)
    term = CosineTerm(D, DT, hidden_dim=7, layers=3)
    widths = [m.out_features for m in term.projector if isinstance(m, torch.nn.Linear)]
    assert widths == [7, 7, DT]
    student, teacher = outputs()
    projected = copy.deepcopy(term.projector)(student["output"])
    loss = term(student, teacher, make_views())
    expected = (2 - 2 * F.cosine_similarity(projected, teacher["output"])).mean()
    close(loss, expected, rtol=1e-5, atol=1e-6)
    close(loss, cosine_loss(projected, teacher["output"]))
    loss.backward()
    assert all(p.grad is not None for p in term.parameters())

    ours, theirs = (
        F.normalize(z.detach().double()).numpy() for z in (projected, teacher["output"])
    )
    error = ((ours - theirs) ** 2).sum()
    around = ((theirs - theirs.mean(0)) ** 2).sum()
    measured = term.measure()
    assert measured["r2"].item() == pytest.approx(1 - error / around, abs=1e-5)
    spread = ours.var(0).sum() / theirs.var(0).sum()
    assert measured["spread"].item() == pytest.approx(spread, rel=1e-4)


def test_a_projector_of_one_layer_is_linear():
    parts = list(projector(D, DT, hidden_dim=99, layers=1))
    assert [type(p) for p in parts] == [torch.nn.Linear]
    assert (parts[0].in_features, parts[0].out_features) == (D, DT)


@pytest.mark.parametrize("kind", [Standardise, PhiS])
def test_the_feature_term_standardises_projects_and_meets_at_the_coarser_grid(kind):
    torch.manual_seed(0)
    term = FeatureTerm("map-16", D, DT, kind(DT))
    assert learns_scales(term)
    assert (term.student_taps, term.teacher_taps) == (("map-16",), ("map",))
    seen = 3 + 5 * draw(40, DT, 2, 3, seed=4)
    term.fit({"map": seen})
    places = seen.permute(0, 2, 3, 1).reshape(-1, DT)
    standard = term.standardise(places)
    close(standard.mean(0), torch.zeros(DT), atol=1e-4, rtol=0)
    close(standard.var(0, unbiased=False), torch.ones(DT), atol=1e-3, rtol=0)

    student = {"map-16": draw(B, D, 4, 6).requires_grad_()}
    teacher = {"map": 3 + 5 * draw(B, DT, 2, 3, seed=1)}
    # 2 x 2 means of the student's places, and the target at the places of the teacher
    ours = student["map-16"].unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    projected = copy.deepcopy(term.projector)(ours)
    target = torch.stack([
        term.standardise(teacher["map"][:, :, r, c]) for r in range(2) for c in range(3)
    ], 2).view(B, DT, 2, 3)  # fmt: skip
    loss = term(student, teacher, make_views())
    close(loss, (projected - target).square().mean(), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert student["map-16"].grad.abs().sum() > 0
    assert all(p.grad is not None for p in term.parameters())

    error = (projected - target).detach().double().square().sum()
    around = (target - target.mean((0, 2, 3), keepdim=True)).double().square().sum()
    measured = term.measure()
    assert measured["r2"].item() == pytest.approx((1 - error / around).item(), abs=1e-4)
    variances = [x.detach().var((0, 2, 3), unbiased=False).sum() for x in (projected, target)]
    close(measured["spread"], variances[0] / variances[1], rtol=1e-4, atol=1e-5)


def test_a_finer_teacher_is_averaged_to_the_students_grid():
    term = FeatureTerm("map-32", D, DT, Standardise(DT))
    student, teacher = {"map-32": draw(B, D, 2, 2)}, {"map": draw(B, DT, 4, 4, seed=1)}
    projected = copy.deepcopy(term.projector)(student["map-32"])
    target = teacher["map"].unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    close(term(student, teacher, make_views()), (projected - target).square().mean())


def test_nothing_is_measured_before_the_first_batch():
    assert CosineTerm(D, DT, hidden_dim=4, layers=2).measure() == {}
    assert FeatureTerm("map", D, DT, Standardise(DT)).measure() == {}
    assert not learns_scales(CosineTerm(D, DT, hidden_dim=4, layers=2))


# --- maps and relations


@pytest.mark.parametrize("form", ["kl", "l2"])
def test_the_attention_term_is_the_mean_over_maps_at_the_coarser_grid(form):
    term = AttentionTerm(["map-16", "map-32"], "attention", form)
    student = {"map-16": draw(B, D, 4, 4).requires_grad_(), "map-32": draw(B, 3, 2, 2, seed=1)}
    attention = draw(B, 4, 4, seed=2).abs()
    energies = [student[name].square().mean(1) for name in term.student_taps]
    coarse = attention.unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))
    expected = [
        attention_loss(energies[0], attention, form=form),
        attention_loss(energies[1], coarse, form=form),
    ]
    loss = term(student, {"attention": attention}, make_views())
    close(loss, torch.stack(expected).mean())
    loss.backward()
    assert student["map-16"].grad.abs().sum() > 0


def test_the_relation_term_is_the_weighted_sum_of_its_relations():
    student, teacher = outputs()
    student["map-16"], teacher["map"] = draw(B, D, 4, 4, seed=2), draw(B, DT, 2, 2, seed=3)
    ours, theirs = student["output"], teacher["output"]
    coarse = student["map-16"].unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    parts = {
        "distance": rkd_distance_loss(ours, theirs),
        "angle": rkd_angle_loss(ours, theirs, 4),
        "similarity": similarity_loss(ours, theirs),
        "tokens": token_relation_loss(coarse, teacher["map"]),
    }
    off = dict.fromkeys(parts, 0.0)
    for name, loss in parts.items():
        term = RelationTerm(**{**off, name: 2.0}, max_anchors=4, student_map="map-16")
        assert ("map" in term.teacher_taps) == (name == "tokens")
        close(term(student, teacher, make_views()), 2 * loss)
    weights = {"distance": 1.0, "angle": 2.0, "similarity": 3.0, "tokens": 4.0}
    everything = RelationTerm(**weights, max_anchors=4, student_map="map-16")
    expected = sum(weights[name] * loss for name, loss in parts.items())
    close(everything(student, teacher, make_views()), expected)


# --- memories


def test_the_queue_term_compares_with_the_past_and_then_remembers():
    torch.manual_seed(0)
    term = QueueTerm(D, DT, size=8, student_temp=0.2, teacher_temp=0.07)
    student, teacher = outputs()
    before = term.queue.queue.clone()
    projected = copy.deepcopy(term.projector)(student["output"])
    loss = term(student, teacher, make_views())
    close(
        loss,
        queue_loss(projected, teacher["output"], before, student_temp=0.2, teacher_temp=0.07),
    )
    assert torch.equal(term.queue.queue, before)  # this step's features come after it
    loss.backward()
    assert all(p.grad is not None for p in term.parameters())
    term.after_step(skipped=True)
    term.after_step(skipped=False)  # nothing is left of the skipped step
    assert torch.equal(term.queue.queue, before)
    term(student, teacher, make_views())
    term.after_step(skipped=False)
    close(term.queue.queue[:B], F.normalize(teacher["output"]))
    assert torch.equal(term.queue.queue[B:], before[B:])


def test_the_contrast_term_learns_on_both_sides_and_remembers_both():
    torch.manual_seed(0)
    term = ContrastTerm(
        D, DT, num_images=9, dim=3, negatives=4, temperature=0.1, momentum=0.5
    )  # fmt: skip
    student, teacher = outputs()
    views = make_views()
    banks = term.bank.student.clone(), term.bank.teacher.clone()
    torch.manual_seed(7)
    loss = term(student, teacher, views)
    torch.manual_seed(7)
    drawn = term.bank.negatives(views.indices, 4)
    ours, theirs = term.embed(student["output"]), term.embed_teacher(teacher["output"])
    s, t = (F.normalize(z.detach().double()) for z in (ours, theirs))
    # Z by its definition: N times the mean of exp(score / T)
    z = []
    for anchor, positive, bank in ((s, t, banks[1]), (t, s, banks[0])):
        scores = [(anchor * positive).sum(1)]
        scores += [(anchor * bank[drawn[:, k]].double()).sum(1) for k in range(4)]
        z.append(9 * (torch.stack(scores) / 0.1).exp().mean().item())
    expected = crd_loss(
        ours, theirs, banks[0][drawn], banks[1][drawn], temperature=0.1, num_images=9,
        z_student=z[0], z_teacher=z[1],
    )  # fmt: skip
    close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert student["output"].grad.abs().sum() > 0
    for layer in (term.embed, term.embed_teacher):
        assert layer.weight.grad.abs().sum() > 0
    term.after_step(skipped=True)
    term.after_step(skipped=False)
    assert torch.equal(term.bank.student, banks[0])
    assert term.bank.z_student == 0
    term(student, teacher, views)
    term.after_step(skipped=False)
    moved = F.normalize(0.5 * banks[1][:B] + 0.5 * t.float())
    close(term.bank.teacher[:B], moved, rtol=1e-4, atol=1e-5)
    assert torch.equal(term.bank.teacher[B:], banks[1][B:])


def test_both_embeddings_of_the_contrast_term_follow_one_loss():
    """Its gradient is that of the value as a function of either embedding, by differences."""
    torch.manual_seed(0)
    term = ContrastTerm(D, DT, num_images=9, dim=3, negatives=4, temperature=0.5, momentum=0.5)
    student, teacher = outputs()
    term.bank.z_student.fill_(9.0)
    term.bank.z_teacher.fill_(7.0)

    def value():
        torch.manual_seed(3)
        return term(student, teacher, make_views())

    value().backward()
    for layer in (term.embed, term.embed_teacher):
        weight, step = layer.weight.data, 1e-2
        weight[0, 0] += step
        above = value().item()
        weight[0, 0] -= 2 * step
        below = value().item()
        weight[0, 0] += step
        slope = (above - below) / (2 * step)
        assert layer.weight.grad[0, 0].item() == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_the_prototype_term_is_balanced_over_the_batch():
    torch.manual_seed(0)
    term = PrototypeTerm(D, 16, hidden_dim=6, student_temp=0.1, teacher_temp=0.07)
    student, teacher = {"output": draw(B, D).requires_grad_()}, {"prototypes": draw(B, 16, seed=1)}
    loss = term(student, teacher, make_views())
    logs = term.head(student["output"])
    close(loss, prototype_loss(logs, sinkhorn(teacher["prototypes"], 0.07), 0.1))
    loss.backward()
    assert student["output"].grad.abs().sum() > 0
    assert all(p.grad is not None for p in term.parameters() if p.requires_grad)
