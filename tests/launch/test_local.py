"""Jobs on this machine without Slurm: same variables, signals, exit codes and files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from dino_kd.engine.checkpoint import load_checkpoint
from dino_kd.errors import EXIT_INTERRUPTED
from launch.job import load_job
from tests.tiny import TINY, read_metrics, without_times, write_images

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
FAST = [word for word in TINY if not word.startswith("optim.length")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`python -m launch.local ...` on a machine without Slurm."""
    env = {
        **os.environ, "PATH": "/nowhere", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "XDG_CONFIG_HOME": str(tmp_path),
    }  # fmt: skip

    def run(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.local", *words], cwd=tmp_path, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return run


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def test_an_interrupted_local_job_goes_on_to_equal_weights(
    start: Callable[..., subprocess.Popen[str]], images: Path, tmp_path: Path
) -> None:
    words = [*FAST, f"data.train={images}", "optim.length=60", "log.save_every=1000"]
    words += ["data.num_workers=1", "slurm.tasks_per_node=2"]
    finish(start("pretrain", *words, "run_dir=whole"))
    process = start("pretrain", *words, "run_dir=run")
    rows = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not rows.exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR2)
    said = finish(process, EXIT_INTERRUPTED)
    assert "saved; the same command with resume=auto goes on" in said
    step = load_checkpoint(tmp_path / "run" / "checkpoints")[0]["step"]
    assert 0 < step < 60
    assert load_job(tmp_path / "run" / "launch").outcome() == "interrupted"
    assert "already holds a run; add resume=auto" in finish(
        start("pretrain", *words, "run_dir=run"), 2
    )
    said = finish(start("pretrain", *words, "run_dir=run", "resume=auto"))
    assert f"at step {step} of 60" in said
    states = [load_checkpoint(tmp_path / name / "checkpoints")[0] for name in ("run", "whole")]
    for name, value in states[1]["task"].items():
        assert torch.equal(states[0]["task"][name], value), name
    curves = [without_times(read_metrics(tmp_path / name)) for name in ("run", "whole")]
    assert curves[0] == curves[1]
    status = finish(start("status", "run"))
    assert "local job" in status
    assert " done " in status


def test_a_failing_process_ends_all_and_gives_its_code(
    start: Callable[..., subprocess.Popen[str]], images: Path, tmp_path: Path
) -> None:
    words = [*FAST, f"data.train={images}", "run_dir=r", "slurm.tasks_per_node=2"]
    said = finish(start("pretrain", *words, "optim.batch_size=15"), 2)
    assert "error: optim.batch_size: 15 images do not divide" in said
    assert load_job(tmp_path / "r" / "launch").outcome() == "failed code=2"
    assert "failed, exit code 2" in finish(start("status", "r"))


def test_a_sweep_here_reports_the_failed_point(
    start: Callable[..., subprocess.Popen[str]], images: Path, tmp_path: Path
) -> None:
    words = [*FAST, f"data.train={images}", "run_dir=s", "optim.length=2"]
    said = finish(start("sweep", "pretrain", *words, "grid.optim.batch_size=[16, 64]"), 2)
    assert "1 of 2 points failed: 1" in said
    status = finish(start("status", "s"))
    assert "batch_size=16  done" in status
    assert "batch_size=64  failed, exit code 2" in status


def write_pipeline(folder: Path, images: Path) -> Path:
    """pretrain -> evaluate -> distill -> evaluate: the whole way to a small network."""
    learn = dict(word.split("=", 1) for word in FAST) | {"data.train": str(images)}
    score = {
        "train": str(images), "test": str(images), "device": "cpu", "num_workers": 0,
        "suite": {"knn": {"k": [1]}}, "compare": [], "cache": "off",
    }  # fmt: skip
    stages = {
        "pretrain": {"command": "pretrain", "settings": {**learn, "optim.length": 4},
                     "slurm": {"tasks_per_node": 2}},
        "score": {"command": "evaluate", "settings": {**score, "backbone": "{pretrain}"}},
        "distill": {"command": "distill", "config": "distill/label_free", "after": ["pretrain"],
                    "settings": {
            "data.train": str(images), "data.num_workers": 0, "device": "cpu",
            "teacher.backbone": "{pretrain}", "student.image_size": 32,
            "student.backbone": "test_resnet", "optim.batch_size": 8, "optim.length": 2,
            "optim.precision": "fp32", "log.tensorboard": False}},
        "score_student": {"command": "evaluate", "settings": {**score, "backbone": "{distill}"}},
    }  # fmt: skip
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"folder": "p", "stages": stages}, sort_keys=False))
    return file


def test_a_pipeline_runs_here_and_is_not_repeated(
    start: Callable[..., subprocess.Popen[str]], images: Path, tmp_path: Path
) -> None:
    file = write_pipeline(tmp_path, images)
    finish(start("pipeline", str(file)))
    for stage in ("score", "score_student"):
        result = json.loads((tmp_path / "p" / stage / "suite_teacher.json").read_text())
        assert 0 <= result["metrics"]["teacher"]["knn"]["knn1_top1"] <= 100
    assert finish(start("pipeline", str(file))).count("done before") == 4
    status = finish(start("status", "p"))
    assert status.count(" done ") == 4


def test_mistakes_of_a_pipeline_come_before_its_start(
    start: Callable[..., subprocess.Popen[str]], images: Path, tmp_path: Path
) -> None:
    file = write_pipeline(tmp_path, images)
    tree = yaml.safe_load(file.read_text())
    tree["stages"]["score"]["after"] = ["pretrian"]
    tree["stages"]["distill"]["settings"]["teacher.backbone"] = "{pre}"
    tree["stages"]["score_student"]["comand"] = "x"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    said = finish(start("pipeline", str(file)), 2)
    assert "stages.score.after: unknown stage 'pretrian'; did you mean 'pretrain'?" in said
    assert "stages.distill: {pre}: unknown stage 'pre'" in said
    assert "stages.score_student.comand" in said
    assert not (tmp_path / "p").exists()
