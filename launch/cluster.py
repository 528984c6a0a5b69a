"""What Slurm says: its tools called, its partitions read, its errors put into sentences."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from dino_kd.errors import ConfigError, UserError, unknown_name
from dino_kd.schema import SlurmSettings
from dino_kd.schema.launch import minutes_of

SECONDS_TO_ANSWER = 90  # Slurm's clients retry by themselves before they give up

# Pending reasons, https://slurm.schedmd.com/job_reason_codes.html, in words
REASONS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "other jobs come first",
    "Resources": "waits for free nodes",
    "BeginTime": "waits a moment after its requeue",
    "Dependency": "waits for the job before it",
    "JobArrayTaskLimit": "as many points run as slurm.parallel allows",
    "JobHeldUser": "held by you: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "a node it needs is not available, maybe reserved for maintenance",
    "Reservation": "waits for its reservation",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS allows",
    "QOSGrpNodeLimit": "the QOS has no nodes left",
    "AssocGrpNodeLimit": "the account has no nodes left",
    "NodeDown": "a node it needs is down",
}
NEVER = {
    "PartitionNodeLimit": "asks for more nodes than the partition gives to a job",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "DependencyNeverSatisfied": "the job it waits for has failed",
    "BadConstraints": "no node has what slurm.constraint asks for",
    "InvalidAccount": "the account is not valid",
    "InvalidQOS": "the QOS is not valid",
    "QOSMaxWallDurationPerJobLimit": "asks for more time than the QOS allows",
    "QOSMaxNodePerJobLimit": "asks for more nodes than the QOS gives to a job",
    "QOSMaxCpuPerJobLimit": "asks for more CPUs than the QOS gives to a job",
    "AssocMaxWallDurationPerJobLimit": "asks for more time than the account allows",
    "AssocMaxNodePerJobLimit": "asks for more nodes than the account gives to a job",
    "AccountNotAllowed": "the partition does not take this account",
    "QOSNotAllowed": "the partition does not take this QOS",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is closed",
}

GONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "BOOT_FAIL",
        "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "SPECIAL_EXIT"}  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """What a partition gives to one job."""

    name: str
    is_default: bool
    nodes: int
    max_minutes: float


@dataclass(frozen=True)
class QueueRow:
    """One line of squeue; `job` is 123, or 123_4 for a task of an array."""

    job: str
    state: str
    reason: str
    nodes: str
    elapsed: str

    @property
    def is_live(self) -> bool:
        """Whether it is waiting or running."""
        return self.state not in GONE


def ask(command: Sequence[str], given: str = "") -> str:
    """Run a Slurm tool, `given` as its input, and return what it prints (errors too, if it works).

    Raises UserError in a sentence: no Slurm here, a controller that does not answer, or the
    tool's own words.
    """
    command = list(command)
    if shutil.which(command[0]) is None:
        raise UserError(
            f"there is no Slurm here: {command[0]} is not on the PATH. Log in to the cluster's "
            "login node (and load its Slurm module), or run the job on this machine with "
            "`dino-kd launch --local ...`"
        )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False,
            input=given, env=outside_a_job(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"Slurm's controller does not answer: {command[0]} gave up after {SECONDS_TO_ANSWER} s"
            ". Try again later, or ask the cluster's administrators"
        ) from None
    if done.returncode:
        raise UserError(explain(command[0], done.stderr or done.stdout))
    return done.stdout + (done.stderr if given else "")


def outside_a_job() -> dict[str, str]:
    """The environment without the variables of a job that we may run in.

    SLURM_CONF and its like stay: without them the tools do not find the cluster.
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_DEBUG_FLAGS"}
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_"))
    }


def explain(tool: str, words: str) -> str:
    """The error output of a Slurm tool as one sentence with advice."""
    text = " ".join(
        line.strip()
        .removeprefix(f"{tool}: ")
        .removeprefix("error: ")
        .removeprefix("fatal: ")
        .removeprefix("allocation failure: ")
        for line in words.splitlines()
        if line.strip()
    )
    if re.search(r"Unable to contact slurm controller|Connection refused|Socket timed out", text):
        return (
            f"Slurm's controller does not answer ({tool}: {text[:200]}); nothing was changed. Try "
            "again later, or ask the cluster's administrators"
        )
    if "configuration source" in text:
        return (
            f"{tool} does not find the cluster ({text[:200]}); set SLURM_CONF, or log in to a "
            "login node of the cluster"
        )
    advice = {
        "node configuration is not available": "no node has the CPUs, GPUs or memory that "
        "slurm.cpus_per_task, gpus_per_node and mem ask for; `sinfo -o '%P %D %c %m %G'` lists "
        "what there is",
        "Invalid account": "look at slurm.account and slurm.qos",
        "Invalid qos": "look at slurm.qos",
        "invalid partition": "look at slurm.partition; `sinfo` lists them",
        "Invalid feature": "look at slurm.constraint; `sinfo -o '%P %f'` lists the features",
        "unrecognized option": "look at slurm.extra",
    }
    hint = next((advice[part] for part in advice if part.lower() in text.lower()), "")
    return f"Slurm refuses the job ({tool}: {text[:300]})" + (f": {hint}" if hint else "")


def partitions() -> dict[str, Partition]:
    """The partitions of the cluster by name."""
    found = {}
    for line in ask(["scontrol", "show", "partition", "--oneliner"]).splitlines():
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" not in values:
            continue
        nodes, most = int(values.get("TotalNodes", 0)), values.get("MaxNodes", "UNLIMITED")
        found[values["PartitionName"]] = Partition(
            name=values["PartitionName"],
            is_default=values.get("Default") == "YES",
            nodes=min(nodes, int(most)) if most.isdigit() else nodes,
            max_minutes=minutes_of(values.get("MaxTime", "UNLIMITED")),
        )
    return found


def check_request(slurm: SlurmSettings) -> None:
    """Compare the request with the cluster. Raises ConfigError for every part it cannot give."""
    known = partitions()
    problems: list[str] = []
    chosen = (slurm.partition or "").split(",") if slurm.partition else []
    for name in chosen:
        if name not in known:
            problems.append(str(unknown_name("partition", name, known, "slurm.partition")))
    fitting = [known[n] for n in chosen if n in known] or [
        p for p in known.values() if p.is_default
    ]
    if not chosen and not fitting:
        problems.append(
            f"slurm.partition: this cluster has no default; choose one of {', '.join(known)}"
        )
    problems += _too_much(slurm, fitting)
    for kind, value in (("account", slurm.account), ("qos", slurm.qos)):
        accepted = _associations(kind) if value else []
        if value and accepted and value not in accepted:
            problems.append(str(unknown_name(kind, value, accepted, f"slurm.{kind}")))
    if problems:
        raise ConfigError(problems)


def _too_much(slurm: SlurmSettings, fitting: list[Partition]) -> list[str]:
    problems = []
    names = ", ".join(p.name for p in fitting)
    most_nodes = max((p.nodes for p in fitting), default=slurm.nodes)
    if slurm.nodes > most_nodes:
        problems.append(
            f"slurm.nodes: {slurm.nodes} nodes would wait for ever, partition {names} gives a job "
            f"at most {most_nodes}"
        )
    longest = max((p.max_minutes for p in fitting), default=float("inf"))
    asked = minutes_of(slurm.time) if slurm.time else 0.0
    if asked > longest:
        problems.append(
            f"slurm.time: {slurm.time} would wait for ever, partition {names} allows "
            f"{longest:g} minutes; a longer run is requeued and goes on by itself"
        )
    limit = min(asked or longest, longest) * 60
    if slurm.warn + 60 > limit:  # signals come up to a minute early
        problems.append(
            f"slurm.warn: {slurm.warn} s before a time limit of {limit / 60:g} minutes leaves no "
            "time to work (signals come up to 60 s early); set slurm.warn lower or slurm.time "
            "higher"
        )
    return problems


def _associations(kind: str) -> list[str]:
    """Your accounts or QOS as the accounting knows them; empty where there is none."""
    try:
        out = ask(
            ["sacctmgr", "--noheader", "--parsable2", "show", "associations",
             f"user={getpass.getuser()}", f"format={kind}"]
        )  # fmt: skip
    except UserError:
        return []  # no accounting is not an error: sbatch itself will judge
    names = {name for line in out.splitlines() for name in line.split(",") if name}
    return sorted(names)


def queue(job_id: str) -> list[QueueRow]:
    """What squeue knows about a job, one row for each task of an array; empty when it is gone."""
    words = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N|%M"]
    try:
        out = ask([*words, f"--jobs={job_id}"])
    except UserError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    rows = [line.split("|") for line in out.splitlines() if line.count("|") == 4]
    return [QueueRow(*row) for row in rows]


def reason_in_words(reason: str) -> str:
    """Why a job waits."""
    if reason in NEVER:
        return f"will never start: {NEVER[reason]} ({reason})"
    known = next((REASONS[name] for name in REASONS if reason.startswith(name)), None)
    return f"{known} ({reason})" if known else reason
