"""A real Slurm cluster of two emulated nodes for the session, and one project run as its user."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dino_kd import cli
from tests.tiny import TINY, write_images

CLUSTER = Path(__file__).parent / "cluster"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = Path(f"/tmp/slurm-{os.getpid()}")  # short: Slurm's sockets live below it
    up = subprocess.run([CLUSTER, "up", folder], stdout=subprocess.PIPE, text=True, check=True)
    assert up.stdout.strip() == f"{folder}/env"
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
    patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("DINO_KD_SLURM", str(tmp_path_factory.mktemp("site") / "slurm.yaml"))
    Path(os.environ["DINO_KD_SLURM"]).write_text("slurm: {warn: 60}\n")
    yield folder
    patch.undo()
    subprocess.run([CLUSTER, "down", folder], check=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def launch(
    cluster: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """`dino-kd launch ...` in a folder of its own; what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 0) -> str:
        found = cli.main(["launch", *words])
        out, err = capfd.readouterr()
        assert found == code, out + err
        return out + err

    return run


def recipe(images: Path, length: int) -> list[str]:
    """Words of a tiny pretraining with loader processes."""
    return [
        *(word for word in TINY if not word.startswith(("data.num_workers", "optim.length"))),
        "data.num_workers=1",
        f"optim.length={length}",
        f"data.train={images}",
    ]


def tool(*words: str) -> str:
    """A Slurm tool's output."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def state_of(job: str) -> str:
    return tool("squeue", "-h", "--states=all", "-j", job, "-o", "%T")


def wait_for(
    what: Callable[[], object], seconds: float = 120, why: Callable[[], str] = str
) -> None:
    """Until `what` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why()
        time.sleep(0.05)
