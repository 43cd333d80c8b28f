"""One rank dies, stops or raises: the whole group ends, within a bounded time, and the error names the rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import wait as wait_for_sentinels

import psutil
import pytest

from configs.errors import StepError, WorkerError
from nanoengine import executor as executor_module
from nanoengine.executor import MultiprocessExecutor
from nanoengine.rank_process import RankProcess
from nanoengine.step import Epoch
from tests.nanoengine.fake_worker import invented
from tests.nanoengine.process_tools import alive
from tests.nanoengine.test_executor import EPOCH, Make, make, rank_pids, run_steps, step
from tests.waiting import eventually

__all__ = ["make"]  # the fixture


def turn_for(executor: MultiprocessExecutor, seconds: float) -> None:
    """What the engine's loop does while it waits."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if executor.num_in_flight:
            executor.collect(0.05)
        else:
            time.sleep(0.05)
            executor.watch()


def expect_failure(executor: MultiprocessExecutor, rank: int, message: str, within: float = 20) -> None:
    """The group fails soon (what hangs does so for ten minutes), nobody of it is left, and it stays failed."""
    pids = rank_pids(executor)
    with pytest.raises(WorkerError, match=message) as caught:
        turn_for(executor, within)
    assert caught.value.rank == rank
    assert executor.num_in_flight == 0
    assert alive(pids) == []
    for call in (executor.watch, executor.collect, lambda: executor.submit(step(9))):
        with pytest.raises(WorkerError, match=message):
            call()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_idle(make: Make, rank: int) -> None:
    executor = make()
    executor.start(EPOCH)
    run_steps(executor)
    os.kill(rank_pids(executor)[rank], signal.SIGKILL)
    expect_failure(executor, rank, rf"rank {rank} died \(killed by signal 9 \(SIGKILL\)\)")


def test_a_step_for_a_rank_that_is_gone_fails_without_a_wait(make: Make) -> None:
    executor = make()
    executor.start(EPOCH)
    killed = rank_pids(executor)[1]
    os.kill(killed, signal.SIGKILL)
    assert eventually(lambda: not alive([killed]))
    begin = time.monotonic()

    def steps_and_a_look() -> None:
        run_steps(executor)
        executor.watch()  # these ranks never wait for each other: the one that is left may answer every step

    with pytest.raises(WorkerError, match="rank 1 died"):
        steps_and_a_look()
    assert time.monotonic() - begin < 2
    executor.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_the_middle_of_a_step(make: Make, rank: int) -> None:
    executor = make(f"die@{rank}")
    executor.start(EPOCH)
    executor.submit(step(1))
    executor.submit(step(2))
    expect_failure(executor, rank, rf"rank {rank} died")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_any_rank_fails_the_step_at_once(make: Make, rank: int) -> None:
    """On a rank other than 0 it must not leave rank 0 waiting in a collective until some deadline."""
    executor = make(f"raise@{rank}")
    executor.start(EPOCH)
    executor.submit(step(1))
    executor.submit(step(2))
    expect_failure(executor, rank, f"rank {rank} failed: ValueError: rank trouble")


def test_the_last_words_of_a_rank_are_awaited_that_ends_between_two_looks(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipe is closed a moment before it has an exit code, and what it said may still be in ZeroMQ's thread."""
    executor = make("raise@1")
    executor.start(EPOCH)
    assert executor._group is not None
    rank = executor._group.ranks[1]
    executor.submit(step(1))
    executor.submit(step(2))
    assert rank.sentinel is not None
    assert wait_for_sentinels([rank.sentinel], 20)
    looks: Iterator[int | None] = iter([None])
    receive = rank.link.receive
    with monkeypatch.context() as patch:
        patch.setattr(RankProcess, "exit_code", property(lambda self: next(looks, 1) if self is rank else None))
        patch.setattr(rank.link, "receive", lambda timeout=0.0: receive(timeout) if timeout else None)
        expect_failure(executor, 1, "rank 1 failed: ValueError: rank trouble")


def test_a_stopped_rank_is_noticed_by_its_silence(make: Make) -> None:
    executor = make(silence_limit=1.5)
    executor.start(EPOCH)
    os.kill(rank_pids(executor)[1], signal.SIGSTOP)
    expect_failure(executor, 1, r"rank 1 \(ready\) has given no sign of life for \d")


def test_a_rank_stopped_in_the_middle_of_a_step_is_noticed(make: Make) -> None:
    executor = make("freeze@0", silence_limit=1.5)
    executor.start(EPOCH)
    run_steps(executor, last=1)
    executor.submit(step(2))
    expect_failure(executor, 0, r"rank 0 \(computing step 2 for .* s\) has given no sign of life")


def test_a_hung_step_is_noticed_although_its_rank_is_alive(make: Make) -> None:
    executor = make("hang@0", step_timeout=1.0, first_steps=1)
    executor.start(EPOCH)
    run_steps(executor, last=1)
    executor.submit(step(2))
    expect_failure(executor, 0, r"step 2 has not returned within 1 s, waiting for rank 0 \(computing step 2 for \d")


def test_a_slow_first_step_does_not_count_as_hung(make: Make) -> None:
    """It may compile for a while; the second one has no such excuse."""
    executor = make("slow-hang@0", step_timeout=0.1, first_steps=1)
    executor.start(EPOCH)
    executor.submit(step(1))
    assert executor.collect(None) == invented(step(1))
    executor.submit(step(2))
    expect_failure(executor, 0, "step 2 has not returned within 0.1 s")


def test_a_group_that_was_suspended_with_its_scheduler_goes_on(make: Make) -> None:
    """Ctrl-Z and fg: the scheduler may run again a moment before the ranks do."""
    executor = make(silence_limit=1.5)
    executor.start(EPOCH)
    executor.watch()
    for rank in (0, 1):
        os.kill(rank_pids(executor)[rank], signal.SIGSTOP)
    time.sleep(1.8)  # nobody watches meanwhile
    executor.watch()
    for rank in (0, 1):
        os.kill(rank_pids(executor)[rank], signal.SIGCONT)
    turn_for(executor, 0.5)
    assert run_steps(executor, last=1) == [invented(step(1))]


def test_a_failure_wakes_whoever_polls(make: Make) -> None:
    """The engine's loop sleeps in a poll over these, and must not find out only at its next watch."""
    import zmq

    executor = make()
    executor.start(EPOCH)
    poller = zmq.Poller()
    for source in executor.wait_fds():
        poller.register(source, zmq.POLLIN)
    assert poller.poll(0) == []
    os.kill(rank_pids(executor)[1], signal.SIGKILL)
    assert poller.poll(20_000)
    expect_failure(executor, 1, "rank 1 died")


def test_a_new_epoch_starts_after_a_failure_and_an_old_one_does_not(make: Make) -> None:
    executor = make()
    executor.start(EPOCH)
    os.kill(rank_pids(executor)[0], signal.SIGKILL)
    expect_failure(executor, 0, "rank 0 died")
    with pytest.raises(AssertionError, match="never used twice"):
        executor.start(EPOCH)
    executor.start(Epoch(1, 2))
    executor.submit(step(1, epoch=Epoch(1, 2)))
    output = executor.collect(None)
    assert output is not None
    assert output.epoch == Epoch(1, 2)
    with pytest.raises(AssertionError, match="another epoch"):
        executor.submit(step(2, epoch=EPOCH))


def test_a_rank_that_does_not_leave_is_made_to(make: Make) -> None:
    executor = make("wait@1")
    executor.start(EPOCH)
    run_steps(executor, last=1)
    begin = time.monotonic()
    executor.stop()
    assert time.monotonic() - begin < 7.5, "it waits for 1.5 s"


def test_the_log_says_where_a_stopped_rank_stood(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    executor = make("freeze@0", step_timeout=1.0, first_steps=1)
    executor.start(EPOCH)
    run_steps(executor, last=1)
    executor.submit(step(2))
    expect_failure(executor, 0, r"waiting for rank 0 \(computing step 2 for .* s\), stopped by a signal")
    stacks = [record.getMessage() for record in caplog.records if "stands at" in record.getMessage()]
    assert stacks[0].startswith("rank 0 (computing step 2")
    assert "fake_worker.py" in stacks[0]
    assert "in run_worker" in stacks[0]


def test_a_start_that_is_polled_does_not_block_and_tells_of_a_death(make: Make) -> None:
    executor = make()
    begin = time.monotonic()
    executor.begin_start(EPOCH)
    assert executor.poll_start() is None
    assert time.monotonic() - begin < 1
    os.kill(rank_pids(executor)[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match="rank 1 died"):
        assert eventually(lambda: executor.poll_start() is not None)
    executor.stop()
    executor.begin_start(Epoch(EPOCH.incarnation, EPOCH.group + 1))
    assert eventually(lambda: executor.poll_start() is not None)
    executor.stop()


def spare_pids(executor: MultiprocessExecutor) -> list[int]:
    assert executor._spare is not None
    return [rank._process.pid or 0 for rank in executor._spare.ranks if rank._process is not None]


def test_spare_ranks_that_die_are_noticed_and_replaced(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would show when they are needed, and the engine would start as slowly as without them."""
    monkeypatch.setattr(executor_module, "SPARE_SECONDS", 0.0)
    executor = make(tp=1)
    executor.start(EPOCH)
    executor.park_spare(Epoch(EPOCH.incarnation, EPOCH.group + 1))
    pids = spare_pids(executor)
    os.kill(pids[0], signal.SIGKILL)
    assert eventually(lambda: not alive(pids))
    executor.watch()
    replaced = spare_pids(executor)
    assert replaced != pids
    assert len(alive(replaced)) == 1
    monkeypatch.undo()
    os.kill(replaced[0], signal.SIGKILL)
    assert eventually(lambda: not alive(replaced))
    executor.watch()
    assert executor._spare is None, "others would die as soon"
    run_steps(executor)


def test_spare_ranks_take_over_and_end_with_the_executor(make: Make) -> None:
    executor = make()
    executor.start(EPOCH)
    following = Epoch(EPOCH.incarnation, EPOCH.group + 1)
    executor.park_spare(following)
    pids = spare_pids(executor)
    executor.park_spare(following)
    assert spare_pids(executor) == pids, "there is one already"
    run_steps(executor)
    os.kill(rank_pids(executor)[0], signal.SIGKILL)
    expect_failure(executor, 0, "rank 0 died")
    assert alive(pids) == pids
    executor.end_group()
    executor.start(following)
    assert rank_pids(executor) == pids
    executor.submit(step(1, epoch=following))
    assert executor.collect(None) == invented(step(1, epoch=following))
    executor.park_spare(Epoch(EPOCH.incarnation, EPOCH.group + 2))
    pids += spare_pids(executor)
    executor.stop()
    assert alive(pids) == []


def test_spare_ranks_take_over_that_have_not_come_so_far_yet(make: Make) -> None:
    """Two failures may follow each other within the second that a rank takes to start and connect."""
    executor = make()
    executor.start(EPOCH)
    following = Epoch(EPOCH.incarnation, EPOCH.group + 1)
    executor.park_spare(following)
    pids = spare_pids(executor)
    executor.end_group()
    executor.start(following)
    assert rank_pids(executor) == pids
    executor.submit(step(1, epoch=following))
    assert executor.collect(None) == invented(step(1, epoch=following))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_spare_ranks_that_died_or_stopped_are_not_relied_on(make: Make, number: signal.Signals) -> None:
    executor = make()
    executor.start(EPOCH)
    following = Epoch(EPOCH.incarnation, EPOCH.group + 1)
    executor.park_spare(following)
    pids = spare_pids(executor)
    os.kill(pids[1], number)
    assert eventually(lambda: psutil.Process(pids[1]).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
    executor.end_group()
    executor.start(following)
    assert not set(pids) & set(rank_pids(executor))
    assert alive(pids) == []
    executor.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_finds_no_memory_stays_and_so_do_the_others(make: Make, rank: int) -> None:
    executor = make(f"give-up@{rank}")
    executor.start(EPOCH)
    pids = rank_pids(executor)
    executor.submit(step(1))
    executor.submit(step(2))
    assert executor.collect(20) == invented(step(1))
    executor.submit(step(3))  # as it would be under async scheduling: void, too
    expected = f"rank {rank} found no memory for step 2 .no luck with memory."
    with pytest.raises(StepError, match=expected) as caught:
        turn_for(executor, 20)  # rank 0 may have done its part of the step
    assert (caught.value.rank, caught.value.step_id) == (rank, 2)
    executor.forget_steps()
    assert executor.num_in_flight == 0
    executor.submit(step(4))
    assert executor.collect(20) == invented(step(4)), "and no output of a step before"
    executor.watch()
    assert rank_pids(executor) == pids
