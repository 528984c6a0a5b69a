"""Nearest neighbours in two passes: bf16 products choose candidates, float32 decides among them.

The first pass carries a bound of its own error, so that every query knows whether its answer is
certain; `dino_kd.knn.search` repeats the others in float32. A query is certain when its k-th
neighbour is more similar than anything that was left out can be:

    similarity(k-th)  >  largest coarse similarity left out + bound

The bound is Cauchy-Schwarz on the rounding that was really done, not on the worst possible one:
for a query q and a bank row b, rounded to q' and b',

    |q.b - q'.b'|  <=  |q - q'| |b| + |q'| |b - b'|  +  rounding of sums and results

Features of images tend to point one way, and what sets them apart is short. So both sides are
rounded less the bank's mean m, where the same bits resolve more finely:

    q.(b - m)  =  (q - m).(b - m)  +  m.(b - m)

The left side orders the rows as q.b does. The last term belongs to the row alone; it rides along
as three more columns, which hold it to 24 bits, against three ones on the query's side.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_GROUP = 8  # columns whose maximum stands for them in the first choice
_ROUNDED = 1024  # bank rows rounded at once
_PARTITIONED = 2**18  # numbers that a thread partitions at once
_NUMPY_2 = int(np.__version__.partition(".")[0]) >= 2
_RESCORED = 2**20  # numbers of candidate rows held at once; they should stay in the cache
_SORTED = 4096  # queries whose candidates are sorted at once
_SAMPLE = 4096  # rows that the common vector is the mean of
_SUM_ERROR = 2.0**-23  # of a float32 sum, per term and its size: twice the unit roundoff
_EXACT_ERROR = 2.0**-19  # of a rescored similarity, with much to spare
_OFFSETS = 3  # columns for what belongs to a bank row alone


def candidates_for(k: int) -> int:
    """How many candidates k neighbours are chosen from.

    What is left out must be further away than the bound, which takes more rows where they lie
    dense. Measured on CIFAR-10 at k = 200, 125 more: all queries are certain for a pretrained
    network, 92 % for an untrained one, whose features have a mean cosine of 0.96.
    """
    return k + max(128, 5 * k // 8)


@torch.no_grad()
def search_coarsely(
    queries: Tensor, bank: Tensor, k: int, *, query_chunk: int = 256, bank_chunk: int = 65536
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most similar bank rows of every query, and which queries are certain of theirs.

    Arguments as `dino_kd.knn.search`; `candidates_for(k)` must not exceed the bank.

    Returns:
        similarity ``[Q, k]`` float32 descending and index ``[Q, k]`` int64, among equals the lower
        index first; bool ``[Q]``, whether these are the k nearest beyond doubt.
    """
    # Any vector would do; the mean of a sample leaves short rows.
    centre = _normal(bank[:: -(-len(bank) // _SAMPLE)]).mean(0)  # [D]
    candidates, left_out = _candidates(
        queries, bank, centre, candidates_for(k), query_chunk=query_chunk, bank_chunk=bank_chunk
    )
    lengths = torch.linalg.vector_norm(bank, dim=1, dtype=torch.float32)  # [M]
    similarity = torch.empty(len(queries), k, device=queries.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), _SORTED):
        part = slice(start, start + _SORTED)
        near, place = rescore(queries[part], bank, lengths, candidates[part])
        similarity[part], index[part] = near[:, :k], place[:, :k]
    centred = similarity[:, k - 1] - _normal(queries).double() @ centre.double()  # [Q]
    return similarity, index, centred > left_out + _EXACT_ERROR


def _candidates(
    queries: Tensor,
    bank: Tensor,
    centre: Tensor,
    count: int,
    *,
    query_chunk: int,
    bank_chunk: int,
) -> tuple[Tensor, Tensor]:
    """The `count` rows of every query with the largest bf16 products; what the rest cannot exceed.

    Returns int64 ``[Q, count]`` in no order, and float32 ``[Q]``: the largest product that a query
    can truly have with a row that is not among them, rows taken less `centre`.
    """
    best = torch.full((len(queries), count), -torch.inf, device=queries.device)  # [Q, count]
    index = torch.zeros(len(queries), count, dtype=torch.int64, device=queries.device)
    bound = torch.zeros(len(queries), device=queries.device)  # [Q], the largest of all chunks
    # Two buffers for all chunks: fresh memory costs a page fault for each 4 KiB of it.
    width = -(-min(bank_chunk, len(bank)) // _GROUP) * _GROUP
    store = torch.empty(width, _columns(bank), dtype=torch.bfloat16, device=queries.device)
    buffer = store.new_empty(min(query_chunk, len(queries)) * width)
    for start in range(0, len(bank), bank_chunk):
        m = min(bank_chunk, len(bank) - start)
        rows = store[: -(-m // _GROUP) * _GROUP]  # [m and up to 7 more, D]
        length, error = _round_rows(bank[start : start + m], centre, out=rows)
        rows[m:] = 0
        for first in range(0, len(queries), query_chunk):
            part = slice(first, first + query_chunk)
            query = _round_queries(queries[part], centre)  # [q, D + 3 and more]
            product = buffer[: len(query.rows) * len(rows)].view(len(query.rows), len(rows))
            with _whole_sums(product.device):
                torch.mm(query.rows, rows.T, out=product)
            product[:, m:] = -torch.inf
            near, place = _largest(product, min(count, m))  # [q, up to count]
            both = torch.cat([best[part], near.float()], dim=1)
            best[part], order = both.topk(count, dim=1, sorted=False)
            index[part] = torch.cat([index[part], place + start], dim=1).gather(1, order)
            here = query.error * length + query.length * error  # [q]
            here += bank.shape[1] * _SUM_ERROR * length * (query.length + 2)
            bound[part] = torch.maximum(bound[part], here)
    # Whatever was dropped, in whichever chunk, had a product of at most the least that is left.
    # That one was rounded to bf16 once more, by at most 2^-8 of it.
    least = best.amin(1)
    return index, least + least.abs() * 2.0**-8 + bound


def _columns(bank: Tensor) -> int:
    """Columns of rounded rows: the features, the offsets, and zeros up to a multiple of eight."""
    return -(-(bank.shape[1] + _OFFSETS) // 8) * 8


class _Rounded(NamedTuple):
    """Normalised vectors less the centre in bf16; their lengths, and how far rounding moved them.

    ``rows [n, _columns]``; float32 ``length`` and ``error [n]``.
    """

    rows: Tensor
    length: Tensor
    error: Tensor


def _round_queries(queries: Tensor, centre: Tensor) -> _Rounded:
    exact = _normal(queries).sub_(centre)  # [q, D]
    rows = exact.new_zeros(len(exact), _columns(exact), dtype=torch.bfloat16)
    rounded = rows[:, : exact.shape[1]].copy_(exact)
    rows[:, exact.shape[1] : exact.shape[1] + _OFFSETS] = 1
    return _Rounded(rows, rounded.float().norm(dim=1), exact.sub_(rounded).norm(dim=1))


def _round_rows(bank: Tensor, centre: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Bank rows ``[m, D]`` to `out`, in bf16; the largest |b - m| and |(b - m) - (b - m)'|."""
    longest, furthest = centre.new_zeros(()), centre.new_zeros(())
    dim = bank.shape[1]
    out[:, dim:] = 0
    for start in range(0, len(bank), _ROUNDED):  # few enough to stay in the cache
        exact = _normal(bank[start : start + _ROUNDED]).sub_(centre)
        rounded = out[start : start + len(exact)]
        offset = exact @ centre  # [n]
        for column in range(dim, dim + _OFFSETS):
            rounded[:, column] = offset
            offset = offset - rounded[:, column]
        rounded[:, :dim] = exact
        longest = torch.maximum(longest, exact.norm(dim=1).max())
        furthest = torch.maximum(furthest, exact.sub_(rounded[:, :dim]).norm(dim=1).max())
    return longest, furthest


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`values.topk(count)` without order: first of groups by their maxima, then in the best.

    The `count` largest lie in at most as many groups, those with the largest maxima. Column j
    belongs to group j modulo the number of groups: maxima are then taken of whole rows.
    """
    groups = values.shape[1] // _GROUP
    if groups < 2 * count:
        place = _places_of_largest(values, count)
        return values.gather(1, place), place
    table = values.view(len(values), _GROUP, groups)
    maxima = table
    while maxima.shape[1] > 1:  # by halves: twice as fast as amax on a CPU
        maxima = torch.maximum(*maxima.chunk(2, dim=1))
    group = _places_of_largest(maxima[:, 0], count)  # [q, c]
    within = table.gather(2, group[:, None].expand(-1, _GROUP, -1)).flatten(1)  # [q, 8 c]
    place = _places_of_largest(within, count)
    near = within.gather(1, place)
    return near, (place // count) * groups + group.gather(1, place % count)


def _places_of_largest(values: Tensor, count: int) -> Tensor:
    """Columns int64 ``[q, count]`` of the largest bf16 numbers of every row, in no order.

    On a CPU by the partition of numpy 2, four times as fast as `topk` where it knows the processor
    (numpy 1 is slower than `topk`). It lets go of Python's lock, so that threads share the rows;
    they do without torch, which would start threads of its own in each.
    """
    if values.device.type != "cpu" or not _NUMPY_2:
        return values.topk(count, dim=1, sorted=False).indices
    bits = values.view(torch.int16).numpy().view(np.uint16)

    def partition(begin: int) -> np.ndarray:
        # bf16 is the upper half of a float32
        numbers = (bits[begin : begin + rows].astype(np.uint32) << 16).view(np.float32)
        return np.argpartition(numbers, -count, axis=1)[:, -count:]

    rows = max(1, _PARTITIONED // values.shape[1])
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        parts = list(threads.map(partition, range(0, len(values), rows)))
    return torch.from_numpy(np.concatenate(parts))


def rescore(queries: Tensor, bank: Tensor, lengths: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines in float32 of the bank rows ``[Q, c]``: descending, among equals by index.

    `lengths` ``[M]`` are those of the bank's rows.
    Product and sum, not a matrix product: copies of a row get the same similarity to the last bit
    wherever they stand.
    """
    similarity = torch.empty(index.shape, device=queries.device)
    size = max(1, _RESCORED // (index.shape[1] * bank.shape[1]))
    # One buffer here too: fresh memory took four times as long as the copying.
    buffer = bank.new_empty(min(size, len(queries)) * index.shape[1], bank.shape[1])
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        wanted = index[part].flatten()
        rows = torch.index_select(bank, 0, wanted, out=buffer[: len(wanted)])
        rows = rows.view(-1, *index.shape[1:], bank.shape[1]).float()  # [q, c, D]
        torch.sum(rows.mul_(_normal(queries[part])[:, None]), dim=-1, out=similarity[part])
    similarity /= lengths[index].clamp_min_(1e-12)  # as F.normalize
    similarity, order = similarity.sort(dim=1, descending=True)
    index = index.gather(1, order)
    equal = (similarity[:, 1:] == similarity[:, :-1]).any(dim=1)  # rare without copies
    if equal.any():
        similarity[equal], index[equal] = order_ties(similarity[equal], index[equal])
    return similarity, index


def order_ties(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Sort neighbours ``[Q, k]`` by descending similarity, then ascending index."""
    index, order = index.sort(dim=-1)
    similarity, by_similarity = similarity.gather(1, order).sort(
        dim=-1, descending=True, stable=True
    )
    return similarity, index.gather(1, by_similarity)


def _normal(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=-1)


@contextmanager
def _whole_sums(device: torch.device) -> Iterator[None]:
    """On CUDA bf16 products may add partial sums in bf16, which the bound does not cover."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
