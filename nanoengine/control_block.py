"""Shared memory between the scheduler and its ranks: heartbeats, phases and step counters; it carries no data.

Each word has one writer. The words are hints that save a wait or explain one: what must not be lost or
reordered goes over the channel. Times are `time.monotonic_ns()`, which all processes of a machine share.
"""

from __future__ import annotations

import enum
import mmap
import os
import tempfile
import time

_WORD = 8
_WORDS_PER_LINE = 8  # a cache line for the scheduler and one for each rank: no writer disturbs another
_SUBMITTED, _STOP = 0, 1
_HEARTBEAT, _PHASE, _BEGUN, _ENDED, _BEGIN_TIME, _REJECTED = range(6)


class Phase(enum.IntEnum):
    """What a rank is doing."""

    STARTING = 0
    LOADING = 1
    READY = 2
    IDLE = 3
    COMPUTING = 4
    LEAVING = 5
    FAILED = 6
    PARKED = 7


def anonymous_file(label: str) -> int:
    """An empty file of no name that two processes can map, as a descriptor; it goes when its last holder does.

    `label` is for /proc alone.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(label, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(prefix=label) as file:  # elsewhere than on Linux: unlinked from the start
        return os.dup(file.fileno())


class ControlBlock:
    """The words of one worker group, seen from the scheduler or, through `rank`, from a rank."""

    def __init__(self, fd: int, world_size: int) -> None:
        """Map `fd`, which stays the caller's to close. Every holder gives the same `world_size`."""
        size = (1 + world_size) * _WORDS_PER_LINE * _WORD
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)  # the new bytes are zeros
        self._map = mmap.mmap(fd, size)
        self._words = memoryview(self._map).cast("q")
        self.ranks = [RankWords(self._words, rank) for rank in range(world_size)]

    @property
    def submitted(self) -> int:
        """Number of the newest step that was sent to the ranks (0: none yet)."""
        return self._words[_SUBMITTED]

    @submitted.setter
    def submitted(self, step_id: int) -> None:
        self._words[_SUBMITTED] = step_id

    @property
    def stop_requested(self) -> bool:
        """Whether the ranks are to leave after the step they are in."""
        return self._words[_STOP] != 0

    def request_stop(self) -> None:
        """Ask the ranks to leave."""
        self._words[_STOP] = 1

    def close(self) -> None:
        """Unmap; harmless twice."""
        for words in self.ranks:
            words.release()
        self._words.release()
        self._map.close()


class RankWords:
    """The words that one rank writes and the scheduler reads."""

    def __init__(self, words: memoryview, rank: int) -> None:
        start = (1 + rank) * _WORDS_PER_LINE
        self._words = words[start : start + _WORDS_PER_LINE]

    def beat(self) -> None:
        """I live."""
        self._words[_HEARTBEAT] = time.monotonic_ns()

    @property
    def heartbeat(self) -> int:
        """Time of the last beat (0: none yet)."""
        return self._words[_HEARTBEAT]

    @property
    def phase(self) -> Phase:
        """What the rank is doing."""
        return Phase(self._words[_PHASE])

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._words[_PHASE] = phase

    def begin(self, step_id: int) -> None:
        """The rank begins to compute `step_id`."""
        self._words[_BEGIN_TIME] = time.monotonic_ns()
        self._words[_BEGUN] = step_id
        self._words[_PHASE] = Phase.COMPUTING

    def end(self, step_id: int) -> None:
        """The rank has computed `step_id` and waits for the next."""
        self._words[_ENDED] = step_id
        self._words[_PHASE] = Phase.IDLE

    @property
    def begun(self) -> int:
        """Newest step the rank has begun."""
        return self._words[_BEGUN]

    @property
    def ended(self) -> int:
        """Newest step the rank has ended."""
        return self._words[_ENDED]

    @property
    def rejected(self) -> int:
        """How many frames the rank has refused."""
        return self._words[_REJECTED]

    @rejected.setter
    def rejected(self, number: int) -> None:
        self._words[_REJECTED] = number

    def describe(self) -> str:
        """For error messages: the phase, and the step where there is one."""
        phase = self.phase
        text = phase.name.lower()
        if phase is Phase.COMPUTING:
            seconds = (time.monotonic_ns() - self._words[_BEGIN_TIME]) / 1e9
            text += f" step {self.begun} for {seconds:.1f} s"
        elif self.ended:
            text += f" after step {self.ended}"
        return text

    def release(self) -> None:
        """Let go of the mapping."""
        self._words.release()
