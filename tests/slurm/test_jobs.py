"""Jobs, sweeps and pipelines on a real Slurm of two emulated nodes."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.job import load_job
from tests.slurm.conftest import recipe, state_of, tool, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.dist]
Launch = Callable[..., str]


def quick(images: Path, length: int = 3) -> list[str]:
    return [*recipe(images, length), "data.num_workers=0"]


def ended(job: str) -> bool:
    live = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
    return not live & set(state_of(job).split())


def test_the_production_request_runs_16_ranks(launch: Launch, images: Path, tmp_path: Path) -> None:
    words = [*quick(images), "optim.batch_size=32", "run_dir=r"]
    ask = ["slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.cpus_per_task=10", "slurm.mem=0"]
    assert "Slurm accepts it: Job" in launch("pretrain", *words, *ask, "--check")
    launch("pretrain", *words, *ask)
    job = load_job(tmp_path / "r" / "launch")
    shown = tool("scontrol", "show", "job", job.job_id)
    assert re.search(r"NumNodes=2(-2)? NumCPUs=(160|192) NumTasks=16 CPUs/Task=10", shown), shown
    assert "TresPerNode=gres:gpu:8" in shown
    log = job.path("slurm.log")
    wait_for(lambda: ended(job.job_id), 400, lambda: log.read_text() if log.is_file() else shown)
    assert job.outcome() == "done", log.read_text()
    assert "on 16 x cpu" in log.read_text()
    assert "15: " in launch("logs", "r") or state_of(job.job_id) == "COMPLETED"


def test_a_sweep_with_a_failing_point_and_its_evaluation(
    launch: Launch, images: Path, tmp_path: Path
) -> None:
    """Point 3 asks for more images than there are; the evaluation of the other five runs."""
    words = [*quick(images), "run_dir=s", "slurm.parallel=3"]
    assert "of 6 points" in launch(
        "sweep", "pretrain", *words, "grid.optim.batch_size=[8, 10, 12, 64, 16, 20]"
    )
    score = [f"train={images}", f"test={images}", "device=cpu", "num_workers=0", "cache=off"]
    score += ["compare=[]", "suite={knn: {k: [1]}}"]
    launch("eval", "s", *score, "--after")
    trained = load_job(tmp_path / "s" / "launch")
    scored = load_job(tmp_path / "s" / "launch_evaluate")
    assert scored.after == [trained.job_id]
    running = []

    def over() -> bool:
        states = state_of(trained.job_id).split()
        running.append(states.count("RUNNING"))
        return ended(trained.job_id) and ended(scored.job_id)

    wait_for(over, 400, lambda: launch("status", "s"))
    assert 1 <= max(running) <= 3
    table = launch("status", "s").splitlines()
    rows = {line.split()[0]: line for line in table if re.match(r"\d +batch_size=", line)}
    assert sum(bool(re.search(r"batch_size=\d+ +done ", line)) for line in table) == 10
    failed = [line for line in table if "batch_size=64" in line]
    assert "failed, exit code 2" in failed[0]
    assert "fewer than optim.batch_size=64" in failed[0]
    assert "cancelled before its start" in failed[1]
    assert len(rows) == 6
    for number in (0, 1, 2, 4, 5):
        assert (tmp_path / "s" / str(number) / "eval" / "suite_teacher.json").is_file()
    assert not (tmp_path / "s" / "3" / "eval").exists()
    assert "fewer than optim.batch_size=64" in launch("logs", "s/launch", "--point", "3")
    assert "choose with --point, one of 0, 1, 2" in launch("logs", "s/launch", code=2)


def test_a_waiting_job_is_explained_protected_and_cancelled(
    launch: Launch, images: Path, tmp_path: Path
) -> None:
    words = [*quick(images), "run_dir=r"]
    launch("pretrain", *words, "slurm.extra={hold: true}")
    job = load_job(tmp_path / "r" / "launch").job_id
    assert "waiting: held by you: scontrol release (JobHeldUser)" in launch("status", "r")
    said = launch("pretrain", *words, "resume=auto", code=2)
    assert f"is in use by slurm job {job}" in said
    assert "is waiting already" in launch("requeue", "r", code=2)
    assert "no output yet: waiting: held by you" in launch("logs", "r", code=2)
    launch("cancel", "r")
    assert "cancelled before its start" in launch("status", "r")
    assert "is over already" in launch("cancel", "r", code=2)


def test_a_job_runs_the_code_it_was_launched_with(
    launch: Launch, images: Path, tmp_path: Path
) -> None:
    """Neither the installed package nor a folder of that name where the job runs."""
    (tmp_path / "dino_kd").mkdir()
    (tmp_path / "dino_kd" / "__init__.py").write_text("raise RuntimeError('wrong code')\n")
    launch("pretrain", *quick(images), "run_dir=r", "slurm.extra={hold: true}")
    job = load_job(tmp_path / "r" / "launch")
    with (job.job_dir / "code" / "dino_kd" / "cli.py").open("a") as file:
        file.write("\nprint(f'this copy: {__file__}')\n")  # one write: Slurm labels each
    tool("scontrol", "release", job.job_id)
    followed = launch("logs", "-f", "r")
    assert f"this copy: {job.job_dir}/code/dino_kd/cli.py" in followed
    assert "launch: done" in followed
    assert job.outcome() == "done"


def test_by_hand_the_batch_file_does_the_same(launch: Launch, images: Path, tmp_path: Path) -> None:
    text = launch("pretrain", *quick(images), "run_dir=r", "--dry-run")
    assert not (tmp_path / "r").exists()
    launch("pretrain", *quick(images), "run_dir=r")
    assert (tmp_path / "r" / "launch" / "job.sbatch").read_text() in text
    assert "optim:" in text
    launch("cancel", "r")
    wait_for(lambda: tool("squeue", "-h") == "")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["slurm.partition=mian"], "unknown partition 'mian'; did you mean 'main'?"),
        (["slurm.nodes=3"], "3 nodes would wait for ever, partition main gives a job at most 2"),
        (
            ["slurm.partition=short", "slurm.time=5"],
            "5 would wait for ever, partition short allows 1",
        ),
        (["slurm.partition=short"], "slurm.warn: 60 s before a time limit of 1 minutes"),
        (["slurm.gpus_per_node=9"], "no node has the CPUs, GPUs or memory"),
        (["slurm.extra={frob: 1}"], "look at slurm.extra"),
        (["slurm.extra={signal: x}"], "slurm.extra.signal: use slurm.warn"),
        (["slurm.constraint=fast"], "slurm.constraint"),
    ],
)
def test_what_the_cluster_cannot_give_is_said_at_once(
    launch: Launch, images: Path, words: list[str], sentence: str, tmp_path: Path
) -> None:
    said = launch("pretrain", *quick(images), "run_dir=r", *words, code=2)
    assert sentence in said
    assert "Traceback" not in said
    assert tool("squeue", "-h", "-o", "%i") == ""
    assert not (tmp_path / "r").exists()


def test_after_a_failed_job_nothing_waits_for_ever(
    launch: Launch, images: Path, tmp_path: Path
) -> None:
    failed = tool("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 3")
    wait_for(lambda: state_of(failed) == "FAILED")
    said = launch("pretrain", *quick(images), "run_dir=r", "--after", failed, code=2)
    assert "the job it waits for has failed" in said
    assert "--after: after what?" in launch(
        "pretrain", *quick(images), "run_dir=q", "--after", code=2
    )


def test_a_dead_controller_is_one_sentence(
    launch: Launch, cluster: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "dead.conf"
    text = (cluster / "slurm.conf").read_text()
    conf.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", text) + "MessageTimeout=2\n")
    launch("pretrain", *quick(images), "run_dir=r", "slurm.extra={hold: true}")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    said = launch("pretrain", *quick(images), "run_dir=q", code=2)
    assert "Slurm's controller does not answer" in said
    status = launch("status", "r")  # its own files still speak
    assert "controller does not answer" in status
    assert "unknown" in status
    monkeypatch.setenv("SLURM_CONF", str(cluster / "slurm.conf"))
    launch("cancel", "r")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_one_sentence(launch: Launch, images: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        said = launch("pretrain", *quick(images), f"run_dir={disk}/r", code=2)
        assert "the disk is full; free some space or choose another run_dir" in said
        assert tool("squeue", "-h", "-o", "%i") == ""
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_fails_the_job_in_words(
    launch: Launch, images: Path, tmp_path: Path
) -> None:
    """The first checkpoint finds no space: /dev/full stands where the metrics go."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "metrics.jsonl").symlink_to("/dev/full")
    launch("pretrain", *quick(images), "run_dir=r")
    job = load_job(tmp_path / "r" / "launch")
    wait_for(lambda: ended(job.job_id))
    assert state_of(job.job_id) == "FAILED"
    assert "the disk is full" in launch("status", "r")


def test_a_node_that_failed_is_avoided(launch: Launch, images: Path, tmp_path: Path) -> None:
    """Down in life 0, known in life 1, left out from life 2 on although it is back."""
    launch("pretrain", *quick(images, 3000), "run_dir=r")
    job = load_job(tmp_path / "r" / "launch")
    wait_for(lambda: (tmp_path / "r" / "metrics.jsonl").exists())
    node = job.lives()[0]["nodes"]
    for state in ("DOWN", "DRAIN"):  # one that is only down comes back by itself, sooner or later
        tool("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")
    wait_for(lambda: len(job.lives()) == 2)
    failed = job.job_dir / "failed_nodes"
    wait_for(lambda: failed.is_file() and failed.read_text(), 20)
    assert failed.read_text().split() == [node]
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False)
    wait_for(lambda: job.path("slurm.log").read_text().count("resuming") == 1)
    launch("requeue", "r")
    wait_for(lambda: len(job.lives()) == 3)
    assert f"ExcNodeList={node}" in tool("scontrol", "show", "job", job.job_id)
    assert job.lives()[2]["nodes"] != node
    launch("cancel", "r")
    wait_for(lambda: ended(job.job_id))


def test_the_pipeline_file_of_the_local_test_on_slurm(
    launch: Launch, images: Path, tmp_path: Path
) -> None:
    from tests.launch.test_local import write_pipeline

    launch("pipeline", str(write_pipeline(tmp_path, images)))
    jobs = {p.parts[-3]: load_job(p.parent) for p in tmp_path.glob("p/*/launch/job.json")}
    assert jobs["score"].after == [jobs["pretrain"].job_id] == jobs["distill"].after
    wait_for(lambda: all(ended(job.job_id) for job in jobs.values()), 400)
    assert [job.outcome() for job in jobs.values()] == ["done"] * 4, launch("status", "p")
    assert (tmp_path / "p" / "score_student" / "suite_teacher.json").is_file()
    assert launch("pipeline", "pipeline.yaml").count("done before") == 4
