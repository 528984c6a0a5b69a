"""`dino-kd launch eval RUN --after`: score a run, or every point of a sweep, when it is there."""

from __future__ import annotations

from pathlib import Path

from dino_kd.config import dump_settings, load_settings
from dino_kd.errors import ConfigError, UserError
from dino_kd.schema import EvaluateConfig, SlurmSettings

from . import cluster
from .job import DONE, Job, Point, find_jobs, load_job
from .request import Plan, Words, chosen_job_dir, plan_job, with_monitor_sets

COMMAND = "evaluate"


def plan_evaluation(words: Words, slurm: SlurmSettings) -> Plan:
    """The evaluation of RUN as a job, one point for each of a sweep's; raises ConfigError."""
    bare = [word for word in words.rest if "=" not in word]
    run = Path(bare[0]).expanduser() if bare else None
    trained = load_job(run / "launch") if run and (run / "launch" / "job.json").is_file() else None
    if run is None or (trained is None and not (run / "config.yaml").is_file()):
        raise ConfigError(
            "launch eval: name a run directory or a sweep that `dino-kd launch` started, got "
            f"{bare[0] if bare else 'none'!r}; for other backbones: dino-kd launch evaluate "
            "backbone=... slurm.job_dir=..."
        )
    rest = [word for word in words.rest if word != bare[0]]
    if trained is not None and trained.is_array:
        plan = _plan_of_sweep(trained, run, rest, slurm)
    else:
        plan = plan_job(COMMAND, [str(run.absolute()), *rest], slurm)
    if "--after" in words.flags:
        named = words.flags["--after"]
        if named:
            plan.job.after.extend(job_ids(named))
        elif trained is not None and _is_waited_for(trained):
            plan.job.after.append(trained.job_id)
    return plan


def _plan_of_sweep(trained: Job, run: Path, words: list[str], slurm: SlurmSettings) -> Plan:
    """Point i of the evaluation scores, and with --after waits for, point i of the sweep."""
    job_dir = chosen_job_dir(slurm) or run.absolute() / f"launch_{COMMAND}"
    points, configs = [], []
    for number, point in enumerate(trained.points):
        # for the check only: the point's own settings say which sets it has
        config = trained.path("config.yaml", number)
        checked = [f"backbone={point.folder}", *words]
        if config.is_file():
            checked = with_monitor_sets(config, point.folder, words)
        settings = load_settings(EvaluateConfig, checked, command=COMMAND)
        points.append(Point(point.name, str(job_dir), [point.folder, *words], point.settings))
        configs.append(dump_settings(settings))
    record = slurm.model_dump(mode="json")
    job = Job(job_dir, COMMAND, points, Path.cwd(), record, is_array=True, task_by_task=True)
    return Plan(job, slurm, configs)


def _is_waited_for(trained: Job) -> bool:
    """Whether the run's job is still to succeed. Raises UserError when it has failed."""
    if trained.place != "slurm":
        return False
    rows = cluster.queue(trained.job_id)
    if any(row.is_live for row in rows):
        return True
    if all(trained.outcome(n) != DONE for n in range(len(trained.points))):
        raise UserError(
            f"--after: job {trained.job_id} is over and has not succeeded; look at it with "
            f"dino-kd launch status {trained.job_dir.parent}"
        )
    # A sweep with failed points: only a dependency of Slurm's own drops theirs.
    return trained.is_array and bool(rows)


def job_ids(named: str) -> list[str]:
    """Job ids from ids and run directories, separated by commas. Raises UserError."""
    if not named:
        raise ConfigError("--after: after what? Name a job id or a run directory: --after runs/a")
    ids = []
    for word in named.split(","):
        is_id = word.replace("_", "").isdigit()
        ids += [word] if is_id else [job.job_id for job in find_jobs([word])[-1:]]
    return ids
