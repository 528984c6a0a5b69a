"""Recomputed activations: the same gradients from less that is kept."""

from __future__ import annotations

import pytest
import torch

from dino_kd.errors import ConfigError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.checkpointing import checkpoint_activations


def build(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    args = {"depth": 4, "embed_dim": 32, "num_heads": 2}
    return create_backbone(name, img_size=32, **options or {"patch_size": 8, "args": args})


def test_gradients_are_equal_and_less_is_kept():
    """With stochastic depth, whose numbers are drawn again in the second pass."""
    x = torch.randn(8, 3, 32, 32)
    made, kept = [], []
    for checkpointing in (False, True):
        backbone = build(
            patch_size=8, drop_path=0.5, args={"depth": 4, "embed_dim": 32, "num_heads": 2}
        ).train()
        if checkpointing:
            checkpoint_activations(backbone)
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = backbone(x)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
        (features * torch.arange(32.0)).sum().backward()
        made.append([features.detach(), *(p.grad for p in backbone.parameters())])
    torch.testing.assert_close(made[1], made[0], rtol=1e-6, atol=1e-7)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(
    ("name", "reason"), [("resnet18", "batch norms"), ("mobilenetv3_small_050", "batch norms")]
)
def test_networks_that_cannot_are_refused(name, reason):
    with pytest.raises(ConfigError, match=rf"model.checkpoint_activations: {name}.*{reason}"):
        checkpoint_activations(create_backbone(name, img_size=32))
