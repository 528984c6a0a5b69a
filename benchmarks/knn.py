"""One search for all k against one search for each k, as the original evaluator does.

python benchmarks/knn.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import compare

from dino_kd.knn import knn_accuracy

KS = [10, 20, 100, 200]


def search_for_each_k(
    queries: torch.Tensor, query_labels: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor
) -> None:
    """Similarity, top-k and one-hot votes anew for every k."""
    one_hot = F.one_hot(labels, 10).float()
    for k in KS:
        similarity, index = (queries @ bank.T).topk(k)
        votes = (one_hot[index] * (similarity / 0.07).exp()[..., None]).sum(1)
        (votes.argmax(1) == query_labels).float().mean()


def main() -> None:
    """20,000 bank vectors, 1,000 queries, 384 dimensions, four values of k."""
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(20_000, 384, generator=generator), dim=1)
    queries = F.normalize(torch.randn(1_000, 384, generator=generator), dim=1)
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


if __name__ == "__main__":
    main()
