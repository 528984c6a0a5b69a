"""The two-pass search against a float64 search of everything, and its promise of certainty."""

from __future__ import annotations

import time

import pytest
import torch

from dino_kd import coarse_search
from dino_kd.coarse_search import candidates_for, rescore, search_coarsely
from dino_kd.hardware import cpu_has_bf16
from dino_kd.knn import knn_accuracy, search, search_others
from tests.tiny import TensorSizes, draw


def by_float64(queries, bank, k):
    """Cosine and place of the k nearest, by a full stable sort in double precision."""
    cosine, index = all_cosines(queries, bank).sort(dim=-1, descending=True, stable=True)
    return cosine[:, :k], index[:, :k]


def all_cosines(queries, bank):
    queries, bank = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (queries, bank))
    return queries @ bank.T


def clustered(count, dim, seed, spread=0.3):
    """Vectors that nearly all point one way, as features of images do."""
    return 1.0 + spread * draw(count, dim, seed=seed)


SETS = {
    "random": (draw(50, 24, seed=1), draw(1003, 24, seed=2)),
    "one way": (clustered(50, 24, seed=3), clustered(1003, 24, seed=4)),
    "lengths": (draw(50, 24, seed=5) * 1e3, draw(1003, 24, seed=6) * torch.rand(1003, 1) * 1e-3),
}


@pytest.mark.parametrize("chunks", [(256, 65536), (7, 100), (64, 1003), (50, 8)])
@pytest.mark.parametrize("k", [1, 20, 200])
@pytest.mark.parametrize("name", SETS)
def test_both_ways_equal_a_float64_search(name, k, chunks):
    queries, bank = SETS[name]
    cosine, expected = by_float64(queries, bank, k)
    for coarse in (False, True):
        similarity, index = search(
            queries, bank, k, query_chunk=chunks[0], bank_chunk=chunks[1], coarse=coarse
        )
        # where two similarities are equal in float32 ("one way" has some), any may be first
        differ = index != expected
        assert (all_cosines(queries, bank).gather(1, index) - cosine)[differ].abs().le(3e-7).all()
        assert differ.double().mean() < (0.01 if name == "one way" else 1e-9), coarse
        torch.testing.assert_close(similarity, cosine.float(), rtol=0, atol=5e-7)


@pytest.mark.parametrize("spare", [0, 1, 10])
@pytest.mark.parametrize("name", SETS)
def test_certain_queries_are_right_however_few_the_candidates(name, spare, monkeypatch):
    """With hardly any spare candidates many answers are wrong: none of them may be certain."""
    monkeypatch.setattr(coarse_search, "candidates_for", lambda k: k + spare)
    queries, bank = SETS[name]
    _, expected = by_float64(queries, bank, 30)
    _, index, is_certain = search_coarsely(queries, bank, 30)
    is_right = (index == expected).all(1)
    assert not (is_certain & ~is_right).any()
    if spare == 0:
        assert not is_certain.any()  # the last candidate is the k-th: nothing can be proved


def test_what_is_left_out_is_below_the_bound():
    """The largest float64 product with a row that is no candidate, for every query."""
    for queries, bank in SETS.values():
        unit = torch.nn.functional.normalize(bank.double(), dim=-1)
        centre = unit.mean(0)
        found, left_out = coarse_search._candidates(
            queries, bank, centre.float(), 40, query_chunk=16, bank_chunk=301
        )
        exact = torch.nn.functional.normalize(queries.double(), dim=-1) @ (unit - centre).T
        exact.scatter_(1, found, -torch.inf)
        assert (exact.amax(1) <= left_out).all()


def near_copies(count, distance):
    """A query, 40 rows far from it, and `count` rows around it that bf16 cannot tell apart."""
    query = draw(1, 32, seed=0)
    offsets = distance * draw(count, 32, seed=1)
    order = torch.randperm(count + 400, generator=torch.Generator().manual_seed(2))
    return query, torch.cat([query + offsets, draw(400, 32, seed=3)])[order]


@pytest.mark.parametrize("count", [30, 90, 600])
def test_near_copies_below_the_resolution_of_bf16_are_told_apart(count):
    query, bank = near_copies(count, distance=5e-2)
    cosine, _ = by_float64(query, bank, 20)
    assert cosine[0, 0] - cosine[0, -1] < 2**-8  # bf16 resolves no more
    _, _, is_certain = search_coarsely(query, bank, 20)
    # more near copies than candidates: the 20 nearest may hide among those left out
    assert is_certain.tolist() == [count < candidates_for(20)]
    _, index = search(query, bank, 20, coarse=True)
    assert (all_cosines(query, bank).gather(1, index) - cosine).abs().max() < 3e-7
    assert len(index.unique()) == 20


@pytest.mark.parametrize("copies", [5, 60, 500])
def test_copies_come_by_index_also_beyond_the_candidates(copies):
    bank = draw(800, 16, seed=0)
    bank[:: 800 // copies][:copies] = bank[0].clone()
    where = (bank == bank[0]).all(1).nonzero()[:, 0]
    similarity, index = search(bank[:3], bank, 20, coarse=True)
    assert index[0, : min(copies, 20)].tolist() == where[:20].tolist()
    assert (similarity[0, : min(copies, 20)] == similarity[0, 0]).all()


def test_a_collapsed_network_is_searched_in_float32(monkeypatch):
    """All features equal: a small pilot shows it, and the answer is that of one pass."""
    bank, queries = torch.ones(500, 8), torch.ones(2048, 8)
    asked = []
    monkeypatch.setattr(
        "dino_kd.knn.search_coarsely",
        lambda queries, *rest, **more: (
            asked.append(len(queries)) or search_coarsely(queries, *rest, **more)
        ),
    )
    _, index = search(queries, bank, 5, coarse=True)
    assert torch.equal(index, torch.arange(5).expand(2048, 5))
    assert asked == [64]


def test_a_zero_vector_has_neighbours_too():
    queries, bank = torch.zeros(2, 8), draw(300, 8)
    similarity, index = search(queries, bank, 3, coarse=True)
    assert index.tolist() == [[0, 1, 2]] * 2
    assert not similarity.any()


def test_low_precision_features_are_searched_as_they_are():
    queries, bank = (x.half() for x in SETS["random"])
    _, expected = by_float64(queries.float(), bank.float(), 20)
    assert torch.equal(search(queries, bank, 20, coarse=True)[1], expected)
    _, found = search(queries.bfloat16(), bank.bfloat16(), 20, coarse=True)
    assert torch.equal(found, search(queries.bfloat16(), bank.bfloat16(), 20, coarse=False)[1])


def test_the_accuracy_of_every_k_is_the_same_both_ways():
    bank, queries = clustered(2000, 32, seed=1), clustered(300, 32, seed=2)
    labels, truth = ((x[:, :3].sum(1) * 3).long() % 7 for x in (bank, queries))
    one, two = (
        knn_accuracy(
            queries, truth, bank, labels, ks=[1, 20, 200],
            search=lambda *args, way=way: search(*args, coarse=way),
        )
        for way in (False, True)
    )  # fmt: skip
    assert one == two
    assert one[20]["top1"] > 20


def test_leave_one_out_is_the_same_both_ways():
    features = clustered(700, 16, seed=7)
    features[[5, 20, 699]] = features[2].clone()
    ways = [
        search_others(features, 9, search=lambda *args, way=way: search(*args, coarse=way))
        for way in (False, True)
    ]
    assert torch.equal(ways[0][1], ways[1][1])


def test_rescoring_sorts_by_similarity_then_index():
    bank = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    similarity, index = rescore(
        torch.tensor([[3.0, 0.0]]), bank, bank.norm(dim=1), torch.tensor([[3, 0, 2, 1]])
    )
    assert index.tolist() == [[1, 3, 2, 0]]
    assert similarity[0].tolist() == pytest.approx([1, 1, 0.5**0.5, 0])


def test_memory_of_the_two_passes_is_bounded():
    """Neither all similarities nor all candidates' rows exist at once."""
    queries, bank = draw(1000, 64), draw(3000, 64, seed=1)
    with TensorSizes() as seen:
        search(queries, bank, 100, query_chunk=50, bank_chunk=1000, coarse=True)
    largest_of_all = max(50 * 1000, 1000 * candidates_for(100) * 2, 3000 * 64)
    assert max(seen) <= max(largest_of_all, coarse_search._RESCORED)


@pytest.mark.slow
@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU multiplies bf16 no faster")
def test_two_passes_are_faster_than_one():
    """Processor time, best of three; measured 1.9 times, asserted with slack."""
    queries, bank = draw(1000, 384), draw(50_000, 384, seed=1)

    def seconds(coarse):
        started = time.process_time()
        search(queries, bank, 200, coarse=coarse)
        return time.process_time() - started

    ratios = [seconds(False) / seconds(True) for _ in range(3)]
    assert max(ratios) > 1.2, ratios
