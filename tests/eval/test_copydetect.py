"""The copy detection command on a small Copydays: numbers, distractors, processes, mistakes."""

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
from torch.nn import functional as F

from dino_kd.errors import DataError
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import load_backbone, save_backbone
from eval import copydetect

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def picture(seed, size=(48, 36)):
    mosaic = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(mosaic).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "copydays"
    for name in ("original", "strong", "crops/50", "jpegqual/3"):
        (root / name).mkdir(parents=True)
    for i in range(6):
        original, block = picture(i), f"21{i:02d}"
        original.save(root / "original" / f"{block}00.jpg", quality=95)
        original.crop((7, 5, 41, 31)).save(root / "crops" / "50" / f"{block}01.jpg", quality=95)
        original.save(root / "jpegqual" / "3" / f"{block}01.jpg", quality=3)
        for j in range(1 + i % 2):
            turned = original.rotate(90 + 90 * j, expand=True)
            turned.save(root / "strong" / f"{block}0{j + 1}.jpg", quality=20)
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
    assert copydetect.main([*argv, f"output={output}"]) == 0
    return json.loads(output.read_text())


def describe_by_hand(backbone, path, side):
    """PIL, the bare network, class token beside the 4th-power mean of what is positive."""
    pixels = np.array(
        Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    x = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.no_grad():
        tokens = backbone.net.forward_features(x)[0]
    pooled = tokens[1:].clamp(min=1e-6).pow(4).mean(0).pow(0.25)
    return F.normalize(torch.cat([tokens[0], pooled]), dim=0)


def test_numbers_are_those_worked_out_by_hand(root, folder, tmp_path, capsys):
    """45 px do not divide into patches of 8: 40 are used."""
    result = run(command(folder, root, "image_size=45", "batch_size=4"), tmp_path / "c.json")
    assert result["protocol"]["image_size"] == 40
    backbone = load_backbone(folder)
    originals = sorted((root / "original").iterdir())
    bank = torch.stack([describe_by_hand(backbone, path, 40) for path in originals])
    for attack in ("strong", "crops/50", "jpegqual/3"):
        found = []
        for path in sorted((root / attack).iterdir()):
            similarity = bank @ describe_by_hand(backbone, path, 40)
            target = [p.name[:4] for p in originals].index(path.name[:4])
            place = int((similarity > similarity[target]).sum())
            # one positive at this rank: precision goes from 0 (1 at the top) to 1 / (place + 1)
            found.append(((place == 0) + 1 / (place + 1)) / 2)
        key = attack.replace("/", "_").replace("jpegqual", "jpeg") + "_map"
        assert result["metrics"][key] == pytest.approx(100 * np.mean(found), abs=1e-6)
    printed = capsys.readouterr().out
    assert "searched among 6 originals and 0 distractors" in printed
    assert f"strong           9  {result['metrics']['strong_map']:7.2f}" in printed


def test_distractors_are_searched_too(root, tmp_path):
    """Copies of the copies among the distractors push every original to the second place."""
    others = tmp_path / "others"
    others.mkdir()
    for path in (root / "strong").iterdir():
        (others / path.name).write_bytes(path.read_bytes())
    (others / "broken.jpg").write_bytes(b"no")
    result = run(command("pixels", root, f"distractors={others}"), tmp_path / "c.json")
    assert result["metrics"]["strong_map"] <= 25.0
    assert result["metrics"]["jpeg_3_map"] > 80
    assert result["data"]["distractors"]["images"] == 9
    assert result["data"]["distractors"]["broken"] == 1


def test_whitening_changes_the_numbers_and_is_noted(root, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(12):
        picture(100 + i).save(other / f"{i}.jpg")
    plain = run(command(folder, root, "image_size=32"), tmp_path / "p.json")
    white = run(command(folder, root, "image_size=32", f"whiten={other}"), tmp_path / "w.json")
    assert white["metrics"] != plain["metrics"]
    assert white["data"]["whiten"]["images"] == 12
    assert "12 images, fewer than the 64 dimensions" in white["notes"][0]


def test_mistakes_are_named(root, tmp_path):
    with pytest.raises(DataError, match=r"there is no .*original \(found backbone|there is no"):
        copydetect.main(command("pixels", tmp_path))
    single = tmp_path / "single"
    single.mkdir()
    picture(0).save(single / "a.jpg")
    with pytest.raises(DataError, match=r"whiten: .* holds one image"):
        copydetect.main(command("pixels", root, f"whiten={single}"))
    (root / "strong" / "210001.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"copies: 1 of 21 images cannot be read.*210001.*empty"):
        copydetect.main(command("pixels", root))


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(root, folder, tmp_path):
    argv = command(folder, root, "image_size=32", "batch_size=4")
    one = run(argv, tmp_path / "one.json")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
         "eval.copydetect", *argv, f"output={tmp_path / 'two.json'}"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )  # fmt: skip
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["metrics"] == one["metrics"]
    assert two["data"] == one["data"]
