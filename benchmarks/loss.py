"""How much does one term per student crop save over one term per pair of views?

python benchmarks/loss.py
"""

from __future__ import annotations

import torch
from timing import compare

from dino_kd.losses.dino import dino_cross_entropy


def pair_by_pair(student: torch.Tensor, targets: torch.Tensor, temp: float) -> torch.Tensor:
    """The usual double loop: 18 terms for 2 + 8 crops."""
    total, pairs = student.new_zeros(()), 0
    for u in range(len(targets)):
        for v in range(len(student)):
            if u != v:
                log_probs = torch.log_softmax(student[v] / temp, dim=-1)
                total = total - (targets[u] * log_probs).sum(-1).mean()
                pairs += 1
    return total / pairs


def main() -> None:
    """Forward and backward at the published sizes, batch 16."""
    for prototypes in (4096, 65_536):
        student = torch.randn(10, 16, prototypes, requires_grad=True)
        targets = torch.softmax(torch.randn(2, 16, prototypes), -1)
        compare(
            f"loss, forward + backward, 10 crops, batch 16, K = {prototypes}",
            {
                "pair by pair": lambda s=student, t=targets: pair_by_pair(s, t, 0.1).backward(),
                "dino_cross_entropy": lambda s=student, t=targets: dino_cross_entropy(
                    s, t, 0.1
                ).backward(),
            },
        )


if __name__ == "__main__":
    main()
