"""From a job on paper to a job in the queue: checks, files, submission by submitit."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import os
import time
from datetime import datetime
from pathlib import Path

from dino_kd.errors import UserError
from dino_kd.files import disk_error, write_text
from dino_kd.schema import SlurmSettings

from . import cluster
from .batch import batch_file, tasks_per_node
from .job import Job, load_job, process_start
from .request import Plan
from .snapshot import commit, save_code


def submit(plan: Plan) -> Job:
    """Check the request and the folder, write the job's files, hand the batch file to sbatch.

    Raises UserError: no Slurm, a request that the cluster cannot serve, a folder that a live job
    uses, a full disk, or what sbatch says. A job that would wait for ever is taken back.
    """
    job, slurm = plan.job, plan.slurm
    cluster.check_request(slurm)
    check_with_slurm(job, slurm)
    job = prepare(plan)
    job = dataclasses.replace(job, job_id=_sbatch(job, slurm), place="slurm")
    try:
        job.save()
    except UserError:
        cluster.ask(["scancel", job.job_id])
        raise
    _refuse_eternal_waiting(job)
    return job


def check_with_slurm(job: Job, slurm: SlurmSettings) -> str:
    """What `sbatch --test-only` says: when the job would start. Raises UserError if never."""
    text = batch_file(job, slurm)
    # dependencies and arrays are not part of the test, and their jobs may not exist yet
    lines = [
        line
        for line in text.splitlines()
        if not line.startswith(("#SBATCH --dependency", "#SBATCH --array", "#SBATCH --output"))
    ]
    answer = cluster.ask(["sbatch", "--test-only"], given="\n".join(lines) + "\n")
    return answer.strip().removeprefix("sbatch: ")


def prepare(plan: Plan) -> Job:
    """Claim the folder and put the job's files there. Raises UserError when a live job uses it."""
    job = plan.job
    refuse_live(job)
    write_text(job.job_dir / ".writable", "")  # the plain sentence for a full or read-only disk
    (job.job_dir / ".writable").unlink()
    for number, _ in enumerate(job.points):
        for name in ("outcome", "lives"):
            with contextlib.suppress(FileNotFoundError):
                job.path(name, number).unlink()
    (job.job_dir / "failed_nodes").unlink(missing_ok=True)
    plan.write_configs()
    save_code(job.job_dir)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return dataclasses.replace(job, submitted=now, commit=commit())


def refuse_live(job: Job) -> None:
    """Raise UserError when a live job works in one of the folders, or writes to the job's own."""
    for folder in {str(job.job_dir), *(point.folder for point in job.points)}:
        for job_dir in {Path(folder), Path(folder) / "launch"}:
            if not (job_dir / "job.json").is_file():
                continue
            if is_live(other := load_job(job_dir)):
                raise UserError(
                    f"{folder} is in use by {other.place} job {other.job_id}, launched "
                    f"{other.submitted}: wait for it (dino-kd launch status {folder}), end it "
                    f"(dino-kd launch cancel {folder}), or choose another folder"
                )
        lock = Path(folder) / "run.lock"
        if lock.is_file() and _is_locked(lock):
            raise UserError(
                f"{folder} is in use by a process on this machine ({folder}/run.lock); wait for "
                "it, stop it, or choose another run_dir"
            )


def is_live(job: Job) -> bool:
    """Whether a job is waiting or running."""
    if job.place == "local":
        return job.pid_start != "" and process_start(int(job.job_id)) == job.pid_start
    return any(row.is_live for row in cluster.queue(job.job_id))


def _is_locked(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _sbatch(job: Job, slurm: SlurmSettings) -> str:
    """Submit through submitit; returns the job id."""
    # submitit builds, submits and keeps the file; its batch text, pickles and requeue are not used:
    # they save from a handler of one process, and start over on a plain SIGTERM.
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """submitit's executor with our batch file."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return batch_file(job, slurm)

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            write_text(job.job_dir / "job.sbatch", submission_file_path.read_text())
            gone = sorted(set(os.environ) - set(cluster.outside_a_job()))
            unset = [word for name in gone for word in ("-u", name)]
            return ["env", *unset, "sbatch", str(submission_file_path)]

        def _num_tasks(self) -> int:
            return slurm.nodes * tasks_per_node(slurm)

    folder = job.job_dir / "submissions"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return str(Executor(folder)._submit_command("").job_id)
    except OSError as error:
        raise disk_error(folder, error) from error
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(cluster.explain("sbatch", str(error))) from None


def _refuse_eternal_waiting(job: Job) -> None:
    """Take a job back that Slurm accepts and will never start."""
    for _ in range(5):
        rows = cluster.queue(job.job_id)
        if rows and job.after and all(row.state == "CANCELLED" for row in rows):
            raise UserError(
                f"job {job.job_id} will never start: {cluster.NEVER['DependencyNeverSatisfied']} "
                f"(--after {','.join(job.after)}); Slurm took it back"
            )
        reasons = {row.reason for row in rows if row.state == "PENDING"}
        if never := reasons & set(cluster.NEVER):
            cluster.ask(["scancel", job.job_id])
            raise UserError(
                f"job {job.job_id} {cluster.reason_in_words(never.pop())}; it was taken back"
            )
        if reasons != {"None"}:
            return
        time.sleep(0.2)
