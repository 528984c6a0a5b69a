"""What every command sets for its own process before torch is imported; docs/results.md, bench.md.

A variable that the environment already names is left as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection, Mapping

ENVIRONMENT = {
    # Threads that wait must soon sleep: with a busy process beside them, OpenMP's default of
    # spinning for milliseconds made training 2.6 times slower on 2 cores. Asleep at once, they wake
    # too late for the small operations between two products. So they spin for some 10 microseconds.
    # The second name is GNU's, which wins over the first.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
    # Freed memory stays with the process for the next step, which allocates the same again: a step
    # that has to ask the system for it page by page spends up to a tenth of its time on that.
    # These are for child processes; glibc reads them when a process begins.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # larger blocks go back at once; glibc's largest value
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
}
# malloc.h: the option's number, and its value as an int, in which -1 stands for never.
_MALLOPT = {"MALLOC_MMAP_THRESHOLD_": (-3, 2**25), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}


def with_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment`, and `ENVIRONMENT` where it says nothing.

    A given wait policy stands alone, and so do glibc's tunables of malloc.
    """
    defaults = dict(ENVIRONMENT)
    if "OMP_WAIT_POLICY" in environment:
        del defaults["GOMP_SPINCOUNT"]
    if "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        defaults = {name: value for name, value in defaults.items() if name not in _MALLOPT}
    return {**defaults, **environment}


def prepare_process() -> None:
    """Set the defaults for this process and its children. Call it before torch is imported."""
    added = {k: v for k, v in with_defaults(os.environ).items() if k not in os.environ}
    os.environ.update(added)
    _set_malloc(added)


def _set_malloc(names: Collection[str]) -> None:
    """The variables of that name for this process, which glibc no longer reads; nothing elsewhere.

    musl and others have no `mallopt`, and an allocator that was loaded before glibc's ignores it.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (option, value) in _MALLOPT.items():
        if mallopt is not None and name in names:
            mallopt(option, value)
