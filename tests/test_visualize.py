"""IoU against a brute-force loop, and the picture against what must be in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dino_kd.errors import UserError
from dino_kd.models.backbone import create_backbone
from dino_kd.visualize import attention_iou, mask_iou, save_attention_picture


def vit():
    torch.manual_seed(0)
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    return create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=args).eval()


def images(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


def brute_force_iou(attention, masks, keep):
    scores = []
    for image_attention, mask in zip(attention.numpy(), masks.numpy(), strict=True):
        flat = image_attention.ravel().astype(np.float64)
        chosen, mass = np.zeros(flat.size, bool), 0.0
        for index in np.argsort(-flat, kind="stable"):
            if mass >= keep * flat.sum():
                break
            chosen[index] = True
            mass += flat[index]
        pixels = np.kron(chosen.reshape(image_attention.shape), np.ones((4, 4))) > 0
        scores.append((pixels & mask).sum() / (pixels | mask).sum())
    return np.mean(scores)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_iou_equals_the_loop(keep):
    generator = torch.Generator().manual_seed(1)
    attention = torch.rand(5, 4, 4, generator=generator)
    masks = torch.rand(5, 16, 16, generator=generator) > 0.7
    assert mask_iou(attention, masks, keep) == pytest.approx(
        brute_force_iou(attention, masks, keep), rel=1e-6
    )


def test_attention_on_exactly_the_object_has_iou_one():
    attention = torch.zeros(1, 4, 4)
    attention[0, 1:3, 1:3] = 0.25
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 4:12, 4:12] = True
    assert mask_iou(attention, mask, 0.99) == 1.0


def test_the_best_head_is_at_least_as_good_as_either():
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[:, :8] = True
    scores = attention_iou(vit(), images(3), masks)
    assert 0 < scores["mean"] <= 1
    assert 0 < scores["best_head"] <= 1


def test_the_picture_shows_images_masks_and_maps(tmp_path):
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[:, 4:8, 4:8] = True
    path = tmp_path / "attention.png"
    shown = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    shown[:, 0] = 200
    save_attention_picture({"before": vit(), "after": vit()}, shown, path, masks=masks)
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert (picture == (200, 0, 0)).all(-1).sum() >= 2 * 16 * 16
    assert picture.shape[1] > 6 * 112  # image, object, before, after, two heads


def test_a_cnn_is_refused_in_words(tmp_path):
    cnn = create_backbone("resnet10t", img_size=32).eval()
    with pytest.raises(UserError, match="is no ViT"):
        save_attention_picture({"cnn": cnn}, images(1), tmp_path / "a.png")
