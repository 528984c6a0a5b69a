"""Carry the labels of earlier frames to a new one by the similarity of patch features.

The protocol of Jabri et al. 2020 (arXiv 2006.14613) as used by DINO (arXiv 2104.14294, section
4.2.2): nothing is trained. Pure functions of tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_SIMILARITIES_AT_ONCE = 2**26  # 256 MB of float32


def propagate(
    target: Tensor,
    sources: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    grid: tuple[int, int],
    topk: int = 5,
    temperature: float = 0.1,
    radius: int | None = 12,
) -> Tensor:
    """Labels of a frame from those of `sources`, float32 ``[C, P]``.

    For each patch p of the target, over patches q of all sources that lie at most `radius` rows and
    columns away from it::

        N(p)     = the topk q of highest cosine(p, q)
        w(p, q)  = exp(cosine(p, q) / temperature), normalised over N(p)
        label(p) = sum over q in N(p) of w(p, q) * label(q)

    Memory stays near 256 MB whatever the size of the frames: blocks of rows, and of each source
    only the rows within reach.

    Args:
        target: features ``[P, D]`` of the patches in row-major order.
        sources: T features ``[P, D]`` of earlier frames.
        labels: T labels ``[C, P]``, one row for each class, such as probabilities.
        grid: (rows, columns) with rows * columns = P.
        topk: neighbours, fewer where the window holds fewer.
        temperature: in units of the cosine.
        radius: in patches, 0 for the same place only; None: the whole frame.
    """
    rows, columns = grid
    reach = max(grid) if radius is None else radius
    bank = torch.stack([F.normalize(s.float(), dim=-1) for s in sources])  # [T, P, D]
    bank = bank.unflatten(1, grid)  # [T, rows, columns, D]
    known = torch.stack([label.float() for label in labels]).unflatten(2, grid)  # [T, C, rows, ...]
    queries = F.normalize(target.float(), dim=-1).unflatten(0, grid)  # [rows, columns, D]
    block = max(1, _SIMILARITIES_AT_ONCE // (len(sources) * rows * columns * columns))
    made = []
    for top in range(0, rows, block):
        bottom = min(rows, top + block)
        low, high = max(0, top - reach), min(rows, bottom + reach)
        part = queries[top:bottom].flatten(0, 1)  # [N, D]
        cosine = torch.einsum("nd,trcd->ntrc", part, bank[:, low:high])  # [N, T, r, columns]
        if radius is not None:
            near = _within(radius, (top, bottom), (low, high), columns, part.device)
            cosine = cosine.masked_fill(~near[:, None], -torch.inf)
        value, place = cosine.flatten(1).topk(min(topk, cosine[0].numel()), dim=1)  # [N, k]
        weight = (value / temperature).softmax(1)  # -inf, out of reach, weighs 0
        seen = known[:, :, low:high].movedim(1, 0).flatten(1)  # [C, T * r * columns]
        made.append((seen[:, place] * weight).sum(2))  # [C, N]
    return torch.cat(made, dim=1)


def follow(
    frames: Iterable[Tensor],
    first_labels: Tensor,
    *,
    grid: tuple[int, int],
    queue: int = 7,
    topk: int = 5,
    temperature: float = 0.1,
    radius: int | None = 12,
) -> Iterator[Tensor]:
    """Yield the labels ``[C, P]`` of every frame after the first.

    Each frame learns from the first one, whose labels are given, and from the `queue` frames before
    it with the labels that they were given here (the first one is not among those).

    Args:
        frames: features ``[P, D]`` of all frames in order, read one at a time.
        first_labels: ``[C, P]``.
        grid: as `propagate`.
        queue: frames besides the first, 0 for none.
        topk: as `propagate`.
        temperature: as `propagate`.
        radius: as `propagate`.
    """
    remaining = iter(frames)
    first = next(remaining)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=queue)
    for features in remaining:
        labels = propagate(
            features,
            [first, *(f for f, _ in recent)],
            [first_labels, *(label for _, label in recent)],
            grid=grid,
            topk=topk,
            temperature=temperature,
            radius=radius,
        )
        recent.append((features, labels))
        yield labels


def labels_to_mask(labels: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The class of every pixel, uint8 ``[H, W]``, of labels ``[C, P]``.

    Bilinear upsampling to `size` (height, width), then every class is stretched to 0..1 over the
    frame (a class that is nowhere stays 0), then the highest one wins, the lower number on a tie.
    """
    maps = F.interpolate(
        labels.float().unflatten(1, grid)[None], size=size, mode="bilinear", align_corners=False
    )[0]  # [C, H, W]
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = highest - lowest
    # a class that covers the frame evenly, a background without an object, becomes 0 everywhere
    stretched = torch.where(highest > 0, (maps - lowest) / span.clamp(min=1e-12), maps)
    return stretched.argmax(0).to(torch.uint8)


def _within(
    radius: int,
    target_rows: tuple[int, int],
    source_rows: tuple[int, int],
    columns: int,
    device: torch.device,
) -> Tensor:
    """Which source patches are in reach, bool ``[N, r, columns]`` for N patches of the target."""
    t = torch.arange(*target_rows, device=device)
    s = torch.arange(*source_rows, device=device)
    c = torch.arange(columns, device=device)
    near_rows = (t[:, None] - s).abs() <= radius  # [n, r]
    near_columns = (c[:, None] - c).abs() <= radius  # [columns, columns]
    near = near_rows[:, None, :, None] & near_columns[None, :, None, :]
    return near.flatten(0, 1)
