"""`make bench`: which scripts it runs; it writes nothing but the part between its markers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "everything.py"


@pytest.fixture(scope="module")
def everything():
    spec = importlib.util.spec_from_file_location("everything", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_is_run(everything):
    assert {"loss", "knn", "linear", "logreg", "teacher_cache"} <= set(everything.scripts())
    assert not {"everything", "plain", "timing"} & set(everything.scripts())


def test_results_are_written_between_the_markers_of_the_page(everything):
    page = f"before\n{everything.BEGIN}\nold\n{everything.END}\nafter\n"
    new = everything.between_markers(page, "x2.0")
    assert new == f"before\n{everything.BEGIN}\nx2.0\n{everything.END}\nafter\n"
    with pytest.raises(SystemExit, match="has no lines"):
        everything.between_markers("nothing", "x2.0")
    everything.between_markers((ROOT / "docs" / "results.md").read_text(), "x2.0")


def test_an_unknown_name_is_answered_with_the_known_ones():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "speed"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no benchmark speed" in done.stderr
    assert "teacher_cache" in done.stderr


def test_a_failing_benchmark_fails_the_whole_and_writes_nothing(everything, tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "HERE", tmp_path)
    (tmp_path / "good.py").write_text("print('x3.0')")
    (tmp_path / "bad.py").write_text("raise SystemExit('no')")
    page = tmp_path / "page.md"
    page.write_text(f"{everything.BEGIN}\n{everything.END}\n")
    monkeypatch.setattr(sys, "argv", ["everything.py", "--write", str(page)])
    with pytest.raises(SystemExit, match="failed: bad"):
        everything.main()
    assert "x3.0" not in page.read_text()
    (tmp_path / "bad.py").unlink()
    everything.main()
    assert "`python benchmarks/good.py`" in page.read_text()
    assert "x3.0" in page.read_text()
