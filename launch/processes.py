"""A job on this machine: N processes with the variables, signals and outcomes of a Slurm job."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import BinaryIO

from dino_kd.errors import EXIT_INTERRUPTED
from dino_kd.schema import SlurmSettings

from .batch import grace_seconds, tasks_per_node
from .job import DONE, INTERRUPTED, Job, process_start
from .request import Plan
from .submit import prepare
from .worker import EXIT_PORT_TAKEN

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_SECONDS_TO_DIE = 10.0  # between TERM and KILL, when a neighbour has failed


def run_here(plan: Plan) -> list[int]:
    """Run the points one after another; the exit code of each.

    0: done. 75: a signal (or Ctrl-C) asked for the end and everything is saved; the same command
    goes on. Otherwise the code of the first process that failed. After a signal no further point
    starts.

    Raises UserError when a live job uses the folder, or the disk is full.
    """
    job, slurm = prepare(plan), plan.slurm
    here = str(os.getpid())
    start = process_start(os.getpid())
    dataclasses.replace(job, job_id=here, place="local", pid_start=start).save()
    codes: list[int] = []
    for number, point in enumerate(job.points):
        if job.is_array:
            print(
                f"== point {point.name}: {' '.join(f'{k}={v}' for k, v in point.settings.items())}"
            )
        codes.append(_run_point(job, number, slurm))
        if codes[-1] == EXIT_INTERRUPTED:
            break
    dataclasses.replace(job, job_id=here, place="local").save()  # no process: it is over
    return codes


def _run_point(job: Job, point: int, slurm: SlurmSettings) -> int:
    with job.path("slurm.log", point).open("ab") as log:
        _note_life(job, point, log)
        for _ in range(5):
            job.path("outcome", point).unlink(missing_ok=True)
            code = _Processes(job, point, slurm, log).run()
            if code != EXIT_PORT_TAKEN:
                break
    outcome = job.outcome(point)
    if outcome == INTERRUPTED:
        return EXIT_INTERRUPTED
    return code or (0 if outcome == DONE else 1)


def _note_life(job: Job, point: int, log: BinaryIO) -> None:
    now = datetime.now().isoformat(timespec="seconds")
    with job.path("lives", point).open("a", encoding="utf-8") as lives:
        lives.write(f"job={os.getpid()} life=0 nodes={socket.gethostname()} start={now}\n")
    log.write(f"{now} launch: life 0 here\n".encode())
    log.flush()


class _Processes:
    """The processes of one life."""

    def __init__(self, job: Job, point: int, slurm: SlurmSettings, log: BinaryIO) -> None:
        self.job, self.point, self.log = job, point, log
        self.count = slurm.nodes * tasks_per_node(slurm)
        self.threads = slurm.cpus_per_task
        self.grace = grace_seconds(slurm)
        self.python = shlex.split(slurm.python) if slurm.python else [sys.executable]
        self.running: list[subprocess.Popen[bytes]] = []
        self.asked: float | None = None
        self.write_lock = threading.Lock()

    def run(self) -> int:
        """Start all, wait for all; 0 or the code of the first that failed."""
        with self.listening():
            port = free_port()
            self.running = [self.start(rank, port) for rank in range(self.count)]
            if self.asked is not None:  # the signal came while they were started
                self.tell(signal.SIGUSR2)
            readers = [
                threading.Thread(target=self.copy_output, args=(rank, process))
                for rank, process in enumerate(self.running)
            ]
            for reader in readers:
                reader.start()
            code = self.wait()
            for reader in readers:
                reader.join(timeout=5)
        return code

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Pass signals on; a second Ctrl-C ends the processes at once."""

        def handle(number: int, frame: object) -> None:
            if self.asked is not None and number == signal.SIGINT:
                self.tell(signal.SIGKILL)
            elif self.asked is None:
                self.asked = time.monotonic()
                self.tell(signal.SIGUSR2)

        before = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        """One process, in a session of its own: the terminal's Ctrl-C reaches it through us."""
        env = dict(os.environ)
        if self.count > 1:
            env |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.count),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(self.count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        for name in [n for n in env if n.startswith("SLURM_") and n != "SLURM_CONF"]:
            del env[name]  # of a job that we may run in
        if self.threads:
            env.setdefault("OMP_NUM_THREADS", str(self.threads))
        start = str(self.job.job_dir / "code" / "start.py")
        return subprocess.Popen(
            [*self.python, "-u", start, str(self.job.job_dir), str(self.point)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=self.job.cwd, env=env, start_new_session=True,
        )  # fmt: skip

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to every process that still runs."""
        for process in self.running:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Until all have ended; one that fails ends the others, as srun --kill-on-bad-exit."""
        code, failed_at = 0, 0.0
        while any(process.poll() is None for process in self.running):
            bad = [p.returncode for p in self.running if p.returncode]
            if bad and not failed_at:
                code, failed_at = bad[0], time.monotonic()
                self.tell(signal.SIGTERM)
            too_late = failed_at and time.monotonic() - failed_at > _SECONDS_TO_DIE
            hung = self.asked is not None and time.monotonic() - self.asked > self.grace
            if too_late or hung:
                self.tell(signal.SIGKILL)
            time.sleep(0.05)
        code = code or next((p.returncode for p in self.running if p.returncode), 0)
        return 128 - code if code < 0 else code

    def copy_output(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Lines to the terminal and the log, with the rank in front as srun --label has it."""
        assert process.stdout is not None
        width = len(str(self.count - 1))
        for line in process.stdout:
            with self.write_lock:
                self.log.write(f"{rank:{width}d}: ".encode() + line)
                self.log.flush()
                sys.stdout.buffer.write(line if self.count == 1 else f"{rank}: ".encode() + line)
                sys.stdout.flush()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
