"""The same jobs, sweeps and pipelines on this machine, without Slurm.

    python -m launch.local pretrain pretrain/folder data.train=/images run_dir=runs/a \\
        slurm.tasks_per_node=2
"""

from __future__ import annotations

import sys

from . import command


def main(argv: list[str]) -> int:
    """`dino-kd launch --local ...`; returns the exit code."""
    return command.main(argv, here=True)


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
