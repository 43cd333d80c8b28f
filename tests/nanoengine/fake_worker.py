"""A rank without a model, for tests of the executor: it invents tokens, and misbehaves where its settings say so.

The misbehaviour is asked for through the model's name, `fake:WHAT@RANK`, since that reaches every process:
WHAT is one of the keys of the `match` statements below, RANK the rank that does it (`*` for all).
"""

from __future__ import annotations

import os
import signal
import time

from configs.errors import CapacityError, ConfigError
from nanoengine.channel import RankPort
from nanoengine.step import StepInput, StepOutput

MAX_BLOCKS = (100, 70, 90, 80)


def invented(step: StepInput) -> StepOutput:
    """Deterministic nonsense: the sum of a row's ids plus the step's number."""
    tokens = [[sum(row.token_ids) + step.step_id] if row.sample else [] for row in step.rows]
    return StepOutput(step.epoch, step.step_id, [row.seq_id for row in step.rows], tokens)


def misbehaviour(port: RankPort) -> str:
    what, _, rank = port.config.model.model.removeprefix("fake:").partition("@")
    return what if rank in ("*", str(port.rank)) else ""


def run_worker(port: RankPort) -> None:
    what = misbehaviour(port)
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
    for step in port.steps():
        match what:
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
        if port.rank == 0:
            output = invented(step)
            if what == "settings":
                output.token_ids = [[port.config.cache.block_size, port.config.scheduler.max_num_seqs, num_blocks]]
            if what == "wrong-step":
                output.step_id += 1
            port.send_output(output)
        elif what == "wait":
            time.sleep(600)
