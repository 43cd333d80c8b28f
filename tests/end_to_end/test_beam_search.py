"""Beam search through the whole engine against transformers' generate(num_beams=…) in float32."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.checkpoint import load_checkpoint_config
from nanoengine import LLM, BeamSearchParams
from nanoengine.messages import AddRequest, TokenDelta
from nanoengine.sampling_params import SamplingParams
from nanoengine.tokenizer import Tokenizer
from tests.end_to_end.inprocess import InProcessEngine
from tests.end_to_end.reference import load_twin, make_prompt, model_directory
from tests.transformers_beams import hypotheses, transformers_search

PROMPTS = (
    "中国的首都是",
    "What is 17 + 25? Answer:",
    "Tell me a story about Lily the bear, the garden and the flute.",
    "The capital of",
)
SEARCHES = (
    BeamSearchParams(1, 12),
    BeamSearchParams(3, 24),
    BeamSearchParams(5, 24, early_stopping=True),
    BeamSearchParams(5, 20, length_penalty=2.0, early_stopping="never"),
    BeamSearchParams(4, 20, length_penalty=0.0, early_stopping="never"),
    BeamSearchParams(3, 20, length_penalty=-1.0),
    BeamSearchParams(8, 10, ignore_eos=True, length_penalty=0.5),
)
TIGHT = {"num_kv_blocks": 22, "block_size": 4}
SCHEDULES: list[dict[str, Any]] = [
    {"async_scheduling": False, "enable_prefix_caching": False},
    {"max_num_batched_tokens": 1, "max_num_seqs": 3},
    {"max_num_batched_tokens": 7, "block_size": 1, "max_num_seqs": 1},
    TIGHT,
    TIGHT | {"enable_prefix_caching": False, "async_scheduling": False, "max_num_batched_tokens": 16},
    TIGHT | {"preemption_mode": "swap", "swap_space": 0.01},
]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a search over a prompt comes to: tokens of each output, best first, and their summed log-probabilities."""

    tokens: list[list[int]]
    sums: list[float]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, prompts, and for each of SEARCHES what transformers makes of each of them."""

    model_dir: str
    prompts: list[list[int]]
    expected: list[list[Outcome]]


def searched(twin: torch.nn.Module, prompt: list[int], params: BeamSearchParams, eos: tuple[int, ...]) -> Outcome:
    result = transformers_search(twin, prompt, params, [] if params.ignore_eos else eos, 0)
    if params.beam_width == 1:  # transformers takes it for greedy decoding, which has no scores
        tokens = result.sequences[0, len(prompt) :].tolist()
        chosen = torch.cat(result.logits).log_softmax(-1)[range(len(tokens)), tokens]
        return Outcome([tokens], [chosen.sum().item()])
    outputs = hypotheses(result, len(prompt))
    scores = zip(result.sequences_scores.tolist(), map(len, outputs), strict=True)
    return Outcome(outputs, [score * length**params.length_penalty for score, length in scores])


def make_case(name: str, root: Path) -> Case:
    model_dir = model_directory(name, root)
    checkpoint = load_checkpoint_config(model_dir)
    if name == "demo":
        prompts = [Tokenizer(model_dir).encode(text) for text in PROMPTS]
    else:
        prompts = [make_prompt(checkpoint.vocab_size, length, 0) for length in (1, 16, 17, 30)]
    twin = load_twin(model_dir)
    expected = [[searched(twin, prompt, params, checkpoint.eos_token_ids) for prompt in prompts] for params in SEARCHES]
    return Case(model_dir, prompts, expected)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_case(name, root) for name in ("demo", "llama3")}


@contextlib.contextmanager
def engine_with(run_dir: Path, model_dir: str, **settings: Any) -> Iterator[InProcessEngine]:
    settings = {"model": model_dir, "dtype": "float32", "skip_tokenizer_init": True} | settings
    with contextlib.closing(InProcessEngine(run_dir, **settings)) as engine:
        yield engine


def add_search(engine: InProcessEngine, name: str, prompt: list[int], params: BeamSearchParams) -> None:
    journal: list[list[int]] = [[] for _ in range(params.beam_width)]
    sampling = params.sampling_params().to_dict()
    engine.scheduler.add(AddRequest("c", name, prompt, sampling, 0, 0.0, 0, journal, beam_search=params.to_dict()))


def run(engine: InProcessEngine) -> dict[str, list[TokenDelta]]:
    """Run to the end; the deltas of each request."""
    deltas: dict[str, list[TokenDelta]] = {}
    while engine.scheduler.has_work:
        engine.step()
        for item in engine.scheduler.take_deltas():
            assert item.delta.error is None, item.delta.error
            deltas.setdefault(item.delta.request_id, []).append(item.delta)
    while engine.executor.num_in_flight:
        engine.step()
    return deltas


def outcome(deltas: list[TokenDelta], params: BeamSearchParams) -> Outcome:
    assert [delta.index for delta in deltas] == list(range(params.beam_width))
    sums = [sum(values[0] for _, values, _ in delta.logprobs or ()) for delta in deltas]
    return Outcome([delta.token_ids for delta in deltas], sums)


def check_searches(engine: InProcessEngine, case: Case, which: Iterable[tuple[int, int]]) -> None:
    """Run searches by their number and their prompt's, all at once, and compare each with transformers'."""
    which = list(which)
    for number, place in which:
        add_search(engine, f"{number}.{place}", case.prompts[place], SEARCHES[number])
    found = run(engine)
    for number, place in which:
        each, expected = outcome(found[f"{number}.{place}"], SEARCHES[number]), case.expected[number][place]
        assert each.tokens == expected.tokens, (SEARCHES[number], place)
        assert each.sums == pytest.approx(expected.sums, abs=1e-4), (SEARCHES[number], place)


@pytest.mark.parametrize("name", ["demo", "llama3"])
@pytest.mark.parametrize("settings", [{}, {"tensor_parallel_size": 2}], ids=str)
def test_beams_and_scores_equal_transformers(
    settings: dict[str, Any], name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    with engine_with(tmp_path, cases[name].model_dir, **settings) as engine:
        check_searches(engine, cases[name], itertools.product(range(len(SEARCHES)), range(len(PROMPTS))))


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_beams_do_not_depend_on_the_schedule(settings: dict[str, Any], cases: dict[str, Case], tmp_path: Path) -> None:
    with engine_with(tmp_path, cases["demo"].model_dir, **settings) as engine:
        check_searches(engine, cases["demo"], [(1, 0), (6, 3), (2, 1)])
        if "num_kv_blocks" in settings:
            assert engine.scheduler.num_preemptions > 0, "this test wants a cache that is too small"


def test_beams_and_other_requests_do_not_change_each_other(cases: dict[str, Case], tmp_path: Path) -> None:
    case, greedy = cases["demo"], SamplingParams(temperature=0, max_tokens=20)
    with engine_with(tmp_path, case.model_dir, **TIGHT) as engine:
        alone = engine.generate(case.prompts, greedy)
        for place, prompt in enumerate(case.prompts):
            engine.scheduler.add(AddRequest("c", f"g{place}", prompt, greedy.to_dict(), 0, 0.0, 0, [[]]))
            add_search(engine, f"b{place}", prompt, SEARCHES[1])
        found = run(engine)
        for place in range(len(case.prompts)):
            assert [token for delta in found[f"g{place}"] for token in delta.token_ids] == alone[place]
            assert outcome(found[f"b{place}"], SEARCHES[1]).tokens == case.expected[1][place].tokens
        assert engine.scheduler.num_preemptions > 0


def test_a_search_through_processes_equals_transformers(cases: dict[str, Case]) -> None:
    case = cases["demo"]
    with LLM("demo", device="cpu", dtype="float32", tensor_parallel_size=2, check_invariants=True) as llm:
        outputs = llm.beam_search(list(PROMPTS), SEARCHES[2])
        for output, expected in zip(outputs, case.expected[2], strict=True):
            assert output.finished
            assert [each.token_ids for each in output.outputs] == expected.tokens
            assert [each.cumulative_logprob for each in output.outputs] == pytest.approx(expected.sums, abs=1e-4)
            assert [each.index for each in output.outputs] == list(range(SEARCHES[2].beam_width))
        assert outputs[0].outputs[0].text.startswith("北京")
        assert outputs[0].outputs[0].finish_reason == "stop"
