"""Running statistics after applied and after skipped steps."""

from __future__ import annotations

import torch
from torch import nn

from dino_kd.models.batch_norm import BatchNormStatistics


def test_a_skipped_step_leaves_no_trace_and_an_applied_one_stays():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    statistics = BatchNormStatistics(module)
    norm = module[1]
    start = {name: value.clone() for name, value in norm.named_buffers()}
    statistics.remember()
    module(torch.randn(8, 3))
    statistics.remember()  # a second micro-batch of the same step
    module(torch.randn(8, 3))
    statistics.settle(skipped=True)
    assert all(torch.equal(value, start[name]) for name, value in norm.named_buffers())
    statistics.remember()
    module(torch.randn(8, 3))
    moved = norm.running_mean.clone()
    statistics.settle(skipped=False)
    assert torch.equal(norm.running_mean, moved)
    assert norm.num_batches_tracked == 1
    assert not torch.equal(moved, start["running_mean"])


def test_a_network_without_batch_norm_needs_nothing():
    statistics = BatchNormStatistics(nn.Linear(2, 2))
    statistics.remember()
    statistics.settle(skipped=True)
    statistics.settle(skipped=False)
