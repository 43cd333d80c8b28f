"""The scheduler's loop between a real front-end socket and an executor that invents tokens in this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from configs.engine import EngineConfig
from configs.errors import CapacityError, StepError, WorkerError
from nanoengine.engine import EngineCore
from nanoengine.executor import Executor, ExecutorFacts
from nanoengine.front_socket import FrontSocket, merge
from nanoengine.messages import (
    Abort,
    AddRequest,
    Deltas,
    EngineFailure,
    EngineState,
    Hello,
    Message,
    Ready,
    StateRequest,
    Stats,
    TokenColumns,
    TokenDelta,
    decode,
    encode,
    spelt_out,
)
from nanoengine.sampling_params import SamplingParams
from nanoengine.step import Epoch, StepInput, StepOutput
from tests.nanoengine.scheduler_driver import FakeWorkers, expected_output
from tests.waiting import PATIENCE, until

FACTS = ExecutorFacts(num_kv_blocks=64, dtype="float32", device="cpu")
EPOCH = Epoch(3, 1)


class InventingExecutor(Executor):
    """Computes with FakeWorkers when it is collected.

    It fails of `failure`, until it is started again, before each step whose number is in `failing_steps` (counted
    over all groups), and of each step with the prompt token `poison`. As many starts fail as `failing_starts` says.
    `rows_at_failure` holds how many rows there were beside it. Steps from the number `held_at` on bring nothing until
    that is None: no stream ends meanwhile, however fast they are. There is no memory for steps of more than `memory`
    tokens, nor for any with the prompt token `hungry`.
    """

    def __init__(self) -> None:
        self.workers = FakeWorkers(FACTS.num_kv_blocks, 16)
        self.steps: list[StepInput] = []
        self.failure: WorkerError | None = None
        self.poison: int | None = None
        self.num_steps = 0
        self.failing_steps: set[int] = set()
        self.failing_starts = 0
        self.held_at: int | None = None
        self.hold_start = False
        self.epochs: list[Epoch] = []
        self.rows_at_failure: list[int] = []
        self.poisoned: set[int] = set()
        self.memory = 10**9
        self.hungry: int | None = None
        self.steps_given_up: list[int] = []  # how many tokens each had

    @property
    def num_in_flight(self) -> int:
        return len(self.steps)

    def start(self, epoch: Epoch) -> ExecutorFacts:
        self.epochs.append(epoch)
        if self.failing_starts:
            self.failing_starts -= 1
            raise CapacityError("no memory yet")
        self.failure = None
        self.poisoned.clear()
        self.workers.lose_everything()
        return FACTS

    def poll_start(self) -> ExecutorFacts | None:
        return None if self.hold_start else super().poll_start()

    def submit(self, step: StepInput) -> None:
        self.steps.append(step)

    def collect(self, timeout: float | None = 0) -> StepOutput | None:
        if self.failure is not None:
            raise self.failure
        if not self.steps or (self.held_at is not None and self.num_steps >= self.held_at):
            return None
        if self.num_steps in self.failing_steps:
            self.failing_steps.remove(self.num_steps)
            self.failure = WorkerError("rank 1 died", 1, "died")
            raise self.failure
        self.num_steps += 1
        step = self.steps[0]
        num_tokens = sum(len(row.token_ids) for row in step.rows)
        if num_tokens > self.memory or any(self.hungry in row.token_ids for row in step.rows):
            self.steps_given_up.append(num_tokens)
            raise StepError(f"rank 0 found no memory for step {step.step_id} (MemoryError: )", 0, step.step_id)
        self.steps.pop(0)
        self.poisoned |= {row.seq_id for row in step.rows if self.poison in row.token_ids}
        if any(row.seq_id in self.poisoned for row in step.rows):
            self.rows_at_failure.append(step.num_rows)
            self.failure = WorkerError("rank 0 died (killed by signal 11 (SIGSEGV))", 0, "died")
            raise self.failure
        return self.workers.run(step)

    def watch(self) -> None:
        if self.failure is not None:
            raise self.failure

    def forget_steps(self) -> None:
        self.steps.clear()
        self.workers.lose_everything()

    def wait_fds(self) -> list[object]:
        return []

    def stop(self) -> None:
        self.steps.clear()


class FrontEnd:
    """A DEALER that speaks typed messages."""

    def __init__(self, address: str, client_id: str, **options: int) -> None:
        self.client_id = client_id
        self.stats: list[Stats] = []
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, client_id.encode())
        self.socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(address)

    def send(self, message: Message) -> None:
        self.socket.send(encode(message))

    def receive(self, timeout: float = PATIENCE) -> Message:
        """The next message but for statistics, which come at their own times and are kept in `stats`."""
        while True:
            assert self.socket.poll(int(timeout * 1000)), "no answer in time"
            message = decode(self.socket.recv())
            if not isinstance(message, Stats):
                return message
            self.stats.append(message)

    def add(self, request_id: str, prompt: list[int], **params: Any) -> None:
        sampling = SamplingParams(**({"temperature": 0} | params)).to_dict()
        self.send(AddRequest(self.client_id, request_id, prompt, sampling, 0, 0.0, 0, [[]]))

    def tokens_until_end(self, request_id: str) -> tuple[list[int], TokenDelta]:
        tokens: list[int] = []
        while True:
            message = self.receive()
            assert isinstance(message, Deltas)
            for delta in spelt_out(message.deltas):
                if delta.request_id == request_id:
                    tokens.extend(delta.token_ids)
                    if delta.finish_reason:
                        return tokens, delta


class Served:
    """An EngineCore that serves in a thread."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.address = f"ipc://{directory}/front"
        self.executor = InventingExecutor()
        self.front = FrontSocket(self.address, EPOCH.incarnation)
        config = EngineConfig.create(model="demo", check_invariants=True, **settings).resolve()
        self.core = EngineCore(config, self.executor, self.front, FACTS, EPOCH)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve)
        self.fronts: list[FrontEnd] = []

    def _serve(self) -> None:
        try:
            self.core.serve()
        except BaseException as error:
            self.error = error

    def front_end(self, client_id: str = "c", **options: int) -> FrontEnd:
        front = FrontEnd(self.address, client_id, **options)
        self.fronts.append(front)
        return front


@pytest.fixture
def settings() -> dict[str, Any]:
    return {}


@pytest.fixture
def served(tmp_path: Path, settings: dict[str, Any]) -> Iterator[Served]:
    server = Served(tmp_path, **settings)
    server.thread.start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.front.close)
        stack.callback(lambda: [front.socket.close(0) for front in server.fronts])
        stack.callback(lambda: _assert_faultless(server))
        stack.callback(lambda: server.thread.join(PATIENCE))
        stack.callback(server.core.stop)
        yield server


def _assert_faultless(server: Served) -> None:
    assert not server.core.recovery.stats.scheduler_faults, "the scheduler failed, and nobody saw it"


def test_hello_is_answered_with_what_was_learnt_at_run_time(served: Served) -> None:
    front = served.front_end()
    front.send(Hello("c"))
    ready = front.receive()
    assert isinstance(ready, Ready)
    assert (ready.incarnation, ready.num_kv_blocks, ready.max_model_len) == (3, 64, 4096)


def test_tokens_come_back_to_the_front_end_that_asked(served: Served) -> None:
    first, second = served.front_end("a"), served.front_end("b")
    first.add("same-id", [5, 6, 7], max_tokens=6)
    second.add("same-id", [8, 9], max_tokens=3)
    assert first.tokens_until_end("same-id")[0] == expected_output([5, 6, 7], 6)
    assert second.tokens_until_end("same-id")[0] == expected_output([8, 9], 3)


def test_the_first_token_is_reported_once_and_no_start_or_prompt_alone_is(served: Served) -> None:
    """The owner counts by it which schedulers were started in vain."""
    reported: list[int] = []
    totals = served.core.scheduler.totals
    served.core.on_progress = lambda: reported.append(totals.num_generated_tokens)
    front = served.front_end()
    front.send(Hello("c"))
    front.receive()
    front.add("refused", [])
    assert front.tokens_until_end("refused")[1].finish_reason == "error"
    assert reported == []
    for name in ("first", "second"):
        front.add(name, [5, 6, 7], max_tokens=6)
        front.tokens_until_end(name)
    assert len(reported) == 1
    assert 0 < reported[0] <= 6


def test_state_is_told_to_the_front_end_that_asks_and_to_nobody_else(served: Served) -> None:
    curious, busy = served.front_end("curious"), served.front_end("busy")
    served.executor.held_at = 3
    busy.add("long", [5] * 40, max_tokens=None, ignore_eos=True)
    busy.receive()
    curious.send(StateRequest())
    state = curious.receive()
    assert isinstance(state, EngineState)
    assert (state.incarnation, state.num_running, state.device.num_blocks) == (3, 1, 64)
    assert [row.request_id for row in state.rows] == ["long"]
    assert state.device.num_held >= 3
    assert curious.socket.poll(50) == 0
    busy.send(Abort("long", None, "test"))
    busy.tokens_until_end("long")


def test_refused_request_gets_its_error_and_the_next_one_is_served(served: Served) -> None:
    front = served.front_end()
    front.add("bad", [])
    _, delta = front.tokens_until_end("bad")
    assert delta.finish_reason == "error"
    assert delta.error is not None
    assert "at least 1 token" in delta.error["message"]
    front.add("good", [5], max_tokens=2)
    assert front.tokens_until_end("good")[0] == expected_output([5], 2)


def test_malformed_and_unexpected_messages_harm_nobody(served: Served) -> None:
    front = served.front_end()
    front.socket.send(b"\xc1nonsense")
    front.socket.send_multipart([b"too", b"many"])
    front.send(Ready(1, 1, 1, 1, "x", "y"))
    front.send(Abort("unknown", None, "test"))
    front.add("good", [5], max_tokens=2)
    assert front.tokens_until_end("good")[0] == expected_output([5], 2)


def test_requests_of_a_vanished_front_end_are_aborted(served: Served) -> None:
    front = served.front_end("gone")
    front.add("endless", [5], max_tokens=None, ignore_eos=True)
    front.receive()
    front.socket.close(0)
    until(lambda: not served.core.scheduler.requests, why="the request of a vanished front end still runs")
    assert served.core.scheduler.blocks.num_free_blocks == FACTS.num_kv_blocks


@pytest.mark.parametrize("settings", [{"max_restarts": 0}])
def test_failed_worker_ends_open_requests_with_its_error_and_the_loop(served: Served) -> None:
    front = served.front_end()
    front.send(Hello("c"))
    front.receive()
    served.executor.failing_steps = {3}
    front.add("open", [5], max_tokens=None, ignore_eos=True)
    _, delta = front.tokens_until_end("open")
    assert delta.finish_reason == "error"
    assert delta.error == {"kind": "WorkerError", "message": "rank 1 died", "rank": 1}
    failure = front.receive()
    assert isinstance(failure, EngineFailure)
    served.thread.join(PATIENCE)
    assert isinstance(served.error, WorkerError)


def test_slow_front_end_is_not_waited_for_and_loses_nothing(served: Served) -> None:
    slow, quick = served.front_end("slow", RCVHWM=1), served.front_end("quick")
    served.front.socket.setsockopt(zmq.SNDHWM, 1)
    slow.add("s", [5], max_tokens=900, ignore_eos=True)
    quick.add("q", [6], max_tokens=900, ignore_eos=True)
    assert quick.tokens_until_end("q")[0] == expected_output([6], 900)
    assert slow.tokens_until_end("s")[0] == expected_output([5], 900)


def test_front_ends_hear_how_the_engine_is_and_at_last_that_it_is_at_rest(served: Served) -> None:
    front, silent = served.front_end("a"), served.front_end("b")
    for each in (front, silent):
        each.send(Hello(each.client_id))
        each.receive()
    front.add("r", [5, 6, 7], max_tokens=6)
    front.tokens_until_end("r")
    for each in (front, silent):
        while not each.stats or each.stats[-1].num_generated_tokens < 6 or each.stats[-1].num_running:
            message = decode(each.socket.recv()) if each.socket.poll(30_000) else None
            assert isinstance(message, Stats), "told once more when the work is done"
            each.stats.append(message)
        last = each.stats[-1]
        assert (last.num_waiting, last.num_used_blocks, last.num_prefill_tokens) == (0, 0, 3)
    assert not front.socket.poll(600), "and not again"


def test_a_front_end_that_is_slow_gets_the_latest_statistics_alone(tmp_path: Path) -> None:
    with contextlib.closing(FrontSocket(f"ipc://{tmp_path}/front", 3)) as socket:
        socket.socket.setsockopt(zmq.SNDHWM, 1)
        front = FrontEnd(f"ipc://{tmp_path}/front", "slow", RCVHWM=1)
        front.send(Hello("slow"))
        until(lambda: [*socket.receive()], why="no greeting")
        num_posted = 0
        while not socket.has_pending or num_posted % 1000:  # it takes what fits into the kernel's buffers
            num_posted += 1
            socket.post_stats(["slow", "gone"], Stats(3, 1, num_running=num_posted))
            assert socket.flush() == ["gone"]
        deadline = time.monotonic() + PATIENCE
        while not front.stats or front.stats[-1].num_running < num_posted:
            socket.flush()
            assert time.monotonic() < deadline, "the latest statistics do not come"
            if not front.socket.poll(10):
                continue
            message = decode(front.socket.recv())
            assert isinstance(message, Stats)
            front.stats.append(message)
        front.socket.close(0)
    assert len(front.stats) < num_posted
    assert front.stats[-1].num_running == num_posted


def test_merging_keeps_the_counts_that_came_with_the_first_tokens() -> None:
    (merged,) = merge([TokenDelta("a", 0, 0, [1], metrics={"queue_seconds": 2.0}), TokenDelta("a", 0, 1, [2])])
    assert merged.metrics == {"queue_seconds": 2.0}


def test_merging_keeps_every_token_and_the_end() -> None:
    deltas = [
        TokenDelta("a", 0, 0, [1]),
        TokenDelta("b", 0, 0, [9]),
        TokenDelta("a", 0, 1, [2, 3]),
        TokenDelta("a", 0, 3, [], finish_reason="stop", metrics={"num_preemptions": 0}),
        TokenDelta("a", 0, 1, [2, 3], finish_reason="stop"),  # a replay is a delta of its own
    ]
    merged = merge(deltas)
    assert [(d.request_id, d.start, d.token_ids, d.finish_reason) for d in merged] == [
        ("a", 0, [1, 2, 3], "stop"),
        ("b", 0, [9], None),
        ("a", 1, [2, 3], "stop"),
    ]


def test_columns_for_a_slow_front_end_are_merged_with_what_came_before_and_behind() -> None:
    entries = [
        TokenDelta("a", 0, 0, [1]),
        TokenColumns(["a", "b"], [0, 1], [0, 4], 1, [2, 9]),
        TokenColumns(["a", "b"], [0, 1], [0, 4], 2, [3, 8]),
        TokenDelta("b", 1, 7, [7], finish_reason="length"),
    ]
    assert merge(entries) == [
        TokenDelta("a", 0, 0, [1, 2, 3]),
        TokenDelta("b", 1, 5, [9, 8, 7], finish_reason="length"),
    ]
