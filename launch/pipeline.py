"""`dino-kd launch pipeline FILE`: stages that follow one another, from one file.

On Slurm every stage is a job that waits for those before it; with --local they run here in turn.
A stage that has succeeded with the same settings is not run again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dino_kd.config import find_config, load_settings
from dino_kd.errors import ConfigError, UserError, unknown_name
from dino_kd.problems import validate
from dino_kd.schema import PipelineConfig, SlurmSettings, StageSettings

from . import cluster
from .batch import batch_file
from .job import DONE, Job, load_job
from .processes import run_here
from .request import Plan, as_word, plan_job, schema_of, slurm_settings, split
from .submit import check_with_slurm, submit


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, ready to start."""

    name: str
    after: list[str]
    plan: Plan


def main(argv: list[str], here: bool) -> int:
    """Read the file, check every stage, then start them. Returns the exit code."""
    words = split(argv, {"--local": False, "--dry-run": False, "--check": False})
    if not [word for word in words.rest if "=" not in word]:
        raise ConfigError("launch pipeline: name a file; launch/pipeline is an example")
    stages = read(words.rest, words.slurm)
    if "--dry-run" in words.flags or "--check" in words.flags:
        for stage in stages:
            after = f", after {', '.join(stage.after)}" if stage.after else ""
            print(f"# === stage {stage.name}{after}")
            if "--check" in words.flags:
                cluster.check_request(stage.plan.slurm)
                print(f"Slurm accepts it: {check_with_slurm(stage.plan.job, stage.plan.slurm)}")
            else:
                print(batch_file(stage.plan.job, stage.plan.slurm))
                print(f"# --- settings of {stage.plan.job.command}\n{stage.plan.configs[0]}")
        return 0
    if here or "--local" in words.flags:
        return run_stages_here(stages)
    return submit_stages(stages)


def read(words: list[str], slurm_words: list[str]) -> list[Stage]:
    """The stages of a file in order. Raises ConfigError with the problems of all stages."""
    pipeline = load_settings(PipelineConfig, words, command="launch")
    folder = Path(pipeline.folder).expanduser().absolute()
    stages: list[Stage] = []
    problems: list[str] = []
    earlier: dict[str, str] = {}  # the folders of the stages before
    for name, tree in pipeline.stages.items():
        before, earlier = earlier, {**earlier, name: str(folder / name)}
        made, wrong = validate(StageSettings, tree, command="launch", overridden=set(), origin="")
        problems += [f"stages.{name}.{line}" for line in wrong]
        if made is None:
            continue
        after = made.after if made.after is not None else list(before)[-1:]
        problems += [
            _not_before(other, pipeline.stages, before, f"stages.{name}.after")
            for other in after
            if other not in before
        ]
        settings, named = fill_in(made.settings, before)
        missing = [other for other in named if other not in before]
        problems += [
            _not_before(other, pipeline.stages, before, f"stages.{name}: {{{other}}}")
            for other in missing
        ]
        if missing:
            continue
        try:
            slurm = slurm_settings(slurm_words, {**pipeline.slurm, **made.slurm})
            plan = _plan(made.model_copy(update={"settings": settings}), earlier[name], slurm)
            stages.append(Stage(name, list(dict.fromkeys([*after, *named])), plan))
        except ConfigError as error:
            problems += [f"stages.{name}: {line}" for line in error.problems]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return stages


def _plan(stage: StageSettings, folder: str, slurm: SlurmSettings) -> Plan:
    """The job of one stage; its folder is its run_dir, or holds its results."""
    schema = schema_of(stage.command)
    words = [f"{key}={as_word(value)}" for key, value in stage.settings.items()]
    if stage.config:
        words.insert(0, str(find_config(stage.config)))
    job_dir = slurm.job_dir or str(Path(folder) / "launch")
    if "run_dir" in schema.model_fields:
        words.append(f"run_dir={folder}")
    elif "output" in schema.model_fields and "output" not in stage.settings:
        one_file = "" if stage.command == "evaluate" else f"/{stage.command}.json"
        words.append(f"output={folder}{one_file}")
    request = slurm.model_copy(update={"job_dir": job_dir})
    plan = plan_job(stage.command, words, request, resume=True)
    point = dataclasses.replace(plan.job.points[0], name=Path(folder).name)
    return dataclasses.replace(plan, job=dataclasses.replace(plan.job, points=[point]))


def fill_in(value: Any, folders: dict[str, str]) -> tuple[Any, list[str]]:
    """Replace {NAME} in texts, at any depth, by the folder of stage NAME; also all names found.

    A name that `folders` does not hold stays as it is.
    """
    named: list[str] = []

    def folder(found: re.Match[str]) -> str:
        named.append(found[1])
        return folders.get(found[1], found[0])

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: fill(item) for key, item in part.items()}
        if isinstance(part, list):
            return [fill(item) for item in part]
        return re.sub(r"\{([\w-]+)\}", folder, part) if isinstance(part, str) else part

    return fill(value), named


def _not_before(name: str, stages: Iterable[str], before: Iterable[str], where: str) -> str:
    """The sentence for a stage that is named but is not there yet."""
    if name in stages:
        return (
            f"{where}: stage {name!r} does not come before this one; a stage builds on earlier ones"
        )
    return str(unknown_name("stage", name, before, where))


def is_done(plan: Plan) -> bool:
    """Whether the stage has succeeded before with the same settings."""
    job_dir = plan.job.job_dir
    if not (job_dir / "job.json").is_file():
        return False
    earlier = load_job(job_dir)
    config = earlier.path("config.yaml")
    same = config.is_file() and config.read_text(encoding="utf-8") == plan.configs[0]
    return same and earlier.outcome() == DONE


def run_stages_here(stages: list[Stage]) -> int:
    """One after another on this machine; ends at the first that does not succeed."""
    for stage in stages:
        if is_done(stage.plan):
            print(f"== stage {stage.name}: done before", flush=True)
            continue
        print(f"== stage {stage.name}", flush=True)
        code = run_here(stage.plan)[0]
        if code:
            print(f"stage {stage.name} ended with exit code {code}; the same command goes on there")
            return code
    return 0


def submit_stages(stages: list[Stage]) -> int:
    """All of them as dependent jobs; none stays in the queue when one is refused."""
    submitted: dict[str, Job] = {}
    try:
        for stage in stages:
            if is_done(stage.plan):
                print(f"stage {stage.name}: done before")
                continue
            ids = [submitted[name].job_id for name in stage.after if name in submitted]
            stage.plan.job.after.extend(ids)
            submitted[stage.name] = submit(stage.plan)
            after = f", after {', '.join(stage.after)}" if ids else ""
            print(f"stage {stage.name}: job {submitted[stage.name].job_id}{after}")
    except UserError:
        for job in submitted.values():
            cluster.ask(["scancel", job.job_id])
        raise
    if submitted:
        print(f"look at them: dino-kd launch status {stages[0].plan.job.job_dir.parents[1]}")
    return 0
