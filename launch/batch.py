"""The batch file: the request for sbatch, and the shell that outlives every interruption.

The shell on the first node takes Slurm's warning (USR2), passes it on to the processes, waits for
them, and requeues the job when the last one has gone, whatever Python does. Who may requeue:

    event                              processes get   this shell gets  state       then
    time limit, `launch requeue`,      - (passed on)   USR2             RUNNING     requeue
      preemption with the user signal
    preemption with a grace time       TERM            nothing          RUNNING     requeue
    preemption without, node failure,
      `scontrol requeue`               TERM .. KILL    TERM             COMPLETING  Slurm does
    `scancel`                          TERM .. KILL    TERM             COMPLETING  never

Measured with Slurm 22.05. `sbatch JOB_DIR/job.sbatch` by hand does the same as the launcher.
"""

from __future__ import annotations

import shlex
import sys
from string import Template

from dino_kd.errors import ConfigError
from dino_kd.schema import SlurmSettings

from .job import Job

# What the batch file itself decides, and where to set it instead.
OWN = {
    "array": "use `dino-kd launch sweep`",
    "dependency": "use --after",
    "kill-on-invalid-dep": "use --after",
    "job-name": "use slurm.job_name",
    "nodes": "use slurm.nodes",
    "ntasks": "use slurm.nodes and slurm.tasks_per_node",
    "ntasks-per-node": "use slurm.tasks_per_node",
    "cpus-per-task": "use slurm.cpus_per_task",
    "gpus-per-node": "use slurm.gpus_per_node",
    "mem": "use slurm.mem",
    "time": "use slurm.time",
    "partition": "use slurm.partition",
    "account": "use slurm.account",
    "qos": "use slurm.qos",
    "constraint": "use slurm.constraint",
    "exclude": "use slurm.exclude",
    "signal": "use slurm.warn",
    "requeue": "jobs are always requeued",
    "no-requeue": "jobs are always requeued; use slurm.max_restarts=0",
    "output": "the log is JOB_DIR/slurm.log",
    "error": "the log is JOB_DIR/slurm.log",
    "open-mode": "the log of all lives is one file",
    "chdir": "the job runs in the folder that it is launched from",
}


def tasks_per_node(slurm: SlurmSettings) -> int:
    """Processes on each node: one for each GPU, or one, unless the settings say."""
    tasks = slurm.tasks_per_node
    return tasks if isinstance(tasks, int) else max(1, slurm.gpus_per_node)


def grace_seconds(slurm: SlurmSettings) -> int:
    """How long the processes may take to end after the warning."""
    return slurm.grace if isinstance(slurm.grace, int) else max(1, slurm.warn * 4 // 5)


def request(job: Job, slurm: SlurmSettings) -> dict[str, str | None]:
    """The options for sbatch; None is a bare flag.

    Raises ConfigError for a slurm.extra that the launcher decides itself.
    """
    clash = [key for key in slurm.extra if key.replace("_", "-") in OWN]
    if clash:
        raise ConfigError([f"slurm.extra.{key}: {OWN[key.replace('_', '-')]}" for key in clash])
    last = len(job.points) - 1
    limit = f"%{slurm.parallel}" if slurm.parallel else ""
    kind = "aftercorr" if job.task_by_task else "afterok"
    optional = {
        "array": f"0-{last}{limit}" if job.is_array else None,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node or None,
        "mem": slurm.mem,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "dependency": f"{kind}:{':'.join(job.after)}" if job.after else None,
        "kill-on-invalid-dep": "yes" if job.after else None,
    }
    log = job.job_dir / ("slurm_%a.log" if job.is_array else "slurm.log")
    options: dict[str, str | None] = {
        "job-name": slurm.job_name or default_name(job),
        "nodes": str(slurm.nodes),
        "ntasks-per-node": str(tasks_per_node(slurm)),
        **{name: str(value) for name, value in optional.items() if value is not None},
        "chdir": str(job.cwd),
        "output": _literal_percent(str(log), keep="%a"),
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR2@{slurm.warn}",
    }
    for key, value in slurm.extra.items():
        if value is not False:
            options[key.replace("_", "-")] = None if value is True else str(value)
    return options


def default_name(job: Job) -> str:
    """The job's name in the queue: the folder it works in."""
    folder = job.job_dir.parent if job.job_dir.name.startswith("launch") else job.job_dir
    return f"{job.command}-{folder.name}" if folder.name else job.command


def _literal_percent(path: str, keep: str) -> str:
    """sbatch replaces %j and its like in a path; a folder's own per cent sign is doubled."""
    head, found, tail = path.rpartition(keep)
    return head.replace("%", "%%") + found + tail if found else path.replace("%", "%%")


def batch_file(job: Job, slurm: SlurmSettings) -> str:
    """The text of JOB_DIR/job.sbatch."""
    lines = [
        f"#SBATCH --{name}" + ("" if value is None else f"={_sbatch_value(value)}")
        for name, value in request(job, slurm).items()
    ]
    cpus = f" --cpus-per-task={slurm.cpus_per_task}" if slurm.cpus_per_task else ""
    python = slurm.python or shlex.quote(sys.executable)
    start = shlex.quote(str(job.job_dir / "code" / "start.py"))
    return _BATCH.substitute(
        options="\n".join(lines),
        job_dir=shlex.quote(str(job.job_dir)),
        number="_${SLURM_ARRAY_TASK_ID:-0}" if job.is_array else "",
        max_restarts=slurm.max_restarts,
        grace=grace_seconds(slurm),
        exclude_failed=slurm.exclude_failed,
        nodes=slurm.nodes,
        exclude=f"{slurm.exclude}," if slurm.exclude else "",
        setup="\n".join(slurm.setup) or ":",
        run=f'{python} -u {start} "$$job_dir" "$$point"'.replace("$$", "$"),
        cpus=cpus,
        threads=slurm.cpus_per_task or "",
    )


def _sbatch_value(value: str) -> str:
    """Quoted as sbatch reads its own lines: like a shell."""
    return shlex.quote(value)


_BATCH = Template(
    r"""#!/bin/bash
# Written by dino-kd launch. `sbatch THIS_FILE` does the same.
$options

job_dir=$job_dir
point=$${SLURM_ARRAY_TASK_ID:-0}
id=$$SLURM_JOB_ID   # of the last task of an array this is the array's id: never requeue that one
[ -z "$$SLURM_ARRAY_JOB_ID" ] || id=$${SLURM_ARRAY_JOB_ID}_$$SLURM_ARRAY_TASK_ID
life=$${SLURM_RESTART_COUNT:-0}
max_restarts=$max_restarts grace=$grace
outcome_file=$$job_dir/outcome$number
lives_file=$$job_dir/lives$number
say() { printf '%s launch: %s\n' "$$(date '+%F %T')" "$$*"; }

# --- the beginning of a life
before=$$(tail -n 1 "$$lives_file" 2>/dev/null)
say "life $$life of job $$id on $$SLURM_JOB_NODELIST"
echo "job=$${SLURM_ARRAY_JOB_ID:-$$SLURM_JOB_ID} life=$$life nodes=$$SLURM_JOB_NODELIST" \
     "start=$$(date '+%FT%T')" >>"$$lives_file" || { say "cannot write $$lives_file"; exit 2; }
if [ "$$life" -gt $$max_restarts ]; then
    say "restart limit reached: slurm.max_restarts=$$max_restarts"
    echo "failed restart limit reached" >"$$outcome_file"
    exit 1
fi
rm -f "$$outcome_file"
# Nodes that failed in the life before are avoided from the next requeue on.
if [ "$$life" -gt 0 ] && [ $exclude_failed -gt 0 ]; then
    nodes=$${before#*nodes=}; nodes=$${nodes%% *}
    [ -z "$$nodes" ] || sinfo -h -N -n "$$nodes" -o '%N %T' 2>/dev/null |
        awk '$$2 ~ /^(down|drain|fail)/ { print $$1 }' | sort -u >>"$$job_dir/failed_nodes"
fi

srun_pid='' asked='' stopped=''
trap 'asked=$${asked:-$$SECONDS}; [ -z "$$srun_pid" ] || kill -USR2 "$$srun_pid" 2>/dev/null' USR2
trap 'stopped=1' TERM

$setup

MASTER_ADDR=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT
threads=$threads
[ -z "$$threads" ] || export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$threads}

# --- the processes; below 32768 no port is handed out by the kernel itself
for attempt in 0 1 2 3 4; do
    MASTER_PORT=$$((10000 + (SLURM_JOB_ID * 7 + life * 131 + attempt * 1009) % 20000))
    while (exec 3<>"/dev/tcp/$$MASTER_ADDR/$$MASTER_PORT") 2>/dev/null; do
        MASTER_PORT=$$((MASTER_PORT + 1))
    done
    [ -z "$$asked" ] || break
    # stdin is no terminal; --kill-on-bad-exit: a failed process would leave the others waiting
    srun$cpus --kill-on-bad-exit=1 --unbuffered --label \
        $run </dev/null &
    srun_pid=$$!
    [ -z "$$asked" ] || kill -USR2 $$srun_pid
    hung=''
    while kill -0 $$srun_pid 2>/dev/null; do
        if [ -z "$$asked" ]; then
            wait $$srun_pid; status=$$?
        elif [ $$((SECONDS - asked)) -ge $$grace ]; then
            hung=1
            break
        else
            sleep 1 & wait $$!
        fi
    done
    if [ -z "$$hung" ]; then   # a trap may have interrupted the last wait
        wait $$srun_pid 2>/dev/null; again=$$?
        [ $$again = 127 ] || status=$$again
    fi
    [ "$$status" = 98 ] || break
    say "port $$MASTER_PORT was taken in the meantime; trying another"
done

# --- the end of a life
outcome=$$(cat "$$outcome_file" 2>/dev/null)
state=$$(squeue -h -j "$$id" -o %T 2>/dev/null | head -n 1)
if [ -n "$$hung" ]; then
    say "the processes did not end within $$grace s; going back to the last checkpoint"
elif [ "$$status" = 0 ] && [ "$$outcome" = "done" ]; then
    say "done"
    exit 0
elif [ -n "$$stopped" ] || { [ -n "$$state" ] && [ "$$state" != RUNNING ]; }; then
    say "stopped by Slurm ($${state:-unknown state}), outcome: $${outcome:-killed}"
    exit 143
elif [ -z "$$asked" ] && [ "$$outcome" != interrupted ]; then
    case $$status in
        0) say "failed: the processes ended without an outcome"; status=1 ;;
        12[89]|1[3-9][0-9]) say "failed: a process died of signal $$((status - 128))" \
                                "($$(kill -l $$((status - 128)) 2>/dev/null))" ;;
        *) say "failed: exit code $$status" ;;
    esac
    [ -n "$$outcome" ] || echo "failed code=$$status" >"$$outcome_file"
    exit "$$status"
elif [ "$$outcome" != interrupted ] && [ "$${outcome%% *}" = failed ]; then
    say "$$outcome"   # it failed by itself while it was asked to end: no requeue
    exit 1
fi
if [ "$$life" -ge $$max_restarts ]; then
    say "restart limit reached: slurm.max_restarts=$$max_restarts; launch it again to go on"
    echo "failed restart limit reached" >"$$outcome_file"
    exit 1
fi
failed=$$(sort -u "$$job_dir/failed_nodes" 2>/dev/null | head -n $exclude_failed)
left=$$(sinfo -h -N -p "$$SLURM_JOB_PARTITION" -o %N | sort -u | grep -vcxF "$${failed:-none}")
[ "$$left" -ge $nodes ] || failed=''   # better a node that failed than none
failed=$$(printf '%s' "$$failed" | paste -sd,)
say "requeue after $${outcome:-no answer}"
trap '' TERM   # Slurm ends this job when it takes the requeue: scontrol must not die of that first
for attempt in 1 2 3 4 5; do
    if [ -n "$$failed" ]; then
        say "avoiding $$failed from now on"
        excluded=$exclude$$failed
        scontrol requeuehold "$$id" && scontrol update "JobId=$$id" "ExcNodeList=$$excluded" &&
            scontrol release "$$id" && exit 0
        scontrol release "$$id" 2>/dev/null && exit 0
    fi
    scontrol requeue "$$id" && exit 0
    sleep 5
done
say "Slurm did not take the requeue; launch the same command again to go on"
exit 75
"""
)
