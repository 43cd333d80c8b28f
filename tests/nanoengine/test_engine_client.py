"""The front end's core without a transport: what it journals, refuses, asks again and survives."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.engine import EngineConfig
from configs.errors import ChannelError, EngineDeadError, RequestError, WorkerError, to_wire
from nanoengine.engine_client import MAX_REPLAYS, REPLAY_INTERVAL, EngineClient
from nanoengine.journal import RequestJournal
from nanoengine.messages import (
    Abort,
    AddRequest,
    Deltas,
    EngineFailure,
    Hello,
    Message,
    Ready,
    Recovering,
    TokenColumns,
    TokenDelta,
)
from nanoengine.prompts import Prompt
from nanoengine.sampling_params import SamplingParams
from nanoengine.silence import PING_INTERVAL
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.fake_engine import EOS, MAX_MODEL_LEN, VOCAB_SIZE, write_model

IDS = Prompt(token_ids=[1, 2, 3])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig.create(model=str(write_model(tmp_path_factory.mktemp("model")))).resolve()


@pytest.fixture(scope="module")
def tokenizer(config: EngineConfig) -> Tokenizer:
    return Tokenizer(str(config.model_dir), expected_vocab_size=VOCAB_SIZE)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(config: EngineConfig, tokenizer: Tokenizer, clock: Clock) -> EngineClient:
    return make_client(config, tokenizer, clock)


def make_client(config: EngineConfig, tokenizer: Tokenizer | None, clock: Clock | None = None) -> EngineClient:
    client = EngineClient(config, tokenizer, "front", clock or Clock())
    client.handle(ready(1))
    return client


def ready(incarnation: int) -> Ready:
    return Ready(incarnation, 8, 16, MAX_MODEL_LEN, "float32", "cpu")


def add(client: EngineClient, prompt: Prompt = IDS, request_id: str | None = None, **params: Any) -> RequestJournal:
    return client.add(client.check(prompt, SamplingParams(**params)), request_id)


def sent(client: EngineClient) -> list[Message]:
    messages = list(client.outbox)
    client.outbox.clear()
    return messages


def tell(
    client: EngineClient, journal: RequestJournal, start: int, ids: list[int], reason: str | None = None, **more: Any
) -> list[RequestJournal]:
    return client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, start, ids, reason, **more)]))


def ids_of(journal: RequestJournal) -> list[int]:
    return journal.output().outputs[0].token_ids


# -- what a request looks like ---------------------------------------------------------------------------------


def test_the_request_that_is_sent_holds_all_a_scheduler_needs(client: EngineClient) -> None:
    journal = add(client, Prompt(text="The capital"), temperature=0.5, stop="x", max_tokens=5, seed=7)
    [message] = sent(client)
    assert isinstance(message, AddRequest)
    assert message.client_id == "front"
    assert message.request_id == journal.wire_id
    assert message.prompt_token_ids == journal.prompt_token_ids
    assert (message.seed, message.journal) == (7, [[]])
    assert message.params["temperature"] == 0.5
    assert "stop" not in message.params, "stop strings are the front end's business"
    SamplingParams.from_dict(message.params)


@pytest.mark.parametrize(("asked", "sent_max"), [(None, MAX_MODEL_LEN - 3), (10**6, MAX_MODEL_LEN - 3), (5, 5)])
def test_generation_is_capped_at_max_model_len(client: EngineClient, asked: int | None, sent_max: int) -> None:
    add(client, max_tokens=asked)
    [message] = sent(client)
    assert isinstance(message, AddRequest)
    assert message.params["max_tokens"] == sent_max


def test_the_longest_prompt_leaves_room_for_one_token(client: EngineClient) -> None:
    assert client.check(Prompt(token_ids=[1] * (MAX_MODEL_LEN - 1))).max_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        (Prompt(text=""), {}, "prompt", "at least 1 token"),
        (Prompt(token_ids=[]), {}, "prompt", "at least 1 token"),
        (Prompt(token_ids=[1] * MAX_MODEL_LEN), {}, "prompt", f"at most {MAX_MODEL_LEN - 1} tokens"),
        (Prompt(text="首" * 200), {}, "prompt", f"at most {MAX_MODEL_LEN - 1} tokens"),
        (
            Prompt(token_ids=[1, VOCAB_SIZE]),
            {},
            "prompt",
            f"from 0 to {VOCAB_SIZE - 1}, got {VOCAB_SIZE} at position 1",
        ),
        (Prompt(token_ids=[-1]), {}, "prompt", "got -1 at position 0"),
        (Prompt(token_ids=[10**30]), {}, "prompt", "at position 0"),
        (Prompt(text="half \ud83d"), {}, "prompt", "surrogate"),
        (IDS, {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", f"from 0 to {VOCAB_SIZE - 1}"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_is_sent(
    client: EngineClient, prompt: Prompt, params: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        add(client, prompt, **params)
    assert refused.value.param == param
    assert not client.outbox
    assert client.num_unfinished == 0


def test_a_prompt_that_is_too_long_is_refused_with_the_code_of_the_api(client: EngineClient) -> None:
    with pytest.raises(RequestError) as refused:
        client.check(Prompt(token_ids=[1] * 1000))
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", 3])
def test_parameters_of_another_type_are_refused(client: EngineClient, params: Any) -> None:
    with pytest.raises(RequestError) as refused:
        client.check(IDS, params)
    assert refused.value.param == "sampling_params"


def test_text_and_stop_strings_are_refused_without_a_tokenizer(config: EngineConfig) -> None:
    client = make_client(config, None)
    for prompt, params in [(Prompt(text="hello"), {}), (IDS, {"stop": "x"})]:
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            add(client, prompt, **params)
    journal = add(client)
    tell(client, journal, 0, [5, 6], "length")
    assert journal.output().outputs[0].token_ids == [5, 6]
    assert journal.output().outputs[0].text == ""


@pytest.mark.parametrize("request_id", ["", "x" * 257, 3, "half \ud83d"])
def test_a_malformed_request_id_is_refused(client: EngineClient, request_id: Any) -> None:
    with pytest.raises(RequestError) as refused:
        add(client, request_id=request_id)
    assert refused.value.param == "request_id"


@pytest.mark.parametrize("priority", [2**70, "high", 1.5, True])
def test_a_priority_that_no_message_can_carry_is_refused(client: EngineClient, priority: Any) -> None:
    with pytest.raises(RequestError) as refused:
        client.add(client.check(IDS), priority=priority)
    assert refused.value.param == "priority"
    assert not client.outbox


def test_a_live_request_id_is_refused_and_a_finished_one_is_free_again(client: EngineClient) -> None:
    journal = add(client, request_id="a")
    with pytest.raises(RequestError, match="still runs"):
        add(client, request_id="a")
    tell(client, journal, 0, [1], "stop")
    add(client, request_id="a")


def test_an_id_that_is_made_up_avoids_one_that_a_client_chose(client: EngineClient) -> None:
    first = add(client, request_id="1")
    assert add(client).request_id != first.request_id


def test_seeds_follow_from_the_setting_and_the_order_of_requests(
    config: EngineConfig, tokenizer: Tokenizer, client: EngineClient
) -> None:
    def seeds(client: EngineClient, second: int | None) -> list[int]:
        return [add(client, seed=seed).seed for seed in (None, second, None)]

    plain, with_own = seeds(client, None), seeds(make_client(config, tokenizer), 42)
    assert len(set(plain)) == 3
    assert with_own == [plain[0], 42, plain[2]], "a seed on one request moved another's"
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, seed=1))
    assert seeds(make_client(other, tokenizer), None) != plain


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


# -- text ------------------------------------------------------------------------------------------------------


def test_a_stop_string_split_over_tokens_ends_the_request_and_nothing_behind_it_counts(
    client: EngineClient, tokenizer: Tokenizer
) -> None:
    journal = add(client, Prompt(text="x"), stop=["END"])
    sent(client)
    ids = [tokenizer.encode(char)[0] for char in "abENDxyz"]
    tell(client, journal, 0, ids[:4])
    assert journal.output().outputs[0].text == "ab", "what may become a stop string is held back"
    tell(client, journal, 4, ids[4:])
    output = journal.output().outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", "END")
    assert output.token_ids == ids[:5]
    assert sent(client) == [Abort(journal.wire_id, 0, "stop")]
    assert tell(client, journal, 8, ids[:1]) == []


def test_a_stop_string_in_the_last_delta_needs_no_abort(client: EngineClient, tokenizer: Tokenizer) -> None:
    journal = add(client, Prompt(text="x"), stop=["b"])
    sent(client)
    tell(client, journal, 0, [tokenizer.encode(char)[0] for char in "abc"], "length")
    output = journal.output().outputs[0]
    assert (output.text, len(output.token_ids), output.finish_reason) == ("a", 2, "stop")
    assert not client.outbox


def test_text_that_was_held_back_for_a_stop_string_comes_out_at_the_end(
    client: EngineClient, tokenizer: Tokenizer
) -> None:
    journal = add(client, Prompt(text="x"), stop=["END"])
    tell(client, journal, 0, [tokenizer.encode(char)[0] for char in "abEN"], "length")
    assert journal.output().outputs[0].text == "abEN"


def test_a_stop_token_is_in_the_ids_and_not_in_the_text(client: EngineClient, tokenizer: Tokenizer) -> None:
    journal = add(client, Prompt(text="x"))
    ids = [tokenizer.encode(char)[0] for char in "ab!"]
    tell(client, journal, 0, ids, "stop", stop_reason=ids[-1])
    output = journal.output().outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("ab", ids, ids[-1])


def test_eos_is_in_the_ids_and_gives_no_stop_reason(client: EngineClient, tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_id == EOS
    journal = add(client, Prompt(text="x"), stop="never")
    tell(client, journal, 0, [EOS], "stop")
    output = journal.output().outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("", [EOS], None)


def test_no_output_splits_a_character(client: EngineClient, tokenizer: Tokenizer) -> None:
    text = "鿿 and 😀"
    ids = tokenizer.encode(text)
    assert any(tokenizer.decode([token]).startswith("\ufffd") for token in ids), "some character spans tokens"
    journal = add(client, Prompt(text="x"))
    seen = []
    for position, token in enumerate(ids):
        tell(client, journal, position, [token], "length" if position == len(ids) - 1 else None)
        seen.append(journal.output().outputs[0].text)
    assert all(text.startswith(piece) for piece in seen)
    assert seen[-1] == text


def test_the_state_of_the_detokeniser_is_freed_at_the_end(client: EngineClient) -> None:
    journal = add(client, stop="x")
    client.abort(journal.request_id)
    sequence = journal.sequences[0]
    assert sequence._detokenizer is None
    assert sequence._stops is None
    assert client.num_unfinished == 0
    assert not client._live


def test_a_detokeniser_that_fails_harms_its_own_request_only(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = add(client), add(client)
    sent(client)

    def explode(ids: object) -> str:
        raise ValueError("no such token")

    monkeypatch.setattr(bad.sequences[0]._detokenizer, "append", explode)
    deltas = [TokenDelta(journal.wire_id, 0, 0, [1]) for journal in (bad, good)]
    assert client.handle(Deltas(1, deltas)) == [bad, good]
    assert "no such token" in str(bad.output().outputs[0].error)
    assert not good.finished
    assert sent(client) == [Abort(bad.wire_id, None, "error")]


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
