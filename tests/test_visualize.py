"""IoU against a brute-force loop, and the picture against what must be in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dino_kd.errors import UserError
from dino_kd.models.backbone import create_backbone
from dino_kd.visualize import (
    attention_and_patches,
    attention_iou,
    colour_picture,
    heat_over_image,
    heat_pictures,
    mask_iou,
    mask_over_image,
    patch_at,
    patch_marked,
    patch_similarity,
    save_attention_picture,
)


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


def test_attention_and_patches_are_those_of_the_network():
    backbone, batch = vit(), images(2)
    attention, patches = attention_and_patches(backbone, batch)
    assert attention.shape == (2, 2, 4, 4)
    with torch.no_grad():
        expected = backbone.tokens(backbone.preprocess(batch)).patches
    torch.testing.assert_close(patches.flatten(1, 2), expected)
    assert attention_and_patches(backbone, batch, with_attention=False)[0] is None


def test_patches_of_a_cnn_are_its_last_map():
    cnn = create_backbone("resnet10t", img_size=64).eval()
    wide = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    attention, patches = attention_and_patches(cnn, wide, with_attention=False)
    assert attention is None
    with torch.no_grad():
        expected = cnn.net.forward_features(cnn.preprocess(wide))[0].permute(1, 2, 0)
    torch.testing.assert_close(patches[0], expected)


def test_bf16_is_near_fp32():
    exact, patches = attention_and_patches(vit(), images(2))
    near, near_patches = attention_and_patches(vit(), images(2), precision="bf16")
    assert near.dtype == near_patches.dtype == torch.float32
    torch.testing.assert_close(near, exact, atol=0.02, rtol=0.1)
    assert not torch.equal(near_patches, patches)


def test_a_map_becomes_flat_blocks_from_dark_to_bright():
    (picture,) = heat_pictures(torch.tensor([[[0.0, 1.0, 0.5]]]), (4, 6))
    assert picture.shape == (3, 4, 6)
    blocks = picture.sum(0)
    assert (blocks == blocks[:1]).all()
    assert blocks[0, 0] == blocks[0, 1] < blocks[0, 4] < blocks[0, 2]


def test_a_constant_map_is_no_error():
    (picture,) = heat_pictures(torch.full((1, 2, 2), 0.25), (4, 4))
    assert len(np.unique(picture.reshape(3, -1), axis=1).T) == 1


def test_the_overlay_colours_strong_places_and_shows_the_image_in_weak_ones():
    image = np.zeros((3, 4, 8), np.uint8)
    image[:, :, ::2] = 200  # stripes
    found = heat_over_image(image, torch.tensor([[0.0, 1.0]])).astype(int)
    left, right = found[:, :, :4], found[:, :, 4:]
    stripes = [abs(part[:, :, 0] - part[:, :, 1]).max() for part in (left, right)]
    assert stripes[0] > 1.5 * stripes[1]  # the image is plainer where the map is weak
    assert right.sum() > left.sum()


def test_the_mask_keeps_the_image_inside_and_darkens_the_rest():
    image = np.full((3, 80, 120), 200, np.uint8)
    found = mask_over_image(image, torch.tensor([[True, False, False], [False, False, True]]))
    assert found[:, 20, 20].tolist() == [200, 200, 200]
    assert found[:, 60, 100].tolist() == [200, 200, 200]
    assert (found[:, 20, 60] < 70).all()
    outlined = (found == np.array([255, 196, 0])[:, None, None]).all(0)
    assert outlined[0, :40].all()
    assert outlined[:40, 39].all()
    assert not outlined[:, 41:79].any()


def test_grey_and_many_banded_images_are_shown_too():
    for bands in (1, 2, 5):
        image = np.full((bands, 16, 16), 200, np.uint8)
        assert mask_over_image(image, torch.ones(2, 2) > 0).shape == (3, 16, 16)
        assert heat_over_image(image, torch.rand(2, 2)).shape == (3, 16, 16)
        assert patch_marked(image, (0, 1), (2, 2)).shape == (3, 16, 16)


def test_colours_become_blocks():
    colours = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    picture = colour_picture(colours, (2, 4))
    assert picture[:, 0, 1].tolist() == [255, 0, 0]
    assert picture[:, 1, 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("point", "expected"),
    [((0, 0), (0, 0)), ((1, 1), (2, 4)), ((0.5, 0.5), (1, 2)), ((0.99, 0.0), (0, 4))],
)
def test_points_count_from_the_top_left_across_and_down(point, expected):
    assert patch_at(point, (3, 5)) == expected


def test_similarity_is_the_cosine_with_the_chosen_patch():
    patches = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    found = patch_similarity(patches, (2, 1))
    for row in range(3):
        for column in range(4):
            a, b = patches[row, column].numpy(), patches[2, 1].numpy()
            expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found[row, column].item() == pytest.approx(expected, abs=1e-6)


def test_the_chosen_patch_is_outlined():
    image = np.zeros((3, 40, 60), np.uint8)
    changed = (patch_marked(image, (1, 2), (2, 3)) != image).any(0)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 40, 59)
    assert not changed[30, 50]
