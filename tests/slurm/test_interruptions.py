"""Pretraining on 2 nodes x 2 ranks with loader processes, interrupted in every way Slurm knows,
against the same run left alone: bit-equal weights, every step exactly once."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dino_kd.engine.checkpoint import load_checkpoint
from launch.job import load_job
from tests.slurm.conftest import recipe, state_of, tool, wait_for
from tests.tiny import read_metrics, without_times

pytestmark = [pytest.mark.slurm, pytest.mark.dist]

ROOT = Path(__file__).parents[2]
LENGTH = 100
SHAPE = ["slurm.nodes=2", "slurm.tasks_per_node=2"]


Alone = Callable[[], Path]


class Run:
    """A launched run, seen from outside."""

    def __init__(self, launch: Callable[..., str], run_dir: Path, words: list[str]) -> None:
        self.launch, self.run_dir = launch, run_dir
        launch("pretrain", *words, f"run_dir={run_dir}", *SHAPE)
        self.job = load_job(run_dir / "launch").job_id

    def log(self) -> str:
        path = self.run_dir / "launch" / "slurm.log"
        return path.read_text() if path.is_file() else "no log"

    def step(self) -> int:
        rows = self.run_dir / "metrics.jsonl"
        return rows.read_bytes().count(b"\n") if rows.is_file() else 0

    def life(self) -> int:
        return len(load_job(self.run_dir / "launch").lives()) - 1

    def wait_for_steps(self, life: int, more: int = 1) -> None:
        """Until this life has begun and made some steps of its own."""
        wait_for(lambda: self.life() == life, why=self.log)
        resumed = f"of {LENGTH}"
        wait_for(lambda: self.log().count(resumed) >= life, why=self.log)
        begin = self.step()
        wait_for(lambda: self.step() >= begin + more, why=self.log)

    def interrupt(self, what: Callable[[], object]) -> None:
        """Do it while rank 1 is held still, so that it strikes before the run is over.

        The others wait for rank 1 inside the step's collective, where a signal finds them most of
        the time anyway. It goes on when the signal has reached it.
        """
        pid = rank_process(self.job, 1)
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: _state_and_pending(pid)[0] == "T", why=self.log)
            what()
            wait_for(lambda: _is_asked(pid), why=self.log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def wait_for_end(self, state: str, seconds: float = 180) -> None:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: state_of(self.job) in ends, seconds, why=self.log)
        assert state_of(self.job) == state, self.log()

    def stops_and_resumes(self) -> tuple[list[int], list[int]]:
        """The steps after which it stopped, and those at which it went on."""
        text = (self.run_dir / "train.log").read_text().replace(",", "")
        stopped = [int(n) for n in re.findall(r"stopped after step (\d+)", text)]
        return stopped, [int(n) for n in re.findall(r"resuming .* at step (\d+)", text)]


@pytest.fixture(scope="module")
def alone(cluster: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """The run without interruptions: four processes without Slurm, while the tests begin."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    words = [*recipe(images, LENGTH), f"run_dir={run_dir}", *SHAPE]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.local", "pretrain", *words],
        cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    yield lambda: _finished(process, run_dir)
    process.terminate()
    process.wait()


def _finished(process: subprocess.Popen[bytes], run_dir: Path) -> Path:
    assert process.wait(240) == 0
    assert not re.search("resuming|stopped after", (run_dir / "train.log").read_text())
    return run_dir


def assert_bit_equal(run_dir: Path, reference: Path, length: int = LENGTH) -> None:
    """All weights, the optimiser's state and the loss curve."""
    found = load_checkpoint(run_dir / "checkpoints")[0]
    expected = load_checkpoint(reference / "checkpoints")[0]
    assert found["step"] == expected["step"] == length
    for name, value in expected["task"].items():
        assert torch.equal(found["task"][name], value), name
    for number, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(found["optimizer"]["state"][number][name], value), (number, name)
    rows = without_times(read_metrics(run_dir))
    assert [row["step"] for row in rows] == list(range(1, length + 1))
    assert rows == without_times(read_metrics(reference))


def preempt() -> None:
    """A job of the urgent partition takes both nodes for a moment."""
    tool("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 0.1")


def test_every_interruption_loses_nothing(
    launch: Callable[..., str], cluster: Path, images: Path, alone: Alone, tmp_path: Path
) -> None:
    words = [*recipe(images, LENGTH), "log.save_every=10000"]  # no checkpoint but at a stop
    run = Run(launch, tmp_path / "run", words)
    conf = cluster / "slurm.conf"
    stock = conf.read_text()

    def reconfigure(line: str) -> None:
        conf.write_text(f"{stock}{line}\n")
        tool("scontrol", "reconfigure")

    def node_down() -> None:
        tool("scontrol", "update", "NodeName=127.0.0.2", "State=DOWN", "Reason=test")

    def node_back() -> None:
        wait_for(lambda: state_of(run.job) == "PENDING", why=run.log)
        # it may be back already: it registers again by itself
        name = "NodeName=127.0.0.2"
        subprocess.run(["scontrol", "update", name, "State=RESUME"], check=False)

    def without_grace() -> None:
        tool("scontrol", "update", "PartitionName=main", "GraceTime=0")
        preempt()

    def with_user_signal() -> None:
        tool("scontrol", "update", "PartitionName=main", "GraceTime=30")
        reconfigure("SlurmctldParameters=preempt_send_user_signal")
        preempt()

    def time_limit() -> None:
        """Slurm's own limit, 35 to 95 s from now; its warning comes before (slurm.warn)."""
        minutes, seconds = map(int, tool("squeue", "-h", "-j", run.job, "-o", "%M").split(":"))
        limit = minutes + (1 if seconds < 25 else 2)
        tool("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit}")

    def more_time() -> None:
        tool("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")

    nothing = bool
    interruptions: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (preempt, nothing),  # with a grace time
        (node_down, node_back),
        (lambda: tool("scontrol", "requeue", run.job), nothing),
        (without_grace, nothing),
        (with_user_signal, lambda: reconfigure("")),
        (time_limit, more_time),
    ]
    for life, (interrupt, afterwards) in enumerate(interruptions):
        run.wait_for_steps(life)
        run.interrupt(interrupt)
        afterwards()
        wait_for(lambda: run.life() > life, 120, run.log)  # noqa: B023
    run.wait_for_end("COMPLETED")
    stopped, resumed = run.stops_and_resumes()
    assert len(stopped) == len(interruptions), run.log()
    assert stopped == resumed  # steps computed twice: 0
    assert_bit_equal(run.run_dir, alone())
    log = run.log()
    assert f"life {len(interruptions)} of job {run.job}" in log
    assert "DUE TO NODE FAILURE" in log
    assert "DUE TO JOB REQUEUE" in log
    # who brought it back: the job after a grace time, a user signal and the limit, else Slurm
    assert log.count("launch: requeue after interrupted") == 3, log
    assert log.count("launch: stopped by Slurm") == 3, log


@pytest.mark.slow
def test_the_real_time_limit_loses_nothing(
    launch: Callable[..., str], images: Path, tmp_path: Path
) -> None:
    """Two lives of 2 minutes, warned 60 s before their end (signals come up to 60 s early)."""
    length = 2000
    words = [*recipe(images, length), "log.save_every=10000", "slurm.time=2", "slurm.warn=30"]
    run = Run(launch, tmp_path / "run", words)
    wait_for(lambda: run.life() >= 1, 200, run.log)
    wait_for(lambda: state_of(run.job) == "COMPLETED", 1200, run.log)
    stopped, resumed = run.stops_and_resumes()
    assert len(stopped) >= 1
    assert stopped == resumed
    assert [row["step"] for row in read_metrics(run.run_dir)] == list(range(1, length + 1))


@pytest.mark.slow
def test_twenty_random_interruptions_leave_no_trace(
    launch: Callable[..., str], images: Path, tmp_path: Path
) -> None:
    """Each at a random moment, the start and the save of a life included; against the run alone."""
    length = 1000
    words = [*recipe(images, length), "log.save_every=10000"]
    reference = Run(launch, tmp_path / "alone", words)
    reference.wait_for_end("COMPLETED", 400)
    run = Run(launch, tmp_path / "run", words)
    draw = random.Random(0)
    kinds: list[Callable[[], object]] = [
        preempt,
        lambda: tool("scontrol", "requeue", run.job),
        lambda: tool("scancel", "--batch", "--signal=USR2", run.job),
    ]
    life = 0
    for _ in range(20):
        wait_for(lambda: run.life() >= life, why=run.log)  # noqa: B023
        time.sleep(draw.uniform(0, 14))
        assert state_of(run.job) != "COMPLETED", "too few steps for twenty interruptions"
        life = run.life() + 1
        draw.choice(kinds)()
        wait_for(lambda: run.life() >= life, 150, run.log)  # noqa: B023
    run.wait_for_end("COMPLETED", 400)
    assert run.life() >= 20
    stopped, resumed = run.stops_and_resumes()
    assert set(resumed) <= set(stopped)  # a life that ended before its first step saved nothing new
    assert_bit_equal(run.run_dir, reference.run_dir, length)


def test_cancel_restart_limit_and_a_hung_rank(
    launch: Callable[..., str], images: Path, alone: Alone, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = [*recipe(images, LENGTH), "log.save_every=10", "log.keep_checkpoints=100"]
    run = Run(launch, run_dir, words)
    run.wait_for_steps(0)

    # scancel saves, and nothing brings the job back
    cancelled = run.job
    run.interrupt(lambda: launch("cancel", str(run_dir)))
    run.wait_for_end("CANCELLED")
    stopped = run.stops_and_resumes()[0]
    assert load_checkpoint(run_dir / "checkpoints")[0]["step"] == stopped[0] >= 1
    refused = launch("requeue", str(run_dir), code=2)
    assert "over; launch the same command with resume=auto" in refused

    # the restart limit: saved, and FAILED
    run = Run(launch, run_dir, [*words, "resume=auto", "slurm.max_restarts=0"])
    wait_for(lambda: run.step() > stopped[0], why=run.log)
    run.interrupt(lambda: launch("requeue", str(run_dir)))
    run.wait_for_end("FAILED")
    assert "restart limit reached: slurm.max_restarts=0" in run.log()
    assert "failed restart limit reached" in launch("status", str(run_dir))
    stopped = run.stops_and_resumes()[0]
    assert load_checkpoint(run_dir / "checkpoints")[0]["step"] == stopped[1]

    # a rank that hangs cannot save: back to the last checkpoint, at most log.save_every steps
    run = Run(launch, run_dir, [*words, "resume=auto", "slurm.grace=3"])
    wait_for(lambda: len(run.stops_and_resumes()[1]) == 2, why=run.log)
    wait_for(lambda: run.step() > stopped[1] + 12, why=run.log)
    with hanging(rank_process(run.job, 3)):
        before = run.step()
        launch("requeue", str(run_dir))
        wait_for(lambda: run.life() == 1, why=run.log)
    run.wait_for_end("COMPLETED")
    assert "did not end within 3 s; going back to the last checkpoint" in run.log()
    again = run.stops_and_resumes()[1][2]
    assert again % 10 == 0  # a periodic checkpoint, not one that the signal asked for
    assert 0 <= before - again <= 10
    assert_bit_equal(run_dir, alone())
    assert state_of(cancelled) == "CANCELLED"


@contextlib.contextmanager
def hanging(pid: int) -> Iterator[None]:
    """Hold a process still, again and again: Slurm wakes stopped processes to end them."""
    over = threading.Event()

    def hold() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not over.wait(0.002):
                os.kill(pid, signal.SIGSTOP)

    os.kill(pid, signal.SIGSTOP)
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _state_and_pending(pid: int) -> tuple[str, int]:
    """A process's state and the signals that wait for it, as a mask; X when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "X", 0
    found = re.search(r"State:\s+(\w).*^ShdPnd:\s+(\w+)", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1], int(found[2], 16)


def _is_asked(pid: int) -> bool:
    """Whether a signal to end waits for a process held still, or Slurm has woken it for one."""
    state, pending = _state_and_pending(pid)
    return state != "T" or bool(pending & (1 << signal.SIGTERM - 1 | 1 << signal.SIGUSR2 - 1))


def rank_process(job: str, rank: int) -> int:
    """The pid of a rank's main process: the eldest with that job and rank in its environment."""
    found = subprocess.run(
        ["grep", "-lsz", f"^SLURM_PROCID={rank}$", *map(str, Path("/proc").glob("[0-9]*/environ"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    pids = []
    for path in map(Path, found.stdout.split()):
        words = (path.parent / "cmdline").read_bytes()
        if f"SLURM_JOB_ID={job}".encode() in path.read_bytes() and b"start.py" in words:
            pids.append(int(path.parent.name))
    return min(pids)
