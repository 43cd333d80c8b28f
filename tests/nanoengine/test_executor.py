"""The multiprocess executor with ranks that invent tokens: steps, start, settings, and what an idle group costs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import CapacityError, ChannelError, ConfigError, DeadlineError, NanoEngineError, WorkerError
from nanoengine import channel
from nanoengine.executor import ExecutorFacts, MultiprocessExecutor
from nanoengine.step import Epoch, SequenceState, StepInput, StepOutput
from tests.nanoengine.fake_worker import invented
from tests.nanoengine.process_tools import (
    cpu_seconds,
    descendants,
    leaked_memory,
    open_descriptors,
    shared_memory,
    short_directory,
)
from tests.waiting import eventually

EPOCH = Epoch(1, 1)
ENTRY = "tests.nanoengine.fake_worker:run_worker"
Make = Callable[..., MultiprocessExecutor]


def step(step_id: int, num_tokens: int = 1, epoch: Epoch = EPOCH) -> StepInput:
    return StepInput(epoch, step_id, [], [SequenceState(5, list(range(num_tokens)), 0, [], True)], [])


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes executors whose ranks do `what`; afterwards nothing of them may be left anywhere."""
    made: list[MultiprocessExecutor] = []
    memory, children = shared_memory(), set(descendants())
    with short_directory() as run_dir:

        def make(what: str = "", tp: int = 2, **options: Any) -> MultiprocessExecutor:
            arguments = {name: options.pop(name) for name in ("silence_limit", "first_steps") if name in options}
            config = EngineConfig.create(model=f"fake:{what}", tensor_parallel_size=tp, **options)
            own_dir = run_dir / str(len(made))
            own_dir.mkdir()
            made.append(MultiprocessExecutor(config, own_dir, entry=ENTRY, **arguments))
            return made[-1]

        yield make
        for executor in made:
            executor.stop()
            executor.stop()
        assert set(descendants()) <= children
        assert eventually(lambda: not leaked_memory(memory), 5), leaked_memory(memory)
        assert [path for path in run_dir.rglob("*") if not path.is_dir()] == []


def run_steps(executor: MultiprocessExecutor, first: int = 1, last: int = 3) -> list[StepOutput | None]:
    outputs = []
    for step_id in range(first, last + 1):
        executor.submit(step(step_id))
        outputs.append(executor.collect(None))
    return outputs


def rank_pids(executor: MultiprocessExecutor) -> list[int]:
    assert executor._group is not None
    return [rank._process.pid or 0 for rank in executor._group.ranks if rank._process is not None]


# -------------------------------------------------------------------------------------------------- steps


def test_two_steps_in_flight_come_back_in_order(make: Make) -> None:
    executor = make()
    assert executor.start(EPOCH) == ExecutorFacts(
        70, "float32", "cpu", 6
    )  # the least of the ranks' 100 and 70, 6 and 9
    executor.submit(step(1))
    for step_id in range(2, 30):
        executor.submit(step(step_id))
        assert executor.num_in_flight == 2
        assert executor.collect(None) == invented(step(step_id - 1))
    assert executor.collect(None) == invented(step(29))
    assert executor.num_in_flight == 0
    assert executor.collect(None) is None


def test_a_third_step_in_flight_is_a_programming_error(make: Make) -> None:
    executor = make("slow@0")
    executor.start(EPOCH)
    executor.submit(step(1))
    executor.submit(step(2))
    with pytest.raises(AssertionError, match="third"):
        executor.submit(step(3))


def test_collect_does_not_wait_longer_than_asked(make: Make) -> None:
    executor = make(tp=1)
    executor.start(EPOCH)
    (pid,) = rank_pids(executor)
    os.kill(pid, signal.SIGSTOP)
    executor.submit(step(1))
    begin = time.monotonic()
    assert executor.collect(0) is None
    assert executor.collect(0.05) is None
    assert time.monotonic() - begin < 1
    os.kill(pid, signal.SIGCONT)
    assert executor.collect(None) == invented(step(1))


def test_a_step_larger_than_a_mebibyte_passes(make: Make) -> None:
    """64 prompts of 4,096 tokens (and the answer knows them all)."""
    executor = make()
    executor.start(EPOCH)
    large = step(1, 64 * 4096)
    executor.submit(large)
    assert executor.collect(None) == invented(large)


def test_an_oversized_step_is_refused_and_harms_nobody_else(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = make()
    executor.start(EPOCH)
    with monkeypatch.context() as patch:
        patch.setattr(channel, "MAX_FRAME_BYTES", 4096)
        with pytest.raises(ChannelError, match="exceeds the limit"):
            executor.submit(step(1, 5000))
        assert executor.num_in_flight == 0
    assert run_steps(executor) == [invented(step(step_id)) for step_id in (1, 2, 3)]


def test_an_answer_to_another_step_fails_the_group(make: Make) -> None:
    executor = make("wrong-step@0", tp=1)
    executor.start(EPOCH)
    executor.submit(step(1))
    with pytest.raises(WorkerError, match="answered step 2"):
        executor.collect(None)


# -------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("tp", [1, 4])
def test_groups_of_other_sizes_agree_on_the_smallest_block_count(make: Make, tp: int) -> None:
    executor = make(tp=tp)
    assert executor.start(EPOCH).num_kv_blocks == {1: 100, 4: 70}[tp]
    assert run_steps(executor) == [invented(step(step_id)) for step_id in (1, 2, 3)]


def test_settings_that_are_not_the_defaults_reach_every_rank(make: Make) -> None:
    """nano-vllm keeps the block size in a class attribute, which spawned ranks do not see."""
    executor = make("settings@0", block_size=48, max_num_seqs=3)
    executor.start(EPOCH)
    executor.submit(step(1))
    output = executor.collect(None)
    assert output is not None
    assert output.token_ids == [[48, 3, 70]]


def test_sockets_leave_no_file_once_the_ranks_are_connected(make: Make) -> None:
    executor = make()
    executor.start(EPOCH)
    assert list(executor._run_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("config-error@1", ConfigError, "tensor_parallel_size must be odd, got 2"),
        ("config-error@*", ConfigError, "tensor_parallel_size must be odd, got 2"),
        ("capacity-error@0", CapacityError, "too much memory asked for: 3 of 2"),
        ("raise-loading@1", WorkerError, "rank 1 failed: RuntimeError: no such luck"),
        ("die-loading@0", WorkerError, r"rank 0 died \(killed by signal 9 \(SIGKILL\)\)"),
        ("die-loading@1", WorkerError, r"rank 1 died \(killed by signal 9 \(SIGKILL\)\)"),
        ("exit-loading@1", WorkerError, r"rank 1 died \(exit code 7\)"),
        ("die-warming@1", WorkerError, r"rank 1 died"),
    ],
)
def test_what_goes_wrong_on_a_rank_while_starting_is_reported_at_once(
    make: Make, what: str, kind: type[NanoEngineError], message: str
) -> None:
    executor = make(what)
    with pytest.raises(kind, match=message) as caught:
        executor.start(EPOCH)
    if isinstance(caught.value, WorkerError):
        assert f"rank {caught.value.rank}" in message
    executor.stop()


def test_a_start_that_takes_too_long_names_the_ranks_waited_for(make: Make) -> None:
    executor = make("hang-loading@1", start_timeout=2.0)
    with pytest.raises(DeadlineError, match=r"within 2 s .*waiting for rank 1 \(loading\)$"):
        executor.start(EPOCH)


def test_a_start_that_is_interrupted_leaves_nothing(make: Make) -> None:
    """Ctrl-C or SIGTERM while the ranks load: the exception passes through `start`."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    executor = make("hang-loading@*")
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            executor.start(EPOCH)
        assert time.monotonic() - begin < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert executor.wait_fds() == []


# --------------------------------------------------------------------------------------------- life of a group


def test_two_executors_at_once_do_not_meet(make: Make) -> None:
    first, second = make(tp=1), make(tp=1)
    first.start(EPOCH)
    second.start(EPOCH)
    first.submit(step(1))
    second.submit(step(1, 9))
    assert second.collect(None) == invented(step(1, 9))
    assert first.collect(None) == invented(step(1))
    first.stop()
    second.submit(step(2))
    assert second.collect(None) == invented(step(2))


def test_stopping_is_quick_quiet_and_harmless_twice(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make(tp=1).stop()  # never started
    executor = make()
    executor.start(EPOCH)
    run_steps(executor)
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        executor.stop()
        executor.stop()
    assert time.monotonic() - begin < 1.5
    assert caplog.records == []
    assert executor.wait_fds() == []


def test_stopping_in_the_middle_of_a_long_step_is_bounded(make: Make) -> None:
    executor = make("hang@0")
    executor.start(EPOCH)
    executor.submit(step(1))
    executor.submit(step(2))
    begin = time.monotonic()
    executor.stop()
    assert time.monotonic() - begin < 7.5, "it waits for 1.5 s"


def test_groups_that_come_and_go_leave_no_descriptors(make: Make) -> None:
    executor = make(tp=1)

    def come_and_go(group: int) -> None:
        executor.start(Epoch(1, group))
        executor.submit(step(1, epoch=Epoch(1, group)))
        executor.collect(None)
        executor.stop()

    come_and_go(1)
    before = open_descriptors()
    for group in range(2, 7):
        come_and_go(group)
    # ZeroMQ closes what belonged to a socket in a thread of its own, a moment after the socket.
    assert eventually(lambda: len(open_descriptors()) <= len(before)), (before, open_descriptors())


def test_an_idle_group_costs_next_to_nothing(make: Make) -> None:
    """Under 3 % of a core over all ranks, after the spinning that follows a step."""
    executor = make()
    executor.start(EPOCH)
    run_steps(executor)
    ranks = rank_pids(executor)
    time.sleep(0.2)
    before, begin = cpu_seconds(ranks), time.monotonic()
    time.sleep(2)
    assert (cpu_seconds(ranks) - before) / (time.monotonic() - begin) < 0.03


def test_ranks_do_not_import_the_program_that_spawned_them() -> None:
    """A script without a main guard, as users write them, runs once and not once more in every rank."""
    script = """
import sys, tempfile
from pathlib import Path
from configs.engine import EngineConfig
from nanoengine.executor import MultiprocessExecutor
from nanoengine.step import Epoch
print("imported", flush=True)
with tempfile.TemporaryDirectory(dir="/tmp") as run_dir:
    executor = MultiprocessExecutor(
        EngineConfig.create(model="fake:", tensor_parallel_size=2), Path(run_dir), entry=sys.argv[1]
    )
    executor.start(Epoch(1, 1))
    executor.stop()
"""
    with short_directory() as directory:
        (directory / "script.py").write_text(script)
        environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
        done = subprocess.run(
            [sys.executable, str(directory / "script.py"), ENTRY],
            capture_output=True, text=True, timeout=60, env=environment, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
