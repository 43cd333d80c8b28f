"""Communicators: exact sums in rank order between threads and processes, and what a dead rank does to the rest."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError, WorkerError
from tests.workers import collective_ranks as tasks
from tests.workers.ranks import run_ranks, shared_group
from workers.parallel import (
    Communicator,
    HostCommunicator,
    SharedMemoryCommunicator,
    SingleCommunicator,
    ThreadCommunicator,
    TorchCommunicator,
    sum_in_rank_order,
)

SPAWN = multiprocessing.get_context("spawn")


def run_processes(world_size: int, target: Callable[..., None], path: Path, task: tasks.Task) -> dict[int, Any]:
    """What `task` returned, by rank, in one process a rank; all of them are gone afterwards."""
    results = SPAWN.SimpleQueue()
    processes = [
        SPAWN.Process(target=target, args=(rank, world_size, path, task, results)) for rank in range(world_size)
    ]
    found: dict[int, Any] = {}
    try:
        for process in processes:
            process.start()
        until = time.monotonic() + 60
        while any(process.is_alive() for process in processes) or not results.empty():
            assert time.monotonic() < until, f"a rank hangs; only {sorted(found)} answered"
            if results.empty():
                time.sleep(0.01)
            else:
                rank, result = results.get()
                found[rank] = result
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
        results.close()
    return found


def expected(world_size: int) -> dict[int, dict[str, Any]]:
    """What every rank must find, from threads, whose exchange is a list of tensors."""
    return dict(enumerate(run_ranks(world_size, tasks.every_collective)))


# Sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ranks_are_not_added_in_their_order(dtype: torch.dtype) -> None:
    parts = [tasks.part_of(rank, (64,), dtype) for rank in range(4)]
    wanted = ((parts[0].float() + parts[1].float()) + parts[2].float()) + parts[3].float()
    before = [part.clone() for part in parts]
    assert torch.equal(sum_in_rank_order(parts), wanted.to(dtype))
    assert torch.equal(sum_in_rank_order(parts[:1]), parts[0])
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    if dtype == torch.float32:  # otherwise the test could not tell
        assert not torch.equal(sum_in_rank_order(parts[::-1]), wanted)


def test_integers_are_added_as_floats() -> None:
    large = torch.tensor([2**53 + 1])
    assert sum_in_rank_order([large, large]).item() == 2 * (2**53 + 1)


def test_a_rows_sum_depends_on_the_rows_beside_it() -> None:
    def sums(communicator: Communicator) -> bool:
        rows = tasks.part_of(communicator.rank, (257, 96), torch.bfloat16)
        whole = communicator.all_reduce(rows)
        pieces = [communicator.all_reduce(piece) for piece in rows.split([1, 2, 4, 250])]
        return torch.equal(torch.cat(pieces), whole)

    assert all(run_ranks(4, sums))


def test_the_group_of_one_changes_a_tensor() -> None:
    communicator, tensor = SingleCommunicator(), torch.randn(3, 2)
    for result in (
        communicator.all_reduce(tensor),
        communicator.all_gather(tensor),
        communicator.gather(tensor),
        communicator.broadcast(tensor),
    ):
        assert result is tensor
    communicator.barrier()
    communicator.close()


def test_a_tensor_is_changed_while_other_threads_read_it() -> None:
    def reuse(communicator: Communicator) -> bool:
        tensor = torch.ones(2000)
        right = True
        for i in range(50):
            tensor.fill_(i)
            summed = communicator.all_reduce(tensor)
            tensor.fill_(-1)
            right = right and bool((summed == 3 * i).all())
        return right

    assert all(run_ranks(3, reuse))


# Processes


def test_collectives_between_processes_go_wrong_or_wait_for_a_dead_rank_for_ever(tmp_path: Path) -> None:
    (tmp_path / "shared").touch()
    began = time.monotonic()
    found = run_processes(4, tasks.shared_memory_rank, tmp_path / "shared", tasks.all_then_the_last_rank_dies)
    assert sorted(found) == [0, 1, 2]
    wanted = expected(4)
    for rank, (collectives, wrong, named) in found.items():
        assert collectives == wanted[rank]
        assert wrong == 0
        assert named == 3
    assert time.monotonic() - began < 60


def test_gloo_adds_in_another_order_or_ends_in_an_abort(tmp_path: Path) -> None:
    found = run_processes(2, tasks.gloo_rank, tmp_path / "store", tasks.every_collective)
    assert found == expected(2)


# Shared memory within one process, where a test can hold a rank still


def test_a_rank_that_never_comes_is_not_named() -> None:
    first, second, third = shared_group(3, deadline=0.2)
    with pytest.raises(WorkerError, match=r"rank 0 waited 0\.2 s in vain for rank 1") as caught:
        first.all_reduce(torch.ones(3))
    assert caught.value.rank == 1
    for communicator in (first, second, third):
        communicator.abort()


def test_a_rank_that_failed_is_waited_for_until_the_deadline() -> None:
    first, second = shared_group(2, deadline=60)
    second.abort()
    began = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 failed") as caught:
        first.all_reduce(torch.ones(3))
    assert caught.value.rank == 1
    assert time.monotonic() - began < 5
    first.abort()


def test_leaving_twice_or_alone_hangs() -> None:
    first, second = shared_group(2, deadline=0.1)
    first.close()  # alone: the deadline passes
    first.close()
    second.close()
    with pytest.raises(WorkerError, match="has left"):
        first.barrier()
    first.abort()


def test_a_writer_overwrites_what_the_reader_has_not_read() -> None:
    reader, writer = shared_group(2, deadline=0.2)
    # Gathers do not wait for rank 0, so rank 1 runs ahead: by one exchange and no more.
    writer.gather(torch.full((4,), 1.0))
    with pytest.raises(WorkerError) as caught:
        writer.gather(torch.full((4,), 2.0))
    assert caught.value.rank == 0
    reader.abort()
    writer.abort()


def test_the_shared_file_stays_open_or_is_too_small() -> None:
    size = SharedMemoryCommunicator.required_bytes(2)
    before = len(os.listdir("/proc/self/fd"))
    fd = os.memfd_create("test")
    first, second = (SharedMemoryCommunicator(rank, 2, fd) for rank in range(2))
    assert os.fstat(fd).st_size == size
    os.close(fd)
    first.abort()
    second.abort()
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(ConfigError, match="at most 64 ranks"):
        SharedMemoryCommunicator(0, 65, -1)


# Threads


def test_a_thread_that_failed_leaves_the_others_waiting() -> None:
    def fail(communicator: Communicator) -> None:
        if communicator.rank == 1:
            raise ValueError("out of luck")
        communicator.barrier()

    with pytest.raises(ValueError, match="out of luck"):
        run_ranks(3, fail)


def test_a_thread_that_never_comes_is_not_named() -> None:
    first, *_ = ThreadCommunicator.group(2, deadline=0.1)
    with pytest.raises(WorkerError, match="for rank 1") as caught:
        first.all_reduce(torch.ones(2))
    assert caught.value.rank == 1
    first.close()
    first.close()


def test_ranks_on_one_gpu_meet_on_the_host() -> None:
    """Every collective through the host gives what the communicator there gives."""

    def work(on_host: Communicator) -> list[torch.Tensor]:
        communicator = HostCommunicator(on_host)
        own = torch.arange(4.0) + on_host.rank
        gathered = communicator.gather(own, 0)
        communicator.barrier()
        return [
            communicator.all_reduce(own.clone()),
            communicator.all_gather(own, 0),
            communicator.broadcast(own.clone(), 1),
            own if gathered is None else gathered,
        ]

    ranks = run_ranks(2, work)
    both = torch.cat((torch.arange(4.0), torch.arange(4.0) + 1))
    for rank, (added, everyone, second, gathered) in enumerate(ranks):
        assert torch.equal(added, 2 * torch.arange(4.0) + 1)
        assert torch.equal(everyone, both)
        assert torch.equal(second, torch.arange(4.0) + 1)
        assert torch.equal(gathered, torch.arange(4.0) + 1 if rank else both)


def test_wrong_sums_are_noticed_at_the_start() -> None:
    """Broken peer access between GPUs gives other numbers without any error; here a sum that lacks a rank."""
    broken = object.__new__(TorchCommunicator)
    broken.rank, broken.world_size, broken._on_gpu = 0, 2, False
    ranks = torch.tensor([[1.0], [2.0]])
    broken.all_gather = lambda own, dim: ranks.expand(-1, own.shape[1])  # type: ignore[method-assign]
    broken.all_reduce = lambda own: 3 * own  # type: ignore[method-assign]
    broken.self_test(torch.device("cpu"))
    broken.all_reduce = lambda own: own  # type: ignore[method-assign]
    with pytest.raises(WorkerError, match=r"rank 0 gets wrong numbers .* NCCL_P2P_DISABLE=1"):
        broken.self_test(torch.device("cpu"))
