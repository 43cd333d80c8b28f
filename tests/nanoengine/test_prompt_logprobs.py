"""Log-probabilities of prompts: computed once, in order, whatever the schedule; told again to a front end that asks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from configs.errors import RequestError
from nanoengine.engine_client import EngineClient
from nanoengine.forking import Start, find_start
from nanoengine.front_socket import merge
from nanoengine.messages import AddRequest, Deltas, TokenDelta, decode, encode
from nanoengine.outputs import Logprob
from nanoengine.prompt_log import PromptLog
from nanoengine.prompts import Prompt
from nanoengine.row_params import row_extras
from nanoengine.sampling_params import SamplingParams
from nanoengine.sequence import Request, Sequence
from nanoengine.step import Epoch, PromptLogprobs, RowExtras
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.scheduler_driver import Driver, expected_output, expected_prompt_logprobs, output_name, packed

PROMPT = [3 + (7 * i) % 50 for i in range(30)]
ENTRIES = expected_prompt_logprobs(PROMPT)


# --- the field ---


@pytest.mark.parametrize("value", [-1, 21, 1.5, True, "3"])
def test_a_number_out_of_range_is_refused_by_name(value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(prompt_logprobs=value)
    assert caught.value.param == "prompt_logprobs"
    assert repr(value) in caught.value.message


# --- packed entries ---


def test_packed_entries_are_cut_and_joined() -> None:
    whole = packed(0, ENTRIES)
    assert whole.end == len(PROMPT) - 1
    assert list(whole.entries()) == ENTRIES
    assert list(whole.since(5).entries()) == ENTRIES[5:]
    assert (whole.since(5).start, whole.since(99).start, whole.since(99).ranks) == (5, whole.end, b"")
    parts = [packed(0, ENTRIES[:4]), packed(4, ENTRIES[4:9]), packed(9, ENTRIES[9:])]
    assert parts[0].joined(*parts[1:]) == whole
    with pytest.raises(AssertionError, match="follow"):
        parts[0].joined(parts[2])


def test_a_log_keeps_what_is_next_and_gives_any_tail_of_it_again() -> None:
    log = PromptLog(2, len(ENTRIES))
    assert log.since(0) is None
    assert log.add(packed(0, ENTRIES[:4])) == packed(2, ENTRIES[2:4])
    assert log.add(packed(1, ENTRIES[1:3])) is None
    with pytest.raises(AssertionError, match="skip"):
        log.add(packed(5, ENTRIES[5:]))
    assert log.add(packed(4, ENTRIES[4:])) == packed(4, ENTRIES[4:])
    assert log.is_complete
    assert log.since(0) == packed(2, ENTRIES[2:])
    assert log.since(3) == packed(3, ENTRIES[3:])
    assert log.since(len(ENTRIES)) is None


@pytest.mark.parametrize(
    "fields", [(0, 0, b"", b"", b""), (0, 1, b"12345678", b"1234", b"1234"), (0, 1, b"", b"", b"1")]
)
def test_columns_that_do_not_fit_together_are_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        PromptLogprobs.checked(fields)


# --- the scheduler ---


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("budget", [1, 7, 64])
@pytest.mark.parametrize("caching", [False, True])
def test_every_position_is_told_once_whatever_is_cached(budget: int, caching: bool, asynchronous: bool) -> None:
    driver = Driver(asynchronous, max_num_batched_tokens=budget, enable_prefix_caching=caching)
    driver.add("warm", PROMPT)
    driver.run()
    driver.add("a", PROMPT, prompt_logprobs=1)
    driver.add("b", PROMPT, prompt_logprobs=0)
    driver.add("plain", PROMPT)
    driver.run()
    assert driver.prompt_logprobs["a"] == driver.prompt_logprobs["b"] == ENTRIES
    assert driver.prompt_logprobs["plain"] == []
    assert len({tuple(driver.tokens[name]) for name in ("warm", "a", "b", "plain")}) == 1
    assert (driver.last["a"].metrics or {})["num_cached_tokens"] == 0
    assert ((driver.last["plain"].metrics or {})["num_cached_tokens"] > 0) == caching
    assert set(driver.workers.num_told.values()) == {1}


def test_it_does_not_wait_for_a_prefix_that_it_must_compute_itself() -> None:
    driver = Driver(max_num_batched_tokens=40)
    driver.add("first", PROMPT)
    driver.add("telling", PROMPT, prompt_logprobs=1)
    driver.step()
    assert driver.steps[0].rows[1].num_computed_tokens == 0
    assert len(driver.steps[0].rows[1].token_ids) == 10


@pytest.mark.parametrize("prompt", [[5], [5, 6], PROMPT[:4], PROMPT[:5]])
def test_short_prompts(prompt: list[int]) -> None:
    driver = Driver(max_num_batched_tokens=3)
    driver.add("a", prompt, prompt_logprobs=1)
    driver.run()
    assert driver.prompt_logprobs["a"] == expected_prompt_logprobs(prompt)
    assert driver.tokens["a"] == expected_output(prompt, 8)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_preempted_in_mid_prompt_it_goes_on_behind_what_was_told(asynchronous: bool) -> None:
    """And takes the prefix hits up to there, but no further."""
    driver = Driver(asynchronous, num_kv_blocks=12, max_num_batched_tokens=6)
    driver.add("old", PROMPT[:8], max_tokens=30)
    driver.step()
    driver.step()
    driver.add("young", PROMPT[::-1], prompt_logprobs=1, max_tokens=4)
    driver.run()
    assert driver.scheduler.num_preemptions > 0
    assert driver.prompt_logprobs["young"] == expected_prompt_logprobs(PROMPT[::-1])
    assert set(driver.workers.num_told.values()) == {1}
    firsts = [row.extras.first_prompt_logprob for step in driver.steps for row in step.rows if row.extras is not None]
    assert firsts[0] == 0
    resumed = [row for step in driver.steps for row in step.rows if row.params is not None][-1]
    assert resumed.num_computed_tokens > 0, "nothing was hit"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("length", [2, 9, 13, 30])
def test_the_first_of_several_sequences_tells_and_the_others_fork_from_it(length: int, asynchronous: bool) -> None:
    """Its tail is copied, and its state sent again, while the step that tells the last entries is in flight."""
    prompt = PROMPT[:length]
    for blocks in (64, 12):
        driver = Driver(asynchronous, num_kv_blocks=blocks, max_num_batched_tokens=8)
        driver.add("warm", prompt)
        driver.run()
        driver.add("a", prompt, prompt_logprobs=1, n=3)
        driver.add("b", prompt[::-1], prompt_logprobs=1, n=2)
        driver.run()
        assert driver.prompt_logprobs["a"] == expected_prompt_logprobs(prompt)
        assert driver.prompt_logprobs["b"] == expected_prompt_logprobs(prompt[::-1])
        assert set(driver.workers.num_told.values()) == {1}
        assert len({tuple(driver.tokens[output_name("a", index)]) for index in range(3)}) == 3


@pytest.mark.parametrize(
    ("told", "computed", "wanted"), [(0, 0, (1, 0)), (5, 4, (1, 5)), (5, 8, (1, 8)), (5, 29, (-1, 0)), (29, 0, (-1, 0))]
)
def test_a_state_sent_again_asks_for_what_nobody_told_or_is_telling(
    told: int, computed: int, wanted: tuple[int, int]
) -> None:
    """What lies between the entries told and the tokens computed is being told by a step in flight."""
    request = Request("r", PROMPT, SamplingParams(prompt_logprobs=1), num_prompt_logprobs=told)
    seq = Sequence(1, request, 0, [])
    seq.num_computed_tokens = computed
    extras = row_extras(seq, frozenset()) or RowExtras()
    assert (extras.num_prompt_logprobs, extras.first_prompt_logprob) == wanted
    assert row_extras(Sequence(2, request, 1, []), frozenset()) is None


def test_a_sequence_that_still_has_to_tell_does_not_fork_from_a_sibling() -> None:
    driver = Driver(max_num_batched_tokens=64)
    driver.add("a", PROMPT, prompt_logprobs=1, n=2, journals=[[], expected_output(PROMPT, 1)])
    told, other = driver.scheduler.waiting
    driver.scheduler.waiting = [other, told]  # as if the other had been first to run
    driver.scheduler.schedule()
    assert find_start(told, driver.scheduler.blocks) == Start(0, [])


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_tells_each_prompt_exactly_once(seed: int) -> None:
    """Tight caches, preemption, aborts, lost worker groups, with and without overlap."""
    draw = random.Random(seed)
    driver = Driver(
        bool(seed % 2), num_kv_blocks=14, block_size=4, max_num_batched_tokens=draw.choice([5, 9, 30]), max_num_seqs=5
    )
    prompts: dict[str, list[int]] = {}
    aborted, epochs = set(), 1
    for number in range(25):
        prompt = PROMPT[: draw.choice([4, 9, 20])] + [draw.randrange(3, 9) for _ in range(draw.randrange(1, 12))]
        name = str(number)
        prompts[name] = prompt
        telling = {"prompt_logprobs": 1} if draw.random() < 0.7 else {}
        telling |= {"n": 3} if draw.random() < 0.3 else {}
        driver.add(name, prompt, max_tokens=draw.randrange(1, 14), **telling)
        for _ in range(draw.randrange(4)):
            driver.step()
        if draw.random() < 0.1:
            aborted.add(name)
            driver.abort(name)
        if draw.random() < 0.1:
            epochs += 1
            driver.new_epoch(Epoch(1, epochs))
    driver.run()
    for name, prompt in prompts.items():
        told = driver.prompt_logprobs[name]
        if told and name not in aborted:
            assert told == expected_prompt_logprobs(prompt)
        assert driver.tokens[name] == expected_output(prompt, len(driver.tokens[name]))
    assert sum(map(bool, driver.prompt_logprobs.values())) > 5
    assert driver.scheduler.num_preemptions > 0


def test_a_request_goes_on_behind_what_its_front_end_has() -> None:
    driver = Driver(max_num_batched_tokens=9)
    driver.add("warm", PROMPT)
    driver.run()
    driver.add("a", PROMPT, prompt_logprobs=1, num_prompt_logprobs=10)
    driver.run()
    assert driver.prompt_logprobs["a"] == ENTRIES[10:]
    assert (driver.last["a"].metrics or {})["num_cached_tokens"] == 8, "whole blocks of 4 in front of position 10"
    complete = expected_output(PROMPT, 3)
    driver.add("b", PROMPT, journal=complete, prompt_logprobs=1, num_prompt_logprobs=len(ENTRIES))
    driver.run()
    assert driver.prompt_logprobs["b"] == []
    assert driver.tokens["b"] == expected_output(PROMPT, 8)


def test_adding_again_tells_again_what_is_missing() -> None:
    driver = Driver(max_num_batched_tokens=9)
    driver.add("a", PROMPT, prompt_logprobs=1)
    for _ in range(5):
        driver.step()
    (_, tokens) = driver.prompt_logprobs.pop("a"), driver.tokens["a"]
    assert tokens
    params = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=1).to_dict()
    driver.scheduler.add(AddRequest("c", "a", PROMPT, params, 0, 0.0, 0, [[]], num_prompt_logprobs=12))
    prompt, output = [item.delta for item in driver.scheduler.take_deltas()]
    assert prompt.prompt_logprobs == packed(12, ENTRIES[12:])
    assert (prompt.start, prompt.token_ids, output.start, output.token_ids) == (0, [], 0, tokens)


# --- the front end ---


def deltas_of(wire_id: str, prompt: list[int]) -> list[TokenDelta]:
    """What a scheduler sends: the prompt in three chunks, then tokens."""
    entries = [([token, 7], [-1.0, -0.25], 2) for token in prompt[1:]]
    chunks = [packed(0, entries[:2]), packed(2, entries[2:5]), packed(5, entries[5:])]
    told = [TokenDelta(wire_id, 0, 0, [], prompt_logprobs=chunk) for chunk in chunks]
    return [*told, TokenDelta(wire_id, 0, 0, [40]), TokenDelta(wire_id, 0, 1, [41], "length")]


PROMPT_IDS = [1, 2, 3, 7, 5, 6, 8, 9]


def test_a_front_end_shows_entries_as_they_come(client: EngineClient, tokenizer: Tokenizer) -> None:
    params = SamplingParams(prompt_logprobs=1, max_tokens=2)
    journal = client.add(client.check(Prompt(token_ids=PROMPT_IDS), params))
    assert journal.output().prompt_logprobs == [None]
    seen = []
    for delta in deltas_of(journal.wire_id, PROMPT_IDS):
        message = decode(encode(Deltas(1, [delta])))
        assert client.handle(message) == [journal]
        seen.append(journal.output())
    assert [len(output.prompt_logprobs or ()) for output in seen] == [3, 6, 8, 8, 8]
    assert seen[0].outputs[0].token_ids == []
    last = seen[-1].prompt_logprobs
    assert last is not None
    assert last[0] is None
    assert last[1] == {2: Logprob(-1.0, 2, tokenizer.token_text(2)), 7: Logprob(-0.25, 1, tokenizer.token_text(7))}
    assert last[3] == {7: Logprob(-1.0, 2, tokenizer.token_text(7))}, "the token itself among the likeliest"
    assert seen[0].prompt_logprobs == last[:3], "a snapshot that does not grow"


def test_a_request_that_asks_for_none_has_none(client: EngineClient) -> None:
    journal = client.add(client.check(Prompt(token_ids=PROMPT_IDS), SamplingParams()))
    assert journal.output().prompt_logprobs is None


@pytest.mark.parametrize("seed", range(20))
def test_lost_doubled_and_merged_deltas_change_nothing(client: EngineClient, seed: int) -> None:
    """A gap is asked for behind what is recorded; nothing is recorded twice, and no token before the prompt's end."""
    draw = random.Random(seed)
    params = SamplingParams(prompt_logprobs=1, max_tokens=2)
    journal = client.add(client.check(Prompt(token_ids=PROMPT_IDS), params))
    sent = deltas_of(journal.wire_id, PROMPT_IDS)
    client.outbox.clear()
    for _ in range(200):
        for delta in merge([each for each in decode_all(sent) if draw.random() < 0.5]):
            for _ in range(draw.randrange(1, 3)):
                client.handle(Deltas(1, [delta]))
                assert journal.finished or not journal.lacks_prompt_logprobs or not journal.num_generated_tokens
        if journal.finished:
            break
        journal.num_replays, journal.next_replay = 0, 0.0
        while client.outbox:
            again = client.outbox.popleft()
            if isinstance(again, AddRequest):
                assert again.num_prompt_logprobs == journal.num_prompt_logprobs
    output = journal.output()
    assert output.outputs[0].token_ids == [40, 41]
    assert [list(entry or ())[:1] for entry in output.prompt_logprobs or ()] == [[], *([t] for t in PROMPT_IDS[1:])]


def decode_all(deltas: list[TokenDelta]) -> list[TokenDelta]:
    """Copies, as a message makes them."""
    message = decode(encode(Deltas(1, deltas)))
    assert isinstance(message, Deltas)
    return message.deltas


def test_merging_keeps_prompt_and_tokens(client: EngineClient) -> None:
    (merged,) = merge(decode_all(deltas_of("r", PROMPT_IDS)))
    told = merged.prompt_logprobs
    assert told is not None
    assert (told.start, told.end, merged.token_ids, merged.finish_reason) == (0, 7, [40, 41], "length")


def test_the_longest_prompt_stays_within_the_bound_of_a_message() -> None:
    entry = (list(range(21)), [-1.5] * 21, 3)
    frame = encode(Deltas(1, [TokenDelta("r", 0, 0, [], prompt_logprobs=packed(0, [entry] * 4095))]))
    assert len(frame) < 2**20
    message = decode(frame)
    assert isinstance(message, Deltas)
    assert message.deltas[0].prompt_logprobs is not None
