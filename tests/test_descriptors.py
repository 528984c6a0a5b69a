"""GeM, scales and whitening against loops, torch's pooling and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

from dino_kd.descriptors import DINO_SCALES, describe, gem, learn_whitening
from dino_kd.models.backbone import create_backbone

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, args=TINY).eval()


@pytest.mark.parametrize("power", [1.0, 3.0, 4.0])
def test_gem_is_the_generalised_mean(power):
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    positive = x.double().clamp(min=1e-6)
    expected = F.lp_pool1d(positive.transpose(1, 2), power, 6).squeeze(2) / 6 ** (1 / power)
    torch.testing.assert_close(gem(x, power).double(), expected, atol=1e-6, rtol=1e-5)


def test_gem_of_a_high_power_is_the_maximum_without_overflow():
    x = torch.tensor([[[1e-3, 1e3], [5.0, 2e3], [2.0, -1.0]]])
    found = gem(x, 1000.0)
    torch.testing.assert_close(found, torch.tensor([[5.0, 2e3]]), rtol=2e-3, atol=0)
    assert torch.isfinite(gem(torch.full((1, 4, 2), -3.0), 4.0)).all()  # nothing is positive


def test_parts_are_the_networks_own(vit):
    x = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        final = vit.net.forward_features(x)  # [3, 1 + 24, 32]
        torch.testing.assert_close(describe(vit, x), final[:, 0])
        both = describe(vit, x, parts=("cls", "gem"), gem_power=3.0)
    pooled = final[:, 1:].clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
    torch.testing.assert_close(both, torch.cat([final[:, 0], pooled], 1), atol=1e-5, rtol=1e-4)


def test_scales_are_averaged_and_cut_to_whole_patches(vit):
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = describe(vit, x, scales=DINO_SCALES)
        views = [x]
        for scale, cut in ((2**-0.5, (40, 32)), (0.5, (32, 24))):  # 45 x 33 and 32 x 24 px
            small = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False,
                                  recompute_scale_factor=True)  # fmt: skip
            views.append(small[..., : cut[0], : cut[1]])
        expected = sum(vit(view) for view in views) / 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_small_image_keeps_one_patch_at_every_scale(vit):
    with torch.no_grad():
        assert describe(vit, torch.zeros(1, 3, 8, 16), scales=DINO_SCALES).shape == (1, 32)


def test_convolutions_pool_their_map():
    torch.manual_seed(0)
    cnn = create_backbone("resnet10t", img_size=64).eval()
    x = torch.randn(1, 3, 70, 50)  # any size
    with torch.no_grad():
        found = describe(cnn, x, parts=("cls", "gem"), gem_power=1.0, scales=(1.0, 0.5))
    assert found.shape == (1, 1024)
    # after the last ReLU the generalised mean of power 1 is the average pooling
    torch.testing.assert_close(found[:, :512], found[:, 512:], atol=1e-4, rtol=1e-3)


def test_whitening_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    new = rng.normal(size=(20, 6)).astype(np.float32)
    found = learn_whitening(torch.from_numpy(x))(torch.from_numpy(new)).numpy()
    expected = PCA(whiten=True).fit(x.astype(float)).transform(new.astype(float))
    signs = np.sign((found * expected).sum(0))  # an axis has no direction
    np.testing.assert_allclose(found, expected * signs, atol=1e-3)


def test_whitening_from_few_images_stays_finite():
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    whitening = learn_whitening(x)
    found = whitening(torch.randn(3, 10, generator=torch.Generator().manual_seed(1)))
    assert torch.isfinite(found).all()
    axis = whitening.matrix.norm(dim=0)
    assert axis.max() / axis.min() < 1e-5**-0.5 * 1.01
    assert torch.isfinite(learn_whitening(torch.ones(5, 3))(torch.zeros(1, 3))).all()
