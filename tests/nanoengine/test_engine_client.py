"""The front end's core without a transport: what it journals, refuses, asks again and survives."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.engine import EngineConfig
from configs.errors import ChannelError, EngineDeadError, RequestError, WorkerError, to_wire
from nanoengine.engine_client import MAX_REPLAYS, REPLAY_INTERVAL, EngineClient
from nanoengine.messages import (
    Abort,
    AddRequest,
    Deltas,
    EngineFailure,
    Hello,
    Recovering,
    TokenColumns,
    TokenDelta,
)
from nanoengine.silence import PING_INTERVAL
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.engine_clients import IDS, Clock, add, ids_of, make_client, ready, sent, tell

# -- deltas ----------------------------------------------------------------------------------------------------


def test_duplicates_are_dropped_and_overlaps_are_trimmed(client: EngineClient) -> None:
    journal = add(client)
    assert tell(client, journal, 0, [10, 11]) == [journal]
    assert tell(client, journal, 0, [10, 11]) == []
    assert tell(client, journal, 1, [11, 12]) == [journal]
    assert tell(client, journal, 3, []) == []
    assert ids_of(journal) == [10, 11, 12]


def test_a_request_has_news_once_however_many_deltas_a_message_holds(client: EngineClient) -> None:
    journal = add(client)
    deltas = [TokenDelta(journal.wire_id, 0, position, [position]) for position in range(3)]
    assert client.handle(Deltas(1, deltas)) == [journal]


def test_columns_are_taken_as_the_deltas_that_they_stand_for(client: EngineClient) -> None:
    first, second = add(client), add(client)
    columns = TokenColumns([second.wire_id, "unknown", first.wire_id], [0, 0, 0], [-5, 0, -5], 5, [7, 8, 9])
    assert client.handle(Deltas(1, [columns])) == [second, first]
    assert (ids_of(first), ids_of(second)) == ([9], [7])
    assert client.handle(Deltas(1, [columns])) == [], "known already"


def test_a_stale_end_does_not_end_a_longer_journal(client: EngineClient) -> None:
    journal = add(client)
    tell(client, journal, 0, [10, 11, 12])
    assert tell(client, journal, 0, [10], "length") == []
    assert not journal.finished


def test_a_gap_is_not_shown_and_is_asked_for_again(client: EngineClient, clock: Clock) -> None:
    journal = add(client)
    tell(client, journal, 0, [10])
    sent(client)
    assert tell(client, journal, 2, [12]) == []
    assert tell(client, journal, 3, [13]) == []
    [message] = sent(client)
    assert isinstance(message, AddRequest)
    assert (message.request_id, message.seed, message.journal) == (journal.wire_id, journal.seed, [[10]])
    clock.now += REPLAY_INTERVAL
    tell(client, journal, 4, [14])
    assert len(sent(client)) == 1, "one loss of the replay must not be the end"
    tell(client, journal, 1, [11, 12, 13, 14])
    assert ids_of(journal) == [10, 11, 12, 13, 14]


def test_an_end_behind_a_gap_is_asked_for_at_once(client: EngineClient) -> None:
    journal = add(client)
    tell(client, journal, 2, [12])
    sent(client)
    tell(client, journal, 3, [13], "length")
    assert not journal.finished
    assert len(sent(client)) == 1, "no later delta would have asked"


def test_tokens_that_never_come_end_the_request_instead_of_hanging_it(client: EngineClient, clock: Clock) -> None:
    journal = add(client)
    for _ in range(MAX_REPLAYS + 1):
        clock.now += REPLAY_INTERVAL
        updated = tell(client, journal, 5, [1])
    assert updated == [journal]
    assert journal.output().outputs[0].finish_reason == "error"
    assert isinstance(sent(client)[-1], Abort)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_the_journal_equals_the_true_sequence_whatever_arrives(
    config: EngineConfig, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    truth = data.draw(st.lists(st.integers(0, 339), min_size=1, max_size=40), label="tokens")
    clock = Clock()
    client = make_client(config, tokenizer, clock)
    journal = add(client)
    length = len(truth)
    pieces = st.tuples(st.integers(0, length), st.integers(0, length), st.sampled_from([0, 1, 1, 2]))
    shown = 0
    for start, size, incarnation in data.draw(st.lists(pieces, max_size=30), label="pieces"):
        clock.now += 1.0
        end = min(length, start + size)
        if incarnation == 2:  # what a scheduler does when it is asked again: everything behind the journal
            start, incarnation = len(ids_of(journal)), 1
        reason = "length" if end == length and start <= end else None
        client.handle(Deltas(incarnation, [TokenDelta(journal.wire_id, 0, start, truth[start:end], reason)]))
        assert ids_of(journal) == truth[: len(ids_of(journal))]
        assert len(ids_of(journal)) >= shown, "a token that was shown is gone"
        shown = len(ids_of(journal))
        assert journal.finished <= (shown == length)
    tell(client, journal, shown, truth[shown:], "length")
    assert ids_of(journal) == truth
    open_start = tokenizer.decode(IDS.token_ids or [])
    assert open_start + journal.output().outputs[0].text == tokenizer.decode([*(IDS.token_ids or []), *truth])


def test_an_output_that_was_handed_out_does_not_change(client: EngineClient) -> None:
    journal = add(client)
    tell(client, journal, 0, [10])
    before = journal.output()
    kept = copy.deepcopy(before)
    before.prompt_token_ids.append(1)  # a client may do what it likes with what it was given
    assert client.resubmit_all()[0].prompt_token_ids == IDS.token_ids  # type: ignore[union-attr]
    before.prompt_token_ids.pop()
    tell(client, journal, 1, [11], "length", metrics={"num_cached_tokens": 3.0, "unknown": 1.0})
    assert before == kept
    after = journal.output().metrics
    assert after.num_cached_tokens == 3
    assert after.first_token_time is not None
    assert after.finished_time is not None


# -- incarnations ----------------------------------------------------------------------------------------------


def test_words_of_a_scheduler_that_was_replaced_are_dropped(client: EngineClient) -> None:
    journal = add(client)
    client.handle(ready(2))
    client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, 0, [9])]))
    client.handle(EngineFailure(1, to_wire(WorkerError("rank 1 died", 1))))
    assert ids_of(journal) == []
    assert client.failure is None


def test_a_new_scheduler_is_handed_every_unfinished_request_with_its_journal(client: EngineClient) -> None:
    done, begun, waiting = add(client), add(client, seed=5), add(client)
    tell(client, done, 0, [1], "stop")
    tell(client, begun, 0, [10, 11])
    sent(client)
    client.handle(ready(2))
    messages = [message for message in sent(client) if isinstance(message, AddRequest)]
    assert [(message.request_id, message.journal) for message in messages] == [
        (begun.wire_id, [[10, 11]]),
        (waiting.wire_id, [[]]),
    ]
    assert messages[0].seed == 5
    assert client.resubmit_all() == messages, "asking twice is harmless"
    client.handle(Deltas(2, [TokenDelta(begun.wire_id, 0, 2, [12], "length")]))
    assert ids_of(begun) == [10, 11, 12]


# -- aborts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_an_abort_ends_a_request_in_each_state_and_late_deltas_are_dropped(
    client: EngineClient, num_tokens: int
) -> None:
    journal = add(client, request_id="a")
    tell(client, journal, 0, [10, 11][:num_tokens])
    sent(client)
    assert client.abort("a") is journal
    assert sent(client) == [Abort(journal.wire_id, None, "abort")]
    assert journal.output().outputs[0].finish_reason == "abort"
    assert tell(client, journal, num_tokens, [12], "length") == []
    assert ids_of(journal) == [10, 11][:num_tokens]
    assert client.abort("a") is None
    assert client.abort("never heard of") is None
    assert not client.outbox


def test_a_late_delta_of_an_aborted_request_is_not_taken_for_one_of_its_namesake(client: EngineClient) -> None:
    old = add(client, request_id="a")
    client.abort("a")
    new = add(client, request_id="a")
    tell(client, old, 0, [99])
    assert ids_of(new) == []
    tell(client, new, 0, [5])
    assert ids_of(new) == [5]


def test_a_delta_for_an_unknown_index_is_dropped(client: EngineClient) -> None:
    journal = add(client)
    assert client.handle(Deltas(1, [TokenDelta(journal.wire_id, 4, 0, [1]), TokenDelta("?", 0, 0, [1])])) == []


# -- failure ---------------------------------------------------------------------------------------------------


def test_a_request_that_the_scheduler_refuses_fails_alone_and_keeps_its_error(client: EngineClient) -> None:
    bad, good = add(client), add(client)
    tell(client, bad, 0, [], "error", error=to_wire(RequestError("can never fit the K/V cache", "prompt")))
    output = bad.output().outputs[0]
    assert (output.finish_reason, output.error) == ("error", "can never fit the K/V cache")
    assert isinstance(bad.failure, RequestError)
    assert not good.finished


def test_when_the_engine_fails_every_open_request_ends_and_later_calls_say_why(client: EngineClient) -> None:
    journal = add(client)
    tell(client, journal, 0, [10])
    assert client.handle(EngineFailure(1, to_wire(WorkerError("rank 1 died", 1)))) == [journal]
    output = journal.output().outputs[0]
    assert (output.token_ids, output.finish_reason) == ([10], "error")
    assert "rank 1 died" in str(output.error)
    with pytest.raises(EngineDeadError, match="rank 1 died") as dead:
        add(client)
    assert isinstance(dead.value.__cause__, WorkerError)
    assert client.fail(WorkerError("again")) == [], "the first cause stays"
    assert "rank 1 died" in str(client.failure)


def test_a_message_that_no_scheduler_sends_is_refused(client: EngineClient) -> None:
    with pytest.raises(ChannelError):
        client.handle(Hello("x"))


def test_a_scheduler_that_hangs_is_noticed_after_it_was_asked(client: EngineClient, clock: Clock) -> None:
    journal = add(client)
    sent(client)
    asked = 0
    while client.hung is None:
        clock.now += 1.0
        assert client.watch() == []
        asked += sum(isinstance(message, Hello) for message in sent(client))
        assert clock.now < 2000
    assert asked > 3
    assert "the scheduler has not said anything" in client.hung.message
    assert not journal.finished, "another one may go on"


def test_neither_a_busy_scheduler_nor_an_idle_one_counts_as_hung(client: EngineClient, clock: Clock) -> None:
    clock.now += 10_000
    assert client.watch() == []
    add(client)
    sent(client)
    for _ in range(500):
        clock.now += 1.0
        assert client.watch() == []
        for _message in sent(client):
            client.handle(ready(1))
        assert client.hung is None
    assert client.failure is None


def test_a_recovery_pauses_requests_and_is_over_with_the_next_ready(client: EngineClient, clock: Clock) -> None:
    """However long it takes: the scheduler answers, so it does not hang."""
    journal = add(client)
    sent(client)
    client.handle(ready(1))
    for _ in range(500):
        clock.now += 1.0
        assert client.watch() == []
        for _message in sent(client):
            assert client.handle(Recovering(1, to_wire(WorkerError("rank 1 died", 1)))) == []
        assert client.hung is None
    assert isinstance(client.recovering_from, WorkerError)
    assert client.failure is None
    add(client)
    client.handle(ready(1))
    assert client.recovering_from is None
    tell(client, journal, 0, [1], "stop")
    assert ids_of(journal) == [1]


def test_a_front_end_that_was_suspended_itself_does_not_blame_the_scheduler(client: EngineClient, clock: Clock) -> None:
    add(client)
    clock.now += 10_000
    assert client.watch() == []
    assert client.hung is None
    assert PING_INTERVAL > 0
