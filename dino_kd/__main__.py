"""`python -m dino_kd COMMAND ...` and `torchrun ... -m dino_kd COMMAND ...`."""

from __future__ import annotations

import sys

from dino_kd.cli import main

sys.exit(main())
