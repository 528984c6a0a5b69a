"""Run a function on two processes that can form a gloo group."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from dino_kd.engine.sharding import check_sharding
from dino_kd.errors import ConfigError


def on_two_ranks(work: Callable[[int], None]) -> None:
    """Call ``work(rank)`` in two processes; what fails in one fails here.

    `work` lies at the top of its module and opens the group itself, `process_group("cpu")`, so that
    it can compute alone before.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_as_rank, (work, port), nprocs=2)


def cpus_can_shard() -> bool:
    """Called within the group; False on versions of PyTorch whose gloo is known not to be able."""
    try:
        check_sharding("fp32", "adamw", torch.device("cpu"))
    except ConfigError:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14):
            raise
        return False
    return True


def _as_rank(rank: int, work: Callable[[int], None], port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    work(rank)
