"""Small arrays on their way to a device, together: many copies would cost more than their bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Place = tuple[slice, tuple[int, ...]]  # where among all numbers, and the array's shape


class Numbers:
    """What is added here travels in one copy.

    As float32, which holds whole numbers up to 2**24 exactly.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._length = 0

    def add(self, array: np.ndarray) -> Place:
        """Take an array along; returns what `real` and `whole` find it by."""
        self._arrays.append(np.asarray(array, dtype=np.float32).ravel())
        begin, self._length = self._length, self._length + array.size
        return slice(begin, self._length), array.shape

    def send(self, device: torch.device) -> None:
        """Copy all that was added, without waiting for the device."""
        together = torch.from_numpy(np.concatenate(self._arrays))
        if device.type == "cuda":
            together = together.pin_memory()  # a copy from other memory would wait
        self._reals = together.to(device, non_blocking=True)
        self._wholes = self._reals.long()

    def real(self, place: Place) -> Tensor:
        """An array as float32."""
        return self._reals[place[0]].view(place[1])

    def whole(self, place: Place) -> Tensor:
        """An array as int64."""
        return self._wholes[place[0]].view(place[1])
