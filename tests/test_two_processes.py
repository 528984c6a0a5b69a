"""Two gloo processes under torchrun give what one process gives; ranks agree on ending."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dino_kd.config import load_settings
from dino_kd.engine.checkpoint import list_checkpoints, load_checkpoint
from dino_kd.errors import EXIT_INTERRUPTED
from dino_kd.pretrain import pretrain
from dino_kd.schema import PretrainConfig
from tests.tiny import TINY, read_metrics, write_images

pytestmark = pytest.mark.dist
RECIPE = [*TINY, "optim.length=20", "model.drop_path=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """The same 20 steps in one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    words = [*RECIPE, f"data.train={images}", f"run_dir={run_dir}"]
    return pretrain(load_settings(PretrainConfig, words, command="pretrain"))


def torchrun(processes, argv):
    """Start `processes` ranks on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", "dino_kd", "pretrain", *argv]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def finish(process, code=0):
    output, _ = process.communicate(timeout=180)
    assert process.returncode == code, output
    return output


def assert_close_runs(run_dir, reference):
    """Weights, teacher and centre; the order of float additions differs, hence not bit for bit."""
    found = load_checkpoint(run_dir / "checkpoints")[0]
    expected = load_checkpoint(reference / "checkpoints")[0]
    assert found["step"] == expected["step"] == 20
    for name, value in expected["task"].items():
        torch.testing.assert_close(found["task"][name], value, rtol=1e-2, atol=2e-4, msg=name)
    losses = [[row["loss"] for row in read_metrics(d)] for d in (run_dir, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_equal_one_for_20_steps(images, alone, tmp_path):
    run_dir = tmp_path / "run"
    said = finish(torchrun(2, [*RECIPE, f"data.train={images}", f"run_dir={run_dir}"]))
    assert "find_unused_parameters" not in said  # torch's advice, given by every rank
    assert_close_runs(run_dir, alone)


def test_a_run_of_two_processes_is_interrupted_and_goes_on_alone(images, alone, tmp_path):
    """One rank gets the signal; both stop at the same step; a single process resumes."""
    run_dir = tmp_path / "run"
    argv = [*RECIPE, f"data.train={images}", f"run_dir={run_dir}", "log.save_every=20"]
    process = torchrun(2, argv)
    until = time.time() + 120
    while not (run_dir / "metrics.jsonl").exists() and time.time() < until:
        time.sleep(0.01)
    for rank in ranks_of(process.pid)[-1:]:
        os.kill(rank, signal.SIGUSR2)
    output, _ = process.communicate(timeout=180)
    saved = load_checkpoint(run_dir / "checkpoints")[0]
    assert 0 < saved["step"] < 20, output
    assert "stopped after step" in output
    assert f"exitcode  : {EXIT_INTERRUPTED}" in output
    words = [*argv, "resume=true"]
    pretrain(load_settings(PretrainConfig, words, command="pretrain"))
    assert_close_runs(run_dir, alone)
    assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, 21))


def ranks_of(pid):
    """Child processes of torchrun, in order of their start."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children)


def test_a_mistake_is_said_once_and_nothing_hangs(images, tmp_path):
    argv = [*RECIPE, f"data.train={images}", f"run_dir={tmp_path}/run", "optim.batch_size=15"]
    output = finish(torchrun(2, argv), code=1)
    assert output.count("error: optim.batch_size: 15 images do not divide") == 1
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
