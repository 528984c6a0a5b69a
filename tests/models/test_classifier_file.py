"""The classifier's file: what is written is read back, and what is no classifier is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dino_kd.errors import CheckpointError
from dino_kd.models.classifier_file import (
    CLASSIFIER_FILE,
    of_token,
    read_classifier,
    write_classifier,
)


@pytest.mark.parametrize("with_token", [False, True])
def test_it_comes_back_with_its_classes(tmp_path, with_token):
    layers = [nn.Linear(5, 2), nn.Linear(5, 2)]
    write_classifier(tmp_path, ["cat", "dog"], layers[0], layers[1] if with_token else None)
    names, tensors = read_classifier(tmp_path / CLASSIFIER_FILE)
    assert names == ["cat", "dog"]
    assert torch.equal(tensors["weight"], layers[0].weight)
    assert torch.equal(tensors["bias"], layers[0].bias)
    token = of_token(tensors)
    assert set(token) == ({"weight", "bias"} if with_token else set())
    if with_token:
        assert torch.equal(token["weight"], layers[1].weight)


def test_what_is_no_classifier_is_refused(tmp_path):
    path = tmp_path / CLASSIFIER_FILE
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is damaged or no classifier"):
        read_classifier(path)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is no classifier: it holds other"):
        read_classifier(path)
