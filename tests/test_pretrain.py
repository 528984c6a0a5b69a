"""The pretraining story end to end on tiny real JPEGs: results, resume, bad input, settings."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from dino_kd import cli, load_backbone
from dino_kd.config import load_settings
from dino_kd.describe import leaves
from dino_kd.engine.checkpoint import list_checkpoints, load_checkpoint
from dino_kd.engine.compilation import compiler_works
from dino_kd.errors import EXIT_INTERRUPTED, UserError
from dino_kd.pretrain import pretrain
from dino_kd.schema import LogregConfig, PretrainConfig, Settings
from tests.tiny import TINY, read_metrics, without_times, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def settings(images, run_dir, *more):
    words = [*TINY, f"data.train={images}", f"run_dir={run_dir}", *more]
    return load_settings(PretrainConfig, words, command="pretrain")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """One uninterrupted run of 8 steps that the others are compared with."""
    return pretrain(settings(images, tmp_path_factory.mktemp("whole") / "run"))


def final_state(run_dir):
    return load_checkpoint(run_dir / "checkpoints")[0]


def assert_same(a, b, where="state"):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def assert_same_run(run_dir, reference):
    assert_same(final_state(run_dir), final_state(reference))
    assert without_times(read_metrics(run_dir)) == without_times(read_metrics(reference))


# --- the result


def test_the_run_directory_holds_what_the_design_says(whole):
    names = {p.name for p in whole.iterdir()}
    expected = {
        "config.yaml", "env.json", "metrics.jsonl", "train.log", "checkpoints", "backbone",
        "heads.safetensors", "crops.png",
    }  # fmt: skip
    assert expected <= names
    assert [p.name for p in list_checkpoints(whole / "checkpoints")] == [
        "step_00000008",
        "step_00000006",
    ]


def test_every_step_is_logged_once_with_the_health_numbers(whole):
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 9))
    wanted = {
        "loss", "teacher_entropy", "kl", "prototypes_used", "center_norm", "rankme", "grad_norm",
        "momentum", "teacher_temp", "lr", "weight_decay", "images_per_s", "data_wait",
    }  # fmt: skip
    assert all(wanted <= row.keys() for row in rows)
    assert rows[0]["loss"] == pytest.approx(rows[0]["teacher_entropy"] + rows[0]["kl"], rel=1e-5)


def test_the_backbone_is_the_teacher_by_every_door(whole):
    """run directory = local-dir = torch.hub = the teacher in the checkpoint."""
    state = final_state(whole)["task"]
    prefix = "teacher.backbone.net."
    teacher = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    x = torch.rand(2, 3, 32, 32)
    by_run = load_backbone(whole)
    by_timm = timm.create_model(f"local-dir:{whole}/backbone", pretrained=True).eval()
    root = Path(__file__).parents[1]
    by_hub = torch.hub.load(str(root), "backbone", str(whole), source="local")
    with torch.no_grad():
        expected = by_timm(x)
        # up to rounding: of the last block ours computes the class token alone
        torch.testing.assert_close(by_run(x), expected)
        assert torch.equal(by_hub(x), by_run(x))
    for name, value in by_timm.state_dict().items():
        assert torch.equal(value, teacher[name]), name


def test_heads_are_saved_beside_it(whole):
    heads = load_file(whole / "heads.safetensors")
    state = final_state(whole)["task"]
    for name, value in heads.items():
        branch, _, rest = name.partition(".")
        assert torch.equal(value, state[f"{branch}.head.{rest}"])
    assert {name.split(".")[0] for name in heads} == {"teacher", "student"}


def test_the_stored_config_reloads_to_the_resolved_settings(images, tmp_path):
    run = pretrain(settings(images, tmp_path / "run", "head.num_prototypes=auto", "optim.length=2"))
    stored = load_settings(PretrainConfig, [str(run / "config.yaml")], command="pretrain")
    assert stored.head.num_prototypes == 1024
    assert stored.teacher.momentum == pytest.approx(0.95)
    log = (run / "train.log").read_text()
    assert "head.num_prototypes: 1024 (for 40 images)" in log


def test_the_monitor_scores_a_separable_set_and_lands_in_the_same_row(images, tmp_path):
    run = pretrain(
        settings(
            images, tmp_path / "run", f"monitor.train={images}", f"monitor.test={images}",
            "monitor.every=4", "monitor.k=3",
        )
    )  # fmt: skip
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "knn_top1" in row] == [4, 8]
    assert rows[-1]["knn_top1"] > 90  # every query is in the bank, and brightness is easy
    assert len(rows) == 8
    log = (run / "train.log").read_text()
    assert "40 of 40 test images are also in train: the score flatters" in log


def test_the_monitors_regression_equals_the_evaluator(images, tmp_path):
    """Its last score against `dino-kd logreg` on the finished run, and k-NN stays as it was."""
    from eval.logreg import score

    words = [f"monitor.train={images}", f"monitor.test={images}", "monitor.every=4"]
    plain = pretrain(settings(images, tmp_path / "plain", *words))
    run = pretrain(settings(images, tmp_path / "run", *words, "monitor.logreg_c=0.01"))
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "logreg_top1" in row] == [4, 8]
    assert [row.get("knn_top1") for row in rows] == [
        row.get("knn_top1") for row in read_metrics(plain)
    ]
    argv = [f"backbone={run}", f"train={images}", f"test={images}", "c=0.01", "cache=off"]
    result = score(load_settings(LogregConfig, argv, command="logreg"), torch.device("cpu"))
    assert rows[-1]["logreg_top1"] == pytest.approx(result["metrics"]["logreg_top1"])
    assert "logistic regression" in (run / "train.log").read_text()


def test_the_monitor_changes_nothing_else(images, tmp_path, whole):
    run = pretrain(
        settings(
            images, tmp_path / "run", f"monitor.train={images}", f"monitor.test={images}",
            "monitor.every=2", "monitor.logreg_c=0.01",
        )
    )  # fmt: skip
    assert_same(final_state(run)["task"], final_state(whole)["task"])


def test_loader_processes_and_micro_batches_keep_the_run(images, tmp_path, whole):
    run = pretrain(settings(images, tmp_path / "workers", "data.num_workers=2"))
    assert_same(final_state(run)["task"], final_state(whole)["task"])
    split = pretrain(settings(images, tmp_path / "split", "optim.accumulate=4"))
    for name, value in final_state(whole)["task"].items():
        torch.testing.assert_close(
            final_state(split)["task"][name], value, rtol=1e-2, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_packed_images_and_either_kind_of_workers_keep_the_run(images, tmp_path, whole, workers):
    more = [f"data.pack={tmp_path}/packs", "data.num_workers=2", f"data.workers={workers}"]
    run = pretrain(settings(images, tmp_path / "packed", *more))
    assert_same_run(run, whole)
    log = (run / "train.log").read_text()
    assert "data.pack: packing 40 images" in log


@pytest.mark.parametrize(
    "more",
    [
        ["model.backbone=resnet10t", "model.patch_size=null", "model.args={}", "model.drop_path=0"],
        ["model.in_chans=1", "crops.preset=non_rgb", "crops.global_size=32", "crops.local_size=16"],
        ["crops.global_size=[32, 48]", "crops.local_size=[16, 24]"],
        ["optim.name=lars", "teacher.buffers=ema", "head.batch_norm=true"],
        ["optim.name=sgd", "optim.lr_schedule=constant", "crops.num_local_crops=0"],
        ["optim.precision=bf16"],
    ],
    ids=["cnn", "grey", "non-square", "lars-bn", "sgd-two-crops", "bf16"],
)
def test_other_shapes_of_run_end_well(images, tmp_path, more):
    words = [w for w in TINY if w.split("=")[0] not in {m.split("=")[0] for m in more}]
    argv = [*words, f"data.train={images}", f"run_dir={tmp_path}/run", "optim.length=2", *more]
    argv.remove("optim.length=8")
    run = pretrain(load_settings(PretrainConfig, argv, command="pretrain"))
    assert all(row["loss"] > 0 for row in read_metrics(run))
    backbone = load_backbone(run)
    height, width = backbone.img_size
    with torch.no_grad():
        assert backbone(torch.rand(1, backbone.in_chans, height, width)).isfinite().all()


# --- how it is computed


def assert_close_runs(run_dir, reference):
    """The same names, and the same numbers up to rounding."""
    found, expected = (final_state(d)["task"] for d in (run_dir, reference))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_activation_checkpointing_changes_no_result(images, tmp_path, whole):
    run = pretrain(settings(images, tmp_path / "run", "model.checkpoint_activations=true"))
    assert_close_runs(run, whole)


def test_packed_crops_change_no_result_and_may_be_left_out_on_resume(images, tmp_path, monkeypatch):
    """Stopped after three steps and continued without; with the same stochastic depth."""
    deep = ["model.args={depth: 3, embed_dim: 32, num_heads: 2}", "model.drop_path=0.3"]
    usual = pretrain(settings(images, tmp_path / "usual", *deep))
    interrupt_at(3, monkeypatch)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="received SIGTERM"):
        pretrain(settings(images, run, *deep, "model.pack_crops=true"))
    monkeypatch.undo()
    pretrain(settings(images, run, *deep, "resume=true", "model.pack_crops=false"))
    assert_close_runs(run, usual)
    found, expected = ([row["loss"] for row in read_metrics(d)] for d in (run, usual))
    assert found == pytest.approx(expected, rel=1e-4)
    packed = pretrain(settings(images, tmp_path / "packed", *deep, "model.pack_crops=true"))
    assert_close_runs(packed, usual)


def test_packed_crops_of_another_network_are_refused_before_anything_is_written(images, tmp_path):
    cnn = ["model.backbone=resnet10t", "model.patch_size=null", "model.args={}"]
    with pytest.raises(UserError, match=r"model\.pack_crops: resnet10t is not"):
        pretrain(settings(images, tmp_path / "run", *cnn, "model.pack_crops=true"))
    assert not (tmp_path / "run").exists()


def test_compilation_on_demand_needs_a_compiler_before_anything_is_written(
    images, tmp_path, monkeypatch
):
    monkeypatch.setattr("dino_kd.engine.compilation.compiler_works", lambda device_type: False)
    with pytest.raises(UserError, match=r"optim\.compile: true, but"):
        pretrain(settings(images, tmp_path / "run", "optim.compile=on"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_and_resumes(images, tmp_path, whole, monkeypatch):
    """Stopped after three steps and continued without compilation, then compared."""
    if not compiler_works("cpu"):
        pytest.skip("no compiler here")
    interrupt_at(3, monkeypatch)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="received SIGTERM"):
        pretrain(settings(images, run, "optim.compile=on"))
    monkeypatch.undo()
    pretrain(settings(images, run, "resume=true", "optim.compile=off"))
    assert_close_runs(run, whole)


# --- resume


@pytest.mark.parametrize("stop_after", [1, 3, 5, 7])
def test_resume_after_a_signal_is_bit_exact(images, tmp_path, whole, stop_after, monkeypatch):
    """Weights, teacher, centre, optimiser and every row of metrics."""
    run_dir = tmp_path / "run"
    interrupt_at(stop_after, monkeypatch)
    with pytest.raises(UserError, match="received SIGTERM") as caught:
        pretrain(settings(images, run_dir))
    assert caught.value.exit_code == EXIT_INTERRUPTED
    monkeypatch.undo()
    pretrain(settings(images, run_dir, "resume=true"))
    assert_same_run(run_dir, whole)


def interrupt_at(step, monkeypatch):
    """Send SIGTERM while the batch of `step` is being fetched."""
    import dino_kd.pretrain as story

    real = story.watched

    def watched(*args):
        for number, batch in enumerate(real(*args), start=1):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(story, "watched", watched)


def test_resume_from_a_damaged_newest_checkpoint_uses_the_one_before(images, tmp_path, whole):
    run = pretrain(settings(images, tmp_path / "run"))
    newest = run / "checkpoints" / "step_00000008" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    pretrain(settings(images, run, "resume=auto"))
    assert_same_run(run, whole)
    assert "damaged" in (run / "train.log").read_text()


def test_resume_of_a_finished_run_keeps_its_result(images, tmp_path, whole):
    run = pretrain(settings(images, tmp_path / "run"))
    pretrain(settings(images, run, "resume=true"))
    assert_same_run(run, whole)


def test_resume_brings_back_a_backbone_that_a_kill_left_out(images, tmp_path, whole):
    """The kill came between the last checkpoint and the backbone's files."""
    run = pretrain(settings(images, tmp_path / "run"))
    (run / "backbone" / "model.safetensors").unlink()
    (run / "checkpoints" / ".step_00000009.tmp-1").mkdir()
    pretrain(settings(images, run, "resume=true"))
    expected = (whole / "backbone" / "model.safetensors").read_bytes()
    assert (run / "backbone" / "model.safetensors").read_bytes() == expected
    assert not list((run / "checkpoints").glob(".*"))


def test_the_same_command_resumes_when_the_horizon_is_given(images, tmp_path):
    words = ["teacher.horizon_images=100", "resume=auto"]
    run = pretrain(settings(images, tmp_path / "run", *words))
    stored = load_settings(PretrainConfig, [str(run / "config.yaml")], command="pretrain")
    assert stored.teacher.momentum == pytest.approx(0.84)
    assert stored.resume is False  # the file can start another run
    pretrain(settings(images, run, *words))


def test_a_run_with_a_relative_folder_resumes_from_anywhere(images, tmp_path, monkeypatch, whole):
    monkeypatch.chdir(images.parent)
    interrupt_at(3, monkeypatch)
    with pytest.raises(UserError, match="received SIGTERM"):
        pretrain(settings(images.name, tmp_path / "run"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    words = [str(tmp_path / "run"), "resume=true"]
    run = pretrain(load_settings(PretrainConfig, words, command="pretrain"))
    assert_same_run(run, whole)
    assert "received SIGTERM" in (run / "train.log").read_text()


def test_a_signal_during_the_last_step_does_not_undo_a_finished_run(images, tmp_path, monkeypatch):
    interrupt_at(8, monkeypatch)
    run = pretrain(settings(images, tmp_path / "run"))
    assert final_state(run)["step"] == 8


def test_free_settings_may_change_on_resume_others_are_refused_with_a_diff(images, tmp_path):
    run = pretrain(settings(images, tmp_path / "run"))
    pretrain(settings(images, run, "resume=true", "log.log_every=2", "optim.accumulate=2"))
    with pytest.raises(UserError) as caught:
        pretrain(settings(images, run, "resume=true", "optim.base_lr=0.02", "crops.hue=0.2"))
    assert "optim.base_lr: 0.01 -> 0.02" in str(caught.value)
    assert "crops.hue: 0.1 -> 0.2" in str(caught.value)


def test_resume_on_a_changed_data_set_is_refused(images, tmp_path):
    copy = write_images(tmp_path / "copy", count=40)
    run = pretrain(settings(copy, tmp_path / "run"))
    (copy / "class_0" / "extra.jpg").write_bytes((copy / "class_0" / "000.jpg").read_bytes())
    with pytest.raises(UserError, match="started on 40 images, now there are 41"):
        pretrain(settings(copy, run, "resume=true"))


def start(images, run_dir, *more):
    """A real process running the tiny recipe."""
    argv = [*TINY, f"data.train={images}", f"run_dir={run_dir}", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "dino_kd", "pretrain", *argv],
        cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(path, process, seconds=120):
    until = time.time() + seconds
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.stdout.read()
        assert time.time() < until, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_kill_9_at_a_random_moment_and_resume_is_bit_exact(images, tmp_path, long_run, trial):
    """A real SIGKILL of a real process, wherever it falls: in a step, a save or a log line."""
    run_dir = tmp_path / "run"
    process = start(images, run_dir, *LONG)
    wait_for(run_dir / "metrics.jsonl", process)
    time.sleep(random.Random(trial).uniform(0, 1.5))
    process.kill()
    process.wait()
    pretrain(settings(images, run_dir, *LONG, "resume=true"))
    assert_same_run(run_dir, long_run)


LONG = ["optim.length=40"]


@pytest.fixture(scope="module")
def long_run(images, tmp_path_factory):
    return pretrain(settings(images, tmp_path_factory.mktemp("long") / "run", *LONG))


@pytest.mark.dist
def test_a_signal_to_a_real_process_saves_and_exits_with_its_own_code(images, tmp_path):
    run_dir = tmp_path / "run"
    process = start(images, run_dir, "optim.length=2000", "log.save_every=2000")
    wait_for(run_dir / "metrics.jsonl", process)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, output
    assert "received SIGUSR2" in output
    assert "resume=true" in output
    assert "Traceback" not in output
    assert len(list_checkpoints(run_dir / "checkpoints")) == 1


@pytest.mark.dist
def test_a_second_process_is_told_who_uses_the_run_directory(images, tmp_path, capsys):
    run_dir = tmp_path / "run"
    process = start(images, run_dir, "optim.length=2000")
    wait_for(run_dir / "metrics.jsonl", process)
    try:
        argv = [*TINY, f"data.train={images}", f"run_dir={run_dir}", "optim.length=2000"]
        assert cli.main(["pretrain", *argv, "resume=true"]) == 2
        assert f"in use by process {process.pid}" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()


# --- broken images


def test_broken_images_are_skipped_counted_and_listed(tmp_path):
    folder = write_images(tmp_path / "images", count=40)
    bad = folder / "class_0" / "002.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    run = pretrain(settings(folder, tmp_path / "run", "data.max_broken_share=0.1"))
    lines = (run / "broken_images.txt").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{bad}\t")
    assert read_metrics(run)[-1]["broken_images"] == 1
    assert "1 images could not be read and were replaced" in (run / "train.log").read_text()


def test_broken_images_between_log_lines_and_at_the_end_count_too(tmp_path):
    """Two epochs and no logged step but the first and the last."""
    folder = write_images(tmp_path / "images", count=40)
    for path in sorted(folder.rglob("*.jpg"))[1:10]:
        path.write_bytes(b"not a picture")
    words = ["log.log_every=100", "log.save_every=100", "data.max_broken_share=0.21"]
    with pytest.raises(UserError, match=r"9 of 40 images cannot be read"):
        pretrain(settings(folder, tmp_path / "run", *words))
    assert len((tmp_path / "run" / "broken_images.txt").read_text().splitlines()) == 9


def test_too_many_broken_images_stop_the_run_with_the_share(tmp_path):
    folder = write_images(tmp_path / "images", count=40)
    for path in sorted(folder.rglob("*.jpg"))[1:8]:
        path.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"\d of 40 images cannot be read, more than") as caught:
        pretrain(settings(folder, tmp_path / "run"))
    assert caught.value.exit_code == 2


# --- bad input: exit code 2, plain sentences, before the first step

BAD = {
    "missing path": (["data.train=/no/such/folder"], "/no/such/folder"),
    "empty folder": (["data.train={empty}"], "empty"),
    "no images": (["data.train={texts}"], r"no image|\.txt"),
    "fewer than batch": (["optim.batch_size=64"], "40 images, fewer than optim.batch_size=64"),
    "misspelt key": (["optim.lenght=3"], "optim.length"),
    "wrong type": (["optim.base_lr=fast"], "optim.base_lr"),
    "out of range": (["crops.jitter=1.5"], "crops.jitter"),
    "patch": (["crops.local_size=20"], "crops.local_size: 20 px is not a multiple of the 8 px"),
    "global patch": (["crops.global_size=36"], "36"),
    "unknown backbone": (["model.backbone=vit_tiny_pach16_224"], "vit_tiny_patch16_224"),
    "unknown optimiser": (["optim.name=adamx"], "adamw"),
    "unknown data set": (["data.train=cifar11:/data"], "cifar10"),
    "resume of nothing": (["resume=true"], "no run to resume"),
    "labels absent": (["monitor.train={flat}", "monitor.test={flat}"], "labels"),
    "one monitor": (["monitor.train={flat}"], "needs both"),
    "fp16 on cpu": (["optim.precision=fp16"], "fp16 needs a CUDA device"),
    "accumulate": (["optim.accumulate=3"], "multiple of 3"),
    "cuda absent": (["device=cuda:99"], "cuda"),
    "warm-up too long": (["optim.warmup=9"], "whole run has 8"),
    "two ways of EMA": (["teacher.momentum=0.9", "teacher.horizon_images=99"], "both set the EMA"),
    "means": (["data.mean=[0.5]"], "1 numbers for model.in_chans=3"),
    "fixed input size": (
        [
            "model.backbone=mixer_s32_224",
            "model.patch_size=null",
            "model.args={}",
            "crops.global_size=64",
            "crops.local_size=32",
        ],
        "mixer_s32_224 does not take 32 x 32 px beside 64 x 64",
    ),
    "drop path twice": (["model.args={drop_path_rate: 0.2}"], "set by model.drop_path"),
    "long value": (["model.args={" + "depth: 1, " * 40 + "no_such: 1}"], "no_such"),
    "other classes": (
        ["monitor.train={images}", "monitor.test={renamed}"],
        "classes that the training images lack",
    ),
    "pack is a file": (["data.pack={texts}/notes.txt"], "data.pack: .*is a file"),
    "run inside data": (["run_dir={images}/run"], "inside the training folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence_and_exit_code_2(images, tmp_path, capsys, case):
    words, expected = BAD[case]
    places = {name: tmp_path / name for name in ("empty", "texts", "flat", "renamed")}
    for place in places.values():
        place.mkdir()
    (places["texts"] / "notes.txt").write_text("no picture")
    for path in sorted(images.rglob("*.jpg"))[:20]:
        (places["flat"] / path.name).write_bytes(path.read_bytes())
    write_images(places["renamed"], count=4, classes=3)
    for name, place in {"images": images, **places}.items():
        words = [w.replace("{" + name + "}", str(place)) for w in words]
    given = {w.split("=")[0] for w in words}
    base = [*TINY, f"data.train={images}", f"run_dir={tmp_path}/run"]
    argv = [w for w in base if w.split("=")[0] not in given] + words
    assert cli.main(["pretrain", *argv]) == 2
    output = capsys.readouterr()
    assert re.search(expected, output.err), output.err
    assert "Traceback" not in output.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_directory_that_holds_another_run_is_refused(images, whole, capsys):
    assert cli.main(["pretrain", *TINY, f"data.train={images}", f"run_dir={whole}"]) == 2
    assert "already holds a run (last checkpoint step_00000008)" in capsys.readouterr().err


# --- no setting without effect


def test_every_setting_is_read(images, tmp_path, monkeypatch):
    """Walks the schema: each field must be read by a run, not only accepted.

    model_dump and validation do not pass through attribute access, so what is recorded is a read.
    """
    seen = set()
    real = Settings.__getattribute__

    def record(self, name):
        if name in type(self).model_fields:
            seen.add((type(self).__name__, name))
        return real(self, name)

    chosen = settings(
        images, tmp_path / "run", "optim.length=2",
        f"monitor.train={images}", f"monitor.test={images}",
        "curriculum.scale=0.5", "curriculum.length=1",
    )  # fmt: skip
    monkeypatch.setattr(Settings, "__getattribute__", record)
    pretrain(chosen)
    monkeypatch.undo()
    by_path = {}
    for path, _ in leaves(PretrainConfig):
        owner = PretrainConfig
        for part in path.split(".")[:-1]:
            owner = owner.model_fields[part].annotation
        by_path[path] = (owner.__name__, path.split(".")[-1])
    crops = {path for path in by_path if path.startswith("crops.")}
    unread = {path for path, key in by_path.items() if key not in seen} - crops
    assert unread == set()


def test_the_renderer_that_is_asked_for_renders_and_is_written_down(images, tmp_path):
    """Each one's first loss is the loss of the same crops; the name is in env.json."""
    losses = {}
    for name in ("pillow", "torch", "device"):
        run = settings(images, tmp_path / name, f"data.renderer={name}", "optim.length=1")
        pretrain(run)
        assert json.loads((tmp_path / name / "env.json").read_text())["renderer"] == name
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = json.loads(rows[0])["loss"]
    assert losses["torch"] == pytest.approx(losses["pillow"], rel=1e-2)
    assert losses["device"] == pytest.approx(losses["pillow"], rel=1e-2)


def test_crops_of_the_device_keep_the_run(images, tmp_path, monkeypatch):
    """Stopped, continued with loader threads, and in micro-batches, on crops whose size changes."""
    more = ["data.renderer=device", "curriculum.scale=0.5", "curriculum.length=50%"]
    reference = pretrain(settings(images, tmp_path / "reference", *more))
    assert (reference / "crops.png").exists()
    interrupt_at(5, monkeypatch)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="received SIGTERM"):
        pretrain(settings(images, run, *more))
    monkeypatch.undo()
    pretrain(settings(images, run, *more, "resume=true", "data.num_workers=2"))
    assert_same_run(run, reference)
    split = pretrain(settings(images, tmp_path / "split", *more, "optim.accumulate=4"))
    assert_close_runs(split, reference)


def test_the_device_refuses_other_channels_before_anything_is_written(images, tmp_path):
    grey = ["model.in_chans=1", "crops.preset=non_rgb", "data.renderer=device"]
    with pytest.raises(UserError, match=r"data.renderer=device renders RGB images"):
        pretrain(settings(images, tmp_path / "run", *grey))
    assert not (tmp_path / "run").exists()


def test_every_crop_setting_changes_the_crops(images):
    """crop_policy passes the whole section on at once, so each field must move the pixels."""
    import numpy as np

    from dino_kd.crop_sizes import crop_policy
    from dino_kd.data.multicrop import crop_rng, render_crops, sample_crops

    def pixels(*more):
        policy = crop_policy(settings(images, "unused", *more))
        image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
        out = []
        for index in range(30):
            out += render_crops(image, sample_crops(policy, 60, 50, crop_rng(0, 0, index)))
        return [crop.tobytes() for crop in out]

    base = ["crops.preset=published", "crops.global_size=48", "crops.local_size=24"]
    other = {
        "preset": "small", "global_size": 40, "local_size": 16, "num_local_crops": 1,
        "global_scale": [0.5, 0.9], "local_scale": [0.1, 0.3], "aspect_ratio": [1, 1],
        "interpolation": "bilinear", "horizontal_flip": 0, "vertical_flip": 0.5, "jitter": 0.1,
        "brightness": 0.1, "contrast": 0.1, "saturation": 0.6, "hue": 0.3, "grayscale": 0.9,
        "blur": [0, 0, 0], "blur_sigma": [1, 3], "solarize": [0.5, 0.5, 0.5],
        "solarize_threshold": 30,
    }  # fmt: skip
    assert other.keys() == PretrainConfig.model_fields["crops"].annotation.model_fields.keys()
    reference = pixels(*base)
    for name, value in other.items():
        words = [w for w in base if not w.startswith(f"crops.{name}=")]
        assert pixels(*words, f"crops.{name}={json.dumps(value)}") != reference, name
