"""What a run that waits for its images is told."""

from __future__ import annotations

import pytest

from dino_kd import presets
from dino_kd.presets import loading_advice
from dino_kd.schema import DistillConfig, FinetuneConfig, PretrainConfig


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets.os, "sched_getaffinity", lambda _: range(8), raising=False)


def test_pretraining_names_workers_pack_and_crops() -> None:
    told = loading_advice(PretrainConfig(data={"train": "x", "num_workers": 2}, run_dir="r"))
    assert "raise data.num_workers from 2 to 7" in told
    assert "data.pack=auto" in told
    assert "renderer" not in told
    assert "crops.num_local_crops" in told


def test_what_is_set_already_is_not_advised() -> None:
    data = {"train": "x", "pack": "auto", "renderer": "pillow"}
    told = loading_advice(PretrainConfig(data=data, run_dir="r"))
    assert told.startswith("set data.renderer=native")
    assert "num_workers" not in told
    assert "pack" not in told


def test_other_runs_name_their_own_settings() -> None:
    tuned = FinetuneConfig(backbone="b", train="x", test="y", run_dir="r", num_workers=0)
    told = loading_advice(tuned)
    assert told.startswith("raise num_workers from 0 to 7")
    assert "pack" not in told
    distilled = DistillConfig(
        data={"train": "x", "num_workers": 0}, teacher={"backbone": "b"}, run_dir="r"
    )
    assert "data.num_workers" in loading_advice(distilled)
    assert "crops" not in loading_advice(distilled)


@pytest.mark.parametrize(
    ("wanted", "used", "device", "words"),
    [
        ("auto", "torch", "cpu", "install a C++ compiler"),
        ("auto", "torch", "cuda", "install a C++ compiler"),
        ("torch", "torch", "cpu", "set data.renderer=native, several times as fast as torch"),
        ("device", "device", "cpu", "set data.renderer=auto, many times as fast as device"),
    ],
)
def test_the_renderer_in_use_decides(wanted: str, used: str, device: str, words: str) -> None:
    settings = PretrainConfig(data={"train": "x", "renderer": wanted}, run_dir="r")
    assert loading_advice(settings, used, device).startswith(words)


@pytest.mark.parametrize(("wanted", "used"), [("auto", "native"), ("device", "device")])
def test_nothing_is_said_of_a_renderer_that_suits(wanted: str, used: str) -> None:
    settings = PretrainConfig(data={"train": "x", "renderer": wanted}, run_dir="r")
    told = loading_advice(settings, used, "cuda")
    assert "renderer" not in told
    assert "compiler" not in told
