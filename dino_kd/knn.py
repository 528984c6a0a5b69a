"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, DINO's protocol).

One exact search serves every k, and memory stays bounded whatever the number of images or classes.
Where bf16 products are native they choose candidates first (`dino_kd.coarse_search`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_kd.coarse_search import candidates_for, order_ties, search_coarsely
from dino_kd.hardware import has_bf16

TOP = 5  # ranked classes that are kept; top-5 means the first five of them

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


_WORTH_TWO_PASSES = 2**22  # similarities; with fewer of them one pass in float32 is as fast
_PILOT = 64  # queries that tell whether two passes are worth it


@torch.no_grad()
def search(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    query_chunk: int = 256,
    bank_chunk: int = 65536,
    coarse: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of every query: exact, by cosine, in float32.

    With `coarse` bf16 products choose candidates and float32 decides among them; queries for
    which a bound on the rounding does not prove that nothing was missed are searched again in
    float32. Both ways find the same neighbours, up to pairs whose similarities differ by less than
    float32 resolves (about 1e-7).

    Working memory is about ``8 * query_chunk * bank_chunk`` bytes plus one normalised bank chunk;
    with `coarse` a quarter of that, half a bank chunk, and 12 bytes for each candidate of
    each query.
    Among equal similarities the lower index comes first, at place k too. Rows that are copies of
    each other are equal with `coarse`, without it as far as the matrix product rounds them alike.

    Args:
        queries: ``[Q, D]``, any length and dtype.
        bank: ``[M, D]`` on the same device.
        k: neighbours, at most M.
        query_chunk: queries compared at once.
        bank_chunk: bank rows compared at once.
        coarse: whether to begin in bf16; None: where that is native and the search is large.

    Returns:
        similarity ``[Q, k]`` float32 in -1..1, descending, and index ``[Q, k]`` int64.
    """
    assert 1 <= k <= len(bank), "callers clamp k to the size of the bank"
    chunks = {"query_chunk": query_chunk, "bank_chunk": bank_chunk}
    if coarse is None:
        is_large = len(queries) * len(bank) >= _WORTH_TWO_PASSES and 4 * k <= len(bank)
        coarse = is_large and has_bf16(queries.device)
    if not coarse or candidates_for(k) > len(bank):
        return _search_in_float32(queries, bank, k, **chunks)
    pilot = queries[:_PILOT]
    if len(queries) >= 32 * _PILOT and not _is_mostly_certain(pilot, bank, k, chunks):
        return _search_in_float32(queries, bank, k, **chunks)
    similarity, index, is_certain = search_coarsely(queries, bank, k, **chunks)
    unsure = (~is_certain).nonzero()[:, 0]
    if len(unsure):
        similarity[unsure], index[unsure] = _search_in_float32(queries[unsure], bank, k, **chunks)
    return similarity, index


def _is_mostly_certain(queries: Tensor, bank: Tensor, k: int, chunks: dict[str, int]) -> bool:
    """False where features are too alike for bf16, as those of a collapsed network."""
    return search_coarsely(queries, bank, k, **chunks)[2].float().mean().item() >= 0.5


def _search_in_float32(
    queries: Tensor, bank: Tensor, k: int, *, query_chunk: int, bank_chunk: int
) -> tuple[Tensor, Tensor]:
    """`search` by one matrix product; its arguments and answers."""
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)  # [Q, k]
    index = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)  # [Q, k]
    # One buffer for every product: fresh memory costs a page fault for each 4 KiB of it.
    size = min(query_chunk, len(queries)) * min(bank_chunk, len(bank))
    buffer = torch.empty(size, device=queries.device)
    for start in range(0, len(bank), bank_chunk):
        columns = F.normalize(bank[start : start + bank_chunk].float(), dim=-1)  # [m, D]
        for rows in _chunks(len(queries), query_chunk):
            query = F.normalize(queries[rows].float(), dim=-1)  # [q, D]
            cosine = buffer[: len(query) * len(columns)].view(len(query), len(columns))
            torch.mm(query, columns.T, out=cosine)
            near, place = _top(cosine, min(k, len(columns)))
            if start:  # what was found before has lower indices, so it stands first
                near = torch.cat([best[rows], near], dim=1)  # [q, up to 2k]
                place = torch.cat([index[rows], place + start], dim=1)
                near, order = _top(near, min(k, near.shape[1]))
                place = place.gather(1, order)
            best[rows, : near.shape[1]], index[rows, : near.shape[1]] = near, place
    return best, index


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` per row with one rule for ties, also at place k: lower index first."""
    top, place = values.topk(min(k + 1, values.shape[1]), dim=-1)
    # Where the next value equals the k-th, topk chose freely among equals.
    unclear = (top[:, k:] == top[:, k - 1 : k]).any(dim=-1)  # [rows]
    top, place = top[:, :k], place[:, :k]
    if unclear.any():
        ordered, order = values[unclear].sort(dim=-1, descending=True, stable=True)
        top[unclear], place[unclear] = ordered[:, :k], order[:, :k]
    # topk ordered equals freely too; without copies there are hardly any, and sorts cost time.
    equal = (top[:, 1:] == top[:, :-1]).any(dim=-1)  # [rows]
    if equal.any():
        top[equal], place[equal] = order_ties(top[equal], place[equal])
    return top, place


@torch.no_grad()
def vote(
    similarity: Tensor,
    neighbour_labels: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    chunk_elements: int = 2**24,
) -> dict[int, Tensor]:
    """Rank classes by the weighted votes of the nearest neighbours, for several k at once.

        score[q, y] = sum over the k nearest i with label y of exp(similarity[q, i] / temperature)

    Args:
        similarity: ``[Q, K]`` descending.
        neighbour_labels: ``[Q, K]`` in 0..num_classes-1.
        num_classes: Y.
        ks: neighbours that vote, each at most K.
        temperature: above 0; small values let the nearest decide.
        chunk_elements: queries times classes held at once.

    Returns:
        for every k the ``[Q, min(5, Y)]`` best classes, best first, the lower class first among
        equals; -1 where fewer classes have a vote.
    """
    wanted = sorted(set(ks))
    ranked: dict[int, list[Tensor]] = {k: [] for k in wanted}
    for rows in _chunks(len(similarity), max(1, chunk_elements // num_classes)):
        near, labels = similarity[rows].double(), neighbour_labels[rows]
        # Relative to the nearest neighbour: the same ranking, and no overflow at any temperature.
        weights = torch.exp((near - near[:, :1]) / temperature).clamp_min(1e-300)
        scores = weights.new_zeros(len(labels), num_classes)  # [q, Y]
        counted = 0
        for k in wanted:
            scores.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
            counted = k
            ranked[k].append(_best_classes(scores))
    return {k: torch.cat(parts) for k, parts in ranked.items()}


def _best_classes(scores: Tensor) -> Tensor:
    """``[q, min(5, Y)]`` classes by score; -1 for classes without a vote."""
    best, classes = _top(scores, min(TOP, scores.shape[1]))
    return classes.masked_fill(best <= 0, -1)


@torch.no_grad()
def search_others(features: Tensor, k: int, *, search: Search = search) -> tuple[Tensor, Tensor]:
    """The k most similar other rows of every row of one set: itself left out by its index.

    Copies of a row stay among its neighbours, also those that stand before it.

    Args:
        features: ``[M, D]``.
        k: neighbours, at most M - 1.
        search: `search` or another exact back-end with its signature.

    Returns:
        similarity ``[M, k]`` descending and index ``[M, k]`` int64, never the row itself.
    """
    similarity, index = search(features, features, k + 1)
    own = index == torch.arange(len(features), device=index.device)[:, None]  # [M, k + 1]
    # Behind more than k copies a row does not find itself: then one copy too many goes.
    own[~own.any(dim=1), -1] = True
    return similarity[~own].view(-1, k), index[~own].view(-1, k)


@torch.no_grad()
def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
    search: Search = search,
) -> dict[int, dict[str, float]]:
    """Accuracy of the weighted vote for several k, from one search.

    Args:
        queries: ``[Q, D]`` features that are scored.
        query_labels: ``[Q]`` integers; classes absent from the bank count as errors.
        bank: ``[M, D]`` features that vote.
        bank_labels: ``[M]`` integers, any values.
        ks: neighbours.
        temperature: of the vote.
        search: `search` or another exact back-end with its signature.

    Returns:
        ``{k: {"top1": percent, "top5": percent}}``; top5 is top-Y for Y < 5 classes. A k larger
        than the bank votes with the whole bank and has a third entry ``"clamped_to": M``.
    """
    similarity, index = search(queries, bank, min(max(ks), len(bank)))
    return vote_accuracy(
        similarity, index, query_labels, bank_labels, ks=ks, temperature=temperature
    )


@torch.no_grad()
def vote_accuracy(
    similarity: Tensor,
    index: Tensor,
    query_labels: Tensor,
    bank_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, dict[str, float]]:
    """`knn_accuracy` of neighbours that are already found.

    Args:
        similarity: ``[Q, K]`` descending.
        index: ``[Q, K]`` places in the bank.
        query_labels: ``[Q]`` integers; classes absent from the bank count as errors.
        bank_labels: ``[M]`` integers, any values.
        ks: neighbours that vote; one above K votes with all K and says so.
        temperature: of the vote.

    Returns:
        as `knn_accuracy`.
    """
    clamped = {k: min(k, similarity.shape[1]) for k in ks}
    # Classes are renumbered 0..Y-1, so that label values cost no memory.
    classes, compact = torch.unique(bank_labels.to(index.device), return_inverse=True)
    ranked = vote(similarity, compact[index], len(classes), list(clamped.values()), temperature)
    truth = query_labels.to(index.device)[:, None]
    result: dict[int, dict[str, float]] = {}
    for k, used in clamped.items():
        places = ranked[used]  # [Q, min(5, Y)]
        hits = (classes[places.clamp_min(0)] == truth) & (places >= 0)
        result[k] = {
            "top1": 100.0 * hits[:, 0].double().mean().item(),
            "top5": 100.0 * hits.any(dim=1).double().mean().item(),
        }
        if used < k:
            result[k]["clamped_to"] = used
    return result


@torch.no_grad()
def label_scores(
    similarity: Tensor,
    index: Tensor,
    bank_labels: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    chunk_elements: int = 2**24,
) -> dict[int, Tensor]:
    """The share of the votes that each label gets, where an image may have several labels.

        score[q, l] = sum_i w[q, i] * bank_labels[i, l] / sum_i w[q, i]
        w[q, i] = exp(similarity[q, i] / temperature), over the k nearest i

    Args:
        similarity: ``[Q, K]`` descending.
        index: ``[Q, K]`` places in the bank.
        bank_labels: bool ``[M, L]``.
        ks: neighbours that vote, each at most K.
        temperature: above 0; small values let the nearest decide.
        chunk_elements: queries times neighbours times labels held at once.

    Returns:
        for every k float64 ``[Q, L]`` in 0..1.
    """
    wanted = sorted(set(ks))
    scores: dict[int, list[Tensor]] = {k: [] for k in wanted}
    bank_labels = bank_labels.to(index.device)
    size = max(1, chunk_elements // (wanted[-1] * max(1, bank_labels.shape[1])))
    for rows in _chunks(len(similarity), size):
        near = similarity[rows].double()
        weights = torch.exp((near - near[:, :1]) / temperature)  # [q, K], the nearest weighs 1
        votes = weights.new_zeros(len(near), bank_labels.shape[1])  # [q, L]
        counted = 0
        for k in wanted:
            having = bank_labels[index[rows, counted:k]].double()  # [q, k - counted, L]
            votes += torch.einsum("qk,qkl->ql", weights[:, counted:k], having)
            counted = k
            scores[k].append((votes / weights[:, :k].sum(1, keepdim=True)).clamp(0, 1))
    return {k: torch.cat(parts) for k, parts in scores.items()}


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
