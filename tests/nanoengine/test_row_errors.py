"""A row that fails on the workers ends its request with an error, and nothing else."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from configs.errors import ChannelError, RequestError, to_wire
from nanoengine.step import Epoch, RowExtras, StepInput, StepOutput
from tests.nanoengine.scheduler_driver import Driver, expected_output


class FailingDriver(Driver):
    """The workers fail the row of request `x` when it has generated `after` tokens."""

    def __init__(self, after: int, async_scheduling: bool) -> None:
        super().__init__(async_scheduling)
        run = self.workers.run

        def failing(step: StepInput) -> StepOutput:
            output = run(step)
            token_ids, errors = list(output.token_ids), {}
            for row, seq_id in enumerate(output.seq_ids):
                seqs = [seq for request in self.scheduler.requests.values() for seq in request.seqs]
                (seq,) = [seq for seq in seqs if seq.seq_id == seq_id] or [None]
                if seq is not None and seq.request.request_id == "x" and seq.num_completion_tokens >= after:
                    token_ids[row] = []
                    errors[row] = to_wire(RequestError("no token fits", "structured_outputs"))
            return StepOutput.unpack(_columns(dataclasses.replace(output, token_ids=token_ids, errors=errors)))

        self.workers.run = failing  # type: ignore[method-assign]


def _columns(message: StepInput | StepOutput) -> Any:
    return pickle.loads(message.pack())  # noqa: S301 - our own bytes, a moment old


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_it_ends_its_request_alone(after: int, async_scheduling: bool) -> None:
    driver = FailingDriver(after, async_scheduling)
    prompts = {name: [5 + i] * 9 for i, name in enumerate("wxy")}
    for name, prompt in prompts.items():
        driver.add(name, prompt)
    driver.run()
    assert driver.finished == {"w": "length", "x": "error", "y": "length"}
    assert driver.last["x"].error == to_wire(RequestError("no token fits", "structured_outputs"))
    tokens = driver.tokens["x"]
    assert len(tokens) in (after, after + async_scheduling), "the token on its way is still its own"
    assert tokens == expected_output(prompts["x"], len(tokens))
    assert all(driver.tokens[name] == expected_output(prompts[name], 8) for name in "wy")


def test_a_row_has_a_token_or_an_error() -> None:
    output = StepOutput(Epoch(1, 1), 1, [7], [[3]], errors={0: to_wire(RequestError("x"))})
    with pytest.raises(ChannelError, match="a row that failed has a token"):
        StepOutput.unpack(_columns(output))


def test_a_grammar_travels_with_the_row_and_its_whole_past() -> None:
    driver = Driver()
    driver.add("g", [1, 2, 3], [4, 5], grammar="the grammar", ignore_eos=True)
    step = driver.step()
    assert step is not None
    (row,) = step.rows
    assert row.extras == RowExtras(grammar="the grammar", ignore_eos=True)
    assert row.extras.looks_back
    assert list(row.past_token_ids) == [1, 2, 3, 4, 5]
    assert StepInput.unpack(_columns(step)).rows[0].extras == row.extras
