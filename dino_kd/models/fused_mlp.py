"""A ViT's MLP in bf16 on a CPU with GELU in the first product, where no gradient is asked for."""

from __future__ import annotations

from timm.layers import Mlp
from torch import Tensor, nn

from dino_kd.models.watched import is_watched
from dino_kd.products import LINEAR, linear_gelu


class FusedMlp(Mlp):
    """timm's MLP by `linear_gelu`; a module becomes one by its `__class__`."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        hidden = linear_gelu(x, self.fc1.weight, self.fc1.bias) if self._is_plain() else None
        if hidden is None:
            return super().forward(x)
        return self.drop2(self.fc2(self.norm(hidden)))

    def _is_plain(self) -> bool:
        """Whether a linear layer and the exact GELU follow each other, and nobody listens."""
        if type(self.fc1) not in LINEAR or type(self.act) is not nn.GELU:
            return False
        passed_by = self.fc1, self.act, self.drop1
        drops = self.training and self.drop1.p > 0
        return self.act.approximate == "none" and not drops and not any(map(is_watched, passed_by))


MLP = (Mlp, FusedMlp)  # exactly these: others compute something else
