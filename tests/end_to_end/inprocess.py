"""Runs the real scheduler over the in-process executor: the whole engine but its processes, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.engine import EngineConfig
from nanoengine.engine import limits_of
from nanoengine.executor import MAX_IN_FLIGHT, create_executor
from nanoengine.messages import AddRequest, TokenDelta
from nanoengine.sampling_params import SamplingParams
from nanoengine.scheduler import Scheduler
from nanoengine.step import Epoch
from nanoengine.structured_outputs import StructuredOutputsParams


class InProcessEngine:
    """One engine in this process; `generate` returns token ids in the order of the prompts."""

    def __init__(self, run_dir: Path, **settings: Any) -> None:
        self.config = EngineConfig.create(**({"executor": "inprocess", "device": "cpu"} | settings)).resolve()
        self.executor = create_executor(self.config, run_dir)
        facts = self.executor.start(Epoch(1, 1))
        self.scheduler = Scheduler(limits_of(self.config, facts), Epoch(1, 1))

    def add(
        self, request_id: str, prompt: list[int], params: SamplingParams, seed: int, journal: list[int] | None = None
    ) -> None:
        """Queue a request as a front end does, its structured outputs compiled."""
        form = params.structured_outputs
        grammar = form.to_grammar() if isinstance(form, StructuredOutputsParams) else ""
        message = AddRequest("c", request_id, prompt, params.to_dict(), seed, 0.0, 0, [journal or []], grammar=grammar)
        self.scheduler.add(message)

    def generate_deltas(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], seeds: list[int] | None = None
    ) -> list[list[TokenDelta]]:
        """The deltas of each prompt, in their order; parameters for all, or for each."""
        for i, prompt in enumerate(prompts):
            own = params[i] if isinstance(params, list) else params
            self.add(str(i), prompt, own, seeds[i] if seeds else 0)
        deltas: list[list[TokenDelta]] = [[] for _ in prompts]
        while self.scheduler.has_work:
            self.step()
            for item in self.scheduler.take_deltas():
                assert item.delta.error is None, item.delta.error
                deltas[int(item.delta.request_id)].append(item.delta)
        while self.executor.num_in_flight:
            self._commit()  # rows that were scheduled behind a stop token
        return deltas

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], seeds: list[int] | None = None
    ) -> list[list[int]]:
        """The output token ids of each prompt, in their order."""
        deltas = self.generate_deltas(prompts, params, seeds)
        return [[token for delta in each for token in delta.token_ids] for each in deltas]

    def generate_all(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int] | None = None
    ) -> list[list[list[int]]]:
        """The output token ids of each sequence of each prompt, in their order."""
        outputs: list[list[list[int]]] = []
        for deltas in self.generate_deltas(prompts, params, seeds):
            outputs.append([[] for _ in range(params.num_sequences)])
            for delta in deltas:
                outputs[-1][delta.index] += delta.token_ids
        return outputs

    def step(self) -> None:
        """Submit as many steps as may be in flight, commit the oldest; the invariants are checked in between."""
        wanted = MAX_IN_FLIGHT if self.config.scheduler.async_scheduling else 1
        while self.executor.num_in_flight < wanted:
            step = self.scheduler.schedule()
            if step is None:
                break
            self.executor.submit(step)
        self.scheduler.check_invariants()
        self._commit()

    def _commit(self) -> None:
        output = self.executor.collect(None)
        assert output is not None, "work is waiting and nothing can be scheduled"
        self.scheduler.commit(output)
        self.scheduler.check_invariants()

    def close(self) -> None:
        self.executor.stop()
