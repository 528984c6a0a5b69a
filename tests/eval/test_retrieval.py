"""The retrieval command on a small revisited Oxford: numbers, file, processes, mistakes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import backbone_hash, load_backbone, save_backbone
from eval import retrieval

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def write_set(root, name="roxford5k", buildings=5, per_building=4, seed=0):
    """Buildings are random mosaics; their views differ by noise and aspect ratio."""
    rng = np.random.default_rng(seed)
    folder = root / name / "jpg"
    folder.mkdir(parents=True)
    images, queries, gnd = [], [], []
    for b in range(buildings):
        mosaic = rng.integers(0, 255, (4, 4, 3))

        def view(path, noise, size, mosaic=mosaic):
            picture = Image.fromarray(mosaic.astype(np.uint8)).resize(
                size, Image.Resampling.NEAREST
            )
            pixels = np.asarray(picture) + rng.normal(0, noise, (size[1], size[0], 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{path}.jpg")

        start = len(images)
        for i in range(per_building):
            size = [(48, 36), (36, 48), (40, 40), (30, 20)][i % 4]
            view(f"b{b}_{i}", 30 * i, size)
            images.append(f"b{b}_{i}")
        view(f"query{b}", 5, (44, 36))
        queries.append(f"query{b}")
        places = np.arange(start, len(images))
        gnd.append({"bbx": [2, 1, 43, 34], "easy": places[:1], "hard": places[1:3],
                    "junk": places[3:]})  # fmt: skip
    gnd[-1]["easy"] = np.array([], dtype=np.int64)  # the last query has nothing easy to find
    truth = {"imlist": images, "qimlist": queries, "gnd": gnd}
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return truth


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "revisited"
    write_set(root)
    return root


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, args=TINY)
    save_backbone(backbone, tmp_path / "backbone")
    return tmp_path / "backbone"


def command(backbone, root, *more):
    return [f"backbone={backbone}", f"root={root}", "device=cpu", "num_workers=0", *more]


def run(argv, output):
    assert retrieval.main([*argv, f"output={output}"]) == 0
    return json.loads(output.read_text())


def describe_by_hand(backbone, path, box=None, scales=(1.0,)):
    """PIL and the bare network, one image at a time."""
    picture = Image.open(path).convert("RGB")
    if box is not None:
        picture = picture.crop(box)
    scale = 40 / max(picture.size)
    if scale < 1:
        size = tuple(round(side * scale) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    width, height = (side // 8 * 8 for side in picture.size)
    pixels = torch.from_numpy(np.array(picture)[:height, :width]).permute(2, 0, 1)[None]
    x = (pixels / 255 - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[
        :, None, None
    ]
    total = 0
    with torch.no_grad():
        for scale in scales:
            side = [int(s * scale) for s in x.shape[-2:]]
            y = F.interpolate(x, side, mode="bilinear") if scale != 1 else x
            total = total + backbone.net(y[..., : side[0] // 8 * 8, : side[1] // 8 * 8])
    return F.normalize(total[0], dim=0)


def scores_by_hand(similarity, truth, protocol, ks):
    """The revisited protocol over plain lists: remove what is ignored, walk down the ranking."""
    found, at = [], {k: [] for k in ks}
    for q, entry in enumerate(truth["gnd"]):
        easy, hard, junk = (set(entry[kind].tolist()) for kind in ("easy", "hard", "junk"))
        good, hidden = {
            "easy": (easy, junk | hard),
            "medium": (easy | hard, junk),
            "hard": (hard, junk | easy),
        }[protocol]
        if not good:
            continue
        order = sorted(range(len(truth["imlist"])), key=lambda i, q=q: (-similarity[q, i], i))
        seen = [i for i in order if i not in hidden]
        precision, area, hits, last = 1.0, 0.0, 0, 0
        for place, i in enumerate(seen, start=1):
            before = precision
            hits += i in good
            precision = hits / place
            if i in good:
                area, last = area + (before + precision) / 2 / len(good), place
        found.append(area)
        for k in ks:
            top = seen[: min(k, last)]
            at[k].append(sum(i in good for i in top) / len(top))
    return 100 * np.mean(found), {k: 100 * np.mean(v) for k, v in at.items()}


@pytest.mark.parametrize("multiscale", [True, False])
@pytest.mark.parametrize("crop", [True, False])
def test_numbers_are_those_worked_out_by_hand(root, folder, tmp_path, multiscale, crop):
    result = run(
        command(folder, root, "image_size=40", f"multiscale={multiscale}".lower(),
                f"crop_queries={crop}".lower(), "k=[1, 3]"),
        tmp_path / "r.json",
    )  # fmt: skip
    backbone = load_backbone(folder)
    truth = pickle.loads((root / "roxford5k" / "gnd_roxford5k.pkl").read_bytes())
    scales = (1.0, 2**-0.5, 0.5) if multiscale else (1.0,)

    def stack(names, boxes):
        files = [root / "roxford5k" / "jpg" / f"{name}.jpg" for name in names]
        rows = zip(files, boxes, strict=True)
        return torch.stack([describe_by_hand(backbone, f, box, scales) for f, box in rows])

    bank = stack(truth["imlist"], [None] * 20)
    boxes = [entry["bbx"] if crop else None for entry in truth["gnd"]]
    similarity = (stack(truth["qimlist"], boxes) @ bank.T).numpy()
    for protocol in ("easy", "medium", "hard"):
        mean, at = scores_by_hand(similarity, truth, protocol, (1, 3))
        assert result["metrics"][f"roxford5k_{protocol}_map"] == pytest.approx(mean, abs=1e-6)
        for k in (1, 3):
            assert result["metrics"][f"roxford5k_{protocol}_mp{k}"] == pytest.approx(at[k])
    assert any("easy: 1 of 5 queries have nothing to find" in note for note in result["notes"])


def test_json_and_table_say_how_the_numbers_came_about(root, folder, tmp_path, capsys):
    write_set(root, "rparis6k", buildings=2, seed=1)
    result = run(command(folder, root, "features=cls+gem", "image_size=32"), tmp_path / "r.json")
    assert result["backbone"]["sha256"] == backbone_hash(load_backbone(folder))
    assert result["protocol"]["scales"] == [1.0, 0.7071, 0.5]
    assert result["protocol"]["gem_power"] == 3.0
    assert result["protocol"]["protocols"]["hard"] == {
        "found": ["hard"], "ignored": ["junk", "easy"],
    }  # fmt: skip
    assert result["data"]["rparis6k images"]["images"] == 8
    assert {"roxford5k_easy_map", "rparis6k_hard_mp10"} <= result["metrics"].keys()
    printed = capsys.readouterr().out
    assert f"{result['metrics']['rparis6k_medium_map']:.2f}" in printed
    assert "roxford5k: 5 queries in 20 images" in printed
    only = run(command(folder, root, "dataset=rparis6k", "k=2"), tmp_path / "o.json")
    assert {key.split("_")[0] for key in only["metrics"]} == {"rparis6k"}


def test_pixels_and_cnns_are_scored_too(root, tmp_path):
    pixels = run(command("pixels", root), tmp_path / "p.json")
    assert pixels["metrics"]["roxford5k_easy_map"] > 50  # mosaics are told apart by their colours
    cnn = run(
        command("random:resnet10t", root, "features=gem", "image_size=45"), tmp_path / "c.json"
    )
    assert 0 < cnn["metrics"]["roxford5k_medium_map"] <= 100


def test_hierarchical_networks_see_whole_patches(root, tmp_path):
    """Swin cuts its first patches of 4 px itself, and refuses a remainder."""
    result = run(
        command("random:swin_tiny_patch4_window7_224", root, "image_size=47"), tmp_path / "s.json"
    )
    assert result["protocol"]["side_multiple"] == 4
    assert 0 < result["metrics"]["roxford5k_medium_map"] <= 100


def test_a_protocol_without_any_query_is_left_out(root, tmp_path, capsys):
    file = root / "roxford5k" / "gnd_roxford5k.pkl"
    truth = pickle.loads(file.read_bytes())
    for entry in truth["gnd"]:
        entry["easy"] = []
    file.write_bytes(pickle.dumps(truth))
    result = run(command("pixels", root, "k=[1]"), tmp_path / "p.json")
    assert "roxford5k_easy_map" not in result["metrics"]
    assert "roxford5k_hard_map" in result["metrics"]
    assert "roxford5k  easy            -         -" in capsys.readouterr().out


def test_whitening_is_learned_elsewhere_and_noted(root, folder, tmp_path):
    other = tmp_path / "other"
    write_set(other, seed=9)
    (other / "roxford5k" / "jpg" / "b0_0.jpg").write_bytes(b"broken")
    result = run(
        command(folder, root, "image_size=32", f"whiten={other / 'roxford5k' / 'jpg'}"),
        tmp_path / "r.json",
    )
    plain = run(command(folder, root, "image_size=32"), tmp_path / "p.json")
    assert result["metrics"] != plain["metrics"]
    assert result["data"]["whiten"]["images"] == 24
    assert result["data"]["whiten"]["broken"] == 1
    assert any("learned from 24 images, fewer than the 32 dim" in n for n in result["notes"])


def test_mistakes_are_named(root, folder, tmp_path):
    with pytest.raises(DataError, match=r"neither roxford5k nor rparis6k"):
        retrieval.main(command(folder, tmp_path))
    with pytest.raises(DataError, match=r"lacks gnd_rparis6k.pkl"):
        retrieval.main(command(folder, root, "dataset=rparis6k"))
    with pytest.raises(CheckpointError, match=r"no backbone at"):
        retrieval.main(command("runs/none", root))
    with pytest.raises(ConfigError, match=r"batch_size"):
        retrieval.main(command(folder, root, "batch_size=2"))
    with pytest.raises(DataError, match=r"whiten: .*nowhere"):
        retrieval.main(command(folder, root, "whiten=nowhere"))
    with pytest.raises(ConfigError, match=r"takes one image size only"):
        retrieval.main(command("random:mixer_s32_224", root))
    (root / "roxford5k" / "jpg" / "b1_2.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(DataError, match=r"roxford5k images: 1 of 20 images cannot be read.*b1_2"):
        retrieval.main(command(folder, root))


def test_a_hostile_ground_truth_does_not_run(root, folder, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (root / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"gnd": Runs()}))
    with pytest.raises(DataError, match=r"asks Python for \w+\.system"):
        retrieval.main(command(folder, root))
    assert not (tmp_path / "ran").exists()


def test_a_network_that_diverged_is_not_scored(root, folder, tmp_path):
    backbone = load_backbone(folder)
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"not finite on the roxford5k images"):
        retrieval.main(command(tmp_path / "nan", root))


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(root, folder, tmp_path):
    argv = command(folder, root, "image_size=40", f"whiten={root / 'roxford5k' / 'jpg'}")
    one = run(argv, tmp_path / "one.json")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
         "eval.retrieval", *argv, f"output={tmp_path / 'two.json'}"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )  # fmt: skip
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["metrics"] == one["metrics"]
    assert two["data"] == one["data"]
    assert two["processes"] == 2
