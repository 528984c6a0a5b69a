"""What a command sets for its process unless the environment says otherwise, and its effect."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dino_kd import cli
from dino_kd.process import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent


def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENVIRONMENT, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_environment_is_set_unless_it_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen = []

    def look(argv: list[str]) -> int:
        seen.append(os.environ.get(name))
        return 0

    clean(monkeypatch)
    cli.run(look, [])
    monkeypatch.setenv(name, "other")
    cli.run(look, [])
    assert seen == [ENVIRONMENT[name], "other"]


def test_a_wait_policy_that_is_given_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cli.run(lambda argv: 0, [])
    assert "GOMP_SPINCOUNT" not in os.environ
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def faults(**environment: str) -> int:
    """Page faults of allocating and freeing 128 MB for the sixth time, in a process of its own."""
    code = (
        "import resource; from dino_kd.cli import run\n"
        "def count(argv):\n"
        "    import torch\n"
        "    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(6):\n"
        "        before = faults()\n"
        "        blocks = [torch.ones(2**22) for _ in range(8)]\n"
        "        del blocks\n"
        "    print(faults() - before)\n"
        "run(count, [])"
    )
    ours = *ENVIRONMENT, "GLIBC_TUNABLES", "LD_PRELOAD"  # the last may bring another allocator
    plain = {k: v for k, v in os.environ.items() if k not in ours}
    made = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT,
        env={**plain, "THP_MEM_ALLOC_ENABLE": "0", **environment},
    )  # fmt: skip
    return int(made.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays_with_the_process() -> None:
    """Unless the environment wants blocks of 16 MB from the system each time."""
    assert faults() < 300
    large = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if large.is_file() and "[always]" in large.read_text():
        pytest.skip("this system gives pages of 2 MB always, whose faults are few")
    pages = 2**27 / os.sysconf("SC_PAGE_SIZE")
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > pages / 2
    assert faults(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=65536") > pages / 2
