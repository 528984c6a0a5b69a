"""`dino-kd launch ...`: reads the words, then submits, runs here, or reports.

dino-kd launch pretrain pretrain/folder data.train=/images run_dir=runs/a slurm.nodes=2
dino-kd launch sweep pretrain CONFIG run_dir=runs/s 'grid.optim.base_lr=[1e-4, 5e-4]'
dino-kd launch eval runs/a train=/a test=/b --after
dino-kd launch pipeline pipeline.yaml
dino-kd launch status runs      logs -f runs/a      cancel runs/a      requeue runs/a
"""

from __future__ import annotations

import os
from collections.abc import Callable

from dino_kd.config import HelpRequested, describe_settings
from dino_kd.errors import EXIT_INTERRUPTED, ConfigError, UserError
from dino_kd.schema import LaunchConfig

from . import control, evaluation, pipeline, report
from .batch import batch_file
from .processes import run_here
from .request import LAUNCHABLE, Plan, plan_job, plan_sweep, slurm_settings, split
from .submit import check_with_slurm, submit

_FLAGS = {"--local": False, "--dry-run": False, "--check": False, "--after": True}


def main(argv: list[str], *, here: bool = False) -> int:
    """Run one `launch` command; `here` is `--local` for all of them. Returns the exit code."""
    if not argv or (argv[0] in ("-h", "--help")):
        raise HelpRequested(help_text())
    name, rest = argv[0], argv[1:]
    if {"-h", "--help"} & set(rest) or (name.startswith("-") and name not in _FLAGS):
        raise HelpRequested(help_text())
    actions: dict[str, Callable[[list[str], bool], int]] = {
        "sweep": _sweep,
        "eval": _eval,
        "pipeline": pipeline.main,
    }
    others: dict[str, Callable[[list[str]], int]] = {
        "status": report.status,
        "logs": report.logs,
        "cancel": control.cancel,
        "requeue": control.requeue,
    }
    if name in others:
        return others[name](rest)
    return actions[name](rest, here) if name in actions else _one(argv, here)


def _one(argv: list[str], here: bool) -> int:
    words = split(argv, _FLAGS)
    _refuse_grid(words.grid)
    if not words.rest:
        raise ConfigError(f"launch: which command? One of {', '.join(LAUNCHABLE)}")
    slurm = slurm_settings(words.slurm)
    plan = plan_job(words.rest[0], words.rest[1:], slurm)
    if "--after" in words.flags:
        plan.job.after.extend(evaluation.job_ids(words.flags["--after"]))
    return start(plan, words.flags, here)


def _refuse_grid(grid: dict[str, str]) -> None:
    if grid:
        first = next(iter(grid))
        raise ConfigError(f"grid.{first}: a grid needs `dino-kd launch sweep COMMAND ...`")


def _sweep(argv: list[str], here: bool) -> int:
    words = split(argv, {**_FLAGS, "--points": True})
    if not words.rest:
        raise ConfigError(f"launch sweep: which command? One of {', '.join(LAUNCHABLE)}")
    command = words.rest.pop(0)
    plan = plan_sweep(command, words, slurm_settings(words.slurm))
    if "--after" in words.flags:
        plan.job.after.extend(evaluation.job_ids(words.flags["--after"]))
    return start(plan, words.flags, here)


def _eval(argv: list[str], here: bool) -> int:
    words = split(argv, _FLAGS)
    _refuse_grid(words.grid)
    plan = evaluation.plan_evaluation(words, slurm_settings(words.slurm))
    return start(plan, words.flags, here)


def start(plan: Plan, flags: dict[str, str], here: bool) -> int:
    """Print, check, run here or submit, as the flags say."""
    job = plan.job
    here = here or "--local" in flags
    if "--dry-run" in flags:
        print(batch_file(job, plan.slurm))
        for point, text in zip(job.points, plan.configs, strict=True):
            title = f"point {point.name}" if job.is_array else job.command
            print(f"# --- settings of {title}\n{text}")
    if "--check" in flags:
        from .cluster import check_request

        check_request(plan.slurm)
        print(f"Slurm accepts it: {check_with_slurm(job, plan.slurm)}")
    if "--dry-run" in flags or "--check" in flags:
        return 0
    if here:
        return run_plan_here(plan)
    job = submit(plan)
    points = f" of {len(job.points)} points" if job.is_array else ""
    print(f"submitted job {job.job_id}{points}; its files are in {_short(str(job.job_dir))}")
    where = _short(
        str(job.job_dir.parent if job.job_dir.name.startswith("launch") else job.job_dir)
    )
    print(f"look at it: dino-kd launch status {where}; dino-kd launch logs -f {where}")
    return 0


def run_plan_here(plan: Plan) -> int:
    """Run a plan on this machine; 75 after an interruption, else the first failure's code."""
    codes = run_here(plan)
    where = _short(str(plan.job.job_dir))
    if EXIT_INTERRUPTED in codes:
        raise_again = "saved; the same command with resume=auto goes on"
        print(f"interrupted and {raise_again} (log: {where}/slurm.log)")
        return EXIT_INTERRUPTED
    failed = [p.name for p, code in zip(plan.job.points, codes, strict=True) if code]
    if failed and plan.job.is_array:
        raise UserError(
            f"{len(failed)} of {len(codes)} points failed: {', '.join(failed)} ({where})"
        )
    return next((code for code in codes if code), 0)


def _short(path: str) -> str:
    """Relative to here when that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path


def help_text() -> str:
    """`dino-kd launch --help`."""
    return f"""usage: dino-kd launch COMMAND [CONFIG] [a.b=c ...] [slurm.x=y ...]
       dino-kd launch sweep COMMAND [CONFIG] [a.b=c ...] grid.a.b=[1, 2] | --points FILE
       dino-kd launch eval RUN [a.b=c ...] [--after]
       dino-kd launch pipeline FILE [folder=...] [slurm.x=y ...] [--local]
       dino-kd launch status [FOLDER ...]
       dino-kd launch logs [-f] RUN [--rank N] [--point N]
       dino-kd launch cancel|requeue RUN [--point N]

COMMAND is one of {", ".join(LAUNCHABLE)}. The job runs where it is launched from, with a copy of
the code; when it is preempted or reaches its time limit it saves, waits in the queue and goes on.

  --local     run on this machine: slurm.nodes x slurm.tasks_per_node processes
  --dry-run   print the batch file and the resolved settings, and stop
  --check     ask Slurm whether it would take the job, and stop
  --after     start when the job of that run (or --after RUN, --after JOBID) has succeeded

Defaults of your site: ~/.config/dino_kd/slurm.yaml, or the file that DINO_KD_SLURM names.

{describe_settings(LaunchConfig)}"""
