"""One search for all k against one search for each k, as the original evaluator does.

python benchmarks/knn.py                                    50,000 vectors vote, five rounds
python benchmarks/knn.py --large                            ImageNet's size, 500 queries, memory
python benchmarks/knn.py --large --queries 50000 --alone    all queries, without the rival

CPU time, so that busy neighbours do not bend it. The predictions of all rivals are compared.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dino_kd.hardware import cpu_has_bf16
from dino_kd.knn import search, vote

KS = [10, 20, 100, 200]
NAIVE_CHUNK = 500  # a hundredth of ImageNet's 50,000 validation images


def search_for_each_k(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Similarity to the whole bank, top-k and one-hot votes anew for every k; classes ``[Q]``."""
    num_classes = int(labels.max()) + 1
    predicted: dict[int, torch.Tensor] = {}
    for k in KS:
        parts = []
        for some in queries.split(NAIVE_CHUNK):
            similarity, index = (some @ bank.T).topk(k)
            one_hot = torch.zeros(index.numel(), num_classes).scatter_(
                1, labels[index].view(-1, 1), 1
            )
            weights = (similarity / 0.07).exp()[..., None]
            votes = (one_hot.view(*index.shape, num_classes) * weights).sum(1)
            parts.append(votes.sort(1, descending=True)[1][:, 0])
        predicted[k] = torch.cat(parts)
    return predicted


def search_once(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, coarse: bool | None
) -> dict[int, torch.Tensor]:
    """The same by `dino_kd.knn`."""
    similarity, index = search(queries, bank, max(KS), coarse=coarse)
    ranked = vote(similarity, labels[index], int(labels.max()) + 1, KS)
    return {k: classes[:, 0] for k, classes in ranked.items()}


def vectors(count: int, dim: int, seed: int) -> torch.Tensor:
    """Random unit vectors, made in place: there is never a second copy."""
    made = torch.empty(count, dim)
    generator = torch.Generator().manual_seed(seed)
    for part in made.split(65536):
        part.normal_(generator=generator)
        part /= part.norm(dim=1, keepdim=True)
    return made


def resident_gib() -> float:
    """Physical memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def measure(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `run` returns, its CPU seconds, and the largest GiB of memory above what was there
    before, sampled every 10 ms.
    """
    before, peak, done = resident_gib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident_gib() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    try:
        found = run()
    finally:
        done.set()
        watcher.join()
    return found, time.process_time() - started, peak[0]


def main() -> None:
    """Small by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="a bank of ImageNet's size")
    parser.add_argument("--bank", type=int, help="vectors that vote")
    parser.add_argument("--queries", type=int, help="vectors that are scored")
    parser.add_argument("--dim", type=int, default=384, help="numbers in a vector")
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument("--alone", action="store_true", help="without the search for each k")
    args = parser.parse_args()
    size, num_queries, rounds = (1_280_000, 500, 1) if args.large else (50_000, 2_000, 5)
    size, num_queries = args.bank or size, args.queries or num_queries
    bank, queries = vectors(size, args.dim, 0), vectors(num_queries, args.dim, 1)
    classes = 1000 if args.large else 10
    labels = torch.randint(0, classes, (size,), generator=torch.Generator().manual_seed(2))
    rivals: dict[str, Callable[[], dict[int, torch.Tensor]]] = {
        "a search for each k, one-hot votes": lambda: search_for_each_k(queries, bank, labels),
        "one search, float32": lambda: search_once(queries, bank, labels, coarse=False),
    }
    if cpu_has_bf16():
        rivals["one search, bf16 then float32"] = lambda: search_once(queries, bank, labels, None)
    if args.alone:
        del rivals["a search for each k, one-hot votes"]
    print(
        f"k-NN, {size:,} x {args.dim} bank, {classes:,} classes, {num_queries:,} queries, "
        f"k = {KS}; {torch.get_num_threads()} threads, CPU time"
    )
    report(rivals, args.rounds or rounds)


def report(rivals: dict[str, Callable[[], dict[int, torch.Tensor]]], rounds: int) -> None:
    """Each in turn, so that what disturbs the machine disturbs all; medians of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    memory, found = dict.fromkeys(rivals, 0.0), {}
    for _ in range(rounds):
        for name, run in rivals.items():
            found[name], spent, gib = measure(run)
            seconds[name].append(spent)
            memory[name] = max(memory[name], gib)
    first = next(iter(rivals))
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[first], times, strict=True))
        same = sum((found[name][k] == found[first][k]).double().mean().item() for k in KS)
        print(
            f"  {name:<36} {statistics.median(times):8.2f} s   x{ratio:5.2f}   "
            f"{memory[name]:5.2f} GiB above bank   {100 * same / len(KS):.3f} % equal predictions"
        )


if __name__ == "__main__":
    main()
