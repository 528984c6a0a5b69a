"""Which images of a labelled set are held out, or drawn as the few that have labels.

Every draw is stratified, follows from a seed alone, and returns positions into the labels.
"""

from __future__ import annotations

import numpy as np


def holdout(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a stratified part of a labelled set from `seed`; the rest stays for fitting.

    ``round(share * N)`` images are held out, at least one where a class can spare one. Each class
    gives its share rounded down; what is missing comes from the classes that lost most by the
    rounding, ties by lot. So a set with few images per class still gives the right total.

    Args:
        labels: class indices ``[N]``, at least 0.
        share: from 0 to below 1.
        seed: of the draw; at least 0.

    Returns:
        ``(fit_indices, held_out_indices)``: int64, ascending, disjoint, together 0..N-1. Every
        class keeps at least one image on the fitting side.

    Raises:
        ValueError: `share` is outside 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be from 0 to below 1, got {share}")
    classes, counts = np.unique(labels, return_counts=True)
    exact = share * counts
    taken = np.floor(exact + 1e-9).astype(np.int64)  # 0.29 * 100 is 28.999...
    spare = np.maximum(counts - 1, 0)
    taken = np.minimum(taken, spare)
    total = min(max(round(share * len(labels)), int(share > 0)), int(spare.sum()))
    lot = np.random.default_rng(seed).random(len(classes))
    by_loss = np.lexsort((lot, -np.round(exact - taken, 9)))
    while taken.sum() < total:  # a second round only when many classes can spare nothing
        willing = by_loss[taken[by_loss] < spare[by_loss]]
        taken[willing[: total - taken.sum()]] += 1
    held_out = [
        order[:count] for order, count in zip(class_orders(labels, seed), taken, strict=True)
    ]
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate([*held_out, np.zeros(0, dtype=np.int64)])] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Draw `shots` images of each class from `seed`; a larger draw contains a smaller one.

    Args:
        labels: class indices ``[N]``, at least 0.
        shots: images per class, at most those of the smallest class.
        seed: of the draw; at least 0.

    Returns:
        int64 ``[shots * Y]``, ascending.

    Raises:
        ValueError: a class has fewer images.
    """
    orders = class_orders(labels, seed)
    smallest = min(map(len, orders), default=0)
    if smallest < shots:
        raise ValueError(f"{shots} images of each class asked for, the smallest has {smallest}")
    return np.sort(np.concatenate([order[:shots] for order in orders]))


def draw_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw a share of each class from `seed`, rounded, at least one image of each.

    A larger share contains a smaller one, and both continue `draw_shots` of the same seed.

    Args:
        labels: class indices ``[N]``, at least 0.
        fraction: from 0 to 1.
        seed: of the draw; at least 0.

    Returns:
        int64, ascending.
    """
    orders = class_orders(labels, seed)
    counts = [max(1, fraction_of(len(order), fraction)) for order in orders]
    parts = [order[:count] for order, count in zip(orders, counts, strict=True)]
    return np.sort(np.concatenate([*parts, np.zeros(0, dtype=np.int64)]))


def labelled_part(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The images of `share` of the labels: those that `holdout` leaves of the rest, int64 ``[n]``.

    One draw for `dino-kd finetune fraction=`, `linear fraction=` and `distill data.labels=`, so
    that with equal seeds a teacher has seen the labels that its student sees.
    """
    return holdout(labels, 1 - share, seed)[0]


def fraction_of(count: int, fraction: float) -> int:
    """`fraction` of `count` images, rounded, halves upwards."""
    return int(np.floor(fraction * count + 0.5 + 1e-9))


def class_orders(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The positions of each class (ascending label) in an order drawn from (`seed`, label).

    A longer draw of the same seed continues a shorter one, and the images of one class do not
    change what is drawn from another.

    Args:
        labels: class indices ``[N]``, at least 0.
        seed: of the draw; at least 0.

    Returns:
        int64 ``[N_y]`` for each class that occurs.
    """
    orders = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        lot = np.random.default_rng([seed, int(label)]).random(len(members))
        orders.append(members[np.argsort(lot, kind="stable")])
    return orders
