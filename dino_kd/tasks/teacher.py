"""A frozen network that answers: logits, features, maps, prototypes of the images it is shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_kd.data.mixing import Answers
from dino_kd.models.backbone import Backbone
from dino_kd.models.fingerprint import weights_hash
from dino_kd.models.head import DINOHead
from dino_kd.models.linear_head import LinearHead
from dino_kd.models.taps import tap_shapes, taps

HEADS = ("logits", "prototypes")


class Teacher(nn.Module):
    """A backbone with its heads, in eval mode and without gradients whatever is done to it.

    Args:
        backbone: frozen in place.
        size: (height, width) in pixels at which it sees every image.
        head: gives "logits" from the backbone's parts, or, as any other module, from its output.
        prototypes: the projection head it was pretrained with, which gives "prototypes".
        weight: its share among several teachers.
        name: for people.
        class_names: of the logits, in their order; None: not known.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: tuple[int, int],
        *,
        head: LinearHead | nn.Module | None = None,
        prototypes: DINOHead | None = None,
        weight: float = 1.0,
        name: str = "",
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.size, self.weight = backbone, size, weight
        self.head, self.prototypes = head, prototypes
        self.name, self.class_names = name or backbone.name, class_names
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: batch-norm statistics and dropout of a teacher are fixed."""
        return super().train(False)

    @torch.no_grad()
    def answers(self, pixels: Tensor, names: Sequence[str]) -> Answers:
        """What `names` asks for, of images float ``[B, C, H, W]`` in 0..255, each normalised anew.

        Names are those of `models.taps`, "logits" ``[B, Y]`` and "prototypes" ``[B, K]``.
        """
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True)
            pixels = pixels.clamp(0, 255)
        return self.answers_to(self.backbone.preprocess(pixels), names)

    @torch.no_grad()
    def answers_to(self, x: Tensor, names: Sequence[str]) -> Answers:
        """As `answers`, of images that are normalised for this teacher, at any size it takes."""
        parts = self.head.parts if isinstance(self.head, LinearHead) else ("output",)
        needed = set(names) - set(HEADS)
        if "prototypes" in names:
            needed.add("output")
        made: Answers = {}
        inside: dict[str, Tensor] = {}
        if "logits" in names and set(parts) <= {"output", "mean"}:  # the pass for the taps has them
            needed |= {"map" if part == "mean" else part for part in parts}
        elif "logits" in names:
            inside = self.backbone.parts(x, list(dict.fromkeys([*parts, "output"])))
            made["output"] = inside["output"]
        made |= taps(self.backbone, x, sorted(needed - made.keys()))
        if "logits" in names:
            assert self.head is not None  # whoever asks has checked
            inside = inside or {
                part: made["map"].mean((2, 3)) if part == "mean" else made[part] for part in parts
            }
            made["logits"] = self.head(
                inside if isinstance(self.head, LinearHead) else inside["output"]
            )
        if "prototypes" in names:
            assert self.prototypes is not None
            made["prototypes"] = self.prototypes(made["output"])
        return {name: made[name] for name in names}

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shape of every tap in `names`, without its batch axis, at this teacher's size."""
        return tap_shapes(self.backbone, [n for n in names if n not in HEADS], self.size)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all weights and statistics: equal before and after training."""
        return weights_hash(self)
