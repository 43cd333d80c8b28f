"""Matchers and masks of rank 0: what a row may sample next, whatever it went through, and what fails alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.engine import EngineConfig
from configs.errors import from_wire
from nanoengine.step import RowExtras
from nanoengine.structured_outputs import StructuredOutputsParams
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.tokenizers_for_tests import write_byte_fallback, write_byte_level
from tests.workers.tiny_models import make_tiny_checkpoint
from workers import structured
from workers.logits_processors import RowProcessor, process
from workers.structured import GrammarMatchers, RowMatcher, constrain

SCHEMA = {
    "type": "object",
    "properties": {"名": {"type": "string", "maxLength": 6}, "n": {"type": "number"}, "e": {"enum": ["ü", 1, None]}},
    "required": ["名", "n", "e"],
}
PADDING = 9  # ids of the model's vocabulary that no token has


class Model:
    """A directory with a tokenizer and a model's config, and the matchers over it."""

    def __init__(self, folder: Path, write: Any) -> None:
        write(folder)
        self.tokenizer = Tokenizer(folder)
        eos = self.tokenizer.eos_token_id
        assert eos is not None
        self.vocab_size = self.tokenizer.vocab_size + PADDING
        make_tiny_checkpoint(folder, "qwen3", vocab_size=self.vocab_size, eos_token_id=[eos], num_hidden_layers=1)
        self.eos = eos
        self.matchers = GrammarMatchers(EngineConfig.create(model=str(folder)).resolve())

    def row(self, output: tuple[int, ...] | list[int] = (), **form: Any) -> RowMatcher:
        return self.matchers.row(StructuredOutputsParams(**form).to_grammar(), list(output))

    def masks(self, *rows: RowMatcher) -> structured.BoolArray:
        future = self.matchers.start_masks(list(rows))
        assert future is not None
        return future.result(20)

    def allowed(self, row: RowMatcher) -> list[int]:
        found: list[int] = np.flatnonzero(self.masks(row)[0]).tolist()
        return found

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module", params=[write_byte_level, write_byte_fallback], ids=["byte-level", "byte-fallback"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), request.param)


def test_only_tokens_that_fit_are_allowed(model: Model) -> None:
    row = model.row(choice=["ab", "az"])
    assert all(model.tokenizer.token_text(token) in ("a", "ab", "az") for token in model.allowed(row))
    row.observe(model.ids("ba")[-1])
    assert {model.tokenizer.token_text(token) for token in model.allowed(row)} == {"b", "z"}
    row.observe(model.ids("ab")[-1])
    assert model.allowed(row) == [model.eos]
    row.observe(model.eos)  # a step that was scheduled behind the end
    assert model.allowed(row) == [model.eos]


def test_eos_is_allowed_where_the_grammar_may_end_and_nowhere_else(model: Model) -> None:
    row = model.row(regex="[0-9]*(ab)*")
    assert model.eos in model.allowed(row)
    row.observe(model.ids("ba")[-1])
    assert model.eos not in model.allowed(row)


def test_what_pads_the_vocabulary_is_never_allowed(model: Model) -> None:
    row = model.row(grammar="start: <[*]> start | //")
    assert max(model.allowed(row)) == model.tokenizer.vocab_size - 1


def test_a_character_may_be_split_over_tokens(model: Model) -> None:
    row = model.row(regex="[鼠牛]!")
    output: list[int] = []
    for _ in range(12):
        token = model.allowed(row)[0]
        output.append(token)
        if token == model.eos:
            break
        row.observe(token)
    assert len(output) > 3, "no token is the character"
    assert b"".join(map(model.tokenizer.token_bytes, output[:-1])).decode() in ("鼠!", "牛!")


@pytest.mark.parametrize("seed", range(4))
def test_a_row_that_comes_again_has_the_same_masks(model: Model, seed: int) -> None:
    """After preemption or in a new worker group the matcher has seen the same tokens, but in one go."""
    picks = random.Random(seed)
    row, output = model.row(json=SCHEMA), list[int]()
    for _ in range(60):
        allowed = model.masks(row)
        if picks.random() < 0.3:
            again = model.row(output, json=SCHEMA)
            np.testing.assert_array_equal(model.masks(again), allowed)
            row = again
        token = picks.choice(np.flatnonzero(allowed[0]).tolist())
        output.append(token)
        if token == model.eos:
            json.loads(model.tokenizer.decode(output))
            break
        row.observe(token)


def test_rows_of_one_grammar_do_not_know_each_other(model: Model) -> None:
    first, second = model.row(json=SCHEMA), model.row(json=SCHEMA)
    before = model.masks(second)
    for token in model.ids('{"')[-2:]:
        first.observe(token)
    masks = model.masks(first, second)
    np.testing.assert_array_equal(masks[1], before[0])
    assert (masks[0] != masks[1]).any()


def test_a_matcher_that_fails_fails_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another row has a copy of the same one, and shares what its lexer has found out."""
    good, bad, other = model.row(regex="a+"), model.row(regex="a+"), model.row(choice=["x"])
    alone = model.masks(good, other)
    bad.observe(model.ids("xz")[-1])  # what no mask would let through
    masks = model.masks(good, bad, other)
    np.testing.assert_array_equal(masks[[0, 2]], alone)
    assert masks[1].all()
    assert bad.error
    assert good.error is None

    def broken(*args: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(good, "_matcher", type("Broken", (), {"consume_token": broken})())
    good.observe(model.ids("ba")[-1])
    np.testing.assert_array_equal(model.masks(other)[0], alone[1])
    assert model.masks(good).all()
    assert good.error == "RuntimeError: broken"


def test_compiled_grammars_are_bounded_and_renewed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "MAX_COMPILED", 3)
    for i in range(6):
        model.row(regex=f"a{i}")
    assert len(model.matchers._compiled) == 3
    monkeypatch.setattr(structured, "MAX_COPIES", 2)
    rows = [model.row(regex="zz") for _ in range(5)]
    (grammar,) = {row.grammar for row in rows}
    assert model.matchers._compiled[grammar].num_copies == 1
    masks = model.masks(*rows)
    assert (masks == masks[0]).all()


# -- beside the other things that mask --------------------------------------------------------------------------


def outcome(
    model: Model, output: str, form: dict[str, Any], **extras: Any
) -> tuple[list[int], dict[int, dict[str, Any]]]:
    """What may come next after `output`, and the errors; a row without a grammar stands beside it."""
    past = model.ids("#" + output)[len(model.ids("#")) :]
    prompt = [1, 2, 3]
    fields = RowExtras(grammar="g", **extras)
    row = RowProcessor(fields, len(prompt), [*prompt, *past], model.row(past, **form))
    logits = torch.randn(2, model.vocab_size, generator=torch.Generator().manual_seed(0))
    raw = logits.clone()
    plain = RowProcessor(RowExtras(allowed_token_ids=(4,)), 3, prompt)
    rows = [(0, 3, plain), (1, 3 + len(past), row)]
    process(logits, rows)
    assert row.matcher is not None
    errors = constrain(logits, rows[1:], model.masks(row.matcher), [model.eos])
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [4]
    assert not logits.isnan().any()
    kept = torch.isfinite(logits[1])
    assert torch.equal(logits[1][kept], raw[1][kept]), "what is allowed keeps its logit"
    return kept.nonzero().flatten().tolist(), errors


def texts(model: Model, ids: list[int]) -> set[str]:
    return {model.tokenizer.token_text(token) if token != model.eos else "EOS" for token in ids}


def test_allowed_ids_and_bad_words_narrow_it(model: Model) -> None:
    a, b, z = (model.ids("#" + char)[-1] for char in "abz")
    assert outcome(model, "", {"regex": "[abc]+"}, allowed_token_ids=(a, b, z))[0] == sorted([a, b])
    assert a not in outcome(model, "", {"regex": "[abc]+"}, bad_words=((a,), (b, a)))[0]
    assert a not in outcome(model, "b", {"regex": "[abc]+"}, bad_words=((b, a),))[0]


def test_what_leaves_nothing_fails_the_row_unless_it_may_end(model: Model) -> None:
    a, z = (model.ids("#" + char)[-1] for char in "az")
    kept, errors = outcome(model, "", {"regex": "[abc]+"}, allowed_token_ids=(z,))
    assert len(kept) == model.vocab_size, "its logits are left alone, so that nothing is NaN"
    assert "nothing that structured_outputs allows is left by allowed_token_ids" in str(from_wire(errors[1]))
    assert outcome(model, "a", {"regex": "[abc]+"}, allowed_token_ids=(z,)) == ([model.eos], {})
    assert outcome(model, "", {"choice": ["a"]}, bad_words=((a,),))[1]
    assert outcome(model, "a", {"choice": ["a"]}, allowed_token_ids=(a,)) == ([model.eos], {})


def test_eos_waits_for_min_tokens_as_long_as_something_else_may_come(model: Model) -> None:
    stops = {"min_tokens": 5, "stop_token_ids": (model.eos,)}
    assert "EOS" not in texts(model, outcome(model, "a", {"regex": "[ab]+"}, **stops)[0])
    assert outcome(model, "a", {"choice": ["a"]}, **stops) == ([model.eos], {}), "a complete output is not continued"
    assert "EOS" in texts(model, outcome(model, "a", {"regex": "[ab]+"})[0])


def test_under_ignore_eos_it_ends_where_nothing_else_may_come(model: Model) -> None:
    assert "EOS" not in texts(model, outcome(model, "a", {"regex": "[ab]+"}, ignore_eos=True)[0])
    assert outcome(model, "a", {"choice": ["a"]}, ignore_eos=True) == ([model.eos], {})
