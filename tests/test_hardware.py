"""What is asked of the hardware, by what it has."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dino_kd.hardware import widest


def test_sums_are_in_float64_but_on_apples_gpus():
    assert widest(torch.ones(2)).dtype == torch.float64
    there = SimpleNamespace(device=torch.device("mps"), float=lambda: "float32", double=None)
    assert widest(there) == "float32"
