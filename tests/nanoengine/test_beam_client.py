"""A beam search in the front end: what is sent for it, and what its client gets to see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import RequestError, RequestTimeoutError, to_wire
from nanoengine import LLM, AsyncLLM, BeamSearchParams, RequestOutput
from nanoengine.engine_client import EngineClient
from nanoengine.messages import Abort, AddRequest, Deltas, Message, TokenDelta
from nanoengine.prompts import Prompt
from tests.nanoengine.engine_clients import make_client, ready, sent
from tests.nanoengine.fake_engine import CHECKPOINT, FakeEngineProcess, write_model

PARAMS = BeamSearchParams(beam_width=2, max_tokens=5, length_penalty=0.5, early_stopping="never")


@pytest.fixture
def client(config: EngineConfig) -> EngineClient:
    return make_client(config, None)


def delta(wire_id: str, index: int, ids: list[int], logprob: float) -> TokenDelta:
    """A complete output whose tokens are equally likely."""
    return TokenDelta(wire_id, index, 0, ids, "length", logprobs=[([token, 9], [logprob, -0.1], 2) for token in ids])


def answer(request: AddRequest) -> list[Message]:
    """The outputs of a search, in two messages."""
    wire_id = request.request_id
    return [Deltas(1, [delta(wire_id, 0, [5, 6], -0.5)]), Deltas(1, [delta(wire_id, 1, [7], -2.0)])]


def test_a_search_is_sent_whole_and_is_over_with_its_last_output(client: EngineClient) -> None:
    journal = client.add(client.check(Prompt(token_ids=[1, 2]), PARAMS))
    (message,) = sent(client)
    assert isinstance(message, AddRequest)
    assert message.beam_search == PARAMS.to_dict()
    assert message.params["n"] == 2
    assert message.params["temperature"] == 0
    assert message.params["max_tokens"] == 5
    first, last = answer(message)
    client.handle(first)
    assert not journal.has_output
    client.handle(last)
    assert journal.has_output
    output = journal.output()
    assert output.finished
    assert [each.token_ids for each in output.outputs] == [[5, 6], [7]]
    assert [each.cumulative_logprob for each in output.outputs] == [-1.0, -2.0]
    assert [each.logprobs for each in output.outputs] == [None, None]
    assert client.num_unfinished == 0


def test_log_probabilities_are_shown_when_they_are_asked_for(client: EngineClient) -> None:
    journal = client.add(client.check(Prompt(token_ids=[1]), BeamSearchParams(2, logprobs=1)))
    (message,) = sent(client)
    assert isinstance(message, AddRequest)
    for each in answer(message):
        client.handle(each)
    logprobs = journal.output().outputs[1].logprobs
    assert logprobs is not None
    assert [(token, each.logprob, each.rank) for token, each in logprobs[0].items()] == [(7, -2.0, 2), (9, -0.1, 1)]


def test_a_scheduler_that_is_replaced_searches_again_from_the_prompt(client: EngineClient) -> None:
    journal = client.add(client.check(Prompt(token_ids=[1, 2]), PARAMS))
    (message,) = sent(client)
    assert isinstance(message, AddRequest)
    client.handle(answer(message)[0])
    client.handle(ready(2))
    again, ended = sent(client)
    assert isinstance(again, AddRequest)
    assert again.journal == [[], []]
    assert again.beam_search == PARAMS.to_dict()
    assert ended == Abort(journal.wire_id, 0, "length"), "the first output is here already"
    for each in answer(message):
        client.handle(Deltas(2, each.deltas))  # type: ignore[union-attr]
    assert [each.token_ids for each in journal.output().outputs] == [[5, 6], [7]]


def test_a_search_wider_than_the_vocabulary_allows_is_refused(tmp_path: Path) -> None:
    config = EngineConfig.create(model=str(write_model(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(CHECKPOINT | {"vocab_size": 90, "eos_token_id": 7}))
    client = make_client(config.resolve(), None)
    client.check(Prompt(token_ids=[1]), BeamSearchParams(45))
    with pytest.raises(RequestError, match="beam_width must be at most 45 for a vocabulary of 90 tokens, got 46") as no:
        client.check(Prompt(token_ids=[1]), BeamSearchParams(46))
    assert no.value.param == "beam_width"


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, config: EngineConfig) -> Iterator[FakeEngineProcess]:
    fake = FakeEngineProcess(config)
    fake.script = answer
    monkeypatch.setattr("nanoengine.scheduler_keeper.EngineProcess", lambda *_: fake)
    yield fake
    fake.stop()


def tokens(output: RequestOutput) -> list[list[int]]:
    return [each.token_ids for each in output.outputs]


def test_llm_returns_the_outputs_of_each_prompt_in_order(config: EngineConfig, process: FakeEngineProcess) -> None:
    with LLM(str(config.model_dir)) as llm:
        outputs = llm.beam_search([[1], {"prompt_token_ids": [2, 3]}], PARAMS)
        assert [each.prompt_token_ids for each in outputs] == [[1], [2, 3]]
        assert [tokens(each) for each in outputs] == [[[5, 6], [7]]] * 2
        several = llm.beam_search([[1], [2]], [PARAMS, BeamSearchParams(1)], use_tqdm=False)
        assert [tokens(each) for each in several] == [[[5, 6], [7]], [[5, 6]]]


def test_a_search_whose_time_is_over_brings_the_error(config: EngineConfig, process: FakeEngineProcess) -> None:
    def late(request: AddRequest) -> list[Message]:
        error = to_wire(RequestTimeoutError("the request was not complete within 1 s"))
        return [Deltas(1, [TokenDelta(request.request_id, i, 0, [], "error", error=error) for i in range(2)])]

    process.script = late
    with LLM(str(config.model_dir)) as llm:
        (output,) = llm.beam_search([[1]], PARAMS, timeout=1)
    assert [(each.finish_reason, each.error_kind) for each in output.outputs] == [("error", "RequestTimeoutError")] * 2
    assert output.outputs[0].cumulative_logprob is None
    assert process.added[0].timeout == 1


async def test_async_llm_yields_one_output(config: EngineConfig, process: FakeEngineProcess) -> None:
    async with AsyncLLM(str(config.model_dir)) as llm:
        outputs = [output async for output in llm.beam_search([1], PARAMS, "mine")]
        assert [tokens(each) for each in outputs] == [[[5, 6], [7]]]
        assert outputs[0].request_id == "mine"
        wrong: Any = {"beam_width": 2}
        with pytest.raises(RequestError, match="params must be a BeamSearchParams, got dict"):
            llm.beam_search([1], wrong)
