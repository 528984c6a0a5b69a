"""Programs of torch.compile without a compiler, for whoever tests what is done around them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture
def compiled_eagerly(monkeypatch):
    """Replaces a module's `_program` by its `_block` as traced; returns the count of programs."""

    def replace(module):
        counter = CompileCounterWithBackend("eager")
        program = torch.compile(module._block, dynamic=False, backend=counter)
        monkeypatch.setattr(module, "_program", lambda: program)
        return counter

    torch._dynamo.reset()
    yield replace
    torch._dynamo.reset()
