"""Relations to images of other steps: SEED's queue of teacher features, CRD's memory of all images.

The losses are pure; the two stores are modules that follow `losses.dino.Center`: micro-batches
`observe`, one `commit` per optimiser step, `discard` for a step that was skipped.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kd.distributed import all_gather_rows, all_reduce_sum
from dino_kd.hardware import widest
from dino_kd.losses.numerics import require_same_shape, unit, without_autocast


def queue_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    student_temp: float = 0.2,
    teacher_temp: float = 0.07,
) -> Tensor:
    """SEED (Fang et al. 2021, 2101.04731): the same ranking of past images.

    ::

        a_s[b] = [s.t, s.Q_1 .. s.Q_M];   a_t[b] = [t.t, t.Q_1 .. t.Q_M]      # unit vectors
        L = mean_b -sum softmax(a_t / teacher_temp) * log_softmax(a_s / student_temp)

    Args:
        student: ``[B, D]``.
        teacher: ``[B, D]``, without gradient.
        queue: ``[M, D]``, teacher features of earlier steps; append this step's after the loss.
        student_temp: > 0.
        teacher_temp: > 0; sharper than the student's.

    Returns:
        A float32 scalar >= 0; a cross-entropy, so its least value is the teacher's entropy, not
        0. ValueError for other shapes.
    """
    require_same_shape(student, teacher, "B D")
    if queue.ndim != 2 or queue.shape[1] != student.shape[1]:
        raise ValueError(
            f"queue must be [M, {student.shape[1]}] like the features, got {list(queue.shape)}"
        )
    with without_autocast(student):
        of_student, of_teacher = unit(student), unit(teacher.detach())
        past = unit(queue.detach())
        own = (of_student * of_teacher).sum(1, keepdim=True)  # [B, 1]
        scores = torch.cat([own, of_student @ past.T], 1)  # [B, 1 + M]
        own = of_teacher.square().sum(1, keepdim=True)
        wanted = torch.cat([own, of_teacher @ past.T], 1)  # [B, 1 + M]
    targets = F.softmax(wanted / teacher_temp, 1)
    return -(targets * F.log_softmax(scores / student_temp, 1)).sum(1).mean()


class FeatureQueue(nn.Module):
    """The last M teacher features as unit vectors, ``queue`` ``[M, D]``; oldest replaced first.

    Starts with random unit vectors from torch's global generator: build it where all processes
    have drawn the same numbers, as for weights. All processes hold the same queue, and after a
    step it holds the same vectors as one process would have, but in another order: ranks follow
    each other where one process sees their images interleaved. A step of more than M images
    keeps the last M of that order.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue needs at least one place, got {size}")
        self.register_buffer("queue", unit(torch.randn(size, dim)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._observed: list[Tensor] = []

    @torch.no_grad()
    def observe(self, features: Tensor) -> None:
        """Keep teacher features ``[B, D]`` for the coming commit."""
        if features.ndim != 2 or features.shape[1] != self.queue.shape[1]:
            raise ValueError(
                f"features must be [B, {self.queue.shape[1]}], got {list(features.shape)}"
            )
        self._observed.append(unit(features.detach()).to(self.queue.device))

    @torch.no_grad()
    def commit(self) -> None:
        """Append what all processes observed, in rank order; all of them must call it."""
        rows = all_gather_rows(torch.cat([self.queue[:0], *self._observed]))
        size = len(self.queue)
        places = torch.arange(len(rows), device=rows.device)[-size:]
        self.queue[(self.pointer + places) % size] = rows[-size:]
        self.pointer.copy_((self.pointer + len(rows)) % size)
        self.discard()

    def discard(self) -> None:
        """Forget what was observed since the last commit."""
        self._observed.clear()


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_negatives: Tensor,
    teacher_negatives: Tensor,
    *,
    temperature: float = 0.07,
    num_images: int,
    z_student: Tensor | float,
    z_teacher: Tensor | float,
) -> Tensor:
    """CRD (Tian et al. 2020, 1910.10699): tell the own teacher feature from K others, and back.

    ::

        h(a, b) = u / (u + K / N);   u = exp(a.b / temperature) / Z          # unit vectors
        L = mean_b [-log h(s, t) - sum_k log(1 - h(s, T_k))]                  # Z of the student
          + mean_b [-log h(t, s) - sum_k log(1 - h(t, S_k))]                  # Z of the teacher

    Args:
        student: ``[B, D]``.
        teacher: ``[B, D]``, the embedding of a frozen feature: gradients reach it, because the
            layer that embeds the teacher trains too.
        student_negatives: ``[B, K, D]``, unit vectors of other images from `MemoryBank.student`.
        teacher_negatives: ``[B, K, D]``, likewise from `MemoryBank.teacher`.
        temperature: > 0.
        num_images: N of the data set.
        z_student: Z of scores of students against teacher vectors, of `MemoryBank.normalisers`.
        z_teacher: Z of scores of teachers against student vectors.

    Returns:
        A float32 scalar >= 0, not 0 for equal features. ValueError for other shapes.
    """
    require_same_shape(student, teacher, "B D")
    for negatives in (student_negatives, teacher_negatives):
        if negatives.ndim != 3 or negatives[:, 0].shape != student.shape:
            raise ValueError(
                f"negatives must be [B, K, D] for features {list(student.shape)}, "
                f"got {list(negatives.shape)}"
            )
    forward = _scores(student, teacher, teacher_negatives)
    backward = _scores(teacher, student, student_negatives)
    return _nce(forward / temperature, z_student, num_images) + _nce(
        backward / temperature, z_teacher, num_images
    )


def _scores(anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Inner products ``[B, 1 + K]``, the positive first."""
    with without_autocast(anchors):
        anchors = unit(anchors)
        own = (anchors * unit(positives)).sum(1, keepdim=True)
        others = torch.einsum("bd,bkd->bk", anchors, negatives.detach().float())
        return torch.cat([own, others], 1)


def _nce(scores: Tensor, z: Tensor | float, num_images: int) -> Tensor:
    log_z = torch.as_tensor(z, dtype=torch.float32, device=scores.device).detach().log()
    odds = scores - log_z - math.log((scores.shape[1] - 1) / num_images)  # log h / (1 - h)
    rows = F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(1)
    return -rows.mean()


class MemoryBank(nn.Module):
    """CRD's unit vectors of every image, `student` and `teacher` ``[N, D]``, and the frozen Z.

    Starts with random unit vectors from torch's global generator (see `FeatureQueue`). N x 128
    float32 twice is 1.3 GB for ImageNet. `commit` moves the vectors of the images that were seen,
    ``v <- unit(momentum * v + (1 - momentum) * new)``, an image seen twice by the mean of both;
    all processes hold the same bank, whatever their number.
    """

    student: Tensor
    teacher: Tensor
    z_student: Tensor
    z_teacher: Tensor

    def __init__(self, num_images: int, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        if num_images < 2:
            raise ValueError(f"a bank needs at least two images, got {num_images}")
        self.momentum = momentum
        self.register_buffer("student", unit(torch.randn(num_images, dim)))
        self.register_buffer("teacher", unit(torch.randn(num_images, dim)))
        self.register_buffer("z_student", torch.zeros(()))  # 0: not yet known
        self.register_buffer("z_teacher", torch.zeros(()))
        self._observed: list[tuple[Tensor, Tensor, Tensor]] = []
        self._z_sums: list[Tensor] = []

    def negatives(
        self, indices: Tensor, count: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw `count` other images for each of ``indices`` ``[B]``: int64 ``[B, count]``.

        Uniform with replacement, never the image itself.
        """
        device = "cpu" if generator is None else generator.device
        drawn = torch.randint(
            len(self.student) - 1, (len(indices), count), generator=generator, device=device
        ).to(indices.device)
        return drawn + (drawn >= indices[:, None])

    @torch.no_grad()
    def normalisers(
        self,
        student: Tensor,
        teacher: Tensor,
        student_negatives: Tensor,
        teacher_negatives: Tensor,
        *,
        temperature: float = 0.07,
    ) -> tuple[Tensor, Tensor]:
        """`z_student` and `z_teacher` for `crd_loss`, whose arguments these are.

        ``Z = N * mean(exp(score / temperature))``. Until a commit has frozen them they are those
        of this micro-batch over all processes, which must then call this equally often.
        """
        if self.z_student > 0:
            return self.z_student, self.z_teacher
        pairs = ((student, teacher, teacher_negatives), (teacher, student, student_negatives))
        sums = [widest(_scores(*pair) / temperature).exp().sum() for pair in pairs]
        count = sums[0].new_tensor(len(student) * (1 + student_negatives.shape[1]))
        packed = all_reduce_sum(torch.stack([*sums, count]))  # [3]
        self._z_sums.append(packed)
        z_student, z_teacher = self._z_of(packed)
        return z_student, z_teacher

    def _z_of(self, packed: Tensor) -> Tensor:
        return (len(self.student) * packed[:2] / packed[2]).float()

    @torch.no_grad()
    def observe(self, indices: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Keep features ``[B, D]`` of the images ``indices`` ``[B]`` for the coming commit."""
        require_same_shape(student, teacher, "B D")
        if indices.shape != student.shape[:1] or student.shape[1] != self.student.shape[1]:
            raise ValueError(
                f"indices must be [B] and features [B, {self.student.shape[1]}], "
                f"got {list(indices.shape)} and {list(student.shape)}"
            )
        self._observed.append((indices, unit(student.detach()), unit(teacher.detach())))

    @torch.no_grad()
    def commit(self) -> None:
        """Move the vectors of all images that were seen; freeze Z at the first. All must call."""
        device = self.student.device
        empty = (torch.zeros(0, dtype=torch.int64, device=device), self.student[:0])
        seen = [all_gather_rows(torch.cat([empty[0], *(o[0].to(device) for o in self._observed)]))]
        for side in (1, 2):
            rows = torch.cat([empty[1], *(o[side].to(device) for o in self._observed)])
            seen.append(all_gather_rows(rows))
        images, place = torch.unique(seen[0], return_inverse=True)
        counts = torch.bincount(place, minlength=len(images))[:, None]
        for bank, rows in ((self.student, seen[1]), (self.teacher, seen[2])):
            means = torch.zeros_like(bank[images]).index_add_(0, place, rows) / counts
            bank[images] = unit(torch.lerp(means, bank[images], self.momentum))
        if self._z_sums and not self.z_student > 0:
            frozen = self._z_of(torch.stack(self._z_sums).sum(0))
            self.z_student.copy_(frozen[0])
            self.z_teacher.copy_(frozen[1])
        self.discard()

    def discard(self) -> None:
        """Forget what was observed since the last commit."""
        self._observed.clear()
        self._z_sums.clear()
