"""Processes that train together: detection, collectives, and their no-ops for a single process.

The same command runs as plain `python` (no process group) and under torchrun (nccl or gloo).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from dino_kd.errors import ConfigError, UserError

if TYPE_CHECKING:  # its import takes long, and only sharded networks need it
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
# Seconds in which a group's threads let go of the last tensors, for which they need Python's lock.
# PyTorch 2.6 holds that lock while it waits for the end of these threads: forever.
_LET_GO = 0.1
_meshes: list[DeviceMesh] = []
_notes: list[dist.Store] = []  # of the group made here: which broadcasts have begun
_turns = itertools.count()


@contextlib.contextmanager
def process_group(device_name: str = "auto") -> Iterator[torch.device]:
    """Join the process group that the launcher describes and yield this process's device.

    Without RANK and WORLD_SIZE in the environment (plain python) no group is made. Raises
    ConfigError when the device does not exist.
    """
    grouped = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", 0)) if grouped else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joins = grouped and not dist.is_initialized()  # a part of a larger job leaves the group to it
    if joins:
        _join("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if joins and dist.is_initialized():
            _notes.clear()
            time.sleep(_LET_GO)
            dist.destroy_process_group()
            _end_threads()


def _join(backend: str) -> None:
    store, number, count = next(dist.rendezvous("env://"))
    group = dist.PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=group, rank=number, world_size=count)
    _notes.append(dist.PrefixStore("dino_kd", store))


def device_mesh(device: torch.device) -> DeviceMesh:
    """All processes in one row, for tensors that are shared out over them; ends with the group."""
    from torch.distributed.device_mesh import init_device_mesh

    _meshes.append(init_device_mesh(device.type, (world_size(),)))
    return _meshes[-1]


def _end_threads() -> None:
    """Let go of the ended group: its threads must not meet the end of the interpreter.

    Caches of PyTorch keep meshes for the whole process, and sharded networks refer to themselves.
    """
    for mesh in _meshes:
        getattr(mesh, "_pg_registry", {}).clear()  # older versions keep the names of groups alone
    if _meshes:
        _meshes.clear()
        gc.collect()


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Never Apple's MPS, which lacks operations that ViTs need; `mps` can be asked for, untested.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device: expected auto, cpu, cuda, cuda:N or mps, got {name!r}"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None and local_rank is not None and world_size_asked() > 1:
            raise ConfigError(
                f"device: {name!r} would put every process on one GPU; use cuda or auto, and each "
                "takes its own"
            )
        index = device.index if device.index is not None else (local_rank or 0)
        if index >= count:
            raise ConfigError(
                f"device: {name!r} asks for CUDA device {index}, but PyTorch sees {count}; "
                "use device=cpu, or start fewer processes"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: 'mps' is not available here; use device=cpu")
    return device


def world_size_asked() -> int:
    """How many processes the launcher started; 1 for plain python."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_grouped() -> bool:
    """Whether a process group is running."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's global number, 0 when alone."""
    return dist.get_rank() if is_grouped() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if is_grouped() else 1


def processes_here() -> int:
    """How many of them share this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main_process() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place; also returned."""
    if is_grouped():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over processes, in place; also returned."""
    return all_reduce_sum(tensor).div_(world_size())


def is_sharded_tensor(value: object) -> bool:
    """Whether a tensor is shared out over processes (a DTensor): whole in shape, a slice here."""
    return isinstance(value, torch.Tensor) and hasattr(value, "to_local")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's slice of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def broadcast(value: T) -> T:
    """The main process's small Python value, on every process."""
    if not is_grouped():
        return value
    _wait_for_main()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _wait_for_main() -> None:
    """However long the main process works alone: packs images, fits classifiers.

    A collective would give up on it, nccl's after 10 minutes. Of a process that has died, torchrun
    and Slurm tell the others.
    """
    if not _notes:
        return  # somebody else's group
    turn, pause = str(next(_turns)), 0.001
    if is_main_process():
        _notes[-1].set(turn, "")
    # A store that is gone went with the main process, which then had begun; not `wait`: threads of
    # nccl need the store meanwhile.
    with contextlib.suppress(dist.DistError):
        while not _notes[-1].check([turn]):
            time.sleep(pause)
            pause = min(2 * pause, 0.25)


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on the main process only; its result, or its UserError, on every process.

    Without this, an error of one process would leave the others waiting in a collective.
    """
    outcome: tuple[T | None, UserError | None] = (None, None)
    if is_main_process():
        try:
            outcome = (work(), None)
        except UserError as error:
            outcome = (None, error)
    result, failure = broadcast(outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate ``[n_r, ...]`` of every rank, in rank order, to ``[sum n_r, ...]``.

    Ranks may hold different numbers of rows, none included; nothing is padded in the result.
    """
    if not is_grouped():
        return rows
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = rows.to(device).contiguous()
    held = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(held, torch.tensor([len(mine)], device=device))
    counts = torch.cat(held).tolist()
    padded = mine.new_zeros((max(counts), *mine.shape[1:]))
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    return torch.cat(parts).to(rows.device)


def all_gather_objects(items: list[T]) -> list[T]:
    """Concatenate the small Python lists of all ranks, in rank order."""
    if not is_grouped():
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
