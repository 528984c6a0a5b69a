"""Batches by threads of this process, for renderers that let go of Python's lock.

Against worker processes: nothing is copied between processes, all threads work on the batch that
is due first, and on a GPU they write straight into page-locked memory.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch

from dino_kd.data.crop_maker import CropBatch, CropMaker, OpenBatch
from dino_kd.data.decoded import DecodedBatch, Shape
from dino_kd.data.processes import signals_blocked
from dino_kd.errors import UserError

AHEAD = 4  # batches in the making or ready, besides the one in use
_PATIENCE = 2.0  # seconds that closing waits for threads; one stuck in a read is left behind


class BufferRing:
    """Memory for batches, used again as soon as nothing refers to it any more.

    Whoever keeps a batch, a tensor of it, or a view of one, keeps its memory: it comes back with
    the last reference, not when the next batch is asked for. Page-locked memory is torch's own
    ring, which also waits for copies to the device that are still under way.
    """

    def __init__(self, pin_memory: bool = False) -> None:
        self._pin = pin_memory
        self._free: deque[np.ndarray] = deque(maxlen=AHEAD + 2)  # blocks of one size

    def take(self, globals_: Shape, locals_: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Two contiguous uint8 tensors of these shapes, contents undefined; any thread."""
        if self._pin:
            return (
                torch.empty(globals_, dtype=torch.uint8, pin_memory=True),
                torch.empty(locals_, dtype=torch.uint8, pin_memory=True),
            )
        split = math.prod(globals_)
        size = split + math.prod(locals_)
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(size, dtype=np.uint8)
        if block.size != size:
            block = np.empty(size, dtype=np.uint8)
        # torch holds `handle` for as long as any tensor or array uses this memory.
        handle = block.view()
        weakref.finalize(handle, self._free.append, block).atexit = False
        whole = torch.from_numpy(handle)
        return whole[:split].view(globals_), whole[split:].view(locals_)


class _Pending:
    """A batch of which some pieces are still in the making."""

    def __init__(self, batch: OpenBatch, pieces: int) -> None:
        self.batch = batch
        self.errors: dict[int, BaseException] = {}  # by first place
        self.done = threading.Event()
        self._lock = threading.Lock()
        self._left = pieces

    def piece_done(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self.done.set()

    def result(self) -> CropBatch | DecodedBatch:
        """Wait for the batch, or raise the error of its first failing piece."""
        self.done.wait()
        if self.errors:
            error = self.errors[min(self.errors)]
            raise error.with_traceback(None) if isinstance(error, UserError) else error
        return self.batch.result()


def run_in_threads(
    maker: CropMaker,
    requests: Iterable[Any],
    num_threads: int,
    *,
    pin_memory: bool = False,
) -> Generator[Any, None, None]:
    """Serve the requests in order by `num_threads` threads; closing ends them.

    Every batch is cut into one piece per thread. The threads are daemons: a read that never comes
    back holds up neither the closing nor the end of the process.

    Raises:
        UserError: as raised while a batch was made, when that batch is due.
    """
    with signals_blocked():  # the main thread takes them; these inherit the mask
        crew = Crew(num_threads)
    ring = BufferRing(pin_memory)
    pending: deque[_Pending] = deque()
    waiting = iter(requests)
    try:
        while True:
            for request in waiting:
                pending.append(crew.begin(maker.open(request, ring.take)))
                if len(pending) >= AHEAD:
                    break
            if not pending:
                return
            made = pending.popleft().result()
            yield made
            del made  # else its memory would be held until the next one is ready
    finally:
        crew.end()


class Crew:
    """Threads that fill batches."""

    def __init__(self, size: int) -> None:
        self._stop = threading.Event()
        self._todo: queue.SimpleQueue[tuple[_Pending, int, int] | None] = queue.SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.threads = [
            threading.Thread(
                target=_work, args=(self._todo, self._stop, device), name=f"loader-{i}", daemon=True
            )
            for i in range(size)
        ]
        for thread in self.threads:
            thread.start()

    def begin(self, batch: OpenBatch) -> _Pending:
        """Have a batch filled, behind those that were begun before it."""
        cuts = np.linspace(0, len(batch), min(len(self.threads), len(batch)) + 1).astype(int)
        pieces = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
        pending = _Pending(batch, len(pieces))
        for begin, end in pieces:
            self._todo.put((pending, begin, end))
        return pending

    def end(self) -> None:
        """Stop between two images; threads that do not stop in time are left to their read."""
        self._stop.set()
        for _ in self.threads:
            self._todo.put(None)
        deadline = time.monotonic() + _PATIENCE
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _work(
    todo: queue.SimpleQueue[tuple[_Pending, int, int] | None],
    stop: threading.Event,
    device: int | None,
) -> None:
    if device is not None:
        torch.cuda.set_device(device)  # page-locked memory belongs to a device's context
    while (piece := todo.get()) is not None:
        pending, begin, end = piece
        if not stop.is_set():
            try:
                pending.batch.fill(begin, end, stop.is_set)
            except BaseException as error:
                pending.errors[begin] = error
        pending.piece_done()
        del piece, pending
