"""The order of copies and batches; streams are stand-ins, since no GPU is needed for it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from dino_kd.data.ahead import ahead_on

GPU = torch.device("cuda", 0)


class Tensor:
    def __init__(self, log, number, device):
        self.log, self.number, self.device = log, number, torch.device(device)

    def record_stream(self, stream):
        self.log.append(f"{self.number} used on {stream.name}")


class Batch:
    """A batch that writes down when it is copied, and on which stream."""

    def __init__(self, log, number, device="cpu"):
        self.log, self.number = log, number
        tensor = Tensor(log, number, device)
        self.crops = SimpleNamespace(global_crops=tensor, local_crops=tensor)

    def to(self, device):
        self.log.append(f"{self.number} copied on {STREAMS[-1].name}")
        return Batch(self.log, self.number, device)


STREAMS: list[SimpleNamespace] = []


@pytest.fixture
def log(monkeypatch):
    """What happens, in order."""
    lines: list[str] = []

    def stream(name):
        waits = lambda event: lines.append(f"{name} waits for {event.of}")  # noqa: E731
        return SimpleNamespace(name=name, wait_event=waits)

    @contextlib.contextmanager
    def current(chosen):
        STREAMS.append(chosen)
        yield
        STREAMS.pop()

    class Event:
        def record(self):
            self.of = f"{lines[-1].split()[0]} on {STREAMS[-1].name}"

    STREAMS[:] = [stream("main")]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: STREAMS[-1])
    return lines


def loader(log, count, device="cpu"):
    try:
        for number in range(count):
            log.append(f"{number} made")
            yield Batch(log, number, device)
    finally:
        log.append("closed")


def test_the_next_batch_is_under_way_when_one_is_given(log):
    batches = ahead_on(GPU, loader(log, 3))
    assert next(batches).number == 0
    assert log == [
        "0 made", "0 copied on side", "1 made", "1 copied on side",
        "main waits for 0 on side", "0 used on main", "0 used on main",
    ]  # fmt: skip
    log.clear()
    assert [batch.number for batch in batches] == [1, 2]
    assert log == [
        "2 made", "2 copied on side",
        "main waits for 1 on side", "1 used on main", "1 used on main", "closed",
        "main waits for 2 on side", "2 used on main", "2 used on main",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_batch_comes_once_and_on_the_device(log, count):
    found = list(ahead_on(GPU, loader(log, count)))
    assert [batch.number for batch in found] == list(range(count))
    assert all(batch.crops.global_crops.device == GPU for batch in found)


def test_what_was_rendered_on_the_device_is_neither_copied_nor_asked_for_early(log):
    batches = ahead_on(GPU, loader(log, 3, device=GPU))
    next(batches)
    assert log == ["0 made"]
    assert len(list(batches)) == 2


def test_closing_closes_the_loader(log):
    batches = ahead_on(GPU, loader(log, 3))
    next(batches)
    batches.close()
    assert log[-1] == "closed"


def test_a_cpu_takes_batches_as_they_are(log):
    made = loader(log, 3)
    assert ahead_on(torch.device("cpu"), made) is made
