"""Near-duplicate images: do two small pictures show the same, and which images belong together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

COARSE = 0.35  # edges at half resolution that agree less than this show different things
# The side of a cut-out, and where it lies in each direction: at one border, in the middle, at the
# other. 0.9 is 81 % of the area.
_CUT_OUTS = ((1.0, (0.5,)), (0.95, (0.0, 0.5, 1.0)), (0.9, (0.0, 0.5, 1.0)))
# Root mean square of the gradient, in grey levels, below which a picture is flat and proves nothing
_FLAT = 0.7
# Edges beyond this many times a picture's own root mean square are cut down to it: else a frame, or
# one horizon, is all that is compared. On CIFAR-10 it took 64 of 68 pairs of framed pictures away.
_STRONGEST = 2.0


@torch.no_grad()
def appearance(first: Tensor, second: Tensor, *, chunk: int = 1024) -> Tensor:
    """Do pictures show the same? The correlation of their edges, best over crops and the mirror.

    Compared are the horizontal and vertical grey-level differences of both pictures as they are,
    with either one replaced by its cut-out of 95 or 90 % of each side at nine places, and with one
    of them mirrored. Differences know nothing of brightness, their correlation nothing of contrast.
    A picture's strongest edges are cut down, so that a frame does not outweigh what is in it.
    A first look at half the resolution and at the centre spares most pairs the rest: below `COARSE`
    its correlation is returned. (Of 25,000 re-encoded, resized, cropped, mirrored and brightened
    copies none was below 0.41; of the nearest distinct images 85 to 95 % were; both
    before strong edges were cut down.)

    Args:
        first: grey pictures uint8 ``[N, S, S]``.
        second: the same, one for each.
        chunk: pairs compared at once; about 50 kB of working memory each at S = 32.

    Returns:
        ``[N]`` float32 in -1..1, 1 for the same picture. Flat pictures give 0.
    """
    found = []
    for start in range(0, len(first), chunk):
        a, b = (part[start : start + chunk].float() for part in (first, second))
        best = _best_match(_halved(a), _halved(b), ((1.0, (0.5,)), (0.95, (0.5,)), (0.9, (0.5,))))
        close = best >= COARSE
        best[close] = _best_match(a[close], b[close], _CUT_OUTS)
        found.append(best)
    return torch.cat(found) if found else torch.zeros(0)


def groups_of(pairs: Tensor, count: int) -> Tensor:
    """Connected components: which images hang together by pairs ``[P, 2]`` of 0..count-1.

    Returns:
        int64 ``[count]``: the lowest index of the component that an image belongs to.
    """
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return torch.tensor([root(index) for index in range(count)], dtype=torch.int64)


def same_rows(rows: Tensor) -> Tensor:
    """int64 ``[N]``: for each row of ``[N, B]`` the first one that equals it."""
    _, inverse = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(rows) else 0,), len(rows))
    first.scatter_reduce_(0, inverse, torch.arange(len(rows)), "amin")
    return first[inverse]


_Cuts = tuple[tuple[float, tuple[float, ...]], ...]


def _best_match(first: Tensor, second: Tensor, cuts: _Cuts) -> Tensor:
    """``[N]``: the best correlation over cut-outs of either picture and the mirror."""
    best = torch.full((len(first),), -1.0)
    for whole, cut in ((first, second), (second, first)):
        targets = _edges(cut), _edges(cut.flip(-1))
        for view in _views(whole, cuts):
            edges = _edges(view)
            for target in targets:
                best = torch.maximum(best, (edges * target).sum(-1))
    return best


def _views(pictures: Tensor, cuts: _Cuts) -> Iterator[Tensor]:
    """The parts of each picture ``[N, S, S]`` that are compared, resampled to S x S."""
    side = pictures.shape[-1]
    for zoom, places in cuts:
        for top in places:
            rows = _resampling(side, zoom, top) @ pictures
            for left in places:
                yield rows @ _resampling(side, zoom, left).T


def _halved(pictures: Tensor) -> Tensor:
    return F.avg_pool2d(pictures[:, None], 2)[:, 0]


def _resampling(side: int, zoom: float, place: float) -> Tensor:
    """``[S, S]``: linear interpolation of `side` samples inside `zoom` of the width."""
    at = (torch.arange(side) + 0.5) * zoom + (1 - zoom) * side * place - 0.5
    low = at.floor()
    weight = (at - low)[:, None]
    pick = torch.eye(side)
    low_index = low.long().clamp(0, side - 1)
    high_index = (low.long() + 1).clamp(0, side - 1)
    return (1 - weight) * pick[low_index] + weight * pick[high_index]


def _edges(pictures: Tensor) -> Tensor:
    """Central differences of ``[N, S, S]``, both directions in one row, scaled to length 1."""
    across = (pictures[:, :, 2:] - pictures[:, :, :-2]).flatten(1)
    down = (pictures[:, 2:] - pictures[:, :-2]).flatten(1)
    edges = torch.cat([across, down], 1)
    strength = edges.square().mean(dim=1, keepdim=True).sqrt().clamp_min(_FLAT)
    edges = edges.clamp(-_STRONGEST * strength, _STRONGEST * strength)
    length = edges.norm(dim=1, keepdim=True)
    # a flat picture's edges are noise: scaled down, so that they correlate with nothing
    return edges / length.clamp_min(_FLAT * edges.shape[1] ** 0.5)
