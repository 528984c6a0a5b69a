"""Counted FLOPs against the textbook's, and the sentence about what holds a training up."""

from __future__ import annotations

import torch

from dino_kd.engine.speed import Setup, Speed, bottleneck, count_flops, measured_peak, peak_of
from tests.tiny import draw

CPU = torch.device("cpu")


def setup(**changes):
    values = {"device": CPU, "precision": "fp32", "loading_advice": "add workers"}
    return Setup(**{**values, **changes})


def test_flops_of_a_layer_forward_and_backward():
    """2 N I O forward, the same for each of the two gradients."""
    layer, x = torch.nn.Linear(7, 5), draw(3, 7).requires_grad_()
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 7 * 5


def test_flops_of_attention_on_a_cpu():
    """Two products forward, five backward (one of them is done again), as on a GPU."""
    q, k, v = (draw(2, 3, 16, 8, seed=s).requires_grad_() for s in range(3))
    product = 2 * (2 * 3) * 16 * 16 * 8

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert count_flops(forward) == 2 * product
    assert count_flops(lambda: forward().sum().backward()) == (2 + 5) * product


def test_the_measured_peak_is_that_of_a_fast_product():
    """Above a plain product of small matrices, and far below what no machine does."""
    peak = measured_peak(CPU, torch.float32, 512, rounds=3)
    assert 1e8 < peak < 1e15


def test_the_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak = peak_of(torch.device("cuda"), "bf16")
    assert peak.flops == 989e12
    assert "data sheet of H100" in peak.source


def test_a_slow_loader_is_named_with_what_makes_it_faster():
    slow = Speed(loader=50, step=400, together=49, waiting=0.88, mfu=0.3)
    kind, sentence = bottleneck(slow, setup())
    assert kind == "loader"
    for part in ("50 images/s", "400", "waits 88 %", "add workers"):
        assert part in sentence


def test_a_slow_step_is_named_with_what_makes_it_shorter(monkeypatch):
    slow = Speed(loader=400, step=50, together=49, waiting=0.01, mfu=0.5)
    monkeypatch.setattr("dino_kd.engine.speed.has_bf16", lambda device: True)
    kind, sentence = bottleneck(slow, setup())
    assert kind == "step"
    assert "optim.precision=auto" in sentence
    _, sentence = bottleneck(slow, setup(precision="bf16"))
    assert "model.backbone" in sentence


def test_an_idle_gpu_is_given_larger_batches():
    idle = Speed(loader=9000, step=900, together=890, waiting=0.01, mfu=0.08)
    kind, sentence = bottleneck(idle, setup(device=torch.device("cuda"), precision="bf16"))
    assert kind == "step"
    assert "8 % of the peak a larger optim.batch_size" in sentence


def test_a_loader_that_is_fast_alone_only_shares_the_cores():
    shared = Speed(loader=500, step=400, together=250, waiting=0.3, mfu=0.4)
    kind, sentence = bottleneck(shared, setup())
    assert kind == "cores"
    assert "together 250" in sentence
    assert "add workers" in sentence


def test_waiting_that_loading_between_the_steps_explains_is_the_step(monkeypatch):
    monkeypatch.setattr("dino_kd.engine.speed.has_bf16", lambda device: False)
    kind, _ = bottleneck(Speed(900, 100, 90, waiting=0.1, mfu=0.4), setup())
    assert kind == "step"
