"""Losses of relations, against loops over pairs and triplets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_kd.losses.relations import (
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_loss,
    token_relation_loss,
)
from tests.tiny import draw


def pair():
    return draw(6, 5), draw(6, 8, seed=1)


def smooth_l1(difference):
    size = abs(difference)
    return 0.5 * size**2 if size < 1 else size - 0.5


def test_distance_loss_is_the_loop_over_pairs():
    student, teacher = (z.double().numpy() for z in pair())
    pairs = list(itertools.permutations(range(6), 2))
    psi = []
    for z in (student, teacher):
        distances = np.array([np.linalg.norm(z[i] - z[j]) for i, j in pairs])
        psi.append(distances / distances.mean())
    expected = np.mean([smooth_l1(a - b) for a, b in zip(*psi, strict=True)])
    assert rkd_distance_loss(*pair()).item() == pytest.approx(expected, rel=1e-5)


def angles(features, count):
    values = []
    for i, j, k in itertools.permutations(range(count), 3):
        one, two = features[i] - features[j], features[k] - features[j]
        values.append(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    return values


@pytest.mark.parametrize("max_anchors", [128, 4])
def test_angle_loss_is_the_loop_over_triplets(max_anchors):
    student, teacher = (z.double().numpy() for z in pair())
    both = (angles(z, min(6, max_anchors)) for z in (student, teacher))
    expected = np.mean([smooth_l1(a - b) for a, b in zip(*both, strict=True)])
    loss = rkd_angle_loss(*pair(), max_anchors)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_published_rkd_weights_are_ours_times_the_share_that_counts():
    """Published means run over all B^2 and B^3 entries, the diagonal's zeros included."""
    student, teacher = pair()
    published = []
    for z in (student, teacher):
        distances = torch.cdist(z, z)
        difference = z[None] - z[:, None]
        edges = F.normalize(difference, dim=2)
        published.append(
            (distances / distances[distances > 0].mean(), torch.bmm(edges, edges.transpose(1, 2)))
        )
    distance, angle = (F.smooth_l1_loss(a, b) for a, b in zip(*published, strict=True))
    torch.testing.assert_close(rkd_distance_loss(student, teacher) * 5 / 6, distance)
    torch.testing.assert_close(rkd_angle_loss(student, teacher) * 5 * 4 / 36, angle)


def test_near_images_far_from_the_origin_keep_their_distances():
    """At an offset of 1e3 a float32 gram has no digit left for distances of 1e-2."""
    base = draw(6, 5).double() * 1e-2
    student = (base + 1e3).float()
    exact = student.double() - student.double().mean(0)
    loss = rkd_distance_loss(student, exact.float())
    assert loss < 1e-9


def test_similarity_is_the_loop_over_pairs_of_centred_cosines():
    student, teacher = (z.double().numpy() for z in pair())
    total = 0.0
    for i, j in itertools.permutations(range(6), 2):
        cosines = []
        for z in (student, teacher):
            c = z - z.mean(0)
            cosines.append(c[i] @ c[j] / np.linalg.norm(c[i]) / np.linalg.norm(c[j]))
        total += (cosines[0] - cosines[1]) ** 2
    assert similarity_loss(*pair()).item() == pytest.approx(total / 30, rel=1e-5)


def test_similarity_of_unrelated_features_is_about_one_over_each_width():
    loss = similarity_loss(draw(64, 96), draw(64, 384, seed=1))
    assert loss.item() == pytest.approx(1 / 96 + 1 / 384, rel=0.1)


def test_token_relation_is_kl_div_of_each_image():
    student, teacher = draw(3, 5, 2, 3), draw(3, 8, 2, 3, seed=1)
    total = 0.0
    for b in range(3):
        grams = []
        for z in (student, teacher):
            tokens = F.normalize(z[b].flatten(1).T, dim=1)
            grams.append(F.log_softmax(tokens @ tokens.T / 0.07, 1))
        total += F.kl_div(*grams, log_target=True, reduction="batchmean").item()
    assert token_relation_loss(student, teacher).item() == pytest.approx(total / 3, rel=1e-4)


def tokens(features):
    """Images ``[B, D]`` as the tokens of one image, ``[1, D, 1, B]``."""
    return features.T[None, :, None, :]


LOSSES = {
    "distance": rkd_distance_loss,
    "angle": rkd_angle_loss,
    "similarity": similarity_loss,
    "tokens": lambda s, t: token_relation_loss(tokens(s), tokens(t)),
}
EVERY = pytest.mark.parametrize("name", LOSSES)


@EVERY
def test_equal_relations_cost_nothing(name):
    student, _ = pair()
    rotation = torch.linalg.qr(draw(5, 5, seed=7)).Q
    assert LOSSES[name](student, student.clone()) == 0
    assert LOSSES[name](student, 3 * student @ rotation).abs() < 1e-6
    assert LOSSES[name](student, pair()[1]) > 1e-3


@EVERY
def test_only_the_student_gets_a_gradient(name):
    student, teacher = (z.requires_grad_() for z in pair())
    LOSSES[name](student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["distance", "angle", "similarity"])
def test_gradients_are_those_of_finite_differences(name):
    student, teacher = (z.double() for z in pair())
    leaf = student.float().requires_grad_()
    LOSSES[name](leaf, teacher.float()).backward()
    for i, j in ((0, 0), (3, 2), (5, 4)):
        values = []
        for step in (1e-2, -1e-2):
            moved = student.clone()
            moved[i, j] += step
            values.append(LOSSES[name](moved.float(), teacher.float()).item())
        slope = (values[0] - values[1]) / 2e-2
        assert leaf.grad[i, j].item() == pytest.approx(slope, rel=2e-2, abs=2e-5)


@EVERY
def test_duplicates_extremes_and_constants_stay_finite(name):
    wild = 6e4 * draw(6, 5).sign()
    twins = draw(3, 5).repeat(2, 1)
    batches = [wild, twins, torch.zeros(6, 5), torch.full((6, 5), 6e4), draw(6, 5, seed=3)]
    for student, teacher in itertools.product(batches, batches):
        leaf = student.half().requires_grad_()
        loss = LOSSES[name](leaf, teacher.half())
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        loss.backward()
        assert leaf.grad.isfinite().all()


def test_duplicates_do_not_dominate_the_gradient():
    student = draw(6, 5)
    student[1] = student[0]
    for loss in (rkd_distance_loss, rkd_angle_loss):
        leaf = student.clone().requires_grad_()
        loss(leaf, pair()[1]).backward()
        assert leaf.grad.abs().max() < 1


@EVERY
def test_autocast_changes_nothing(name):
    student, teacher = pair()
    with torch.autocast("cpu", torch.bfloat16):
        low = LOSSES[name](student, teacher)
    assert torch.equal(low, LOSSES[name](student, teacher))


@pytest.mark.parametrize("repeats", [2, 5])
def test_token_relation_does_not_depend_on_the_batch(repeats):
    student, teacher = draw(3, 5, 2, 3), draw(3, 8, 2, 3, seed=1)
    repeated = token_relation_loss(*(z.repeat(repeats, 1, 1, 1) for z in (student, teacher)))
    torch.testing.assert_close(repeated, token_relation_loss(student, teacher))


@pytest.mark.parametrize(
    ("loss", "least"), [(rkd_distance_loss, 2), (rkd_angle_loss, 3), (similarity_loss, 2)]
)
def test_shapes_that_do_not_fit_are_named(loss, least):
    with pytest.raises(ValueError, match="the same number of rows, got"):
        loss(torch.zeros(3, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=f"at least {least} rows, got {least - 1}"):
        loss(torch.zeros(least - 1, 4), torch.zeros(least - 1, 4))


def test_other_grids_and_too_few_anchors_are_refused():
    with pytest.raises(ValueError, match=r"the same batch and grid.*resample"):
        token_relation_loss(torch.zeros(2, 3, 7, 7), torch.zeros(2, 5, 14, 14))
    with pytest.raises(ValueError, match="max_anchors=2"):
        rkd_angle_loss(*pair(), 2)
