"""One process of a job: Slurm's variables become torch's, the command runs, the outcome is kept.

Runs from the job's own copy of the code (`JOB_DIR/code/start.py JOB_DIR POINT`), under srun as
under `launch.local`, with the same variables, signals and exit codes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dino_kd.errors import EXIT_INTERRUPTED
from dino_kd.files import write_text

from .job import DONE, FAILED, INTERRUPTED, Job, load_job

EXIT_PORT_TAKEN = 98  # the number of EADDRINUSE: the batch file tries another port
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


def work(run_command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run the command of ``[JOB_DIR, POINT]``; 0 when it is done or has saved after a signal.

    A command that handles the signals itself (pretrain) saves first. One that does not, and every
    process before it listens, holds nothing worth saving and ends at once.
    """
    job, point = load_job(Path(argv[0])), int(argv[1])

    def end_at_once(number: int, frame: object) -> None:
        with contextlib.suppress(Exception):
            _keep(job, point, INTERRUPTED)
        os._exit(EXIT_INTERRUPTED)

    for number in _SIGNALS:
        signal.signal(number, end_at_once)
    describe_processes()
    code = _guarded(run_command, [job.command, *job.points[point].argv])
    for number in _SIGNALS:  # it is over: what comes now only asks for the end
        signal.signal(number, signal.SIG_IGN)
    if os.environ.get("RANK", "0") == "0" and code != EXIT_PORT_TAKEN:
        outcomes = {0: DONE, EXIT_INTERRUPTED: INTERRUPTED}
        _keep(job, point, outcomes.get(code, f"{FAILED} code={code}"))
    # Not 75: srun would end the others, which may still be closing their files.
    return 0 if code == EXIT_INTERRUPTED else code


def leave(code: int) -> NoReturn:
    """End this process at once, after what was registered for its end.

    Everything is saved by now. Python would take torch's modules apart first: a second of
    processor time in every process of every life, while Slurm counts the seconds to its kill.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _guarded(run_command: Callable[[list[str]], int], argv: list[str]) -> int:
    """The command's exit code; a taken port is told from other crashes."""
    try:
        return run_command(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        traceback.print_exc()
        taken = "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
        return EXIT_PORT_TAKEN if taken else 1


def _keep(job: Job, point: int, outcome: str) -> None:
    write_text(job.path("outcome", point), outcome + "\n")


def describe_processes() -> None:
    """Set RANK and its like for torch from what srun says; MASTER_ADDR comes from the batch file.

    A single process stays alone: without RANK no process group is made. CUDA_VISIBLE_DEVICES is
    Slurm's; a process that sees one device of several takes that one.
    """
    env = os.environ
    if "SLURM_PROCID" not in env or int(env.get("SLURM_NTASKS", "1")) < 2:
        return
    here = tasks_on_node(env.get("SLURM_TASKS_PER_NODE", "1"), int(env.get("SLURM_NODEID", "0")))
    local_rank = int(env["SLURM_LOCALID"])
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_NTASKS"],
        LOCAL_RANK=str(0 if len(visible) == 1 else local_rank),
        LOCAL_WORLD_SIZE=str(here),
    )


def tasks_on_node(text: str, node: int) -> int:
    """Tasks of the node number `node`, from Slurm's form such as ``2(x3),1``."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert found, text
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[node]
