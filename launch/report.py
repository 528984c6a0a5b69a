"""`dino-kd launch status` and `logs`: what jobs do, by squeue, then by their own files."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from dino_kd.errors import ConfigError, UserError

from . import cluster
from .cluster import QueueRow, reason_in_words
from .job import DONE, Job, find_jobs, only_job
from .request import split
from .submit import is_live

_SECONDS_BETWEEN_LOOKS = 0.5


def status(argv: list[str]) -> int:
    """`dino-kd launch status [FOLDER ...]`: one row for each job and point."""
    words = split(argv, {})
    for number, job in enumerate(find_jobs([*words.rest, *words.slurm])):
        print(("\n" if number else "") + job_table(job))
    return 0


def job_table(job: Job) -> str:
    """A job's head line and one row for each of its points."""
    rows, note = _queue_rows(job)
    titles = ["point", "settings", "state", "restarts", "step", "loss", "last line"]
    cells = [_row(job, number, rows, note) for number in range(len(job.points))]
    if not job.is_array:
        titles, cells = [t for t in titles if t != "settings"], [[c[0], *c[2:]] for c in cells]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [titles, *cells]
    ]
    head = f"{job.place} job {job.job_id}  {job.command}  {job.job_dir}  since {job.submitted}"
    return "\n".join([head, *([note] if note else []), *lines])


def _queue_rows(job: Job) -> tuple[dict[int, QueueRow], str]:
    """squeue's row of each point, and a note when Slurm cannot be asked."""
    if job.place != "slurm":
        return {}, ""
    try:
        rows = cluster.queue(job.job_id)
    except UserError as error:
        return {}, f"note: {error}; what follows is from the job's own files"
    return {int(row.job.partition("_")[2] or 0) if job.is_array else 0: row for row in rows}, ""


def _row(job: Job, number: int, rows: dict[int, QueueRow], note: str) -> list[str]:
    point, lives = job.points[number], job.lives(number)
    settings = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in point.settings.items())
    step, loss = _progress(Path(point.folder))
    last = _last_line(job.path("slurm.log", number))
    state = state_in_words(job, number, rows.get(number), bool(lives))
    if note and not job.outcome(number):
        state = "unknown"
    restarts = max(0, len(lives) - 1)
    return [point.name, settings, state, str(restarts), step, loss, last]


def state_in_words(job: Job, number: int, row: QueueRow | None, has_started: bool) -> str:
    """done, running, waiting and why, failed and how.

    The outcome that the processes left counts more than Slurm's word for the end: a job that
    finished inside a preemption's grace time is a TIMEOUT to Slurm.
    """
    outcome = job.outcome(number)
    if row is not None and row.is_live:
        if row.state == "PENDING":
            return f"waiting: {reason_in_words(row.reason)}"
        return f"{row.state.lower()} {row.elapsed} on {row.nodes}"
    if outcome == DONE:
        return "done"
    if row is not None and row.state == "CANCELLED":
        return "cancelled" + ("" if has_started else " before its start")
    if outcome.startswith("failed"):
        return outcome.replace("failed code=", "failed, exit code ")
    if job.place == "local" and not is_live(job):
        return outcome or ("killed" if has_started else "not started")
    if job.place == "local":
        return "running" if has_started else "waiting: its turn comes"
    if row is not None:
        return row.state.lower()
    return outcome or "gone from the queue"


def _progress(folder: Path) -> tuple[str, str]:
    """(step, loss) of the last row of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return "-", "-"
    for line in reversed(_tail(path)):
        try:
            row = json.loads(line)
            loss = row.get("loss")
            return str(row["step"]), "-" if loss is None else f"{loss:.4f}"
        except (ValueError, KeyError):
            continue  # torn by a kill
    return "-", "-"


def _last_line(path: Path) -> str:
    said = _tail(path) if path.is_file() else []
    lines = [line for line in said if not re.fullmatch(r"\s*(\d+:)?\s*", line)]
    errors = [line for line in lines if re.match(r"\s*\d+: error: ", line)]
    chosen = errors[-1:] if errors and "failed" in lines[-1] else lines[-1:]
    return chosen[0].strip()[:200] if chosen else "-"


def _tail(path: Path, size: int = 16384) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", "replace").splitlines()


def logs(argv: list[str]) -> int:
    """`dino-kd launch logs [-f] RUN [--rank N] [--point N]`: the output of all lives."""
    follow = "-f" in argv
    words = split([w for w in argv if w != "-f"], {"--rank": True, "--point": True})
    if len(words.rest) != 1:
        raise ConfigError("launch logs: name one run directory")
    job = only_job(words.rest[0])
    path = job.path("slurm.log", point_number(job, words.flags.get("--point")))
    rank = words.flags.get("--rank")
    if not path.is_file() and not follow:
        rows, note = _queue_rows(job)
        raise UserError(f"{path}: no output yet: " + (note or state_in_words(
            job, 0, next(iter(rows.values()), None), has_started=False)))  # fmt: skip
    _print_log(job, path, rank, follow)
    return 0


def _print_log(job: Job, path: Path, rank: str | None, follow: bool) -> None:
    """Copy the log to the screen; with `follow` until the job is over."""
    position, torn = 0, b""
    while True:
        is_over = follow and not is_live(job)  # asked before the read: nothing is missed
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                data = torn + file.read()
                position = file.tell()
            whole, newline, torn = data.rpartition(b"\n")
            for line in (whole + newline).decode("utf-8", "replace").splitlines():
                if rank is None or re.match(rf"\s*{re.escape(rank)}: ", line):
                    print(line)
            sys.stdout.flush()
        if not follow or is_over:
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def point_number(job: Job, name: str | None) -> int:
    """The index of a point given by its name. Raises ConfigError."""
    names = [point.name for point in job.points]
    if name is None:
        if len(names) > 1:
            raise ConfigError(f"this is a sweep: choose with --point, one of {', '.join(names)}")
        return 0
    for number, known in enumerate(names):
        if name == known or (job.is_array and name.isdigit() and int(name) == number):
            return number
    raise ConfigError(f"--point: there is no point {name!r}; the points are {', '.join(names)}")
