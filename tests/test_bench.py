"""`dino-kd bench` on the smallest run: what it finds, prints, writes, and refuses."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from dino_kd import bench as story
from dino_kd import cli, presets
from dino_kd.bench import bench, prepared
from dino_kd.config import load_settings
from dino_kd.engine.signals import StopFlag
from dino_kd.engine.speed import Peak
from dino_kd.schema import BenchConfig
from dino_kd.tasks.dino import DinoTask
from tests.tiny import TINY, write_images
from tests.two_ranks import on_two_ranks


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def words(images, *more):
    return [*TINY, f"data.train={images}", "bench.seconds=0.3", "bench.warmup=1", *more]


def settings(images, *more):
    return load_settings(BenchConfig, words(images, *more), command="bench")


@pytest.fixture(scope="module")
def quick_peak():
    """The product of two large matrices takes a second on one core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "peak_of", lambda *_: Peak(1e12, "assumed"))
        yield


@pytest.fixture
def slow_loader(monkeypatch):
    real = story.Timed.batches

    def slowly(self):
        for batch in real(self):
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(story.Timed, "batches", slowly)


@pytest.fixture
def slow_step(monkeypatch):
    """And a loader that makes one batch and gives it again and again."""
    real, loader = DinoTask.after_step, story.Timed.batches

    def repeatedly(self):
        first = next(loader(self))
        while True:
            yield first

    def slowly(self, *args, **more):
        time.sleep(0.2)
        real(self, *args, **more)

    monkeypatch.setattr(DinoTask, "after_step", slowly)
    monkeypatch.setattr(story.Timed, "batches", repeatedly)


@pytest.mark.usefixtures("quick_peak", "slow_loader")
def test_a_slow_loader_is_found(images):
    numbers = bench(settings(images))
    assert numbers["bottleneck"] == "loader"
    assert numbers["waiting"] > 0.5
    rates = numbers["images_per_s"]
    assert rates["loader"] < 16 / 0.2  # a batch of 16 every 0.2 s at best
    assert rates["together"] < 16 / 0.2 < rates["step"]


def test_free_cores_are_named_before_anything_else(images, monkeypatch):
    monkeypatch.setattr(presets, "loader_processes", lambda wanted, _: 7 if wanted == "auto" else 0)
    assert presets.loading_advice(settings(images)).startswith("raise data.num_workers from 0 to 7")
    every = settings(images, "data.num_workers=auto")
    assert "num_workers" not in presets.loading_advice(every)


@pytest.mark.usefixtures("quick_peak", "slow_step")
def test_a_slow_step_is_found(images):
    numbers = bench(settings(images))
    assert numbers["bottleneck"] == "step"
    assert numbers["waiting"] < 0.2
    assert numbers["images_per_s"]["step"] < 16 / 0.2 < numbers["images_per_s"]["loader"]


@pytest.mark.usefixtures("quick_peak")
def test_the_table_and_the_file_hold_the_same_numbers(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *words(images, "bench.output=speed")]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "speed" / "bench.json").read_text())
    assert numbers["sentence"] in printed
    assert f"{numbers['images_per_s']['step']:,.4g} images/s" in printed
    assert numbers["flops_per_step_and_process"] > 0
    assert numbers["peak_memory_bytes"] > 50 * 2**20
    assert numbers["settings"]["optim"]["batch_size"] == 16
    assert [p.name for p in tmp_path.iterdir()] == ["speed"]  # no run directory


@pytest.mark.usefixtures("quick_peak")
def test_without_output_nothing_is_written_and_a_run_can_be_measured(
    images, tmp_path, monkeypatch, capsys
):
    """A run directory is a CONFIG here too, and stays as it is."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"seed: 3\ndata: {{train: {images}}}\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", str(run), *words(images)]) == 0
    assert "waiting for images" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert [p.name for p in run.iterdir()] == ["config.yaml"]


def test_flops_of_a_step_grow_with_its_crops(images):
    """Twice the local crops: the count grows by exactly what two more crops cost."""

    def flops(crops):
        chosen = settings(images, f"crops.num_local_crops={crops}")
        timed = prepared(chosen, torch.device("cpu"), StopFlag())
        held = next(timed.batches()).crops
        return story.count_flops(lambda: timed.run(iter([held]), steps=1))

    none, two, four = (flops(crops) for crops in (0, 2, 4))
    assert four - two == two - none > 0


@pytest.mark.usefixtures("quick_peak")
def test_rendering_on_the_device_is_the_loaders_part_not_the_steps(images):
    """Its matrix products are no work of the network."""
    elsewhere, here = (bench(settings(images, f"data.renderer={n}")) for n in ("torch", "device"))
    assert here["flops_per_step_and_process"] == elsewhere["flops_per_step_and_process"]
    assert here["images_per_s"]["loader"] > 0


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["bench.secnds=3"], ["bench.secnds", "bench.seconds"]),
        (["bench.seconds=0"], ["bench.seconds", "> 0"]),
        (["data.train=/nowhere"], ["/nowhere"]),
        (["crops.global_size=33"], ["33 px", "patches of 8 px"]),
        (["optim.batch_size=100"], ["40 images", "optim.batch_size"]),
    ],
    ids=["misspelt", "no time", "no images", "patch", "batch"],
)
def test_mistakes_are_told_before_anything_is_measured(images, capsys, more, parts):
    keys = {word.split("=")[0] for word in more}
    argv = [word for word in words(images) if word.split("=")[0] not in keys] + more
    assert cli.main(["bench", *argv]) != 0
    told = capsys.readouterr()
    assert all(part in told.err for part in parts), told.err
    assert "images/s" not in told.out


def test_the_config_of_another_command_is_refused(capsys):
    assert cli.main(["bench", "distill/cifar10_cpu"]) != 0
    assert "settings of dino-kd distill, not of dino-kd bench" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_peak")
def test_a_signal_ends_it_in_words(images, monkeypatch, capsys):
    real = story.measure_loader

    def interrupted(*args):
        found = real(*args)
        args[1].stop.request("received SIGTERM")
        return found

    monkeypatch.setattr(story, "measure_loader", interrupted)
    assert cli.main(["bench", *words(images)]) != 0
    assert "received SIGTERM; nothing was written" in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_measure_together(images, tmp_path, monkeypatch):
    """Both return the main process's numbers, of the whole batch."""
    monkeypatch.setenv("BENCH_TEST_IMAGES", str(images))
    monkeypatch.setenv("BENCH_TEST_OUTPUT", str(tmp_path))
    on_two_ranks(bench_as_rank)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["processes"] == 2
    assert found[0]["images_per_s"]["together"] > 0


def bench_as_rank(rank):
    numbers = bench(settings(os.environ["BENCH_TEST_IMAGES"]))
    Path(os.environ["BENCH_TEST_OUTPUT"], f"{rank}.json").write_text(json.dumps(numbers))
