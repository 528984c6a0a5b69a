"""Terms that regress the teacher's features: a projector leads from the student's to them."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from dino_kd.data.mixing import Answers, Views
from dino_kd.losses.maps import coarser_grid, cosine_loss, hint_loss, r_squared, resample_map
from dino_kd.losses.standardise import PhiS, Standardise
from dino_kd.terms.term import Term


class CosineTerm(Term):
    """The direction of the pooled feature, through an MLP with batch norms (SimReg).

    Args:
        width, teacher_width: of the pooled features.
        hidden_dim, layers: of the MLP.
    """

    student_taps = ("output",)
    teacher_taps = ("output",)

    def __init__(self, width: int, teacher_width: int, *, hidden_dim: int, layers: int) -> None:
        super().__init__()
        self.projector = projector(width, teacher_width, hidden_dim=hidden_dim, layers=layers)
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """``mean over b of 2 - 2 cos(g(student), teacher)``."""
        projected = self.projector(student["output"])  # [B, Dt]
        self._seen = (projected.detach(), teacher["output"])
        return cosine_loss(projected, teacher["output"])

    def measure(self) -> dict[str, Tensor]:
        """R2 of the unit vectors, and the spread of the projections, 0 when they are all one."""
        if self._seen is None:
            return {}
        return reached(*(nn.functional.normalize(x.float(), dim=1) for x in self._seen))


class FeatureTerm(Term):
    """Every place of the teacher's map, standardised, through a 1x1 convolution (FitNets).

    Without an activation: standardised targets are negative half the time.

    Args:
        student_tap: map of the student, such as "map-16".
        width, teacher_width: channels of both maps.
        standardise: gives the targets mean 0 and variance 1; fitted before the first step.
    """

    def __init__(
        self,
        student_tap: str,
        width: int,
        teacher_width: int,
        standardise: Standardise | PhiS,
        teacher_tap: str = "map",
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.projector = nn.Sequential(
            nn.Conv2d(width, teacher_width, 1, bias=False), nn.BatchNorm2d(teacher_width)
        )
        self.standardise = standardise
        self._seen: tuple[Tensor, Tensor] | None = None

    def fit(self, answers: Answers) -> None:
        """Mean and variance, or the rotation, of all places of the teacher's maps."""
        maps = answers[self.teacher_taps[0]]  # [N, Dt, h, w]
        self.standardise.fit(maps.float().permute(0, 2, 3, 1).flatten(0, 2))

    def forward(self, student: Answers, teacher: Answers, views: Views) -> Tensor:
        """At the coarser of the two grids; a 1x1 convolution and resampling commute."""
        ours, theirs = student[self.student_taps[0]], teacher[self.teacher_taps[0]]
        grid = coarser_grid(ours, theirs)
        target = resample_map(self.standardise(theirs.movedim(1, -1)).movedim(-1, 1), grid)
        projected = self.projector(resample_map(ours, grid))
        self._seen = (projected.detach(), target)
        return hint_loss(projected, target)

    def measure(self) -> dict[str, Tensor]:
        """R2 of the projection, and its variance beside the target's, 0 when it is constant."""
        if self._seen is None:
            return {}
        return reached(*(x.float().movedim(1, -1).flatten(0, -2) for x in self._seen))


def reached(projected: Tensor, target: Tensor) -> dict[str, Tensor]:
    """How much of targets ``[M, D]`` projections explain, and how much they vary beside them."""
    spreads = [values.var(0, unbiased=False).sum() for values in (projected, target)]
    return {"r2": r_squared(projected, target), "spread": spreads[0] / spreads[1].clamp(min=1e-12)}


def projector(width: int, out: int, *, hidden_dim: int, layers: int) -> nn.Sequential:
    """An MLP of `layers` linear layers, batch norm and ReLU between them."""
    widths = [width, *[hidden_dim] * (layers - 1)]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], out))
