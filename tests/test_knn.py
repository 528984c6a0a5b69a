"""k-NN against a brute-force numpy loop and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dino_kd.knn import knn_accuracy, label_scores, order_ties, search, search_others, vote
from tests.tiny import TensorSizes


def data(num_queries=40, num_bank=97, dim=8, classes=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=g)
    bank_labels = torch.randint(classes, (num_bank,), generator=g)
    query_labels = torch.randint(classes, (num_queries,), generator=g)
    bank = centres[bank_labels] + 1.3 * torch.randn(num_bank, dim, generator=g)
    queries = centres[query_labels] + 1.3 * torch.randn(num_queries, dim, generator=g)
    return queries, query_labels, bank, bank_labels


def brute_force(queries, query_labels, bank, bank_labels, k, temperature, top):
    """One query, one neighbour, one class at a time, in double precision."""
    hits = 0
    for query, truth in zip(queries.double().numpy(), query_labels.tolist(), strict=True):
        cosines = [
            float(query @ row / np.linalg.norm(query) / np.linalg.norm(row))
            for row in bank.double().numpy()
        ]
        nearest = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:k]
        scores: dict[int, float] = {}
        for i in nearest:
            label = int(bank_labels[i])
            scores[label] = scores.get(label, 0.0) + math.exp(cosines[i] / temperature)
        ranked = sorted(scores, key=lambda label: (-scores[label], label))
        hits += truth in ranked[:top]
    return 100 * hits / len(queries)


@pytest.mark.parametrize("classes", [2, 4, 7, 30])
def test_accuracy_equals_a_brute_force_loop(classes):
    queries, query_labels, bank, bank_labels = data(classes=classes)
    ks = [1, 5, 20, 97]
    found = knn_accuracy(queries, query_labels, bank, bank_labels, ks=ks)
    for k in ks:
        for name, top in (("top1", 1), ("top5", 5)):
            expected = brute_force(queries, query_labels, bank, bank_labels, k, 0.07, top)
            assert found[k][name] == pytest.approx(expected), (k, name)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_top1_equals_scikit_learn(k):
    from sklearn.neighbors import KNeighborsClassifier

    queries, query_labels, bank, bank_labels = data(num_queries=300, num_bank=500)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank.numpy(), bank_labels.numpy())
    expected = 100 * reference.score(queries.numpy(), query_labels.numpy())
    found = knn_accuracy(queries, query_labels, bank, bank_labels, ks=[k])
    assert found[k]["top1"] == pytest.approx(expected)


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(1, 1), (7, 10), (256, 65536), (3, 97)])
def test_search_is_exact_whatever_the_chunks(query_chunk, bank_chunk):
    queries, _, bank, _ = data()
    similarity, index = search(queries, bank, 13, query_chunk=query_chunk, bank_chunk=bank_chunk)
    q, b = queries.double().numpy(), bank.double().numpy()
    cosine = (q @ b.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    expected = np.argsort(-cosine, axis=1)[:, :13]
    assert index.tolist() == expected.tolist()
    np.testing.assert_allclose(similarity, np.take_along_axis(cosine, expected, 1), atol=1e-6)


def test_search_accepts_low_precision_and_any_length():
    queries, _, bank, _ = data()
    _, expected = search(queries.half().float(), bank.half().float(), 5)
    _, found = search(queries.half() * 3, bank.half(), 5)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bank_chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_equal_neighbours_come_by_index(k, bank_chunk):
    """At place k too, where torch.topk alone takes any of the equal ones."""
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    _, index = search(torch.tensor([[1.0, 0.0]]), bank, k, bank_chunk=bank_chunk)
    assert index.tolist() == [[1, 2, 3, 4, 0][:k]]


def test_order_ties_sorts_by_similarity_then_index():
    similarity, index = order_ties(
        torch.tensor([[0.5, 0.9, 0.5, 0.9]]), torch.tensor([[7, 5, 2, 3]])
    )
    assert index.tolist() == [[3, 5, 2, 7]]
    assert similarity[0].tolist() == pytest.approx([0.9, 0.9, 0.5, 0.5])


def test_votes_by_hand():
    """Two weak votes for class 2 against one strong for class 0, at two temperatures."""
    similarity = torch.tensor([[0.9, 0.8, 0.8]])
    labels = torch.tensor([[0, 2, 2]])
    warm = vote(similarity, labels, 4, [1, 3], temperature=1.0)
    assert warm[1].tolist() == [[0, -1, -1, -1]]
    assert warm[3].tolist() == [[2, 0, -1, -1]]  # 2 e^0.8 > e^0.9
    cold = vote(similarity, labels, 4, [3], temperature=0.05)
    assert cold[3].tolist() == [[0, 2, -1, -1]]  # e^18 > 2 e^16


def test_classes_without_a_vote_are_never_right():
    """k=1 has one candidate; filling up to five with arbitrary classes would inflate top-5."""
    queries, query_labels, bank, bank_labels = data()
    found = knn_accuracy(queries, query_labels, bank, bank_labels, ks=[1])
    assert found[1]["top1"] == found[1]["top5"] < 100


@pytest.mark.parametrize("temperature", [1e-4, 0.07, 100.0])
def test_extreme_temperatures_stay_finite(temperature):
    queries, query_labels, bank, bank_labels = data()
    found = knn_accuracy(
        queries, query_labels, bank, bank_labels, ks=[1, 20], temperature=temperature
    )
    assert all(0 <= v <= 100 for row in found.values() for v in row.values())
    if temperature == 1e-4:
        assert found[20]["top1"] == found[1]["top1"]  # the nearest decides alone
    assert found[20]["top5"] >= found[20]["top1"]


def test_vote_chunks_do_not_change_the_ranking():
    queries, _, bank, bank_labels = data()
    similarity, index = search(queries, bank, 20)
    whole = vote(similarity, bank_labels[index], 7, [5, 20])
    parts = vote(similarity, bank_labels[index], 7, [20, 5], chunk_elements=21)
    assert all(torch.equal(whole[k], parts[k]) for k in (5, 20))


def test_k_beyond_the_bank_is_clamped_and_said():
    queries, query_labels, bank, bank_labels = data(num_bank=9)
    found = knn_accuracy(queries, query_labels, bank, bank_labels, ks=[5, 9, 200])
    assert found[200] == {**found[9], "clamped_to": 9}
    assert "clamped_to" not in found[9]


def test_label_values_and_unseen_classes_are_no_problem():
    queries, query_labels, bank, bank_labels = data()
    expected = knn_accuracy(queries, query_labels, bank, bank_labels, ks=[5])
    far = knn_accuracy(queries, query_labels * 10**9, bank, bank_labels * 10**9, ks=[5])
    assert far == expected
    unseen = knn_accuracy(queries, query_labels + 1000, bank, bank_labels, ks=[5])
    assert unseen[5] == {"top1": 0.0, "top5": 0.0}


def test_one_query_and_one_bank_row_work():
    one = torch.ones(1, 3)
    found = knn_accuracy(one, torch.tensor([4]), one, torch.tensor([4]), ks=[1, 10])
    assert found[1]["top1"] == found[10]["top5"] == 100.0


def test_memory_of_the_search_is_bounded():
    """Many queries against a small bank chunk never build the whole similarity matrix."""
    queries, bank = torch.randn(400, 4), torch.randn(1000, 4)
    with TensorSizes() as seen:
        search(queries, bank, 3, query_chunk=20, bank_chunk=50)
    assert max(seen) <= max(400 * 4, 20 * 50, 50 * 4)


def old_rule(queries, bank, k):
    """Neighbours by a full stable sort of the whole similarity matrix."""
    cosine = torch.nn.functional.normalize(queries, dim=-1) @ (
        torch.nn.functional.normalize(bank, dim=-1).T
    )
    near, index = cosine.sort(dim=-1, descending=True, stable=True)
    return near[:, :k], index[:, :k]


@pytest.mark.parametrize("bank_chunk", [3, 16, 17, 1000])
@pytest.mark.parametrize("k", [1, 2, 7, 30, 97])
def test_search_with_many_copies_equals_a_stable_sort(k, bank_chunk):
    """Axis-parallel vectors: every product is exact, and most similarities are equal."""
    g = torch.Generator().manual_seed(0)
    bank = torch.eye(4)[torch.randint(4, (97,), generator=g)]
    queries = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -1.0, 0.0]])
    expected, expected_index = old_rule(queries, bank, k)
    found, index = search(queries, bank, k, query_chunk=2, bank_chunk=bank_chunk)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_others_equal_a_loop_that_deletes_each_row(k):
    """Each image against a bank without it; rows 5, 20 and 40..49 are copies of row 2."""
    features = data(num_bank=60)[2]
    features[[5, 20, *range(40, 50)]] = features[2].clone()
    similarity, index = search_others(features, k)
    for row in range(60):
        rest = torch.cat([features[:row], features[row + 1 :]])
        near, place = search(features[row : row + 1], rest, k)
        place = torch.where(place >= row, place + 1, place)  # as counted with the row
        torch.testing.assert_close(similarity[row : row + 1], near)
        if k != 10 or row not in {2, 5, 20, *range(40, 50)}:
            assert index[row].tolist() == place[0].tolist(), row
        assert row not in index[row].tolist()


def test_others_of_identical_rows():
    """Row 4 is not among the three neighbours that the search gives it; row 0 stands first."""
    similarity, index = search_others(torch.eye(2)[[0, 0, 0, 0, 0, 1]], 2)
    assert index.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]
    assert similarity[4].tolist() == [1.0, 1.0]


def test_others_reach_every_other_row():
    _, index = search_others(data(num_bank=9)[2], 8)
    assert [sorted(row) for row in index.tolist()] == [
        [other for other in range(9) if other != row] for row in range(9)
    ]


def test_label_scores_equal_a_loop():
    """The weighted mean of the neighbours' label vectors, one query and label at a time."""
    queries, _, bank, _ = data()
    having = torch.rand(97, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    similarity, index = search(queries, bank, 20)
    whole = label_scores(similarity, index, having, [1, 5, 20], 0.1)
    parts = label_scores(similarity, index, having, [20, 5, 1], 0.1, chunk_elements=120)
    for k in (1, 5, 20):
        assert torch.equal(whole[k], parts[k])
        for q in range(len(queries)):
            weights = [math.exp(s / 0.1) for s in similarity[q, :k].tolist()]
            for label in range(3):
                votes = [
                    w * bool(having[i, label])
                    for w, i in zip(weights, index[q, :k].tolist(), strict=True)
                ]
                assert whole[k][q, label].item() == pytest.approx(sum(votes) / sum(weights))


def test_label_scores_at_an_extreme_temperature_are_those_of_the_nearest():
    queries, _, bank, _ = data()
    having = torch.rand(97, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    similarity, index = search(queries, bank, 20)
    scores = label_scores(similarity, index, having, [20], 1e-7)[20]
    torch.testing.assert_close(scores, having[index[:, 0]].double())
