"""What a run directory keeps of its settings."""

from __future__ import annotations

import pytest

from dino_kd.rundir import with_absolute_path


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("pictures", "{here}/pictures"),
        ("folder:pictures", "folder:{here}/pictures"),
        ("folder:/elsewhere", "folder:/elsewhere"),
        ("webdataset:shards/{000..099}.tar", "webdataset:{here}/shards/{{000..099}}.tar"),
        ("webdataset:/shards/*.tar", "webdataset:/shards/*.tar"),
        ("synthetic:textures:train:8", "synthetic:textures:train:8"),
    ],
)
def test_relative_paths_are_kept_absolute(given, kept, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_absolute_path(given) == kept.format(here=tmp_path)
