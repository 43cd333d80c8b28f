"""Sums over ranks that the compiled kernels take part in: Python's bits, its rules, and its exchanges."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch

from configs.errors import WorkerError
from tests.workers.collective_ranks import part_of
from tests.workers.test_giving_up import SUMS, in_threads, run_step
from workers.native import NativeKernels
from workers.native.group import NativeGroup
from workers.parallel import Communicator, SharedMemoryCommunicator, StepGivenUp, sum_in_rank_order

SLOT_BYTES = 4096


class NativeSums(SharedMemoryCommunicator):
    """A communicator whose sums are the kernel's."""

    def __init__(self, native: NativeKernels, rank: int, world_size: int, fd: int, deadline: float) -> None:
        super().__init__(rank, world_size, fd, deadline, SLOT_BYTES)
        self._add_up, self._group = native.library.nano_all_reduce, NativeGroup(self)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        x = tensor.bfloat16().clone()
        self._group.call(lambda group: self._add_up(group, x.data_ptr(), x.numel(), 1))
        return x.to(tensor.dtype)


def make_group(native: NativeKernels, world_size: int, plain: int = 0, deadline: float = 5.0) -> list[Communicator]:
    """Ranks that share memory; the last `plain` of them know no kernel."""
    fd = os.memfd_create("test")
    try:
        first = [NativeSums(native, rank, world_size, fd, deadline) for rank in range(world_size - plain)]
        rest = range(world_size - plain, world_size)
        return [*first, *(SharedMemoryCommunicator(rank, world_size, fd, deadline, SLOT_BYTES) for rank in rest)]
    finally:
        os.close(fd)


@pytest.mark.parametrize(("world_size", "plain"), [(2, 0), (2, 1), (3, 1), (4, 0)])
def test_sums_have_other_bits_than_pythons_or_lose_step_with_its_exchanges(
    native: NativeKernels, world_size: int, plain: int
) -> None:
    """Tensors smaller than a slot, of exactly one, and of several; other collectives in between."""
    shapes = [(1,), (3, 5), (1, 2048), (17, 300), (2, 2048), (5, 1001)]
    parts = [[part_of(rank, shape, torch.bfloat16) for rank in range(world_size)] for shape in shapes]
    group = make_group(native, world_size, plain)

    def run(communicator: Communicator) -> bool:
        for part in parts:
            assert torch.equal(communicator.all_reduce(part[communicator.rank].clone()), sum_in_rank_order(part))
            assert torch.equal(communicator.all_gather(part[communicator.rank], 0), torch.cat(part))
        return True

    assert in_threads(group, run) == [True] * world_size
    for each in group:
        each.abort()


def test_a_step_that_is_given_up_is_not_left_or_spoils_the_next(native: NativeKernels) -> None:
    group = make_group(native, 3)
    for plan in ({1: 0}, {2: 7}, {0: 3, 1: 3}, {0: 2, 2: 6}):
        outcomes = run_step(group, plan)
        assert any(isinstance(outcome, StepGivenUp) for outcome in outcomes)
        assert all(isinstance(outcome, WorkerError) for outcome in outcomes)
        for each in group:
            each.begin_anew()
        assert run_step(group, {}) == [SUMS] * 3
    for each in group:
        each.abort()


def test_a_rank_that_began_anew_is_taken_for_one_that_still_computes(native: NativeKernels) -> None:
    first, second = make_group(native, 2)
    in_threads([first, second], lambda each: each.barrier())
    first.give_up()
    first.begin_anew()
    with pytest.raises(StepGivenUp, match="rank 0"):
        second.all_reduce(torch.ones(3))
    second.begin_anew()
    assert in_threads([first, second], lambda each: each.all_reduce(torch.ones(3)).tolist()) == [[2.0] * 3] * 2
    for each in (first, second):
        each.abort()


def test_who_does_not_come_is_not_named(native: NativeKernels) -> None:
    group = make_group(native, 3, deadline=0.2)
    with pytest.raises(WorkerError, match=r"rank 0 waited 0\.2 s in vain for rank 1") as caught:
        group[0].all_reduce(torch.ones(3))
    assert caught.value.rank == 1
    for each in group:
        each.abort()
    with pytest.raises(WorkerError, match="rank 0 has left"):
        group[0].all_reduce(torch.ones(3))


def test_a_rank_that_failed_is_waited_for_until_the_deadline(native: NativeKernels) -> None:
    first, second = make_group(native, 2, deadline=60)
    second.abort()
    began = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 failed"):
        first.all_reduce(torch.ones(3))
    assert time.monotonic() - began < 5
    first.abort()


def test_a_rank_that_waits_keeps_other_threads_from_running(native: NativeKernels) -> None:
    """The kernel lets go of the interpreter, and what is patient in waiting is Python."""
    first, second = make_group(native, 2, deadline=30)
    done: list[Any] = []
    waiting = threading.Thread(target=lambda: done.append(first.all_reduce(torch.ones(3)).tolist()))
    waiting.start()
    assert not done
    assert second.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    waiting.join(30)
    assert done == [[2.0] * 3]
    for each in (first, second):
        each.abort()
