"""Runs with `optim.shard`: the same as without, and each can go on as the other."""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dino_kd.config import load_settings
from dino_kd.distributed import on_main, process_group
from dino_kd.engine.checkpoint import list_checkpoints, load_checkpoint
from dino_kd.errors import ConfigError
from dino_kd.pretrain import pretrain
from dino_kd.pretrained import load_backbone
from dino_kd.schema import PretrainConfig
from tests.tiny import TINY, read_metrics, without_times, write_images
from tests.two_ranks import cpus_can_shard, on_two_ranks

RECIPE = [*TINY, "model.drop_path=0", "log.save_every=4", "log.keep_checkpoints=5"]
MONITOR = ["monitor.every=4", "monitor.k=1", "monitor.max_images=5"]


def run(folder, name, *words):
    images = folder / "images"
    argv = [*RECIPE, f"data.train={images}", f"run_dir={folder / name}", *words]
    argv += [*MONITOR, f"monitor.train={images}", f"monitor.test={images}"]
    return pretrain(load_settings(PretrainConfig, argv, command="pretrain"))


def cut_short(folder, source, name):
    """A copy of a run that ends with its checkpoint of step 4."""
    shutil.copytree(folder / source, folder / name)
    shutil.rmtree(folder / name / "checkpoints" / "step_00000008")


def both_ways(folder, rank):
    """Two processes: sharded and not, and each continued from step 4 in both ways."""
    cnn = ["model.backbone=resnet18_cifar", "model.args={}", "model.patch_size=null"]
    with process_group("cpu"):
        if not cpus_can_shard():
            return
        with pytest.raises(ConfigError, match=r"optim\.shard: resnet18_cifar has no transformer"):
            run(folder, "cnn", "optim.shard=true", *cnn)
        run(folder, "sharded", "optim.shard=true")
        run(folder, "ddp")
        for source, name, word in (
            ("sharded", "sharded_again", "optim.shard=true"),
            ("sharded", "ddp_from_sharded", "optim.shard=false"),
            ("ddp", "sharded_from_ddp", "optim.shard=true"),
        ):
            on_main(functools.partial(cut_short, folder, source, name))
            run(folder, name, "resume=true", word)
    (folder / f"threads_{rank}").write_text(" ".join(threads_of_the_system()))


def threads_of_the_system():
    """Names of this process's threads as Linux knows them, PyTorch's among them."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """And one process: the whole run, and the rest of the sharded one."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images")
    on_two_ranks(functools.partial(both_ways, folder))
    if not (folder / "sharded").exists():
        pytest.skip("this version of PyTorch cannot shard on CPUs")
    run(folder, "alone")
    cut_short(folder, "sharded", "alone_from_sharded")
    run(folder, "alone_from_sharded", "resume=true", "optim.shard=false")
    return folder


def final(run_dir):
    state = load_checkpoint(run_dir / "checkpoints")[0]
    assert state["step"] == 8
    return state


@pytest.mark.dist
@pytest.mark.parametrize(
    "name",
    ["sharded", "ddp", "sharded_again", "ddp_from_sharded", "sharded_from_ddp",
     "alone_from_sharded"],
)  # fmt: skip
def test_every_way_ends_where_one_process_does(runs, name):
    found, expected = final(runs / name), final(runs / "alone")
    assert found.keys() == expected.keys()
    assert found["task"].keys() == expected["task"].keys()
    for key, value in expected["task"].items():
        torch.testing.assert_close(found["task"][key], value, rtol=1e-2, atol=2e-4, msg=key)
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for number, moments in expected["optimizer"]["state"].items():
        for key, value in moments.items():
            assert found["optimizer"]["state"][number][key].shape == value.shape
    rows, reference = (read_metrics(runs / which) for which in (name, "alone"))
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in reference], rel=1e-4
    )
    assert [row.get("knn_top1") for row in rows] == [row.get("knn_top1") for row in reference]
    assert [row["step"] for row in rows if "knn_top1" in row] == [4, 8]


@pytest.mark.dist
def test_a_resumed_sharded_run_is_bit_equal(runs):
    again, whole = final(runs / "sharded_again"), final(runs / "sharded")
    for key, value in whole["task"].items():
        assert torch.equal(again["task"][key], value), key
    for number, moments in whole["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(again["optimizer"]["state"][number][key], value), (number, key)
    rows, reference = (
        without_times(read_metrics(runs / name)) for name in ("sharded_again", "sharded")
    )
    assert rows == reference


@pytest.mark.dist
def test_backbone_and_heads_of_a_sharded_run_are_those_of_its_checkpoint(runs):
    state = final(runs / "sharded")["task"]
    net = load_backbone(runs / "sharded").net.state_dict()
    for name, value in net.items():
        assert torch.equal(value, state[f"teacher.backbone.net.{name}"]), name
    heads = load_file(runs / "sharded" / "heads.safetensors")
    assert heads.keys() == load_file(runs / "alone" / "heads.safetensors").keys()
    assert torch.equal(heads["student.last_layer"], state["student.head.last_layer"])
    log = (runs / "sharded" / "train.log").read_text()
    assert "on 2 x cpu, shared out over them in fp32" in log


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_nothing_of_the_group_runs_on_after_its_end(runs):
    """Its threads could meet the interpreter's end, and abort the process after all was done."""
    for rank in (0, 1):
        names = (runs / f"threads_{rank}").read_text().split()
        assert names
        assert not [name for name in names if "gloo" in name or "tcpstore" in name]


def test_a_single_process_is_refused_before_anything_is_written(tmp_path):
    write_images(tmp_path / "images", 4)
    with pytest.raises(ConfigError, match=r"optim\.shard: .* single one"):
        run(tmp_path, "run", "optim.shard=true")
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_a_network_without_blocks_is_refused_before_anything_is_written(runs):
    assert not (runs / "cnn").exists()  # `both_ways` has seen the error on both processes
