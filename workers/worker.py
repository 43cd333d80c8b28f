"""One rank: puts device, communicator and ModelRunner together and runs the steps that arrive; it decides nothing.

`run_worker` is the entry of a rank's process, `create_ranks` makes the ranks of an in-process group.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from configs.engine import EngineConfig
from configs.errors import ConfigError
from nanoengine.channel import BlockCounts, RankPort
from nanoengine.step import GaveUp, StepInput, StepOutput
from workers.launched_step import LaunchedStep
from workers.memory import is_out_of_memory
from workers.model_runner import ModelRunner
from workers.parallel import (
    Communicator,
    HostCommunicator,
    SharedMemoryCommunicator,
    SingleCommunicator,
    StepGivenUp,
    ThreadCommunicator,
    TorchCommunicator,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_REASON_CHARS = 1000


class Worker:
    """A rank's model and cache. Every rank of a group makes the same calls in the same order."""

    def __init__(self, config: EngineConfig, device: torch.device, communicator: Communicator) -> None:
        self.device_name = str(device)
        self._communicator = communicator
        self._runner: ModelRunner | None = ModelRunner(config, device, communicator)
        self._gave_up = False  # a step, and nobody has told this rank to begin anew
        self._launched: LaunchedStep | None = None  # its output has not been told

    @property
    def runner(self) -> ModelRunner:
        """The rank's ModelRunner, until `close`."""
        assert self._runner is not None, "closed"
        return self._runner

    @property
    def dtype_name(self) -> str:
        """Type of weights and activations; known after `load`."""
        return self.runner.dtype_name

    def load(self) -> BlockCounts:
        """Load this rank's share of the model; returns how many K/V blocks would fit."""
        self.runner.load_model()
        host = self.runner.max_host_blocks()  # first: a swap space that cannot be would leave no room for a cache, too
        return BlockCounts(self.runner.max_kv_blocks(), host)

    def allocate(self, num_blocks: BlockCounts) -> None:
        """Make the K/V cache and run one step of each kind that needs it before the first request."""
        began = time.perf_counter()
        self.runner.allocate(*num_blocks)
        allocated = time.perf_counter()
        self.runner.warm_up()
        if self._communicator.rank == 0:
            seconds = allocated - began, time.perf_counter() - allocated
            logger.info("K/V cache of %d blocks made in %.2f s, warmed up in %.2f s", num_blocks.device, *seconds)

    def execute(self, step: StepInput) -> StepOutput | GaveUp | None:
        """Compute a step; None on ranks other than 0.

        Where there is no memory for it, all ranks give it up, and compute none (None) until `forget`. The one that
        found none says so.
        """
        return self._or_give_up(step, lambda: self.runner.execute(step))

    def outputs(self, step: StepInput, is_more_waiting: Callable[[], bool]) -> Iterator[StepOutput | GaveUp]:
        """Like `execute`, but when the next step is there before this one's ids are, the output comes with that one's.

        So a GPU has its next step before it is done with this one. On a CPU a step is done as soon as it is launched.
        """
        launched = self._or_give_up(step, lambda: self.runner.launch(step))
        before, self._launched = self._launched, None
        if before is not None:
            finished = before.finish()  # also when this step is given up: that one was launched before it
            if finished is not None:
                yield finished
        if not isinstance(launched, LaunchedStep):  # given up
            if launched is not None:
                yield launched
            return
        while not launched.is_done:
            if is_more_waiting():
                self._launched = launched
                return
            os.sched_yield()
        output = self._or_give_up(step, launched.finish)
        if output is not None:
            yield output

    def _or_give_up(self, step: StepInput, compute: Callable[[], T]) -> T | GaveUp | None:
        if self._gave_up:
            return None
        try:
            return compute()
        except Exception as error:
            follows = isinstance(error, StepGivenUp)
            if not (follows or is_out_of_memory(error)) or not self._communicator.give_up():
                raise
            self._gave_up = True
            if follows:
                return None
            # Logged, not kept: its frames hold what there is no memory for.
            logger.exception("step %d is given up", step.step_id)
            return GaveUp(step.step_id, f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS])

    def forget(self) -> None:
        """Every step so far is void: go on without any row. What the cache holds, nobody reads."""
        self._gave_up, self._launched = False, None
        self._communicator.begin_anew()
        self.runner.forget_rows()

    def close(self) -> None:
        """Leave the group together with the others. Captured graphs hold collectives, so the runner goes first."""
        self._runner = self._launched = None
        gc.collect()
        self._communicator.close()

    def abort(self) -> None:
        """Leave without waiting for anybody; ranks that wait for this one in a collective raise instead."""
        self._communicator.abort()


def run_worker(port: RankPort) -> None:
    """Entry of a rank's process, named as a string by the executor. What it raises, the scheduler is told."""
    torch.set_num_threads(port.num_threads)
    device = pick_device(port.config, port.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels are launched that name no device
    worker = Worker(port.config, device, create_communicator(port, device))
    num_blocks = port.report_loaded(worker.load(), worker.dtype_name, worker.device_name)
    if num_blocks is not None:
        worker.allocate(num_blocks)
        port.report_ready()
        for step in port.steps(worker.forget):
            for output in worker.outputs(step, port.is_command_waiting):
                port.send_output(output)
    worker.close()


def create_ranks(config: EngineConfig) -> list[Worker]:
    """All ranks of a group that lives in this process; several of them run as threads."""
    world_size = config.parallel.world_size
    communicators: list[Communicator] = [SingleCommunicator()]
    if world_size > 1:
        communicators = [*ThreadCommunicator.group(world_size)]
    return [Worker(config, pick_device(config, rank), communicator) for rank, communicator in enumerate(communicators)]


def pick_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: `auto` is CUDA where every rank gets a GPU of its own, else the CPU.

    With `share_gpus` the ranks are dealt out over the GPUs that there are.

    Raises:
        ConfigError: CUDA is asked for and there are not enough GPUs.
    """
    asked, world_size = config.parallel.device, config.parallel.world_size
    num_gpus = torch.cuda.device_count() if asked != "cpu" and torch.cuda.is_available() else 0
    if num_gpus and num_gpus < world_size and config.parallel.share_gpus:
        return torch.device("cuda", rank % num_gpus)
    if asked == "cuda" and num_gpus < world_size:
        raise ConfigError(
            f"device cuda needs a GPU for each of {world_size} rank(s), this machine shows {num_gpus}; "
            f"lower tensor_parallel_size or use device=cpu{' or share_gpus' if num_gpus else ''}",
            "device",
        )
    return torch.device("cuda", rank) if num_gpus >= world_size else torch.device("cpu")


def create_communicator(port: RankPort, device: torch.device) -> Communicator:
    """The collectives of a process: shared memory on CPU, NCCL on GPUs, none when the rank is alone.

    NCCL refuses several ranks on one GPU: they meet in the host's memory, through which their tensors are copied.
    """
    if port.world_size == 1:
        return SingleCommunicator()
    # The scheduler watches over steps; this is for the case that it cannot, and must not be shorter than its own.
    deadline = max(port.config.parallel.start_timeout, port.config.parallel.step_timeout)
    shares_gpu = port.config.parallel.share_gpus and 0 < torch.cuda.device_count() < port.world_size
    if device.type == "cuda" and not shares_gpu:
        store = port.run_dir / f"store{port.epoch.group}"
        return TorchCommunicator(port.rank, port.world_size, store, device, deadline)
    assert port.collective_fd is not None
    on_host = SharedMemoryCommunicator(port.rank, port.world_size, port.collective_fd, deadline)
    return HostCommunicator(on_host) if device.type == "cuda" else on_host
