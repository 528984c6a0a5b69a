"""Run any command of dino-kd as a Slurm job that survives preemption.

python -m launch.slurm pretrain pretrain/folder data.train=/images run_dir=runs/a slurm.nodes=2
"""

from __future__ import annotations

import sys

from . import command


def main(argv: list[str]) -> int:
    """`dino-kd launch ...`; returns the exit code."""
    return command.main(argv)


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
