"""The suite against its evaluators run one by one; its columns, files, mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from dino_kd.config import dump_settings
from dino_kd.errors import ConfigError, DataError
from dino_kd.pretrained import build_untrained, save_backbone
from dino_kd.schema import COMMANDS, PretrainConfig
from eval import knn, suite
from tests.eval.test_knn import REPOSITORY, TINY, write_images

QUIET = ["device=cpu", "num_workers=0"]
KNN_ONLY = "suite={knn: {k: [1, 5]}}"


@pytest.fixture
def sets(tmp_path):
    classes = ["ant", "bee", "cat"]
    return (
        write_images(tmp_path / "train", classes, 12, seed=0),
        write_images(tmp_path / "test", classes, 7, seed=1),
    )


@pytest.fixture
def run_dir(tmp_path, sets):
    """A run directory with a teacher that differs from its start."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = PretrainConfig(
        run_dir=str(folder),
        data={"train": str(sets[0])},
        crops={"preset": "small", "global_size": 16},
        model={"backbone": "vit_tiny_patch16_224", "patch_size": 4, "args": TINY},
        monitor={"train": str(sets[0]), "test": str(sets[1])},
    )
    (folder / "config.yaml").write_text(dump_settings(config))
    teacher = build_untrained(config)
    torch.nn.init.normal_(teacher.net.patch_embed.proj.weight)
    save_backbone(teacher, folder / "backbone")
    return folder


def read(path):
    return json.loads(path.read_text())


def test_numbers_and_files_are_those_of_the_commands(run_dir, sets, tmp_path, capsys):
    words = [f"train={sets[0]}", f"test={sets[1]}", *QUIET, f"cache={tmp_path / 'cache'}"]
    argv = [f"backbone={run_dir}", KNN_ONLY, "compare=[untrained, pixels]", *words]
    assert suite.main(argv) == 0
    printed = capsys.readouterr().out
    summary = read(run_dir / "eval" / "suite_teacher.json")
    assert list(summary["metrics"]) == ["teacher", "untrained", "pixels"]
    for column, more in {
        "teacher": [f"backbone={run_dir}"],
        "untrained": [f"backbone={run_dir}", "branch=untrained"],
        "pixels": ["backbone=pixels"],
    }.items():
        output = tmp_path / f"{column}.json"
        knn.main([*more, "k=[1, 5]", f"output={output}", *words])
        alone, together = read(output), read(run_dir / "eval" / f"knn_{column}.json")
        assert together["metrics"] == alone["metrics"] == summary["metrics"][column]["knn"]
        assert together["protocol"] == alone["protocol"]
        assert together["backbone"] == alone["backbone"]
        assert f"{alone['metrics']['knn5_top1']:.2f}" in printed
    assert printed.count("k-NN top-1 %, k = 5") == 1  # one table


def test_run_alone_takes_the_sets_of_its_monitor(run_dir, sets):
    assert suite.main([str(run_dir), KNN_ONLY, *QUIET, "cache=off"]) == 0
    result = read(run_dir / "eval" / "knn_teacher.json")
    assert result["data"]["train"]["spec"] == str(sets[0])
    assert result["data"]["test"]["spec"] == str(sets[1])
    assert (run_dir / "eval" / "knn_untrained.json").is_file()  # compare=auto
    assert suite.main([str(run_dir), KNN_ONLY, *QUIET, "cache=off", f"test={sets[0]}"]) == 0
    assert read(run_dir / "eval" / "knn_teacher.json")["data"]["test"]["spec"] == str(sets[0])


@pytest.mark.parametrize("command", ["distill", "finetune"])
def test_a_run_of_another_command_is_scored_too(run_dir, sets, tmp_path, command):
    """Without a monitor and an untrained branch; what it is asked to compare with still counts."""
    other = tmp_path / command
    shutil.copytree(run_dir / "backbone", other / "backbone")
    named = {"run_dir": str(other), "backbone": "x", "train": "x", "test": "x"}
    if command == "distill":
        named = {"run_dir": str(other), "data": {"train": "x"}, "student": {"backbone": "x"},
                 "teacher": {"backbone": "x"}}  # fmt: skip
    (other / "config.yaml").write_text(dump_settings(COMMANDS[command](**named)))
    words = [KNN_ONLY, *QUIET, "cache=off", f"train={sets[0]}", f"test={sets[1]}"]
    assert suite.main([str(other), *words]) == 0
    summary = read(other / "eval" / "suite_teacher.json")
    assert list(summary["metrics"]) == ["teacher"]
    assert suite.main([str(run_dir), *words]) == 0
    teacher = read(run_dir / "eval" / "knn_teacher.json")["metrics"]
    assert summary["metrics"]["teacher"]["knn"] == teacher


def test_a_wrong_path_is_told_once_and_before_any_evaluator(run_dir, capsys):
    with pytest.raises(DataError, match=r"test: .*/no/such"):
        suite.main([str(run_dir), *QUIET, "cache=off", "test=/no/such"])
    assert "done in" not in capsys.readouterr().out


def test_evaluators_that_fail_of_the_same_share_a_line():
    errors = {"knn": "no backbone", "linear": "no backbone", "quality": "too few"}
    assert suite.by_problem(errors) == {"no backbone": ["knn", "linear"], "too few": ["quality"]}


def test_what_fails_is_named_and_the_rest_goes_on(run_dir, sets, tmp_path, capsys):
    argv = [str(run_dir), KNN_ONLY, *QUIET, "cache=off", "compare=[no/such, pixels]"]
    assert suite.main(argv) == 2
    captured = capsys.readouterr()
    assert "error: no/such, knn: no backbone at 'no/such'" in captured.err
    summary = read(run_dir / "eval" / "suite_teacher.json")
    assert summary["metrics"]["no/such"] == {}
    assert "knn" in summary["metrics"]["pixels"]
    assert "no/such, knn: no backbone" in summary["notes"][0]
    assert (run_dir / "eval" / "knn_pixels.json").is_file()


def test_a_network_that_cannot_be_read_ends_the_suite(sets, tmp_path, capsys):
    argv = ["backbone=no/such", KNN_ONLY, *QUIET, f"train={sets[0]}", f"test={sets[1]}"]
    assert suite.main([*argv, "compare=[pixels]", f"output={tmp_path / 'out'}"]) == 2
    captured = capsys.readouterr()
    assert "no backbone at 'no/such'" in captured.err
    assert "pixels, knn" not in captured.out


def test_results_go_to_the_folder_that_is_asked_for(sets, tmp_path):
    argv = ["backbone=pixels", KNN_ONLY, *QUIET, f"train={sets[0]}", f"test={sets[1]}"]
    assert suite.main([*argv, f"output={tmp_path / 'out'}", "cache=off"]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "knn_teacher.json",
        "suite_teacher.json",
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("suite={knnn: {}}", r"suite: unknown evaluator 'knnn'; did you mean 'knn'"),
        ("suite={knn: {temprature: 3}}", r"suite.knn.temprature: .* you mean 'temperature'"),
        ("suite={knn: {k: 0}}", r"suite.knn.k: expected"),
        ("suite={}", r"suite: expected"),
        ("compare=[untrained]", r"compare: 'untrained' is a branch of a run directory"),
    ],
)
def test_mistakes_are_named_before_anything_starts(sets, word, message, capsys):
    argv = ["backbone=pixels", *QUIET, f"train={sets[0]}", f"test={sets[1]}", "cache=off", word]
    with pytest.raises(ConfigError, match=message):
        suite.main(argv)
    assert "done in" not in capsys.readouterr().out


def test_output_that_is_a_file_is_refused(sets, tmp_path):
    (tmp_path / "out").write_text("")
    argv = ["backbone=pixels", *QUIET, f"train={sets[0]}", f"test={sets[1]}", KNN_ONLY]
    with pytest.raises(ConfigError, match=r"output: .*out is a file; give a folder"):
        suite.main([*argv, f"output={tmp_path / 'out'}"])


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run_dir):
    argv = [str(run_dir), KNN_ONLY, *QUIET, "cache=off"]
    assert suite.main(argv) == 0
    alone = read(run_dir / "eval" / "suite_teacher.json")["metrics"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node=2", "-m", "eval.suite", *argv]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120)
    result = read(run_dir / "eval" / "suite_teacher.json")
    assert result["processes"] == 2
    assert result["metrics"] == alone


def test_every_way_of_nearest_neighbours_has_a_headline(run_dir, sets, tmp_path, capsys):
    """One set alone, few images per class, several labels: as the command itself scores them."""
    words = [f"train={sets[0]}", f"test={sets[1]}", *QUIET, f"cache={tmp_path / 'cache'}"]
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "".join(f"{p},{p.parent.name}\n" for s in sets for p in sorted(s.rglob("*.png")))
    )
    for own, file, title in (
        ("leave_one_out: true, test: null", "leave_one_out", "k-NN top-1 %, k = 5, leave one out"),
        ("per_class: 3, draws: 2", "per_class3", "k-NN top-1 %, k = 5, 3 per class"),
        (f"labels: {labels}", "labels", "k-NN mAP %, k = 5"),
    ):
        suite_of_one = f"suite={{knn: {{k: 5, {own}}}}}"
        assert suite.main([f"backbone={run_dir}", suite_of_one, "compare=[]", *words]) == 0
        number = knn.headline(read(run_dir / "eval" / f"knn_{file}_teacher.json"))[0]
        assert number[0] == title
        printed = capsys.readouterr().out
        assert title in printed
        assert number[1] in printed
