"""Pillow's warnings are ignored while it reads; the process's own filters come through unharmed."""

from __future__ import annotations

import os
import threading
import warnings

import pytest

from dino_kd.data.quiet import pillow_warnings_ignored


def warn_as(module: str) -> None:
    warnings.warn_explicit("damaged", UserWarning, f"{module}.py", 1, module=module)


def test_only_pillow_is_quiet() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pillow_warnings_ignored():
            warn_as("PIL.Image")
            warn_as("torch.nn")
        warn_as("PIL.Image")
    assert [w.filename for w in heard] == ["torch.nn.py", "PIL.Image.py"]


def test_threads_that_overlap_leave_the_filters_as_they_were() -> None:
    """A enters, B enters, A leaves, B leaves: `catch_warnings` itself fails this."""
    before = list(warnings.filters)
    a_left, b_inside = threading.Event(), threading.Event()

    def b() -> None:
        with pillow_warnings_ignored():
            b_inside.set()
            a_left.wait(10)

    thread = threading.Thread(target=b)
    with pillow_warnings_ignored():
        thread.start()
        assert b_inside.wait(10)
    inside = list(warnings.filters)
    a_left.set()
    thread.join()
    assert inside != before
    assert list(warnings.filters) == before


@pytest.mark.dist
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_in_the_middle_of_a_change_does_not_stop_the_child() -> None:
    from dino_kd.data import quiet

    with quiet._quiet.lock:  # as another thread might hold it
        child = os.fork()
        if child == 0:
            with pillow_warnings_ignored():
                os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
