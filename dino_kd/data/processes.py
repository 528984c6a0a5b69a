"""Serve requests by worker processes, or by none; the workers end when the iteration does."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from dino_kd.errors import DataError, UserError

_IGNORED_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def run_in_processes(
    maker: Any, requests: Iterable[Any], num_workers: int, pin_memory: bool
) -> Generator[Any, None, None]:
    """Serve the requests in order; end the workers however the iteration ends."""
    workers: dict[str, Any] = {}
    if num_workers:
        # fork shares the data set's index with the workers; elsewhere the platform's default
        start = "fork" if sys.platform == "linux" else None
        workers = {"multiprocessing_context": start, "worker_init_fn": _set_up_worker}
    loader: DataLoader[Any] = DataLoader(
        maker,
        batch_sampler=requests,
        collate_fn=_as_made,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),  # without CUDA it only warns
        generator=torch.Generator(),  # else each loader draws a seed from the training's generator
        **workers,
    )
    with signals_blocked():  # workers inherit this for ever, from their first instruction on
        batches = iter(loader)
    try:
        while True:
            try:
                made = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise _worker_death(error) from error
            if isinstance(made, UserError):
                raise made
            yield made
    finally:
        _end_workers(batches)


def _as_made(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold back what a cluster sends to every process of a job, for processes started in here.

    A worker that a signal ends between its fork and `_set_up_worker` would end the run in error.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = [getattr(signal, name) for name in _IGNORED_SIGNALS]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_up_worker(worker: int) -> None:
    torch.set_num_threads(1)
    for name in _IGNORED_SIGNALS:  # the main process decides when a run ends
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _worker_death(error: RuntimeError) -> Exception:
    text = str(error)
    if "DataLoader worker" not in text or "Caught" in text:
        return error
    return DataError(
        "a data-loading process died; mostly that means that memory (or shared memory, /dev/shm) "
        f"ran out. Use fewer data.num_workers or a smaller batch. torch says: {text[:200]}"
    )


def _end_workers(batches: Any) -> None:
    """Stop the loader's processes now, not whenever the garbage collector comes by."""
    processes = getattr(batches, "_workers", ())
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
    for process in processes:
        if process.is_alive():  # stuck in a read; it ignores SIGTERM, and holds nothing to save
            process.kill()
