"""Runs steps on a group of ranks: the interface the engine loop drives, and the choice of implementation.

It knows neither scheduling nor models; the ranks' code is named by a string and imported where it runs.
"""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path

from configs.engine import EngineConfig
from nanoengine.step import Epoch, StepInput, StepOutput

MAX_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class ExecutorFacts:
    """What was learnt while the ranks started; `num_kv_blocks` is the minimum over ranks."""

    num_kv_blocks: int
    dtype: str
    device: str


class Executor(abc.ABC):
    """One group of ranks at a time. All methods belong to one thread; `stop` is harmless twice and in any phase.

    A failure of any rank is the failure of the group: the ranks are killed and reaped before the error is
    raised, and every later `submit`, `collect` and `watch` raises it again. `start` with a higher epoch begins
    a new group afterwards.
    """

    @property
    @abc.abstractmethod
    def num_in_flight(self) -> int:
        """Steps submitted and not yet collected."""

    @abc.abstractmethod
    def start(self, epoch: Epoch) -> ExecutorFacts:
        """Spawn the ranks, load, agree on the number of K/V blocks, warm up; returns when every rank is ready.

        Raises:
            ConfigError, ModelError, CapacityError: what a rank found wrong, as it found it.
            WorkerError: a rank died or raised anything else; names the rank.
            DeadlineError: not ready within `start_timeout`; names the ranks waited for.
        """

    @abc.abstractmethod
    def submit(self, step: StepInput) -> None:
        """Hand a step to every rank; at most two are in flight. Raises WorkerError when the group has failed."""

    @abc.abstractmethod
    def collect(self, timeout: float | None = 0) -> StepOutput | None:
        """The output of the oldest step in flight, or None when it does not come within `timeout` seconds.

        None waits for as long as the step's own deadline allows. Raises WorkerError when a rank died, stalled
        or raised.
        """

    @abc.abstractmethod
    def watch(self) -> None:
        """Raise WorkerError when a rank died, raised, is silent or is overdue; call it at least every 0.5 s."""

    @abc.abstractmethod
    def wait_fds(self) -> list[object]:
        """ZeroMQ sockets and descriptors that become readable when `collect` or `watch` has something to say."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End the ranks, gently when they are idle; nothing of them is left afterwards. Never raises."""


def create_executor(config: EngineConfig, run_dir: Path) -> Executor:
    """The executor that `config.parallel.executor` names; it starts nothing yet."""
    raise NotImplementedError
