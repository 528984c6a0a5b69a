"""The code as it is now, copied beside the job: a requeued life runs what the first one ran."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import dino_kd
from dino_kd.files import disk_error

PACKAGES = ("dino_kd", "eval", "launch")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.so")

# Python puts the folder of the script first on its path, so that the copy wins over what is
# installed and over the folder that the job runs in.
START = '''"""Starts one process of a job from this copy of the code."""

import sys

from dino_kd import cli
from launch.worker import leave, work

if __name__ == "__main__":
    leave(work(cli.main, sys.argv[1:]))
'''


def save_code(job_dir: Path) -> None:
    """Copy the packages and configs to JOB_DIR/code, complete or not at all.

    Raises UserError when the disk is full.
    """
    final, temporary = job_dir / "code", job_dir / f".code.tmp-{os.getpid()}"
    source = Path(dino_kd.__file__).resolve().parents[1]
    try:
        for name in PACKAGES:
            shutil.copytree(source / name, temporary / name, ignore=_IGNORED)
        if (source / "configs").is_dir():  # in a wheel they are inside dino_kd
            shutil.copytree(source / "configs", temporary / "configs", ignore=_IGNORED)
        (temporary / "start.py").write_text(START, encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except shutil.Error as error:  # a list of (source, target, reason), without the number
        full = "No space left" in str(error)
        raise disk_error(final, OSError(28 if full else 5, str(error.args[0][0][2]))) from error
    except OSError as error:
        raise disk_error(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit() -> str:
    """The commit of the code, with a + for uncommitted changes; empty outside a checkout."""
    source = Path(dino_kd.__file__).resolve().parents[1]
    git = ["git", "-C", str(source)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        status = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    if head.returncode or not (source / ".git").exists():
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
