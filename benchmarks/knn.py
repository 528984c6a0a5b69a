"""One search for all k against one search for each k, as the original evaluator does.

python benchmarks/knn.py                                    a small bank, five rounds
python benchmarks/knn.py --large                            ImageNet's size, 1,000 queries, memory
python benchmarks/knn.py --large --queries 50000 --alone    all queries, without the rival
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import compare

from dino_kd.knn import knn_accuracy

KS = [10, 20, 100, 200]
NAIVE_CHUNK = 500  # a hundredth of ImageNet's 50,000 validation images


def search_for_each_k(
    queries: torch.Tensor, query_labels: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor
) -> None:
    """Similarity to the whole bank, top-k and one-hot votes anew for every k."""
    num_classes = int(labels.max()) + 1
    for k in KS:
        for some, truth in zip(
            queries.split(NAIVE_CHUNK), query_labels.split(NAIVE_CHUNK), strict=True
        ):
            similarity, index = (some @ bank.T).topk(k)
            one_hot = torch.zeros(index.numel(), num_classes).scatter_(
                1, labels[index].view(-1, 1), 1
            )
            weights = (similarity / 0.07).exp()[..., None]
            votes = (one_hot.view(*index.shape, num_classes) * weights).sum(1)
            (votes.sort(1, descending=True)[1][:, 0] == truth).float().mean()


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


def measure(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the largest GiB of memory above what was there before, sampled every 10 ms."""
    before, peak, done = resident_gib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident_gib() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return time.perf_counter() - started, peak[0]


def large(args: argparse.Namespace) -> None:
    """Time and memory at the size of ImageNet, 1,000 classes; no warm-up, rivals take turns."""
    bank, queries = vectors(args.bank, args.dim, 0), vectors(args.queries, args.dim, 1)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 1000, (args.bank,), generator=generator)
    query_labels = torch.randint(0, 1000, (args.queries,), generator=generator)
    rivals: dict[str, Callable[[], object]] = {
        "a search for each k, one-hot votes": lambda: search_for_each_k(
            queries, query_labels, bank, labels
        ),
        "knn_accuracy, one search": lambda: knn_accuracy(
            queries, query_labels, bank, labels, ks=KS
        ),
    }
    if args.alone:
        del rivals["a search for each k, one-hot votes"]
    print(f"k-NN, {args.bank:,} x {args.dim} bank, {args.queries:,} queries, k = {KS}")
    for number in range(args.rounds):
        seconds = {}
        for name, run in rivals.items():
            seconds[name], gib = measure(run)
            print(f"  {name:<42} {seconds[name]:9.1f} s   {gib:5.2f} GiB above bank", flush=True)
        if not args.alone:
            naive, ours = seconds.values()
            print(f"  round {number + 1}: x{naive / ours:.2f}", flush=True)


def small() -> None:
    """20,000 bank vectors, 1,000 queries, 384 dimensions, four values of k."""
    bank, queries = vectors(20_000, 384, 0), vectors(1_000, 384, 1)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 10, (20_000,), generator=generator)
    query_labels = torch.randint(0, 10, (1_000,), generator=generator)
    compare(
        "k-NN, 20,000 x 384 bank, 1,000 queries, k = 10, 20, 100, 200",
        {
            "a search for each k, one-hot votes": lambda: search_for_each_k(
                queries, query_labels, bank, labels
            ),
            "knn_accuracy, one search": lambda: knn_accuracy(
                queries, query_labels, bank, labels, ks=KS
            ),
        },
        rounds=5,
    )


def main() -> None:
    """Small by default; the options are about --large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="measure memory too")
    parser.add_argument("--bank", type=int, default=1_280_000, help="vectors that vote")
    parser.add_argument("--queries", type=int, default=1_000, help="vectors that are scored")
    parser.add_argument("--dim", type=int, default=384, help="numbers in a vector")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured")
    parser.add_argument("--alone", action="store_true", help="without the search for each k")
    args = parser.parse_args()
    if args.large:
        large(args)
    else:
        small()


if __name__ == "__main__":
    main()
