"""What the front end's core sends for a request, and what it refuses before anything is sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import RequestError
from nanoengine.engine_client import EngineClient
from nanoengine.messages import (
    AddRequest,
)
from nanoengine.prompts import Prompt
from nanoengine.sampling_params import SamplingParams
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.engine_clients import IDS, add, make_client, sent, tell
from tests.nanoengine.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE


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
