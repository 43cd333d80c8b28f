"""Structured output through the whole engine but its processes: always valid, and the same whatever the schedule."""

from __future__ import annotations

import collections
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest

from nanoengine import grammar
from nanoengine.messages import TokenDelta
from nanoengine.sampling_params import SamplingParams
from nanoengine.tokenizer import Tokenizer
from tests.end_to_end.inprocess import InProcessEngine
from tests.end_to_end.random_schemas import random_schema
from tests.end_to_end.reference import make_prompt
from tests.nanoengine.tokenizers_for_tests import write_byte_level
from tests.workers.tiny_models import make_tiny_checkpoint

PROMPTS = [make_prompt(2048, length, length) for length in (31, 16, 40, 4, 17)]
SCHEMA = {
    "type": "object",
    "properties": {
        "名前": {"type": "string", "minLength": 3, "maxLength": 8},
        "n": {"type": "integer", "minimum": -50, "maximum": 5000},
        "tags": {"type": "array", "items": {"enum": ["rot", "grün", "青"]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["名前", "n", "tags"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json": SCHEMA, "disable_any_whitespace": True},
    {"regex": "(北京|東京|[A-Z][a-z]{2,9})(, [0-9]{1,4}){3}"},
    {"choice": ["北京大学附属中学", "the capital of China", "北京"]},
    {"grammar": 'root ::= term ("+" term){2,3}\nterm ::= [0-9]{1,3} | "(" root ")"'},
    {"json_object": True, "disable_any_whitespace": True},
]
PARAMS = [
    SamplingParams(temperature=1.0 if i % 2 else 0, max_tokens=60, structured_outputs=form)
    for i, form in enumerate(FORMS)
]
TIGHT = {"num_kv_blocks": 24, "block_size": 4}


@contextlib.contextmanager
def engine_with(run_dir: Path, **settings: Any) -> Iterator[InProcessEngine]:
    settings = {"model": "demo", "dtype": "float32"} | settings
    with contextlib.closing(InProcessEngine(run_dir, **settings)) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("demo")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessEngine]:
    with engine_with(tmp_path_factory.mktemp("run")) as engine:
        yield engine


@pytest.fixture(scope="module")
def undisturbed(engine: InProcessEngine) -> list[list[int]]:
    return [engine.generate([p], params, [i])[0] for i, (p, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))]


def run(engine: InProcessEngine) -> dict[str, list[TokenDelta]]:
    """Serve what was added; the deltas of each request."""
    deltas: dict[str, list[TokenDelta]] = collections.defaultdict(list)
    while engine.scheduler.has_work or engine.executor.num_in_flight:
        engine.step()
        for item in engine.scheduler.take_deltas():
            deltas[item.delta.request_id].append(item.delta)
    return deltas


def test_each_form_is_kept(undisturbed: list[list[int]], tokenizer: Tokenizer) -> None:
    schema, regex, choice, sums, _ = map(tokenizer.decode, undisturbed)
    jsonschema.validate(json.loads(schema), SCHEMA)
    assert re.fullmatch(FORMS[1]["regex"], regex)
    assert choice in FORMS[2]["choice"]
    assert re.fullmatch(r"[0-9+()]+", sums)


@pytest.mark.parametrize(
    "settings",
    [
        {"async_scheduling": False},
        {"max_num_batched_tokens": 7},
        TIGHT,
        TIGHT | {"async_scheduling": False, "enable_prefix_caching": False},
        TIGHT | {"preemption_mode": "swap", "swap_space": 0.01},
    ],
    ids=str,
)
def test_the_schedule_changes_nothing(tmp_path: Path, undisturbed: list[list[int]], settings: dict[str, Any]) -> None:
    """Batched, preempted in the middle of a document and computed again, with a step in flight or without."""
    with engine_with(tmp_path, **settings) as engine:
        assert engine.generate(PROMPTS, PARAMS, list(range(len(PROMPTS)))) == undisturbed
        assert (engine.scheduler.num_preemptions > 0) == ("num_kv_blocks" in settings)


def test_ranks_of_a_group_agree(tmp_path: Path) -> None:
    """Rank 0 alone has matchers; at tp 2 the same outputs come at once and one by one."""
    with engine_with(tmp_path, tensor_parallel_size=2) as engine:
        together = engine.generate(PROMPTS, PARAMS, list(range(len(PROMPTS))))
        alone = [engine.generate([PROMPTS[i]], PARAMS[i], [i])[0] for i in range(len(PROMPTS))]
    assert together == alone


def test_a_journal_is_continued(engine: InProcessEngine, undisturbed: list[list[int]]) -> None:
    """What a new scheduler, or a new worker group, is given of an output."""
    for i, whole in enumerate(undisturbed):
        engine.add(str(i), PROMPTS[i], PARAMS[i], i, whole[: len(whole) // 2])
    rest = run(engine)
    for i, whole in enumerate(undisturbed):
        assert whole[len(whole) // 2 :] == [token for delta in rest[str(i)] for token in delta.token_ids]


def test_each_of_n_sequences_has_a_matcher_of_its_own(engine: InProcessEngine, tokenizer: Tokenizer) -> None:
    """They fork from one prompt and go their own ways."""
    form = {"regex": "[0-9]{2,4}(ab|cd)[A-Z]{3}"}
    engine.add("0", PROMPTS[0], SamplingParams(n=6, max_tokens=30, structured_outputs=form), 3)
    outputs: dict[int, list[int]] = collections.defaultdict(list)
    for delta in run(engine)["0"]:
        outputs[delta.index] += delta.token_ids
    texts = [tokenizer.decode(outputs[index]) for index in range(6)]
    assert all(re.fullmatch(form["regex"], text) for text in texts), texts
    assert len(set(texts)) > 1


def test_logprobs_are_of_the_raw_logits(engine: InProcessEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=1, structured_outputs={"choice": ["zzz"]})
    (deltas,) = engine.generate_deltas([PROMPTS[0]], params)
    entries = [entry for delta in deltas for entry in delta.logprobs or []]
    assert all(ids[0] != ids[1] and values[0] < values[1] for ids, values, _ in entries), "zzz is not likely"


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_a_row_with_nothing_left_fails_alone(tmp_path: Path, async_scheduling: bool) -> None:
    """A step that was scheduled behind it goes on without it, and so do the others."""
    stuck = SamplingParams(max_tokens=9, structured_outputs={"choice": ["ab"]}, allowed_token_ids=[70])
    with engine_with(tmp_path, async_scheduling=async_scheduling) as engine:
        engine.add("0", PROMPTS[0], PARAMS[1], 0)
        engine.add("1", PROMPTS[1], stuck, 1)
        engine.add("2", PROMPTS[2], SamplingParams(max_tokens=6, ignore_eos=True), 2)
        deltas = run(engine)
        (error,) = deltas["1"]
        assert error.finish_reason == "error"
        assert not error.token_ids
        assert error.error is not None
        assert "nothing that structured_outputs allows is left" in error.error["message"]
        assert [deltas[name][-1].error for name in "02"] == [None, None]
        assert engine.generate([PROMPTS[1]], PARAMS[1], [1]), "and the engine serves"


def test_a_grammar_that_grows_too_complex_ends_its_own_request(
    engine: InProcessEngine, undisturbed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget of states runs out in the middle of the output, where no check could foresee it."""
    limits = llguidance.LLParserLimits(max_lexer_states=200, verbose_errors=False)
    wild = SamplingParams(max_tokens=200, ignore_eos=True, structured_outputs={"regex": "(.*[aeou].{30})+!"})
    with monkeypatch.context() as patch:
        patch.setattr(grammar, "LIMITS", limits)
        engine.add("0", PROMPTS[0], PARAMS[0], 0)  # compiled before
        engine.add("1", PROMPTS[1], wild, 1)
        deltas = run(engine)
    assert [token for delta in deltas["0"] for token in delta.token_ids] == undisturbed[0]
    last = deltas["1"][-1]
    assert last.finish_reason == "error"
    assert last.error is not None
    assert "structured_outputs failed: lexer error: too many states" in last.error["message"]


def test_ignore_eos_goes_on_as_long_as_the_form_allows(engine: InProcessEngine, tokenizer: Tokenizer) -> None:
    form = {"regex": "(ab?)*"}
    open_ended = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, structured_outputs=form)
    (deltas,) = engine.generate_deltas([PROMPTS[0]], open_ended)
    assert deltas[-1].finish_reason == "length"
    closed = SamplingParams(max_tokens=12, ignore_eos=True, structured_outputs={"choice": ["abc"]})
    (deltas,) = engine.generate_deltas([PROMPTS[0]], closed)
    assert deltas[-1].finish_reason == "stop"
    assert tokenizer.decode([token for delta in deltas for token in delta.token_ids]) == "abc"


@pytest.mark.parametrize(
    ("first", "count"), [(0, 80), pytest.param(80, 420, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_random_schemas_give_valid_documents(tmp_path: Path, first: int, count: int) -> None:
    """The 500 of the promise: a model of random weights at temperature 1, at whose hands the grammar does it all."""
    tokenizer = Tokenizer(write_byte_level(tmp_path / "model"))
    vocab_size, eos = tokenizer.vocab_size + 7, tokenizer.eos_token_id
    make_tiny_checkpoint(tmp_path / "model", "qwen3", vocab_size=vocab_size, eos_token_id=eos, num_hidden_layers=1)
    schemas = [random_schema(seed) for seed in range(first, first + count)]
    params = [
        SamplingParams(max_tokens=400, structured_outputs={"json": schema, "disable_any_whitespace": i % 4 > 0})
        for i, schema in enumerate(schemas)
    ]
    settings = {"model": str(tmp_path / "model"), "num_kv_blocks": 4000, "max_num_seqs": 128}
    ends: collections.Counter[str | None] = collections.Counter()
    with engine_with(tmp_path, **settings) as engine:
        outputs = engine.generate_deltas([[5, 6, 7]] * count, params, list(range(count)))
    for schema, deltas in zip(schemas, outputs, strict=True):
        ends[deltas[-1].finish_reason] += 1
        if deltas[-1].finish_reason == "stop":
            text = tokenizer.decode([token for delta in deltas for token in delta.token_ids])
            jsonschema.validate(json.loads(text), schema)
    assert set(ends) == {"stop", "length"}
    assert ends["stop"] > 0.8 * count, ends
