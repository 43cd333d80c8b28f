"""What a request may say about how it is scheduled: checked in the front end, and sent to the scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import QueueFullError, RequestError, RequestTimeoutError, to_wire
from nanoengine.engine_client import EngineClient
from nanoengine.journal import RequestJournal
from nanoengine.messages import AddRequest, Deltas, ResetPrefixCache, TokenDelta
from nanoengine.prompts import Prompt, parse_prompt


@pytest.fixture
def client() -> EngineClient:
    return EngineClient(EngineConfig.create(model="demo").resolve())


def test_cache_salt_of_a_prompt_is_sent_with_it(client: EngineClient) -> None:
    client.add(client.check(parse_prompt({"prompt_token_ids": [1, 2], "cache_salt": "tenant"})))
    [message] = client.outbox
    assert isinstance(message, AddRequest)
    assert message.cache_salt == "tenant"


@pytest.mark.parametrize("salt", ["", "x" * 257, 7, "half \ud83d"])
def test_impossible_cache_salt_is_refused(salt: object) -> None:
    with pytest.raises(RequestError, match="cache_salt"):
        parse_prompt({"prompt": "a", "cache_salt": salt})


def test_reset_of_the_prefix_cache_is_a_message(client: EngineClient) -> None:
    client.reset_prefix_cache()
    assert list(client.outbox) == [ResetPrefixCache()]


# -- queue limits ------------------------------------------------------------------------------------------------


def limited(**settings: Any) -> EngineClient:
    return EngineClient(EngineConfig.create(model="demo", **settings).resolve(), client_id="front")


def add(client: EngineClient, num_tokens: int = 2, **options: Any) -> RequestJournal:
    return client.add(client.check(Prompt(token_ids=[20] * num_tokens)), **options)


def test_queue_is_full_until_a_request_gets_its_first_token_or_ends() -> None:
    client = limited(max_queued_requests=2)
    first, second = add(client), add(client)
    with pytest.raises(QueueFullError, match=r"2 requests are queued.*max_queued_requests \(2\)"):
        client.check_queue()
    client.handle(Deltas(1, [TokenDelta(first.wire_id, 0, 0, [5])]))
    client.check_queue()
    with pytest.raises(QueueFullError):
        client.check_queue(2)
    client.abort(second.request_id)
    client.check_queue(2)


def test_tokens_that_are_queued_fill_the_queue_too() -> None:
    client = limited(max_queued_tokens=10)
    add(client, 9)
    client.check_queue()
    add(client, 9)
    with pytest.raises(QueueFullError, match="prompts of 18 tokens are queued"):
        client.check_queue()


# -- deadlines and priorities -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "asked", "sent"), [(None, None, None), (None, 2, 2), (5.0, None, 5.0), (5.0, 2, 2), (5.0, 9, 5.0)]
)
def test_timeout_of_a_request_is_bounded_by_the_setting(
    setting: float | None, asked: float | None, sent: float | None
) -> None:
    client = limited(request_timeout=setting)
    add(client, timeout=asked, priority=-3)
    [message] = client.outbox
    assert isinstance(message, AddRequest)
    assert (message.timeout, message.priority) == (sent, -3)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), True, "2"])
def test_impossible_timeout_is_refused(client: EngineClient, wrong: Any) -> None:
    with pytest.raises(RequestError, match="timeout must be a positive number"):
        add(client, timeout=wrong)
    assert client.num_unfinished == 0


def test_request_that_ran_out_of_time_says_so(client: EngineClient) -> None:
    journal = add(client)
    error = to_wire(RequestTimeoutError("not complete within 1 s"))
    client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, 0, [], finish_reason="error", error=error)]))
    [output] = journal.output().outputs
    assert (output.finish_reason, output.error, output.error_kind) == (
        "error",
        "not complete within 1 s",
        "RequestTimeoutError",
    )


# -- metrics -----------------------------------------------------------------------------------------------------


def test_metrics_tell_times_from_arrival_and_counts(client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    journal = add(client)
    metrics = journal.output().metrics
    assert (metrics.ttft, metrics.tpot, metrics.e2e_seconds) == (None, None, None)
    counts = {"num_cached_tokens": 1, "num_preemptions": 2, "queue_seconds": 0.5}
    for seconds, start, ids, reason in ((1.0, 0, [5], None), (2.0, 1, [6, 7], None), (4.0, 3, [8, 9], "length")):
        clock[0] = 100.0 + seconds
        last = counts if reason else None
        client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, start, ids, reason, metrics=last)]))
    metrics = journal.output().metrics
    assert (metrics.arrival_time, metrics.ttft, metrics.tpot, metrics.e2e_seconds) == (100.0, 1.0, 0.75, 4.0)
    assert (metrics.num_cached_tokens, metrics.num_preemptions, metrics.queue_seconds) == (1, 2, 0.5)
    assert metrics.num_generated_tokens == 5


def test_request_that_ends_with_an_error_has_metrics_too(client: EngineClient) -> None:
    journal = add(client)
    error = to_wire(RequestTimeoutError("too late"))
    delta = TokenDelta(journal.wire_id, 0, 0, [5], "error", error=error, metrics={"queue_seconds": 0.5})
    client.handle(Deltas(1, [delta]))
    metrics = journal.output().metrics
    assert metrics.queue_seconds == 0.5
    assert metrics.ttft is not None
