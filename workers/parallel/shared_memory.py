"""Collectives of CPU processes through memory that they share; knows neither who started them nor any file name."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import platform
import threading
import time
from collections.abc import Callable

import torch

from configs.errors import ConfigError, WorkerError
from workers.parallel.base import CLOSE_DEADLINE, DEFAULT_DEADLINE, Communicator, StepGivenUp, sum_in_rank_order

# The file: a page of flags, then two buffers of one slot a rank. A rank's flags lie on a cache line of their own.
_HEADER_BYTES, _WORDS_PER_RANK, _MAX_RANKS = 4096, 8, 64
_SLOT_BYTES = 2**20
# A rank's flags: the exchange that it has reached, whether it has failed, and how many generations it has given up.
_REACHED, _FAILED, _GIVEN_UP = range(3)
# Exchanges that a generation has room for.
_GENERATION = 2**40
# Seconds of busy waiting, then of giving way to other processes; after that the rank sleeps between looks.
_SPIN_SECONDS, _YIELD_SECONDS, _SLEEP_SECONDS = 0.001, 0.003, 0.0001
# x86 keeps the order of stores and of loads, so data written before a flag is seen before it.
_STORES_IN_ORDER = platform.machine() in ("x86_64", "AMD64", "i686")


@dataclasses.dataclass(frozen=True)
class SharedMemoryLayout:
    """Where a group's flags and slots lie, for code that takes part in its exchanges.

    Attributes:
        flags, slots: addresses.
        words_per_rank: int64 words from one rank's flags to the next one's; the first is the exchange it has reached.
        slot_bytes: length of a slot; a buffer has one for each rank, and there are two.
        spin_seconds: how long a wait is worth a processor.
    """

    flags: int
    slots: int
    words_per_rank: int
    slot_bytes: int
    spin_seconds: float


class SharedMemoryCommunicator(Communicator):
    """CPU processes over an anonymous shared file that the scheduler hands down; nothing of it has a name.

    Each collective is a sequence of exchanges, numbered from 1. In exchange k a rank writes its slot of buffer k % 2
    and sets its flag to k; a reader waits until the flags it needs have reached k. A rank overwrites a buffer only
    once every flag has reached k - 1: by then all have read exchange k - 2, which used it last. Tensors larger than a
    slot go in several exchanges. Every rank adds the slots itself, in rank order.

    Ranks that have given up a step count on in another generation, from a number that none has reached: nobody can
    take an exchange of the step for one behind it, and nobody writes a slot before the last one has left the step.

    Args:
        rank: this process's.
        world_size: number of ranks, at most 64.
        fd: a file that all ranks share, new and zeroed; whoever comes first makes it `required_bytes` long. It is
            mapped at once, so the caller may close it.
        deadline: seconds to wait for a rank before WorkerError names it.
        slot_bytes: the same on every rank.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        fd: int,
        deadline: float = DEFAULT_DEADLINE,
        slot_bytes: int = _SLOT_BYTES,
    ) -> None:
        if world_size > _MAX_RANKS:
            raise ConfigError(f"at most {_MAX_RANKS} ranks can share memory, got {world_size}", "tensor_parallel_size")
        self.rank, self.world_size = rank, world_size
        self._deadline, self._slot_bytes = deadline, slot_bytes
        size = self.required_bytes(world_size, slot_bytes)
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)  # all ranks may do so: growing to the same size twice changes nothing
        memory = mmap.mmap(fd, size)
        self._flags = memoryview(memory)[:_HEADER_BYTES].cast("q")
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._count = self._generation = 0
        self._next_generation = _GENERATION
        self._closed = False
        self._others = [other for other in range(world_size) if other != rank]
        self._views: dict[tuple[int, int, torch.dtype], list[torch.Tensor]] = {}
        self._fence_lock = threading.Lock()
        # With more ranks than cores, whom we wait for needs the core that we would spin on.
        self._spin = _SPIN_SECONDS if world_size <= len(os.sched_getaffinity(0)) else 0.0

    @staticmethod
    def required_bytes(world_size: int, slot_bytes: int = _SLOT_BYTES) -> int:
        """Length of the shared file; only pages that are used take memory."""
        return _HEADER_BYTES + 2 * world_size * slot_bytes

    @property
    def layout(self) -> SharedMemoryLayout:
        """For code that takes part between two of our own exchanges, and then says how far it came by `reach`."""
        base = self._bytes.data_ptr()
        return SharedMemoryLayout(base, base + _HEADER_BYTES, _WORDS_PER_RANK, self._slot_bytes, self._spin)

    @property
    def progress(self) -> tuple[int, int]:
        """The last exchange, and the first that is not of this generation any more. Raises WorkerError when closed."""
        self._check_open()
        return self._count, self._next_generation

    def reach(self, count: int) -> None:
        """Go on behind exchange `count`."""
        self._count = count

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Communicator`."""
        if tensor.numel() * tensor.element_size() <= self._slot_bytes:  # the common case, without a copy of the sum
            slots = self._exchange(tensor.detach(), tensor.numel(), tensor.dtype, self._others)
            return sum_in_rank_order(slots).view(tensor.shape)
        return self._in_chunks(tensor, 1, lambda out, slots: out[0].copy_(sum_in_rank_order(slots)))[0]

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """See `Communicator`."""
        return torch.cat(self._in_chunks(tensor, self.world_size, _copy_each), dim)

    def gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor | None:
        """See `Communicator`."""
        if self.rank == 0:
            return self.all_gather(tensor, dim)
        self._in_chunks(tensor, 0, _copy_each, wait_for=[])
        return None

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Communicator`."""
        wait_for = [source] if self.rank != source else []
        return self._in_chunks(
            tensor, 1, lambda out, slots: out[0].copy_(slots[source]), wait_for, writes=self.rank == source
        )[0]

    def barrier(self) -> None:
        """See `Communicator`."""
        self._exchange(None, 0, torch.uint8, self._others)

    def close(self) -> None:
        """See `Communicator`."""
        if self._closed:
            return
        self._deadline = min(self._deadline, CLOSE_DEADLINE)
        with contextlib.suppress(WorkerError):
            self.barrier()
        self._release()

    def abort(self) -> None:
        """See `Communicator`."""
        if not self._closed:
            self._flags[self.rank * _WORDS_PER_RANK + _FAILED] = 1
            self._release()

    def give_up(self) -> bool:
        """See `Communicator`."""
        self._flags[self.rank * _WORDS_PER_RANK + _GIVEN_UP] = self._generation + 1
        return True

    def begin_anew(self) -> None:
        """See `Communicator`."""
        self._generation += 1
        self._count, self._next_generation = self._generation * _GENERATION, (self._generation + 1) * _GENERATION
        self._flags[self.rank * _WORDS_PER_RANK + _REACHED] = self._count

    def _release(self) -> None:
        # The mapping goes with its last view.
        self._closed = True
        self._views.clear()
        self._flags.release()
        del self._bytes

    def _in_chunks(
        self,
        tensor: torch.Tensor,
        num_results: int,
        read: Callable[[list[torch.Tensor], list[torch.Tensor]], object],
        wait_for: list[int] | None = None,
        writes: bool = True,
    ) -> list[torch.Tensor]:
        """Exchange a tensor of any size slot by slot; `read` fills the results' parts from the ranks' slots."""
        flat = tensor.detach().contiguous().view(-1)
        results = [torch.empty_like(flat) for _ in range(num_results)]
        step = self._slot_bytes // flat.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            slots = self._exchange(
                part if writes else None, part.numel(), part.dtype, self._others if wait_for is None else wait_for
            )
            if results:
                read([result[start : start + step] for result in results], slots)
        return [result.view(tensor.shape) for result in results]

    def _exchange(
        self, part: torch.Tensor | None, numel: int, dtype: torch.dtype, wait_for: list[int]
    ) -> list[torch.Tensor]:
        """One exchange; returns every rank's slot, of which those in `wait_for` (and our own) are filled."""
        self._check_open()
        self._count += 1
        slots = self._slots(self._count % 2, numel, dtype)
        for other in self._others:
            self.wait_for(other, self._count - 1)
        if part is not None:
            slots[self.rank].copy_(part.reshape(-1))
        self._fence()
        self._flags[self.rank * _WORDS_PER_RANK] = self._count
        for other in wait_for:
            self.wait_for(other, self._count)
        self._fence()
        return slots

    def _slots(self, buffer: int, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
        key = (buffer, numel, dtype)
        if key not in self._views:
            if len(self._views) >= 256:
                self._views.clear()
            start = _HEADER_BYTES + buffer * self.world_size * self._slot_bytes
            length = numel * dtype.itemsize
            self._views[key] = [
                self._bytes[start + rank * self._slot_bytes :][:length].view(dtype) for rank in range(self.world_size)
            ]
        return self._views[key]

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerError(f"rank {self.rank} has left its group", self.rank)

    def wait_for(self, other: int, count: int) -> None:
        """Return once `other` has reached exchange `count`.

        Raises:
            WorkerError: it failed, gave the step up, or did not come before the deadline.
        """
        flags, word = self._flags, other * _WORDS_PER_RANK
        began = time.perf_counter() if flags[word] < count else 0.0
        while flags[word] < count:
            waited = time.perf_counter() - began
            if waited < self._spin:
                continue
            if flags[word + _FAILED]:
                raise WorkerError(f"rank {other} failed while rank {self.rank} waited for it in a collective", other)
            if flags[word + _GIVEN_UP] > self._generation:
                raise StepGivenUp(f"rank {other} has given up the step that rank {self.rank} computes", other)
            if waited > self._deadline:
                raise WorkerError(
                    f"rank {self.rank} waited {self._deadline:g} s in vain for rank {other} in a collective", other
                )
            if waited < _YIELD_SECONDS:
                os.sched_yield()
            else:
                time.sleep(_SLEEP_SECONDS)
        if flags[word] >= self._next_generation:  # it has left the step already
            raise StepGivenUp(f"rank {other} has given up the step that rank {self.rank} computes", other)

    def _fence(self) -> None:
        # Elsewhere than on x86 (ARM, say) a store may overtake another, and a load too. Releasing and then taking a
        # lock keeps them apart: what precedes the release and what follows the taking cannot change places.
        if not _STORES_IN_ORDER:
            for _ in range(2):
                with self._fence_lock:
                    pass


def _copy_each(results: list[torch.Tensor], slots: list[torch.Tensor]) -> None:
    for result, slot in zip(results, slots, strict=False):
        result.copy_(slot)
