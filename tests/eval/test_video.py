"""The video command on a small DAVIS: numbers, predicted masks, processes, mistakes."""

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

from dino_kd.data.davis import read_mask, write_mask
from dino_kd.errors import CheckpointError, ConfigError, DataError
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import load_backbone, save_backbone
from eval import video

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def write_video(root, name, size=(64, 96), frames=5, objects=2, seed=0):
    """Coloured squares that move to the right over a noisy ground."""
    rng = np.random.default_rng(seed)
    pictures, masks = (root / k / "480p" / name for k in ("JPEGImages", "Annotations"))
    pictures.mkdir(parents=True)
    masks.mkdir(parents=True)
    ground = rng.integers(90, 130, (*size, 3))
    for t in range(frames):
        mask = np.zeros(size, dtype=np.uint8)
        for n in range(objects):
            mask[8 + 28 * n : 28 + 28 * n, 8 + 6 * t : 30 + 6 * t] = n + 1
        pixels = ground.copy()
        pixels[mask == 1] = (220, 30, 30)
        pixels[mask == 2] = (30, 30, 220)
        Image.fromarray(pixels.astype(np.uint8)).save(pictures / f"{t:05d}.jpg", quality=95)
        write_mask(masks / f"{t:05d}.png", mask)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "DAVIS"
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("goat\nlab-coat\nkite\n")
    write_video(root, "goat")
    write_video(root, "lab-coat", size=(96, 64), frames=4, seed=1)
    write_video(root, "kite", frames=6, objects=1, seed=2)
    return root


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, args=TINY)
    save_backbone(backbone, tmp_path / "backbone")
    return tmp_path / "backbone"


def command(backbone, root, *more):
    words = ["device=cpu", "num_workers=0", "image_size=64"]
    return [f"backbone={backbone}", f"root={root}", *words, *more]


def run(argv, output):
    assert video.main([*argv, f"output={output}"]) == 0
    return json.loads(output.read_text())


def propagate_by_looping(features, first, grid, queue, topk, temperature, radius):
    """DINO's evaluation frame by frame, patch by patch; labels [P, C]."""
    columns = grid[1]
    features = [f / f.norm(dim=1, keepdim=True) for f in features]
    known = [first]
    for t in range(1, len(features)):
        made = torch.zeros_like(first)
        for p in range(len(first)):
            near = []
            for s in [0, *range(max(1, t - queue), t)]:
                for q in range(len(first)):
                    rows = abs(p // columns - q // columns)
                    if rows <= radius and abs(p % columns - q % columns) <= radius:
                        near.append((float(features[t][p] @ features[s][q]), known[s][q]))
            near = sorted(near, key=lambda pair: -pair[0])[:topk]
            weights = torch.tensor([c / temperature for c, _ in near]).softmax(0)
            made[p] = sum(w * label for w, (_, label) in zip(weights, near, strict=True))
        known.append(made)
    return known


def test_predictions_are_those_of_a_loop_over_patches(root, folder, tmp_path):
    words = ["sequences=kite", "queue=2", "topk=3", "radius=2", "temperature=0.2"]
    run(command(folder, root, *words, f"predictions={tmp_path / 'masks'}"), tmp_path / "v.json")
    backbone = load_backbone(folder)
    frames = sorted((root / "JPEGImages" / "480p" / "kite").iterdir())
    features = []
    for path in frames:
        # 64 x 96 px: the longer side goes down to a multiple of 64
        pixels = np.array(Image.open(path).resize((64, 64), Image.Resampling.BILINEAR))
        mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
        x = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - mean) / std
        with torch.no_grad():
            features.append(backbone.net.forward_features(x)[0, 1:])
    truth = np.array(Image.open(root / "Annotations" / "480p" / "kite" / "00000.png"))
    small = truth[4::8][:, 6::12]  # the pixel at the centre of each of 8 x 8 cells
    first = torch.stack([torch.from_numpy(small == n).float().flatten() for n in (0, 1)], 1)
    expected = propagate_by_looping(features, first, (8, 8), 2, 3, 0.2, 2)
    for t in range(1, 6):
        maps = []
        for label in expected[t].T:
            picture = Image.fromarray(label.reshape(8, 8).numpy())
            up = np.array(picture.resize((64, 64), Image.Resampling.BILINEAR))
            maps.append((up - up.min()) / max(up.max() - up.min(), 1e-12))
        best = Image.fromarray(np.argmax(maps, 0).astype(np.uint8))
        mask = np.array(best.resize((96, 64), Image.Resampling.NEAREST))
        found, _ = read_mask(tmp_path / "masks" / "kite" / f"{t:05d}.png")
        assert (found == mask).mean() > 0.99  # rounding moves a pixel where classes tie


def test_numbers_are_those_of_the_written_masks(root, folder, tmp_path, capsys):
    """J by counting pixels of the PNGs; the first and last frames do not count."""
    masks = tmp_path / "masks"
    result = run(command(folder, root, f"predictions={masks}"), tmp_path / "v.json")
    j_objects = []
    for name, objects in (("goat", 2), ("lab-coat", 2), ("kite", 1)):
        truths = sorted((root / "Annotations" / "480p" / name).iterdir())
        predicted = sorted((masks / name).iterdir())
        assert [p.name for p in predicted] == [t.name for t in truths]
        assert Image.open(predicted[1]).mode == "P"
        assert np.array_equal(read_mask(predicted[0])[0], read_mask(truths[0])[0])
        for n in range(1, objects + 1):
            values = []
            for mine, its in list(zip(predicted, truths, strict=True))[1:-1]:
                a, b = np.array(Image.open(mine)) == n, np.array(Image.open(its)) == n
                values.append((a & b).sum() / (a | b).sum())
            j_objects.append(values)
    means = [np.mean(values) for values in j_objects]
    metrics = result["metrics"]
    assert metrics["j_mean"] == pytest.approx(100 * np.mean(means))
    recall = [np.mean(np.array(values) > 0.5) for values in j_objects]
    assert metrics["j_recall"] == pytest.approx(100 * np.mean(recall))
    assert metrics["jf_mean"] == pytest.approx((metrics["j_mean"] + metrics["f_mean"]) / 2)
    assert result["sequences"]["goat"]["j_mean"] == pytest.approx(
        [100 * v for v in means[:2]], abs=1e-3
    )
    assert result["data"]["videos"]["objects"] == 5
    assert result["protocol"]["grids"] == [[8, 8]]
    printed = capsys.readouterr().out
    assert f"{metrics['jf_mean']:7.2f}" in printed
    assert "3 sequences, 5 objects, 15 frames" in printed


def test_squares_of_one_colour_are_followed_by_their_pixels(root, tmp_path):
    result = run(command("pixels", root, "image_size=64"), tmp_path / "v.json")
    assert result["metrics"]["j_mean"] > 60
    still = run(command("pixels", root, "queue=0", "radius=0"), tmp_path / "s.json")
    assert still["metrics"]["j_mean"] < result["metrics"]["j_mean"] - 10  # nothing moves then


def test_convolutions_use_the_map_of_their_last_stage(root, tmp_path):
    result = run(
        command("random:resnet10t", root, "image_size=128", "sequences=[goat]"), tmp_path / "v.json"
    )
    assert result["protocol"]["input_sizes"] == [[128, 192]]
    assert result["protocol"]["grids"] == [[4, 6]]
    assert 0 <= result["metrics"]["jf_mean"] <= 100


def test_void_pixels_do_not_count_and_are_noted(root, tmp_path):
    plain = run(command("pixels", root, "sequences=[goat]"), tmp_path / "p.json")
    folder = root / "Annotations" / "480p" / "goat"
    for path in folder.iterdir():
        mask, palette = read_mask(path)
        mask[:, :20] = 255
        write_mask(path, mask, palette)
    result = run(command("pixels", root, "sequences=[goat]"), tmp_path / "v.json")
    assert "void pixels (255) of 1 sequences, such as goat" in result["notes"][0]
    assert result["metrics"]["j_mean"] != plain["metrics"]["j_mean"]


def test_mistakes_are_named(root, folder, tmp_path):
    with pytest.raises(DataError, match=r"there is no .*ImageSets.*Expected: ROOT/ImageSets"):
        video.main(command(folder, root / "JPEGImages"))
    with pytest.raises(ConfigError, match=r"predictions: .* holds the annotations"):
        video.main(command(folder, root, f"predictions={root}/Annotations/480p"))
    with pytest.raises(ConfigError, match=r"predictions: .* is a file"):
        video.main(command(folder, root, f"predictions={folder}/config.json"))
    with pytest.raises(ConfigError, match=r"cannot take frames of 64 x 64 px"):
        video.main(command("random:mixer_s32_224", root))
    with pytest.raises(ConfigError, match=r"unknown sequence 'gaot'.*'goat'"):
        video.main(command(folder, root, "sequences=[gaot]"))
    backbone = load_backbone(folder)
    torch.nn.init.constant_(backbone.net.norm.bias, float("nan"))
    save_backbone(backbone, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"not finite on goat"):
        video.main(command(tmp_path / "nan", root))
    frame = root / "JPEGImages" / "480p" / "goat" / "00003.jpg"
    frame.write_bytes(frame.read_bytes()[:700])
    with pytest.raises(DataError, match=r"a frame cannot be read: .*goat/00003.jpg"):
        video.main(command(folder, root))


def launch(argv, processes):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc_per_node={processes}", "-m", "eval.video", *argv],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_numbers_and_masks_of_one(root, folder, tmp_path):
    """Three sequences on two processes; then one process alone meets a broken frame."""
    argv = command(folder, root)
    one = run([*argv, f"predictions={tmp_path / 'm1'}"], tmp_path / "one.json")
    ended = launch([*argv, f"predictions={tmp_path / 'm2'}", f"output={tmp_path / 'two.json'}"], 2)
    assert ended.returncode == 0, ended.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["metrics"] == one["metrics"]
    assert two["sequences"] == one["sequences"]
    written = sorted(p.relative_to(tmp_path / "m1") for p in (tmp_path / "m1").rglob("*.png"))
    assert len(written) == 15
    for path in written:
        assert (tmp_path / "m1" / path).read_bytes() == (tmp_path / "m2" / path).read_bytes()

    # the header passes the check before the start; its body ends early, on one process only
    frame = root / "JPEGImages" / "480p" / "lab-coat" / "00002.jpg"
    frame.write_bytes(frame.read_bytes()[:700])
    ended = launch([*argv, f"output={tmp_path / 'none.json'}"], 2)
    assert ended.returncode != 0
    assert "a frame cannot be read" in ended.stderr
    assert not (tmp_path / "none.json").exists()
