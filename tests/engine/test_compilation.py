"""Where runs compile, and what is said where they cannot."""

from __future__ import annotations

import pytest
import torch

from dino_kd.engine import compilation
from dino_kd.engine.compilation import choose_compile, compiler_works
from dino_kd.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "works", "expected"),
    [
        (False, CUDA, True, False),
        ("auto", CPU, True, False),
        ("auto", CUDA, True, True),
        (True, CPU, True, True),
    ],
)
def test_choice(wanted, device, works, expected, monkeypatch):
    monkeypatch.setattr(compilation, "compiler_works", lambda device_type: works)
    assert choose_compile(wanted, device) == (expected, "")


def test_auto_without_a_compiler_goes_on_and_says_so(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_works", lambda device_type: False)
    chosen, sentence = choose_compile("auto", CUDA)
    assert not chosen
    assert "does not work here" in sentence


@pytest.mark.parametrize(("device", "needed"), [(CPU, r"g\+\+"), (CUDA, "Triton")])
def test_on_without_a_compiler_is_an_error(device, needed, monkeypatch):
    monkeypatch.setattr(compilation, "compiler_works", lambda device_type: False)
    with pytest.raises(ConfigError, match=f"optim.compile: true, but.*{needed}"):
        choose_compile(True, device)


def test_a_compiler_that_fails_is_no_compiler(monkeypatch):
    def fail(function):
        def call(*_):
            raise RuntimeError("no g++ found")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    assert compiler_works.__wrapped__("cpu") is False
