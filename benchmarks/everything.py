"""Run every benchmark in turn and keep what they print: `make bench`.

python benchmarks/everything.py                         to the screen
python benchmarks/everything.py --write docs/results.md and between the markers of that page
python benchmarks/everything.py knn loss                only these

Each script is a process of its own, so that one's memory and threads do not disturb the next, with
the environment that `dino-kd` sets for itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from dino_kd.files import write_text
from dino_kd.process import with_defaults

HERE = Path(__file__).resolve().parent
NOT_BENCHMARKS = {"everything", "plain", "timing"}
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"


def scripts() -> list[str]:
    """The names of all benchmarks of this folder."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_BENCHMARKS)


def machine() -> str:
    """Commit, processor and versions, for people."""
    import torch

    found = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    commit = found.stdout.strip() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return (
        f"commit {commit}, {os.cpu_count()} x {cpu}, {device}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at the start"
    )


def run(name: str) -> tuple[str, float, int]:
    """What one script printed, its seconds, and its exit status."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py")],
        capture_output=True,
        text=True,
        check=False,
        env=with_defaults(os.environ),
    )
    seconds = time.perf_counter() - started
    told = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return told.rstrip(), seconds, done.returncode


def between_markers(page: str, text: str) -> str:
    """The page with `text` between its markers. Raises SystemExit when it has none."""
    if BEGIN not in page or END not in page:
        raise SystemExit(f"the page has no lines '{BEGIN}' and '{END}' to write between")
    head, rest = page.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(scripts())}; default: all")
    parser.add_argument("--write", type=Path, help="a page with the two markers")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(scripts()):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(scripts())}")
    about = machine()
    print(about, flush=True)
    parts, failed = [about], []
    for name in asked.names or scripts():
        told, seconds, status = run(name)
        print(f"\n== {name} ({seconds:.0f} s)\n{told}", flush=True)
        parts.append(f"`python benchmarks/{name}.py`, {seconds:.0f} s:\n\n```\n{told}\n```")
        failed += [name] if status else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if asked.write:
        page = asked.write.read_text(encoding="utf-8")
        write_text(asked.write, between_markers(page, "\n\n".join(parts)))


if __name__ == "__main__":
    main()
