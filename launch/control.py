"""`dino-kd launch cancel` and `requeue`: end a job, or save and start it again elsewhere."""

from __future__ import annotations

import os
import signal

from dino_kd.errors import ConfigError, UserError

from . import cluster
from .job import Job, only_job, process_start
from .report import point_number
from .request import split


def cancel(argv: list[str]) -> int:
    """`dino-kd launch cancel RUN [--point N]`: saves where it can, and does not come back."""
    job, number = _chosen(argv, "cancel")
    if job.place == "local":
        _signal_here(job)
        print(f"asked local job {job.job_id} to save and end")
        return 0
    job_id = _id_of(job, number)
    if not any(row.is_live for row in cluster.queue(job_id)):
        raise UserError(f"job {job_id} is over already; there is nothing to cancel")
    cluster.ask(["scancel", job_id])
    print(f"cancelled job {job_id}")
    return 0


def requeue(argv: list[str]) -> int:
    """`dino-kd launch requeue RUN [--point N]`: all processes save, then the job waits again."""
    job, number = _chosen(argv, "requeue")
    if job.place == "local":
        raise UserError("a local job has no queue; `launch cancel` saves, the same command goes on")
    rows = cluster.queue(_id_of(job, number))
    running = [row.job for row in rows if row.state == "RUNNING"]
    if not running:
        waiting = any(row.is_live for row in rows)
        raise UserError(
            f"job {job.job_id} is {'waiting already' if waiting else 'over'}"
            + ("" if waiting else "; launch the same command with resume=auto to go on")
        )
    for job_id in running:
        # to the batch shell: it has the processes save, and requeues when all have gone
        cluster.ask(["scancel", "--batch", "--signal=USR2", job_id])
    print(f"asked {', '.join(running)} to save and start again")
    return 0


def _chosen(argv: list[str], what: str) -> tuple[Job, int | None]:
    words = split(argv, {"--point": True})
    if len(words.rest) != 1:
        raise ConfigError(f"launch {what}: name one run directory")
    job = only_job(words.rest[0])
    name = words.flags.get("--point")
    return job, None if name is None else point_number(job, name)


def _id_of(job: Job, number: int | None) -> str:
    return f"{job.job_id}_{number}" if job.is_array and number is not None else job.job_id


def _signal_here(job: Job) -> None:
    pid = int(job.job_id)
    if not job.pid_start or process_start(pid) != job.pid_start:
        raise UserError(f"local job {job.job_id} is over already; there is nothing to cancel")
    os.kill(pid, signal.SIGTERM)
