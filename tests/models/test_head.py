"""DINOHead against numpy, and the properties that training relies on."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dino_kd.models.head import DINOHead


def make_head(**options):
    torch.manual_seed(0)
    return DINOHead(6, 11, **{"hidden_dim": 8, "bottleneck_dim": 4, "num_layers": 3, **options})


@pytest.mark.parametrize("unit_prototypes", [True, False])
def test_logits_match_numpy(unit_prototypes):
    head = make_head(unit_prototypes=unit_prototypes)
    if not unit_prototypes:
        torch.nn.init.uniform_(head.lengths, 0.5, 2.0)
    x = torch.randn(5, 6)
    hidden = x.numpy().astype(np.float64)
    linears = [m for m in head.mlp if isinstance(m, torch.nn.Linear)]
    for i, linear in enumerate(linears):
        hidden = hidden @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        if i < len(linears) - 1:
            hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    z = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    w = head.last_layer.detach().numpy()
    w = w / np.linalg.norm(w, axis=1, keepdims=True)
    if not unit_prototypes:
        w = w * head.lengths.detach().numpy()[:, None]
    np.testing.assert_allclose(head(x).detach().numpy(), z @ w.T, atol=1e-5)


@pytest.mark.parametrize(
    ("num_layers", "widths"),
    [(1, [(6, 4)]), (2, [(6, 8), (8, 4)]), (3, [(6, 8), (8, 8), (8, 4)])],
)
def test_layers_before_the_prototypes_are_counted(num_layers, widths):
    head = make_head(num_layers=num_layers)
    linears = [m for m in head.mlp if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == widths
    assert head(torch.randn(2, 6)).shape == (2, 11)


def test_batch_norm_follows_hidden_layers_only():
    head = make_head(batch_norm=True)
    kinds = [type(m).__name__ for m in head.mlp]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]


def test_published_head_has_the_published_size():
    """22.4 M parameters at K=65536 on ViT-S."""
    assert sum(p.numel() for p in DINOHead(384, 65536).parameters()) == pytest.approx(
        22.4e6, rel=0.01
    )


def test_weights_start_small_and_truncated():
    head = DINOHead(64, 128, hidden_dim=128, bottleneck_dim=64)
    for weight in [head.last_layer, head.mlp[0].weight]:
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert head.mlp[0].bias.abs().max() == 0


def test_prototype_parameters_are_what_freezing_needs():
    assert [p.shape for p in make_head().prototype_parameters()] == [(11, 4)]
    assert [p.shape for p in make_head(unit_prototypes=False).prototype_parameters()] == [
        (11, 4),
        (11,),
    ]


def test_head_can_be_deep_copied_after_a_forward_pass():
    head = make_head()
    head(torch.randn(2, 6)).sum().backward()
    twin = copy.deepcopy(head)
    x = torch.randn(2, 6)
    torch.testing.assert_close(twin(x), head(x))
    assert twin.last_layer is not head.last_layer


def test_lengths_stay_exact_under_autocast():
    head = make_head(bottleneck_dim=256)
    x = torch.randn(64, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(x)
    assert logits.isfinite().all()
    assert (logits.float() - head(x)).abs().max() < 0.03


def test_a_zero_feature_gives_finite_gradients():
    head = make_head()
    for p in head.mlp.parameters():
        torch.nn.init.zeros_(p)
    head(torch.zeros(2, 6)).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("unit_prototypes", [True, False])
def test_a_frozen_last_layer_costs_no_gradient_and_changes_no_other(unit_prototypes):
    """Logits and the gradients of everything before it; the product for its own is not done."""
    torch.manual_seed(0)
    head = DINOHead(6, 11, hidden_dim=5, bottleneck_dim=4, unit_prototypes=unit_prototypes)
    x, weights = torch.randn(7, 6), torch.randn(7, 11)
    made, products = {}, {}
    for frozen in (False, True):
        head.zero_grad(set_to_none=True)
        with FlopCounterMode(display=False) as counted:
            logits = head(x, frozen=frozen)
            (logits * weights).sum().backward()
        products[frozen] = counted.get_total_flops()
        made[frozen] = [logits.detach()] + [p.grad.clone() for p in head.mlp.parameters()]
    assert all(p.grad is None for p in head.prototype_parameters())
    assert all(torch.equal(a, b) for a, b in zip(made[True], made[False], strict=True))
    assert products[False] - products[True] == 2 * 7 * 11 * 4
