"""A step that is launched and whose sampled ids may be under way still; knows neither how it is computed nor a row.

On a GPU the ids are copied out while the host goes on, so that it can launch the next step, which takes them on the
device. On a CPU they are there at once.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import torch

from nanoengine.step import StepInput, StepOutput, TokenLogprobs
from workers.input_batch import Batch


class SampledIds:
    """Ids of a step where they were sampled and, once they are asked for, on the host.

    Args:
        on_device: (num_sampled,) int64.
    """

    def __init__(self, on_device: torch.Tensor) -> None:
        self.on_device = on_device
        self._copy = on_device
        self._copied: torch.cuda.Event | None = None
        if on_device.device.type == "cuda":
            self._copy = torch.empty(on_device.shape, dtype=torch.int64, pin_memory=True)
            self._copy.copy_(on_device, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @classmethod
    def none(cls) -> SampledIds:
        """Of a step that sampled nothing."""
        return cls(torch.zeros(0, dtype=torch.int64))

    @property
    def are_there(self) -> bool:
        """Whether `on_host` would not wait."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    @functools.cached_property
    def on_host(self) -> list[int]:
        """The ids; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        ids: list[int] = self._copy.tolist()
        return ids


@dataclasses.dataclass
class LaunchedStep:
    """What is known of a step by the time it is launched.

    Attributes:
        step: what was asked for.
        began: when it came, by time.perf_counter.
        ids: of the rows that sample; None on ranks other than 0, which tell nothing.
        batch: None when no row was scheduled.
        logprobs, errors: as in `StepOutput`.
    """

    step: StepInput
    began: float
    ids: SampledIds | None = None
    batch: Batch | None = None
    logprobs: dict[int, list[TokenLogprobs]] = dataclasses.field(default_factory=dict)
    errors: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not wait."""
        return self.ids is None or self.ids.are_there

    def finish(self) -> StepOutput | None:
        """Wait for the ids. Rank 0: for each row the ids it sampled, in order. None on the other ranks."""
        if self.ids is None:
            return None
        step = self.step
        token_ids: list[list[int]] = [[] for _ in range(step.num_rows)]
        if self.batch is None:
            return StepOutput(step.epoch, step.step_id, [], token_ids, time.perf_counter() - self.began)
        for row, token in zip(self.batch.sampled, self.ids.on_host, strict=True):
            if row not in self.errors:
                token_ids[row] = [token]
        seconds, told = time.perf_counter() - self.began, self.batch.prompt_logprobs
        return StepOutput(
            step.epoch, step.step_id, self.batch.seq_ids, token_ids, seconds, self.logprobs, told, self.errors
        )
