"""A rank without a model, for tests of the executor: it invents tokens, and misbehaves where its settings say so.

The misbehaviour is asked for through the model's name, `fake:WHAT@RANK`, since that reaches every process:
WHAT is one of the keys of the `match` statements below, RANK the rank that does it (`*` for all).
"""

from __future__ import annotations

import os
import signal
import threading
import time

from configs.engine import EngineConfig
from configs.errors import CapacityError, ConfigError
from nanoengine.channel import BlockCounts, RankPort
from nanoengine.step import GaveUp, StepInput, StepOutput

MAX_BLOCKS = [BlockCounts(*each) for each in ((100, 6), (70, 9), (90, 8), (80, 7))]


def invented(step: StepInput) -> StepOutput:
    """Deterministic nonsense: the sum of a row's ids plus the step's number."""
    tokens = [[sum(row.token_ids) + step.step_id] if row.sample else [] for row in step.rows]
    return StepOutput(step.epoch, step.step_id, [row.seq_id for row in step.rows], tokens)


def misbehaviour(config: EngineConfig, rank: int) -> str:
    what, _, who = config.model.model.removeprefix("fake:").partition("@")
    return what if who in ("*", str(rank)) else ""


def run_worker(port: RankPort) -> None:
    what = misbehaviour(port.config, port.rank)
    match what:
        case "die-loading":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit-loading":
            os._exit(7)
        case "hang-loading":
            time.sleep(600)
        case "config-error":
            raise ConfigError("tensor_parallel_size must be odd, got 2", "tensor_parallel_size")
        case "capacity-error":
            raise CapacityError("too much memory asked for: 3 of 2")
        case "raise-loading":
            raise RuntimeError("no such luck")
    num_blocks = port.report_loaded(MAX_BLOCKS[port.rank], "float32", "cpu")
    if num_blocks is None:
        return
    if what == "die-warming":
        os.kill(os.getpid(), signal.SIGKILL)
    port.report_ready()
    forgotten: list[bool] = []
    for step in port.steps(lambda: forgotten.append(True)):
        match what:
            case "give-up" if step.step_id == 2:
                port.send_output(GaveUp(2, "no luck with memory"))
                continue
            case "give-up" if step.step_id > 2 and not forgotten:
                continue
            case "raise" if step.step_id == 2:
                raise ValueError("rank trouble")
            case "hang" if step.step_id == 2:
                time.sleep(600)
            case "die" if step.step_id == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze" if step.step_id == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            case "slow":
                time.sleep(0.3)
            case "slow-hang":
                time.sleep(0.3 if step.step_id == 1 else 600)
        if port.rank == 0:
            output = invented(step)
            if what == "settings":
                output.token_ids = [
                    [port.config.cache.block_size, port.config.scheduler.max_num_seqs, num_blocks.device]
                ]
            if what == "wrong-step":
                output.step_id += 1
            port.send_output(output)
        elif what == "wait":
            time.sleep(600)


GATE = threading.Event()
"""What `gated` ranks of an in-process executor wait for in each step."""


class FakeRank:
    """The same for the in-process executor. `closed` tells a test that the rank left in an orderly way."""

    dtype_name, device_name = "float32", "cpu"

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self.rank, self.what = rank, misbehaviour(config, rank)
        self.num_blocks, self.closed, self.aborted = BlockCounts(0), False, False

    def load(self) -> BlockCounts:
        match self.what:
            case "config-error":
                raise ConfigError("tensor_parallel_size must be odd, got 2", "tensor_parallel_size")
            case "raise-loading":
                raise RuntimeError("no such luck")
            case "hang-loading":
                time.sleep(1)
        return MAX_BLOCKS[self.rank]

    def allocate(self, num_blocks: BlockCounts) -> None:
        self.num_blocks = num_blocks

    def execute(self, step: StepInput) -> StepOutput | None:
        if step.step_id == 2 and self.what == "raise":
            raise ValueError("rank trouble")
        if self.what == "gated":
            assert GATE.wait(60)
        if self.what == "hang":
            time.sleep(1)
        return invented(step) if self.rank == 0 else None

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


def create_ranks(config: EngineConfig) -> list[FakeRank]:
    return [FakeRank(config, rank) for rank in range(config.parallel.world_size)]


POISON = 777


def run_inventing(port: RankPort) -> None:
    """A rank whose tokens depend on all that came before them (`FakeWorkers`), and which dies of the token POISON.

    It does so again whenever a sequence that holds one is computed.
    """
    from tests.nanoengine.scheduler_driver import FakeWorkers

    num_blocks = port.report_loaded(BlockCounts(64), "float32", "cpu")
    if num_blocks is None:
        return
    workers = FakeWorkers(num_blocks.device, port.config.cache.block_size)
    port.report_ready()
    for step in port.steps():
        if any(POISON in row.token_ids for row in step.rows):
            os.kill(os.getpid(), signal.SIGKILL)
        output = workers.run(step)
        if port.rank == 0:
            port.send_output(output)
