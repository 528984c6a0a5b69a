"""Settings of every test: few threads, no network, markers that need hardware are skipped."""

from __future__ import annotations

import os

# Before torch is imported: tiny tensors are fastest on one thread, and waiting threads sleep.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        reason = "needs Slurm: apt-get install slurmctld slurmd slurm-client munge"
        _skip(items, "slurm", reason)
    if not any(map(shutil.which, BROWSERS)):
        _skip(items, "browser", f"needs one of {', '.join(BROWSERS)}")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
