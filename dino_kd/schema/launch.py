"""Settings of `dino-kd launch`: what to ask Slurm for, and how a job lives with interruptions."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from dino_kd.schema.base import Auto, InWords, PositiveInt, Settings, Text, setting

_DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def minutes_of(time: str) -> float:
    """Slurm's own forms of a duration: 90, 90:30, 12:00:00, 1-12, 1-12:00; UNLIMITED is inf.

    Raises ValueError for anything else.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    found = _DURATION.fullmatch(time)
    if found is None:
        raise ValueError(
            f"expected minutes (90), hours:minutes:seconds (12:00:00) or days-hours (1-12), "
            f"got {time!r}"
        )
    days, *rest = (None if part is None else int(part) for part in found.groups())
    first, second, third = rest
    if days is not None:
        return days * 1440 + (first or 0) * 60 + (second or 0) + (third or 0) / 60
    if third is not None:
        return (first or 0) * 60 + (second or 0) + third / 60
    return (first or 0) + (second or 0) / 60


def _check_time(value: str) -> str:
    minutes_of(value)
    return value


def _as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _one_line(value: str) -> str:
    if "\n" in value or "\r" in value:
        raise ValueError("expected one line")
    return value


Line = Annotated[Text, AfterValidator(_one_line)]
Time = Annotated[
    str,
    BeforeValidator(_as_text),
    AfterValidator(_check_time),
    InWords("minutes (90), hours:minutes:seconds (12:00:00) or days-hours (1-12)"),
]
Memory = Annotated[
    str,
    BeforeValidator(_as_text),
    Field(pattern=r"^\d+[KMGT]?$"),
    InWords("a number with K, M, G or T; 0: the whole node"),
]
Count = Annotated[int, Field(ge=0)]
Extra = str | int | float | bool


class SlurmSettings(Settings):
    """The request, the site's names, and the rules of a preempted job."""

    nodes: PositiveInt = setting(1, "Machines.")
    gpus_per_node: Count = setting(0, "GPUs on each; 0: CPU only.")
    tasks_per_node: Auto | PositiveInt = setting(
        "auto", "Processes on each; auto: one for each GPU, or one."
    )
    cpus_per_task: PositiveInt | None = setting(
        None, "CPU cores of each process, loader processes included; none: the site's default."
    )
    mem: Memory | None = setting(
        None, "Memory of each node; 0: all of it; none: the site's default."
    )
    time: Time | None = setting(
        None, "Time limit of one life of the job; none: the partition's default."
    )
    partition: Line | None = setting(None, "Partition; none: the site's default.")
    account: Line | None = setting(None, "Account; none: the site's default.")
    qos: Line | None = setting(None, "Quality of service; none: the site's default.")
    constraint: Line | None = setting(None, "Node features, as sbatch --constraint takes them.")
    exclude: Line | None = setting(None, "Nodes to avoid.")
    job_name: Line | None = setting(None, "Name in the queue; none: the run directory's name.")
    extra: dict[str, Extra] = setting(
        {}, "Any other sbatch option: {mail-type: END, exclusive: true}."
    )
    setup: list[Line] = setting([], "Shell lines before the processes start: [module load cuda].")
    python: Line | None = setting(
        None, "Command that starts Python on the nodes; none: the interpreter that launches."
    )
    job_dir: Line | None = setting(
        None, "Folder of the job's own files; none: RUN/launch, or RUN/launch_COMMAND."
    )
    warn: PositiveInt = setting(
        300, "Ask the processes to save this long before the time limit.", unit="s"
    )
    grace: Auto | PositiveInt = setting(
        "auto",
        "Requeue without their answer when they have not ended after this; auto: 4/5 of warn.",
        unit="s",
    )
    max_restarts: Count = setting(100, "Give up after so many restarts.")
    exclude_failed: Count = setting(
        2, "At most so many nodes are avoided because they failed during this job."
    )
    parallel: PositiveInt | None = setting(
        None, "Points of a sweep that run at the same time; none: as many as Slurm starts."
    )


class LaunchConfig(Settings):
    """`dino-kd launch`: run any command as a job, on Slurm or on N processes here."""

    slurm: SlurmSettings = SlurmSettings()


class StageSettings(Settings):
    """One stage of a pipeline."""

    command: Text = setting(..., "A command of dino-kd.", examples=["pretrain"])
    config: Text | None = setting(None, "Its CONFIG.")
    settings: dict[str, Any] = setting(
        {}, "Its settings by dotted name; {NAME} in a text is the folder of stage NAME."
    )
    after: list[Text] | None = setting(
        None, "Stages that must have succeeded; none: the one before it."
    )
    slurm: dict[str, Any] = setting({}, "Differs from the pipeline's own slurm section.")


class PipelineConfig(Settings):
    """A file for `dino-kd launch pipeline FILE`: stages that follow one another."""

    folder: Text = setting(
        ..., "Folder of the pipeline; each stage has a folder in it.", examples=["runs/pipeline"]
    )
    slurm: dict[str, Any] = setting({}, "Request of every stage; single ones may differ.")
    stages: dict[str, dict[str, Any]] = setting(..., "By name, in order.", min_length=1)
