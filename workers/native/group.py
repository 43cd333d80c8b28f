"""A group of ranks that share memory, as the compiled kernels see it; knows no kernel.

Its exchanges are the communicator's own, counted on: the kernels write and read slots and flags, and as soon as a rank
is late, Python waits for it, by the communicator's rules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from workers.parallel import SharedMemoryCommunicator

_WAIT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_NUMBERS = ("rank", "world_size", "words_per_rank", "slot_bytes", "count", "next_generation", "spin_ns")


class _Group(ctypes.Structure):  # common.h: Group
    _fields_ = [
        ("flags", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("wait", _WAIT),
    ]


class NativeGroup:
    """Lets kernels add up over the ranks of a communicator.

    Args:
        communicator: this rank's.
    """

    def __init__(self, communicator: SharedMemoryCommunicator) -> None:
        self._communicator, self._layout = communicator, communicator.layout
        self._error: BaseException | None = None
        self._wait = _WAIT(self._wait_for)  # C keeps no reference

    def call(self, function: Callable[[Any], int]) -> None:
        """Call a kernel with the address of its `Group`; what it returns tells whether it came to its end.

        Raises:
            WorkerError: another rank failed, gave the step up, or did not come before the deadline.
        """
        communicator, layout = self._communicator, self._layout
        count, next_generation = communicator.progress
        group = _Group(
            layout.flags, layout.slots, communicator.rank, communicator.world_size, layout.words_per_rank,
            layout.slot_bytes, count, next_generation, int(layout.spin_seconds * 1e9), self._wait,
        )  # fmt: skip
        over = function(ctypes.byref(group))
        communicator.reach(group.count)
        if over:
            error, self._error = self._error, None
            assert error is not None, "a kernel ends early only where waiting raised"
            raise error

    def _wait_for(self, other: int, count: int) -> int:
        try:
            self._communicator.wait_for(other, count)
        except BaseException as error:  # also of a signal's handler; C cannot pass it on
            self._error = error
            return 1
        return 0
