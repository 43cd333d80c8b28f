"""Several sequences of one request in the front end: journals, stop strings, replays, and the ranking of best_of."""

from __future__ import annotations

import math
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import RequestError, to_wire
from nanoengine import LLM, AsyncLLM
from nanoengine.engine_client import EngineClient
from nanoengine.journal import RequestJournal
from nanoengine.messages import Abort, AddRequest, Deltas, TokenDelta
from nanoengine.sampling_params import SamplingParams
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.engine_clients import add, ready, sent


def tell(
    client: EngineClient, journal: RequestJournal, index: int, start: int, ids: list[int], *,
    logprob: float | None = None, reason: str | None = None, **more: Any,
) -> bool:  # fmt: skip
    """A delta for one sequence; says whether the request has news. Each token has the same log-probability."""
    logprobs = None if logprob is None else [([token], [logprob], 1) for token in ids]
    delta = TokenDelta(journal.wire_id, index, start, ids, reason, logprobs=logprobs, **more)
    return journal in client.handle(Deltas(1, [delta]))


def test_a_stop_string_aborts_its_sequence_alone(client: EngineClient, tokenizer: Tokenizer) -> None:
    journal = add(client, n=3, stop="b")
    (message,) = sent(client)
    assert isinstance(message, AddRequest)
    assert message.journal == [[], [], []]
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    tell(client, journal, 1, 0, [a, b])
    assert sent(client) == [Abort(journal.wire_id, 1, "stop")]
    assert not journal.finished
    tell(client, journal, 1, 2, [a])
    for index in (2, 0):
        tell(client, journal, index, 0, [a, a], reason="length")
    output = journal.output()
    assert [(each.index, each.text, each.finish_reason) for each in output.outputs] == [
        (0, "aa", "length"), (1, "a", "stop"), (2, "aa", "length"),
    ]  # fmt: skip
    assert output.finished
    assert output.metrics.num_completion_tokens == 6
    assert output.metrics.num_generated_tokens == 2
    assert client.num_unfinished == 0


def test_one_sequence_or_all_can_be_aborted(client: EngineClient) -> None:
    journal = add(client, n=3)
    client.abort(journal.request_id, 1)
    client.abort(journal.request_id, 1)
    assert [each.finish_reason for each in journal.output().outputs] == [None, "abort", None]
    client.abort(journal.request_id)
    assert journal.finished
    assert [message.index for message in sent(client) if isinstance(message, Abort)] == [1, None]


def test_a_new_scheduler_goes_on_behind_each_journal(client: EngineClient) -> None:
    journal = add(client, n=3)
    tell(client, journal, 0, 0, [5, 6])
    tell(client, journal, 2, 0, [7], reason="length")
    sent(client)
    client.handle(ready(2))
    again, ended = sent(client)
    assert isinstance(again, AddRequest)
    assert again.journal == [[5, 6], [], [7]]
    assert ended == Abort(journal.wire_id, 2, "length")


def test_a_refused_request_ends_with_the_error_for_each_sequence(client: EngineClient) -> None:
    journal = add(client, n=2)
    for index in range(2):
        tell(client, journal, index, 0, [], reason="error", error=to_wire(RequestError("too long", "prompt")))
    assert journal.finished
    assert {(each.error, each.error_kind) for each in journal.output().outputs} == {("too long", "RequestError")}


def test_candidates_are_ranked_by_the_sum_of_their_logprobs(client: EngineClient) -> None:
    journal = add(client, n=2, best_of=4)
    (message,) = sent(client)
    assert isinstance(message, AddRequest)
    params = SamplingParams.from_dict(message.params)
    assert (params.logprobs, params.num_sequences, len(message.journal)) == (0, 4, 4)
    for index, (count, logprob) in enumerate([(3, -1.0), (2, -0.5), (1, -9.0), (9, -0.1)]):
        assert not journal.has_output
        assert journal.output().outputs == [], "nobody knows yet which are the best"
        tell(client, journal, index, 0, [10 + index], logprob=logprob)
        tell(client, journal, index, 1, [10 + index] * (count - 1), logprob=logprob, reason="length")
    assert journal.has_output
    shown = journal.output().outputs
    assert [(each.index, each.token_ids[0], len(each.token_ids)) for each in shown] == [(0, 13, 9), (1, 11, 2)]
    assert {(each.logprobs, each.cumulative_logprob) for each in shown} == {(None, None)}
    assert journal.output().metrics.num_completion_tokens == 15


def test_candidates_show_their_logprobs_when_asked_and_are_ranked_even_if_nothing_is_hidden(
    client: EngineClient,
) -> None:
    journal = add(client, n=1, best_of=2, logprobs=0)
    tell(client, journal, 0, 0, [3, 4], logprob=-2.0, reason="length")
    tell(client, journal, 1, 0, [5, 6], logprob=-1.0, reason="length")
    [best] = journal.output().outputs
    assert (best.token_ids, best.cumulative_logprob) == ([5, 6], -2.0)
    assert best.logprobs is not None
    assert math.isclose(sum(entry[token].logprob for entry, token in zip(best.logprobs, [5, 6], strict=True)), -2.0)


def test_best_of_n_alone_ranks_nothing_and_streams(client: EngineClient) -> None:
    journal = add(client, n=2, best_of=2)
    (message,) = sent(client)
    assert isinstance(message, AddRequest)
    assert message.params["logprobs"] is None
    assert tell(client, journal, 1, 0, [3])
    assert [each.token_ids for each in journal.output().outputs] == [[], [3]]


def test_candidates_that_were_broken_off_come_behind_answers(client: EngineClient) -> None:
    journal = add(client, n=2, best_of=4)
    tell(client, journal, 1, 0, [3], logprob=-0.1)
    tell(client, journal, 2, 0, [4, 4], logprob=-9.0, reason="length")
    client.abort(journal.request_id)
    assert [(each.token_ids, each.finish_reason) for each in journal.output().outputs] == [
        ([4, 4], "length"), ([], "abort"),
    ]  # fmt: skip


def test_candidates_of_which_one_failed_show_the_failure(client: EngineClient) -> None:
    journal = add(client, n=1, best_of=2)
    tell(client, journal, 0, 0, [3], logprob=-1.0, reason="length")
    tell(client, journal, 1, 0, [], reason="error", error=to_wire(RequestError("late")))
    assert [each.finish_reason for each in journal.output().outputs] == ["error"]


def test_best_of_below_n_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(n=3, best_of=2)
    assert caught.value.param == "best_of"
    assert "from n (3) to 64, got 2" in caught.value.message


# --- through the clients ---


@pytest.mark.usefixtures("fake_process")
async def test_a_stream_shows_all_sequences_and_of_candidates_the_best_at_the_end(config: EngineConfig) -> None:
    async with AsyncLLM(config=config) as llm:
        streamed = [output async for output in llm.generate([1, 2], SamplingParams(n=3, max_tokens=20))]
        assert all([each.index for each in output.outputs] == [0, 1, 2] for output in streamed)
        assert [len(each.token_ids) for each in streamed[-1].outputs] == [20, 20, 20]
        ranked = [output async for output in llm.generate([1, 2], SamplingParams(n=2, best_of=3, max_tokens=20))]
        assert [(output.finished, len(output.outputs)) for output in ranked] == [(True, 2)]
        assert ranked[0].metrics.num_completion_tokens == 60


@pytest.mark.usefixtures("fake_process")
def test_candidates_are_no_news_until_all_have_ended(config: EngineConfig) -> None:
    with LLM(config.model.model, skip_tokenizer_init=True) as llm:
        llm.add_request([1, 2], SamplingParams(n=2, best_of=3, max_tokens=20))
        [output] = llm.step(timeout=20)
        assert output.finished
        assert len(output.outputs) == 2
        assert not llm.has_unfinished_requests()
        [output] = llm.generate([[1, 2]], SamplingParams(n=2, max_tokens=5), use_tqdm=True)
        assert [len(each.token_ids) for each in output.outputs] == [5, 5]
