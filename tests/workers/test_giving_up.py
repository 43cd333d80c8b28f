"""A rank that finds no memory gives up its step, the others with it, and all go on, whoever hears of it when."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from configs.errors import WorkerError
from tests.workers.ranks import shared_group
from workers.memory import is_out_of_memory
from workers.parallel import Communicator, SingleCommunicator, StepGivenUp, ThreadCommunicator


class NoMemoryError(WorkerError):
    """What the rank itself raises, so that it is told from what the others do."""


def in_threads(group: list[Communicator], function: Callable[[Communicator], object]) -> list[object]:
    """What `function` returns for each communicator, or the WorkerError that it raises."""
    results: list[object] = [None] * len(group)

    def run(communicator: Communicator) -> None:
        try:
            results[communicator.rank] = function(communicator)
        except WorkerError as error:
            communicator.give_up()
            results[communicator.rank] = error

    threads = [threading.Thread(target=run, args=[each]) for each in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def run_step(group: list[Communicator], give_up_at: dict[int, int]) -> list[object]:
    """Eight collectives; the ranks that are named give up before the one whose number is told."""

    def run(communicator: Communicator) -> list[float]:
        sums = []
        for number in range(8):
            if give_up_at.get(communicator.rank) == number:
                raise NoMemoryError("no memory")
            sums.append(float(communicator.all_reduce(torch.full((5,), float(communicator.rank + number)))[0]))
        return sums

    return in_threads(group, run)


GROUPS: list[Callable[[], list[Communicator]]] = [lambda: [*shared_group(3)], lambda: [*ThreadCommunicator.group(3)]]
SUMS = [float(0 + 1 + 2 + 3 * number) for number in range(8)]


@pytest.mark.parametrize("make", GROUPS, ids=["shared memory", "threads"])
def test_the_others_give_up_too_and_the_next_step_is_right(make: Callable[[], list[Communicator]]) -> None:
    group = make()
    assert run_step(group, {}) == [SUMS] * 3
    for plan in ({1: 0}, {2: 7}, {0: 3, 1: 3}, {0: 2, 2: 6}):
        outcomes = run_step(group, plan)
        assert all(isinstance(outcome, NoMemoryError | StepGivenUp) for outcome in outcomes)
        without = {rank for rank, outcome in enumerate(outcomes) if isinstance(outcome, NoMemoryError)}
        assert without, "somebody was the first"
        assert without <= plan.keys()
        for each in group:
            each.begin_anew()
        assert run_step(group, {}) == [SUMS] * 3
    for each in group:
        each.abort()


def test_a_rank_that_still_computes_the_step_is_not_taken_for_one_that_began_anew() -> None:
    """The scheduler tells them one after the other, and waits for none."""
    first, second = shared_group(2)
    in_threads([first, second], lambda each: each.barrier())
    first.give_up()
    first.begin_anew()  # before the second one comes to the collective which the first one left
    with pytest.raises(StepGivenUp):
        second.all_reduce(torch.ones(3))
    second.give_up()
    second.begin_anew()
    sums = in_threads([first, second], lambda each: each.all_reduce(torch.full((3,), 1.0 + each.rank)).tolist())
    assert sums == [[3.0] * 3] * 2
    first.abort()
    second.abort()


def test_nobody_writes_over_what_one_may_still_read_who_has_not_begun_anew() -> None:
    early, late = shared_group(2, deadline=0.2)
    in_threads([early, late], lambda each: each.barrier())
    early.give_up()
    early.begin_anew()
    with pytest.raises(WorkerError, match=r"waited 0\.2 s in vain for rank 1"):
        early.all_reduce(torch.ones(3))
    early.abort()
    late.abort()


def test_one_that_is_alone_gives_up_and_goes_on() -> None:
    alone = SingleCommunicator()
    assert alone.give_up()
    alone.begin_anew()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 64 bytes"),
            True,
        ),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (StepGivenUp("rank 1 has given up the step"), False),
    ],
    ids=repr,
)
def test_a_failed_allocation_is_told_from_other_failures(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_torch_really_raises_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
