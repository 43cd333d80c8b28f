"""The front end's core and the fields of SamplingParams that it serves itself, checks, or makes readable."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import RequestError
from nanoengine.engine_client import EngineClient
from nanoengine.messages import AddRequest, Deltas, TokenDelta, decode, encode
from nanoengine.outputs import Logprob
from nanoengine.sampling_params import SamplingParams
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.engine_clients import IDS
from tests.nanoengine.fake_engine import EOS, VOCAB_SIZE

# --- fields that change logits ---


def test_bad_words_become_ids_with_and_without_a_space(client: EngineClient, tokenizer: Tokenizer) -> None:
    params = client.check(IDS, SamplingParams(bad_words=["ab", " ab"], bad_words_token_ids=[[7]])).params
    bare, spaced = tuple(tokenizer.encode("ab")), tuple(tokenizer.encode(" ab"))
    found = params.bad_words_token_ids
    assert found is not None
    assert found[:2] == ((7,), bare)
    assert all(any(tuple(ids)[-len(word) :] == tuple(word) for word in found) for ids in (bare, spaced))
    assert len(set(found)) == len(found)


def test_bad_words_without_a_tokenizer_are_refused_and_their_ids_are_not(config: EngineConfig) -> None:
    client = EngineClient(config, None)
    with pytest.raises(RequestError, match="bad_words_token_ids"):
        client.check(IDS, SamplingParams(bad_words=["x"]))
    assert client.check(IDS, SamplingParams(bad_words_token_ids=[[3]])).params.bad_words_token_ids == ((3,),)


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {VOCAB_SIZE: 1}},
        {"allowed_token_ids": [VOCAB_SIZE]},
        {"bad_words_token_ids": [[1, VOCAB_SIZE]]},
        {"allowed_token_ids": [EOS, 7], "stop_token_ids": [7], "min_tokens": 1},
    ],
    ids=str,
)
def test_ids_the_model_cannot_give_are_refused(client: EngineClient, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        client.check(IDS, SamplingParams(**fields))
    assert caught.value.param == next(iter(fields))


def test_the_scheduler_gets_ids_instead_of_words(client: EngineClient) -> None:
    params = SamplingParams(bad_words=["ab"], logit_bias={3: 1.5}, min_tokens=9, max_tokens=None)
    client.add(dataclasses.replace(client.check(IDS, params), max_tokens=4))
    (message,) = client.outbox
    assert isinstance(message, AddRequest)
    sent = SamplingParams.from_dict(decode(encode(message)).params)
    assert not sent.bad_words
    assert sent.bad_words_token_ids
    assert sent.logit_bias == {3: 1.5}
    assert sent.min_tokens == sent.max_tokens == 4, "no more than fit"


def test_no_stop_string_ends_an_output_before_min_tokens(client: EngineClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abab")
    checked = client.check(IDS, SamplingParams(stop="ab", min_tokens=len(ids) // 2, max_tokens=20))
    journal = client.add(checked)
    client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, 0, ids)]))
    assert journal.output().outputs[0].text == "ab"
    assert journal.output().outputs[0].finish_reason == "stop"


# --- log-probabilities ---


def test_logprobs_are_journalled_with_their_tokens(client: EngineClient, tokenizer: Tokenizer) -> None:
    """A delta that overlaps the journal adds its new part only, and none follows a stop string."""
    ids = tokenizer.encode("xyab")[:4]
    told = [([token, 7], [-0.5, -0.25], 2) for token in ids]
    journal = client.add(client.check(IDS, SamplingParams(logprobs=1, stop=tokenizer.decode(ids[2:3]))))
    client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, 0, ids[:2], logprobs=told[:2])]))
    wire = encode(Deltas(1, [TokenDelta(journal.wire_id, 0, 1, ids[1:], logprobs=told[1:])]))
    message = decode(wire)
    assert isinstance(message, Deltas)
    client.handle(message)
    (output,) = journal.output().outputs
    assert output.token_ids == ids[:3]
    assert output.logprobs is not None
    assert [list(entry) for entry in output.logprobs] == [list(dict.fromkeys([token, 7])) for token in ids[:3]]
    assert output.logprobs[0][ids[0]] == Logprob(-0.5, 2, tokenizer.decode(ids[:1]))
    assert output.cumulative_logprob == -1.5


def test_logprobs_are_none_unless_asked_for(client: EngineClient) -> None:
    journal = client.add(client.check(IDS))
    client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, 0, [5])]))
    (output,) = journal.output().outputs
    assert (output.logprobs, output.cumulative_logprob) == (None, None)


# --- fields of the text ---


def text_of(client: EngineClient, ids: list[int], finish: str | None = None, **fields: Any) -> str:
    journal = client.add(client.check(IDS, SamplingParams(**fields)))
    client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, 0, ids, finish)]))
    return journal.output().outputs[0].text


def test_a_stop_string_is_shown_when_the_client_wants_it(client: EngineClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three")
    assert text_of(client, ids, stop="tw") == "one "
    assert text_of(client, ids, stop="tw", include_stop_str_in_output=True) == "one tw"
    # One that only the last, held-back characters complete.
    assert text_of(client, ids, "length", stop="three", include_stop_str_in_output=True) == "one two three"


def test_a_stop_token_is_shown_when_the_client_wants_it(client: EngineClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two")
    before = tokenizer.decode(ids[:-1])
    assert text_of(client, ids, "stop") == before
    assert text_of(client, ids, "stop", include_stop_str_in_output=True) == "one two"


def test_special_tokens_are_shown_when_the_client_wants_it(client: EngineClient, tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_token_ids)
    ids = [special, *tokenizer.encode("one")]
    assert text_of(client, ids, "length") == "one"
    assert text_of(client, ids, "length", skip_special_tokens=False) == tokenizer.decode(ids, False)
    assert tokenizer.decode(ids, False) != "one"


def test_without_detokenising_there_is_no_text(client: EngineClient, tokenizer: Tokenizer) -> None:
    assert text_of(client, tokenizer.encode("one"), "length", detokenize=False) == ""
    with pytest.raises(RequestError, match="detokenize must be true"):
        SamplingParams(stop="x", detokenize=False)


# --- the checkpoint's defaults ---


def test_the_checkpoints_defaults_stand_in_for_absent_parameters_alone(config: EngineConfig) -> None:
    """Explicit parameters are as given, as in vLLM: SamplingParams() means temperature 1, whatever the model says."""
    defaults = (("temperature", 0.6), ("top_k", 20), ("repetition_penalty", 1.1))
    assert config.checkpoint is not None
    checkpoint = dataclasses.replace(config.checkpoint, default_sampling=defaults)
    client = EngineClient(dataclasses.replace(config, checkpoint=checkpoint), None)
    assert client.check(IDS).params == SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert client.check(IDS, SamplingParams()).params == SamplingParams()


@pytest.mark.parametrize("field", ["top_k", "max_tokens", "min_tokens", "temperature"])
def test_a_number_that_no_message_takes_is_refused(field: str) -> None:
    for value in (2**63, 10**400):
        with pytest.raises(RequestError, match=r"64 bits|at most 2147483647"):
            SamplingParams(**{field: value})


def test_a_timeout_that_no_message_takes_is_refused(client: EngineClient) -> None:
    for timeout in (10**20, 1e300, 0, -1, float("nan")):
        with pytest.raises(RequestError, match="timeout must be"):
            client.add(client.check(IDS), timeout=timeout)
    assert not client.outbox
