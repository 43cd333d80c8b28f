"""Brings a step's numbers to the device in transfers that the host does not wait for; knows not what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_NUM_BUFFERS = 3
"""Two steps may be under way while a third is put together."""

_ALIGNED = 2
"""So many numbers are 16 bytes: a Triton kernel is compiled anew for a tensor that begins at no multiple of these."""


def send(numbers: Sequence[int] | npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """(len(numbers),) int64 on the device; from pinned memory, so that the host does not wait for the transfer."""
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


_FILLING = np.zeros(_ALIGNED, dtype=np.int64)


class Staging:
    """Pinned host buffers that take turns, each with the event of its last transfer. On a CPU there is no transfer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._events: list[torch.cuda.Event] = []
        self._turn = 0

    def send(self, arrays: tuple[npt.NDArray[np.int64], ...]) -> list[torch.Tensor]:
        """Each array on the device, in its shape: parts of one new tensor, which begin at multiples of 16 bytes."""
        pieces: list[npt.NDArray[np.int64]] = []
        for array in arrays:
            pieces += [array.ravel(), _FILLING[: -array.size % _ALIGNED]]
        sizes = [piece.size for piece in pieces]
        if self._device.type == "cuda":
            flat = self._transfer(pieces, sum(sizes))
        else:
            flat = torch.from_numpy(np.concatenate(pieces))
        parts = torch.split(flat, sizes)[::2]
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _transfer(self, pieces: list[npt.NDArray[np.int64]], size: int) -> torch.Tensor:
        if not self._buffers:
            self._buffers = [torch.empty(0, dtype=torch.int64)] * _NUM_BUFFERS
            self._events = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)]  # type: ignore[no-untyped-call]
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        event = self._events[self._turn]
        event.synchronize()  # the transfer that read this buffer last; it is long done
        if len(self._buffers[self._turn]) < size:
            self._buffers[self._turn] = torch.empty(2 * size, dtype=torch.int64, pin_memory=True)
        host = self._buffers[self._turn][:size]
        np.concatenate(pieces, out=host.numpy())
        sent = host.to(self._device, non_blocking=True)
        event.record()
        return sent
