"""Is the run learning? Label-free numbers and the sentences they justify.

The cross-entropy splits into teacher entropy plus KL (arXiv 2104.14294, section 5.3): entropy at
ln K is a uniform teacher, entropy at 0 one winning prototype, KL at 0 a student with nothing left
to learn. RankMe is arXiv 2210.02885, equation 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def rankme(features: Tensor) -> Tensor:
    """Effective rank of features ``[N, D]``: exp of the entropy of the singular values' shares.

    Between 1 (all features on one line) and min(N, D); NaN when a feature is not finite. A float32
    scalar on the CPU.
    """
    values = features.detach().float().cpu()
    if not values.isfinite().all():
        return torch.tensor(math.nan)
    singular = torch.linalg.svdvals(values)
    shares = singular / singular.sum().clamp(min=1e-12)
    return torch.exp(torch.special.entr(shares).sum())


def rankme_later(features: Tensor) -> Callable[[], Tensor]:
    """`rankme` of what `features` are now, for when it is called: a scalar on their device.

    The CPU takes tens of milliseconds for it. A GPU copies the features for it at once, and may by
    then have the backward pass to do.
    """
    device = features.device
    if device.type != "cuda":
        return lambda: rankme(features).to(device)
    copied = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    copied.copy_(features.detach(), non_blocking=True)
    has_copied = torch.cuda.Event()
    has_copied.record()

    def measure() -> Tensor:
        has_copied.synchronize()
        return rankme(copied).to(device, non_blocking=True)

    return measure


def perplexity(probs: Tensor) -> Tensor:
    """exp(entropy) of the mean distribution of ``[N, K]``: how many prototypes are in use, 1..K."""
    return torch.exp(torch.special.entr(probs.float().mean(0)).sum())


class DataWait:
    """Names the bottleneck, once, when training waits for its images for long enough to tell.

    Stretches are added up to windows of `window` seconds. The first stretch, in which loading
    starts and a network may be compiled, is left out.

    Args:
        advice: What to change.
        share: Of the time, from which on it is said.
        window: seconds.
    """

    def __init__(self, advice: str, *, share: float = 0.3, window: float = 60.0) -> None:
        self.advice, self.share, self.window = advice, share, window
        self._waited = self._elapsed = 0.0
        self._is_first, self._said = True, False

    def watch(self, waited: float, elapsed: float, *, say: Callable[[str], object]) -> None:
        """As `add`; the sentence is said."""
        if sentence := self.add(waited, elapsed):
            say(sentence)

    def add(self, waited: float, elapsed: float) -> str:
        """Seconds waited of those that passed since the last call; the sentence, mostly empty."""
        if self._is_first or self._said:
            self._is_first = False
            return ""
        self._waited += waited
        self._elapsed += elapsed
        if self._elapsed < self.window:
            return ""
        part = self._waited / self._elapsed
        self._waited = self._elapsed = 0.0
        self._said = part > self.share
        return (
            f"training waits for its images {part:.0%} of the time; {self.advice}"
            if self._said
            else ""
        )


class HealthMonitor:
    """A hook that reads each row of metrics and warns once, in words, about each known failure.

    Nothing is said in the first tenth of the run (at least 100 steps): every network starts
    uniform.
    """

    def __init__(
        self, warn: Callable[[str], None], *, num_prototypes: int, total_steps: int
    ) -> None:
        self.warn = warn
        self.num_prototypes = num_prototypes
        self.quiet_until = max(100, total_steps // 10)
        self.said: set[str] = set()

    def __call__(self, done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        if row and done >= self.quiet_until:
            for name, sentence in diagnose(row, done, self.num_prototypes).items():
                if name not in self.said:
                    self.said.add(name)
                    self.warn(f"step {done}: {sentence}")
        return {}


def diagnose(row: dict[str, float], done: int, num_prototypes: int) -> dict[str, str]:
    """Named findings for one row of metrics; empty when it looks healthy."""
    findings: dict[str, str] = {}
    ceiling = math.log(num_prototypes)
    entropy = row.get("teacher_entropy", ceiling / 2)
    if entropy > 0.98 * ceiling:
        findings["uniform"] = (
            f"the teacher is uniform (entropy {entropy:.2f}, its ceiling ln K is {ceiling:.2f}): "
            "nothing is learned. Usual cures: a lower teacher.temp, a shorter "
            "teacher.horizon_images, fewer head.num_prototypes, a higher optim.base_lr"
        )
    elif row.get("kl", 1.0) < 1e-3:
        findings["no_kl"] = (
            f"student and teacher agree completely (KL {row['kl']:.1e}): collapsed. "
            "Usual cures: a lower optim.base_lr, stronger crops, a lower teacher.temp"
        )
    used = row.get("prototypes_used", math.inf)
    if used < 2:
        findings["one_prototype"] = (
            f"one prototype takes everything (perplexity {used:.2f}): collapsed. "
            "Usual cures: a lower teacher.center_momentum, a higher teacher.temp"
        )
    rank = row.get("rankme", math.inf)
    if rank < 2:
        findings["low_rank"] = (
            f"all features lie on one line (RankMe {rank:.2f}): the backbone has collapsed"
        )
    skipped = row.get("skipped_steps", 0.0)
    if skipped > 0.05 * done:
        findings["skipped"] = (
            f"{skipped:.0f} of {done} steps were skipped because loss or gradient was not finite. "
            "Usual cures: optim.precision=bf16 or fp32, a lower optim.base_lr"
        )
    return findings
