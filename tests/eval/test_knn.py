"""The k-NN command on small folders of images: numbers, file, faiss, processes, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_kd.data.specs import make_dataset
from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.features import extract_features
from dino_kd.knn import knn_accuracy, search
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import backbone_hash, load_backbone, save_backbone
from eval import knn

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
QUIET = ["device=cpu", "num_workers=0", "cache=off"]


def write_images(root, classes, per_class, seed):
    """Noise around one colour per class (at most three): separable, but not trivially."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            colour = np.where(np.arange(3) == c, 140, 100)
            pixels = rng.normal(colour, 60, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def sets(tmp_path):
    classes = ["ant", "bee", "cat"]
    return (
        write_images(tmp_path / "train", classes, 12, seed=0),
        write_images(tmp_path / "test", classes, 7, seed=1),
    )


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=TINY)
    save_backbone(backbone, tmp_path / "backbone")
    return tmp_path / "backbone"


def command(backbone, sets, *more):
    return [f"backbone={backbone}", f"train={sets[0]}", f"test={sets[1]}", *QUIET, *more]


def test_numbers_are_those_of_the_library(sets, folder, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert knn.main(command(folder, sets, "k=[1, 5, 200]", f"output={output}")) == 0
    result = json.loads(output.read_text())

    backbone = load_backbone(folder)
    bank, queries = (extract_features(backbone, make_dataset(str(s)), size=16) for s in sets)
    expected = knn_accuracy(
        queries.features, queries.labels, bank.features, bank.labels, ks=[1, 5, 200]
    )
    for k in (1, 5, 200):
        assert result["metrics"][f"knn{k}_top1"] == expected[k]["top1"]
        assert result["metrics"][f"knn{k}_top5"] == expected[k]["top5"]
    printed = capsys.readouterr().out
    assert f"{expected[5]['top1']:8.2f}" in printed
    assert "21 test images, 36 vote, 3 classes" in printed
    assert "only 36 images vote, fewer than k = 200" in printed


def test_json_says_how_the_numbers_came_about(sets, folder, tmp_path):
    output = tmp_path / "deep" / "result.json"
    broken = sets[1] / "ant" / "0.png"
    broken.write_bytes(b"\x89PNG not really")
    knn.main(command(folder, sets, "k=[5]", "temperature=0.1", f"output={output}"))
    result = json.loads(output.read_text())
    assert result["protocol"] == {
        "image_size": [16, 16],
        "resize": 16,
        "interpolation": "bicubic",
        "precision": "fp32",
        "k": [5],
        "clamped_to": {},
        "distance": "cosine",
        "weights": "exp(cosine / temperature)",
        "temperature": 0.1,
        "search": "torch",
    }
    assert result["backbone"]["sha256"] == backbone_hash(load_backbone(folder))
    assert result["backbone"]["branch"] == "teacher"
    assert result["data"]["train"]["images"] == 36
    assert result["data"]["test"]["images"] == 20
    assert result["data"]["test"]["broken"] == 1
    assert "ant/0.png" in result["data"]["test"]["broken_paths"][0]
    assert {"torch", "timm", "dino_kd", "python"} <= result["versions"].keys()
    assert result["device"] == "cpu"
    assert {"date", "seconds", "processes"} <= result.keys()


def test_pixels_need_no_network(sets, tmp_path):
    output = tmp_path / "pixels.json"
    knn.main(command("pixels", sets, "k=[1]", f"output={output}"))
    result = json.loads(output.read_text())
    assert result["protocol"]["image_size"] == [32, 32]
    assert "sha256" not in result["backbone"]
    assert result["metrics"]["knn1_top1"] > 60  # colours separate these classes; chance is 33


def test_result_of_a_run_goes_into_the_run(sets, tmp_path, folder):
    """config.yaml makes a folder a run directory; its teacher is scored."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    folder.rename(run_dir / "backbone")
    (run_dir / "config.yaml").write_text("run_dir: x\n")
    knn.main(command(run_dir, sets, "k=[1]"))
    assert json.loads((run_dir / "eval" / "knn_teacher.json").read_text())["metrics"]


@pytest.mark.parametrize("k", [1, 7, 36])
def test_faiss_and_torch_find_the_same(k):
    g = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(50, 16, generator=g), torch.randn(36, 16, generator=g)
    bank[20:24] = bank[3]  # ties
    expected, expected_index = search(queries, bank, k)
    found, index = knn.faiss_search(queries, bank, k, query_chunk=7)
    torch.testing.assert_close(found, expected)
    if k != 7:  # at place k faiss takes any of several equal rows
        assert torch.equal(index, expected_index)


def test_faiss_gives_the_same_table(sets, folder, tmp_path):
    metrics = []
    for back_end in ("torch", "faiss"):
        output = tmp_path / f"{back_end}.json"
        knn.main(command(folder, sets, f"search={back_end}", f"output={output}"))
        metrics.append(json.loads(output.read_text())["metrics"])
    assert metrics[0] == metrics[1]


def test_missing_faiss_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"faiss is not installed.*search=torch"):
        knn.faiss_search(torch.ones(1, 2), torch.ones(1, 2), 1)


def test_labels_are_matched_by_name(tmp_path):
    """A test set without the first class must not shift the others."""
    train = write_images(tmp_path / "train", ["ant", "bee", "cat"], 5, seed=0)
    test = tmp_path / "test"
    for name in ("bee", "cat"):
        (test / name).mkdir(parents=True)
        for path in (train / name).iterdir():
            (test / name / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "result.json"
    knn.main(command("pixels", (train, test), "k=[1]", f"output={output}"))
    result = json.loads(output.read_text())
    assert result["metrics"]["knn1_top1"] == 100.0  # every test image is in the bank
    assert result["notes"] == ["1 classes of train have no test image: ant"]


def test_mistakes_in_the_data_are_named(sets, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (sets[0] / "ant").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"train: .*flat has no labels"):
        knn.main(command("pixels", (flat, sets[1])))
    with pytest.raises(DataError, match=r"test: .*flat has no labels"):
        knn.main(command("pixels", (sets[0], flat)))
    other = write_images(tmp_path / "other", ["ant", "wasp"], 1, seed=0)
    with pytest.raises(DataError, match=r"classes that the training images lack: wasp"):
        knn.main(command("pixels", (sets[0], other)))
    single = write_images(tmp_path / "single", ["ant"], 2, seed=0)
    with pytest.raises(DataError, match=r"single class, 'ant'"):
        knn.main(command("pixels", (single, sets[1])))
    with pytest.raises(DataError, match=r"nowhere"):
        knn.main(command("pixels", ("nowhere", sets[1])))


def test_mistakes_in_the_settings_are_named(sets, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no backbone at 'runs/none'"):
        knn.main(command("runs/none", sets))
    with pytest.raises(ConfigError, match=r"does not divide into patches of 4"):
        knn.main(command(folder, sets, "image_size=18"))
    with pytest.raises(ConfigError, match=r"output: .* is a folder"):
        knn.main(command(folder, sets, f"output={tmp_path}"))
    with pytest.raises(ConfigError, match=r"temperature"):
        knn.main(command(folder, sets, "temperature=0"))


def test_a_network_that_diverged_is_not_scored(sets, folder, tmp_path):
    backbone = load_backbone(folder)
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"not finite on the train images"):
        knn.main(command(tmp_path / "nan", sets))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_numbers_of_one(sets, folder, tmp_path, processes):
    """20 test images on 2 and 3 processes, one of them broken, to the last image."""
    (sets[1] / "cat" / "6.png").write_bytes(b"broken")
    argv = command(folder, sets, "k=[1, 5, 36]", "batch_size=4")
    knn.main([*argv, f"output={tmp_path / 'one.json'}"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [
            *launcher,
            f"--nproc_per_node={processes}",
            "-m",
            "eval.knn",
            *argv,
            f"output={tmp_path / 'many.json'}",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    one, many = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "many"))
    assert many["metrics"] == one["metrics"]
    assert many["data"] == one["data"]
    assert many["processes"] == processes


@pytest.mark.slow
def test_module_runs_as_a_script(sets):
    """Exit codes and plain words, without a traceback."""
    found = subprocess.run(
        [sys.executable, "-m", "eval.knn", *command("runs/none", sets)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert found.returncode == 2
    assert "no backbone at 'runs/none'" in found.stderr
    assert "Traceback" not in found.stderr
