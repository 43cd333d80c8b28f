"""The text of an output in the front end's core: stop strings and tokens, whole characters, a failing detokeniser."""

from __future__ import annotations

import pytest

from nanoengine.engine_client import EngineClient
from nanoengine.messages import (
    Abort,
    Deltas,
    TokenDelta,
)
from nanoengine.prompts import Prompt
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.engine_clients import add, sent, tell
from tests.nanoengine.fake_engine import EOS


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
