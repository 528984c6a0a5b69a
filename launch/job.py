"""A job as it stands on disk: which commands it runs, and where its files are.

    JOB_DIR/job.json      what was submitted        JOB_DIR/slurm.log   output of all lives
    JOB_DIR/job.sbatch    the batch file            JOB_DIR/lives       a line at each life's start
    JOB_DIR/code/         the code as it was        JOB_DIR/outcome     done, interrupted, failed

The points of a sweep are numbered: slurm_0.log, lives_0, outcome_0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dino_kd.errors import UserError, did_you_mean
from dino_kd.files import write_json

DONE, INTERRUPTED, FAILED = "done", "interrupted", "failed"


@dataclass(frozen=True)
class Point:
    """One command: a single job has one, a sweep several."""

    name: str
    folder: str  # what it works on: the run directory
    argv: list[str]  # CONFIG and settings
    settings: dict[str, str] = field(default_factory=dict)  # what makes it differ in a sweep


@dataclass(frozen=True)
class Job:
    """Everything that `launch` knows about a job. Paths are absolute."""

    job_dir: Path
    command: str
    points: list[Point]
    cwd: Path
    slurm: dict[str, Any]
    is_array: bool = False
    after: list[str] = field(default_factory=list)  # job ids
    task_by_task: bool = False  # aftercorr: point i waits for point i
    job_id: str = ""
    place: str = ""  # slurm or local
    pid_start: str = ""  # of a local job: when its process started, in clock ticks
    submitted: str = ""
    commit: str = ""

    def path(self, name: str, point: int = 0) -> Path:
        """A file of one point: slurm.log, lives, outcome."""
        stem, dot, end = name.partition(".")
        number = f"_{point}" if self.is_array else ""
        return self.job_dir / f"{stem}{number}{dot}{end}"

    def save(self) -> None:
        """Write job.json."""
        record = asdict(self) | {"job_dir": str(self.job_dir), "cwd": str(self.cwd)}
        write_json(self.job_dir / "job.json", record)

    def outcome(self, point: int = 0) -> str:
        """How the last life of a point ended; empty while it runs or was killed."""
        path = self.path("outcome", point)
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    def lives(self, point: int = 0) -> list[dict[str, str]]:
        """One dict of words for each life, oldest first: life, job, nodes, start."""
        path = self.path("lives", point)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in lines
            if line.startswith(f"job={self.job_id.partition('_')[0]}")
        ]


def load_job(job_dir: Path) -> Job:
    """Read job.json. Raises UserError when there is none or it is damaged."""
    path = job_dir / "job.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        points = [Point(**point) for point in record.pop("points")]
        paths = {name: Path(record.pop(name)) for name in ("job_dir", "cwd")}
        return Job(**(record | paths | {"points": points, "job_dir": job_dir.absolute()}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); launch the job again") from None


def find_jobs(folders: list[str]) -> list[Job]:
    """The jobs in these folders: job folders, run directories, or folders of runs (3 levels).

    Raises UserError for a folder that does not exist or holds no job.
    """
    found: dict[Path, Job] = {}
    for name in folders or ["."]:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            near = [p.name for p in folder.parent.glob("*/")] if folder.parent.is_dir() else []
            raise UserError(f"there is no folder {name}{did_you_mean(folder.name, near) or '.'}")
        jobs = {job_dir.absolute(): load_job(job_dir) for job_dir in _job_dirs(folder, 4)}
        if not jobs:
            raise UserError(
                f"{folder.absolute()} holds no job; name a run directory that `dino-kd launch` "
                "started, or a folder of such runs"
            )
        found.update(jobs)
    return sorted(found.values(), key=lambda job: (job.submitted, str(job.job_dir)))


def only_job(folder: str) -> Job:
    """The one job of a folder; of several the one that was submitted last."""
    return find_jobs([folder])[-1]


def _job_dirs(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "job.json").is_file():
        yield folder
    elif depth:
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            is_part = entry.name in ("checkpoints", "code", "backbone", "eval", "tensorboard")
            if entry.is_dir(follow_symlinks=False) and not is_part and entry.name[0] != ".":
                yield from _job_dirs(Path(entry.path), depth - 1)


def process_start(pid: int) -> str:
    """When a live process started, in clock ticks since boot; empty when there is none.

    With the pid it names one process for ever. Linux; elsewhere only whether it lives.
    """
    stat = Path(f"/proc/{pid}/stat")
    try:
        words = stat.read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if words[0] in "ZX" else words[19]
