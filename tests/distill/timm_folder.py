"""A folder as timm writes it, with the network's own classifier."""

from __future__ import annotations

import json

import timm
import torch
from safetensors.torch import save_file

CLASSES = ["class_0", "class_1", "class_2"]


def write_timm_folder(folder, count, names=None, seed=0):
    """A timm model with its classifier, as timm itself writes it."""
    torch.manual_seed(seed)
    net = timm.create_model("resnet18", num_classes=count)
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    about = {
        "input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.2] * 3, "num_classes": count,
        "classifier": "fc", "first_conv": "conv1",
    }  # fmt: skip
    if names:
        about["label_names"] = names
    config = {"architecture": "resnet18", "num_classes": count, "pretrained_cfg": about}
    (folder / "config.json").write_text(json.dumps(config))
    return net.eval()
