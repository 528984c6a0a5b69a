"""Files of features: three formats, shards, provenance; and the search that reads them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dino_kd.data.specs import make_dataset
from dino_kd.errors import CheckpointError, ConfigError, DataError, UserError
from dino_kd.features import extract_features
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import backbone_hash, load_backbone, save_backbone
from eval import embed, search
from eval.embeddings import read_embeddings
from tests.eval.tiny_sets import QUIET, write_backbone, write_set

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def images(tmp_path):
    return write_set(tmp_path / "images", 10, classes=("ant", "bee"))


@pytest.fixture
def folder(tmp_path):
    return write_backbone(tmp_path / "backbone")


def run(backbone, images, output, *more):
    words = [f"backbone={backbone}", f"data={images}", *QUIET, f"output={output}", *more]
    assert embed.main(words) == 0


def expected(folder, images, parts=()):
    return extract_features(load_backbone(folder), make_dataset(str(images)), size=16, parts=parts)


def load(path):
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["dino_kd"])
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def test_safetensors_holds_every_part_and_where_it_came_from(images, folder, tmp_path, capsys):
    run(folder, images, tmp_path / "f.safetensors", "parts=[cls, mean, patches, block-1]")
    found, about = load(tmp_path / "f.safetensors")
    bank = expected(folder, images, ["mean", "block-1"])
    torch.testing.assert_close(found["cls"], bank.features)
    torch.testing.assert_close(found["mean"], bank.parts["mean"])
    torch.testing.assert_close(found["block-1"], bank.parts["block-1"])
    assert found["patches"].shape == (10, 16, 32)
    torch.testing.assert_close(found["patches"].mean(1), found["mean"])
    assert found["indices"].tolist() == list(range(10))
    assert found["labels"].tolist() == [0] * 5 + [1] * 5
    names = bytes(found["paths"].numpy()).decode().split("\0")
    assert names == [make_dataset(str(images)).path(i) for i in range(10)]
    assert about["backbone"]["sha256"] == backbone_hash(load_backbone(folder))
    assert about["protocol"]["image_size"] == [16, 16]
    assert about["class_names"] == ["ant", "bee"]
    printed = capsys.readouterr().out
    # 32 + 32 + 16 * 32 + 32 numbers of 4 bytes for 10 images
    assert "cls 32 + mean 32 + patches 16 x 32 + block-1 32 in fp32: about 24 kB" in printed


def test_patches_are_the_tokens_of_the_network(images, folder, tmp_path):
    run(folder, images, tmp_path / "f.safetensors", "parts=[patches]")
    backbone, dataset = load_backbone(folder).eval(), make_dataset(str(images))
    small = [
        Image.fromarray(dataset.read(i)).resize((16, 16), Image.Resampling.BICUBIC)
        for i in range(10)
    ]
    batch = torch.from_numpy(np.stack([np.asarray(p).transpose(2, 0, 1) for p in small]))
    with torch.no_grad():
        tokens = backbone.tokens(backbone.preprocess(batch))
    found, _ = load(tmp_path / "f.safetensors")
    torch.testing.assert_close(found["patches"], tokens.patches)


def test_patches_of_a_cnn_have_its_own_width(images, tmp_path):
    torch.manual_seed(0)
    cnn = create_backbone("mobilenetv3_small_050", img_size=64)
    save_backbone(cnn, tmp_path / "cnn")
    run(tmp_path / "cnn", images, tmp_path / "f.safetensors", "parts=[cls, patches, block-2]")
    found, _ = load(tmp_path / "f.safetensors")
    assert found["cls"].shape == (10, cnn.embed_dim)
    assert found["patches"].shape == (10, 4, cnn.patch_dim)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".parquet"])
def test_every_format_reads_back(images, folder, tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    run(folder, images, path)
    back = read_embeddings(path, "gallery")
    bank = expected(folder, images)
    torch.testing.assert_close(back.parts["cls"], bank.features)
    assert back.indices.tolist() == bank.indices.tolist()
    assert back.labels.tolist() == bank.labels.tolist()
    assert back.paths == [make_dataset(str(images)).path(i) for i in range(10)]
    assert back.about["backbone"]["architecture"] == "vit_tiny_patch16_224"


def test_npy_has_readable_companions(images, folder, tmp_path):
    run(folder, images, tmp_path / "f.npy", "dtype=fp16", "normalize=true")
    features = np.load(tmp_path / "f.npy")
    assert features.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(features.astype(float), axis=1), 1, atol=2e-3)
    assert len((tmp_path / "f.paths.txt").read_text().splitlines()) == 10
    assert json.loads((tmp_path / "f.json").read_text())["labels"] == [0] * 5 + [1] * 5


def test_parquet_is_a_table_with_names(images, folder, tmp_path):
    from pyarrow import parquet

    run(folder, images, tmp_path / "f.parquet", "parts=[cls, patches]")
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["path", "index", "label", "class_name", "cls", "patches"]
    assert table["class_name"].to_pylist()[4:6] == ["ant", "bee"]
    np.testing.assert_allclose(
        np.array(table["cls"].to_pylist()),
        expected(folder, images).features,
        rtol=1e-4,
        atol=1e-6,
    )
    assert len(table["patches"][0]) == 16 * 32


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet", ".npy"])
def test_shards_hold_together_what_one_file_holds(images, folder, tmp_path, suffix):
    """One whole shard is broken: its file is left out, and the others keep their places."""
    for place in (3, 4, 5):
        Path(make_dataset(str(images)).path(place)).write_bytes(b"broken")
    run(folder, images, tmp_path / f"f{suffix}", "shard_images=3")
    listing = json.loads((tmp_path / "f.index.json").read_text())
    assert [entry["images"] for entry in listing["files"]] == [3, 3, 1]
    assert listing["files"][1]["file"] == f"f-00002-of-00004{suffix}"
    assert listing["broken"] == 3
    back = read_embeddings(tmp_path / "f.index.json", "gallery")
    assert back.indices.tolist() == [0, 1, 2, 6, 7, 8, 9]
    torch.testing.assert_close(back.parts["cls"], expected(folder, images).features)
    assert back.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_unlabelled_images_have_no_labels(folder, tmp_path):
    flat = write_set(tmp_path / "flat", 3)
    run(folder, flat, tmp_path / "f.safetensors")
    assert "labels" not in load(tmp_path / "f.safetensors")[0]
    run(folder, flat, tmp_path / "f.parquet")
    assert read_embeddings(tmp_path / "f.parquet", "x").labels is None


def test_mistakes_in_the_settings_are_named(images, folder, tmp_path, monkeypatch):
    def fails(kind, match, name, *more, backbone=folder, data=images):
        with pytest.raises(kind, match=match):
            run(backbone, data, tmp_path / name, *more)

    fails(ConfigError, r"unknown format '.csv'; accepted are .*\.parquet", "f.csv")
    fails(ConfigError, r"is a folder", "")
    fails(ConfigError, r"unknown part 'patchs'; did you mean 'patches'", "f.npy", "parts=[patchs]")
    fails(ConfigError, r"unknown part 'block-0'", "f.npy", "parts=[block-0]")
    fails(ConfigError, r"one part, got cls, mean", "f.npy", "parts=[cls, mean]")
    fails(ConfigError, r"named twice", "f.parquet", "parts=[cls, cls]")
    fails(ConfigError, r"pixels have cls only", "f.npy", "parts=[mean]", backbone="pixels")
    fails(DataError, r"does not exist", "f.npy", data=tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    fails(ConfigError, r"needs pyarrow.*dino_kd\[parquet\]", "f.parquet")


def test_what_cannot_be_written_is_said_in_words(images, folder, tmp_path, monkeypatch):
    backbone = load_backbone(folder)
    torch.nn.init.constant_(backbone.net.norm.bias, 7e4)
    save_backbone(backbone, tmp_path / "huge")
    with pytest.raises(ConfigError, match=r"fp16 ends at 65,504"):
        run(tmp_path / "huge", images, tmp_path / "f.npy", "dtype=fp16")
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"not finite"):
        run(tmp_path / "nan", images, tmp_path / "f.npy", "shard_images=3")
    for path in images.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of its 10 images could be read"):
        run(folder, images, tmp_path / "f.npy", "shard_images=3")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 5))
    with pytest.raises(UserError, match=r"about 1 kB in 1 file, but .* has 0 kB free"):
        run(folder, images, tmp_path / "f.npy")
    assert not (tmp_path / "f.npy").exists()


# Search.


def find(backbone, image, gallery, tmp_path, *more):
    output = tmp_path / "found.json"
    words = [f"backbone={backbone}", f"image={image}", f"gallery={gallery}", *QUIET]
    assert search.main([*words, f"output={output}", *more]) == 0
    return json.loads(output.read_text())


def test_search_finds_what_a_loop_finds(images, folder, tmp_path, capsys):
    queries = write_set(tmp_path / "queries", 3, seed=5)
    result = find(folder, queries, images, tmp_path, "k=4", f"sheet={tmp_path / 's.png'}")
    bank = expected(folder, images).features.double().numpy()
    asked = expected(folder, queries).features.double().numpy()
    names = [make_dataset(str(images)).path(i) for i in range(10)]
    for one, query in zip(result["found"], asked, strict=True):
        cosine = [query @ b / np.linalg.norm(query) / np.linalg.norm(b) for b in bank]
        order = sorted(range(10), key=lambda i: -cosine[i])[:4]
        assert [n["path"] for n in one["neighbours"]] == [names[i] for i in order]
        for n, i in zip(one["neighbours"], order, strict=True):
            assert n["similarity"] == pytest.approx(cosine[i], abs=1e-5)
    assert names[0] in capsys.readouterr().out or len(result["found"]) == 3
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 5 * 128
        assert sheet.height > 3 * 128


@pytest.mark.parametrize("file", ["g.safetensors", "g.npy", "g.parquet", "g.index.json"])
def test_a_file_of_embeddings_serves_as_gallery(images, folder, tmp_path, file):
    query = images / "bee" / "003.png"
    plain = find(folder, query, images, tmp_path, "k=3")
    if file == "g.index.json":
        run(folder, images, tmp_path / "g.safetensors", "shard_images=4")
    else:
        run(folder, images, tmp_path / file)
    kept = find(folder, query, tmp_path / file, tmp_path, "k=3")
    assert kept["found"] == plain["found"]
    assert kept["found"][0]["neighbours"][0]["path"] == str(query)
    assert kept["found"][0]["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_images_that_moved_leave_an_empty_square(images, folder, tmp_path):
    run(folder, images, tmp_path / "g.npy")
    query = write_set(tmp_path / "queries", 1, seed=5)
    shutil.rmtree(images)
    find(folder, query, tmp_path / "g.npy", tmp_path, "k=2", f"sheet={tmp_path / 's.png'}")
    assert (tmp_path / "s.png").exists()


def test_another_backbone_or_width_is_refused(images, folder, tmp_path):
    run(folder, images, tmp_path / "g.npy")
    other = write_backbone(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"g.npy was made by .*backbone.*cannot be compared"):
        find(other, images, tmp_path / "g.npy", tmp_path)
    with pytest.raises(DataError, match=r"cannot be compared"):
        find("pixels", images, tmp_path / "g.npy", tmp_path)
    run("pixels", images, tmp_path / "p.npy")
    with pytest.raises(DataError, match=r"3072 numbers, and pixels gives 768 .*image_size"):
        find("pixels", images, tmp_path / "p.npy", tmp_path, "image_size=16")


def test_another_treatment_of_the_images_is_refused_or_noted(images, folder, tmp_path):
    run(folder, images, tmp_path / "g.npy")
    with pytest.raises(DataError, match=r"made with and image_size=\[16, 16\]"):
        find(folder, images, tmp_path / "g.npy", tmp_path, "k=1", "image_size=32")
    result = find(folder, images, tmp_path / "g.npy", tmp_path, "k=1", "resize=24")
    assert "embedded with resize=16, the queries with resize=24" in str(result["notes"])


def test_mistakes_of_a_search_are_named(images, folder, tmp_path):
    def fails(kind, match, image=images, gallery=images, *more):
        with pytest.raises(kind, match=match):
            find(folder, image, gallery, tmp_path, *more)

    fails(ConfigError, r"k: 11 neighbours .* gallery has 10 images", images, images, "k=11")
    (images / "ant" / "000.png").write_bytes(b"broken")
    fails(ConfigError, r"k: 10 neighbours .* gallery has 9 images", images, images, "k=10")
    fails(DataError, r"image: .*000.png cannot be read", images / "ant" / "000.png")
    fails(DataError, r"image: .*nowhere does not exist", tmp_path / "nowhere")
    fails(DataError, r"gallery: .*nowhere.npy does not exist", images, tmp_path / "nowhere.npy")
    (tmp_path / "empty").mkdir()
    fails(DataError, r"image: .* is an empty folder", tmp_path / "empty")
    fails(ConfigError, r"sheet: the name of a .png", images, images, "sheet=x.jpg", "k=1")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    fails(DataError, r"cannot be read as embeddings", images, tmp_path / "x.safetensors")
    fails(DataError, r"not written by", images, folder / "model.safetensors")
    np.save(tmp_path / "y.npy", np.ones((3, 4)))
    fails(DataError, r"y.json is missing beside", images, tmp_path / "y.npy")
    run(folder, images, tmp_path / "p.npy", "parts=[mean]")
    fails(DataError, r"holds mean, and cls is needed", images, tmp_path / "p.npy")


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_write_the_file_of_one(images, folder, tmp_path):
    """Nine readable images in shards of 4: shares of 2 and 2, 2 and 1 broken, 1 and 1."""
    (images / "bee" / "003.png").write_bytes(b"broken")
    more = ["parts=[cls, patches]", "shard_images=4"]
    run(folder, images, tmp_path / "one.safetensors", *more)
    words = [f"backbone={folder}", f"data={images}", *QUIET, *more]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launcher, "--nproc_per_node=2", "-m", "eval.embed", *words,
         f"output={tmp_path / 'two.safetensors'}"],
        cwd=REPOSITORY, env=environment, check=True, timeout=120,
    )  # fmt: skip
    for part in range(3):
        one, two = (load(tmp_path / f"{n}-{part:05d}-of-00003.safetensors") for n in ("one", "two"))
        for name in ("cls", "patches", "indices", "labels", "paths"):
            torch.testing.assert_close(one[0][name], two[0][name])
        assert one[1]["broken"] == two[1]["broken"]
