"""How much does one term per student crop save over one term per pair of views, and in memory?

python benchmarks/loss.py              # eager
python benchmarks/loss.py --compile    # also the compiled region; the first call takes a minute

Forward and backward from given logits and targets, 2 + 8 crops. Memory is what the forward pass
keeps for the backward pass beside its inputs.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from timing import compare
from torch import Tensor

from dino_kd.losses.dino import dino_cross_entropy

Loss = Callable[[Tensor, Tensor, float], Tensor]


def pair_by_pair(student: Tensor, targets: Tensor, temp: float) -> Tensor:
    """The usual double loop: 18 terms for 2 + 8 crops."""
    scaled = (student / temp).unbind(0)
    total, pairs = targets.new_zeros(()), 0
    for u in range(len(targets)):
        for v in range(len(student)):
            if u != v:
                terms = torch.sum(-targets[u] * torch.log_softmax(scaled[v], dim=-1), dim=-1)
                total = total + terms.mean()
                pairs += 1
    return total / pairs


def kept_bytes(loss: Loss, student: Tensor, targets: Tensor) -> int:
    """Bytes that a forward pass saves for its backward pass, each storage once, inputs aside."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(student, targets, 0.1)
    for given in (student, targets):
        storages.pop(given.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def main() -> None:
    """Published sizes; float32 and, as under autocast, bf16 logits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="also measure the compiled region")
    rivals: dict[str, Loss] = {
        "pair by pair": pair_by_pair,
        "dino_cross_entropy": dino_cross_entropy,
    }
    if parser.parse_args().compile:
        rivals["dino_cross_entropy, compiled"] = functools.partial(
            dino_cross_entropy, compiled=True
        )
    for dtype in (torch.float32, torch.bfloat16):
        for prototypes, batch in ((4096, 64), (65_536, 32)):
            student = torch.randn(10, batch, prototypes, dtype=dtype, requires_grad=True)
            targets = torch.softmax(torch.randn(2, batch, prototypes), -1)
            title = f"loss, {str(dtype)[6:]} logits, 10 crops, batch {batch}, K = {prototypes}"

            def step(loss: Loss, s: Tensor = student, t: Tensor = targets) -> None:
                s.grad = None
                loss(s, t, 0.1).backward()

            compare(title, {name: functools.partial(step, loss) for name, loss in rivals.items()})
            kept = {name: kept_bytes(loss, student, targets) for name, loss in rivals.items()}
            for name, size in kept.items():
                share = size / kept["pair by pair"]
                print(f"  kept: {name:<36} {size / 1e6:9.1f} MB   x{share:.2f}")


if __name__ == "__main__":
    main()
