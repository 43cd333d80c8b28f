"""The search itself against transformers' generate(num_beams=…), on the log-probabilities of the same small model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from configs.errors import RequestError
from nanoengine.beam_params import BeamSearchParams
from nanoengine.beam_search import BeamSearch, Hypothesis
from nanoengine.step import TokenLogprobs
from tests.transformers_beams import hypotheses, transformers_search
from tests.workers.tiny_models import load_reference, make_tiny_checkpoint

VOCAB = 83
NO_END: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.nn.Module]:
    path = tmp_path_factory.mktemp("beams")
    make_tiny_checkpoint(path, "qwen2", vocab_size=VOCAB, num_hidden_layers=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_reference(path)
    torch.set_num_threads(threads)


def search_with(model: torch.nn.Module, prompt: list[int], search: BeamSearch) -> list[Hypothesis]:
    """Run a search to its end; each beam's logits are computed from its tokens alone."""
    contexts = [prompt]
    while not search.is_over:
        with torch.inference_mode():
            logits = model(torch.tensor(contexts)).logits[:, -1].float()
        best = logits.log_softmax(-1).topk(min(search.num_likeliest, VOCAB))
        told: list[TokenLogprobs] = [
            ([0, *ids], [-99.0, *values], 1)
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        contexts = [[*contexts[parent], token] for parent, token in search.advance(told)]
    return search.hypotheses


def tokens(hypothesis: Hypothesis) -> list[int]:
    return [beam.token_id for beam in hypothesis.beam.path()]


def transformers_beams(
    model: torch.nn.Module, prompt: list[int], params: BeamSearchParams, end: frozenset[int]
) -> list[tuple[list[int], float]]:
    """transformers' outputs, best first, without padding, and their scores."""
    result = transformers_search(model, prompt, params, end, VOCAB - 1)
    return list(zip(hypotheses(result, len(prompt)), result.sequences_scores.tolist(), strict=True))


def settings() -> list[dict[str, Any]]:
    """Every width with every penalty and every way to stop, in turns, with no, one and several end tokens."""
    draw = random.Random(5)
    cases = []
    for width in (2, 3, 5, 8, 2, 3, 5, 8):
        for penalty in (0.0, 0.5, 1.0, 2.0, -1.0):
            for early in (False, True, "never"):
                ends = draw.choice([0, 1, 1, 2, 4])
                cases.append({"beam_width": width, "length_penalty": penalty, "early_stopping": early, "ends": ends})
    return cases


def test_the_same_beams_and_scores_as_transformers(model: torch.nn.Module) -> None:
    stopped = short = 0
    for number, case in enumerate(settings()):
        draw = random.Random(number)
        prompt = [draw.randrange(VOCAB) for _ in range(draw.choice([1, 3, 9]))]
        num_ends, max_tokens = case.pop("ends"), draw.choice([1, 2, 8, 12])
        params = BeamSearchParams(max_tokens=max_tokens, **case)
        end = NO_END
        if num_ends:  # among what the beams hold when nothing ends them, so that some are ended
            seen = {token for ids, _ in transformers_beams(model, prompt, params, NO_END) for token in ids}
            end = frozenset(draw.sample(sorted(seen), min(num_ends, len(seen))))
        expected = transformers_beams(model, prompt, params, end)
        found = search_with(model, prompt, BeamSearch(params, max_tokens, end))
        assert [tokens(each) for each in found] == [ids for ids, _ in expected], (number, params)
        assert [each.score for each in found] == pytest.approx([score for _, score in expected], abs=1e-4)
        for each in found:
            assert each.stopped == (tokens(each)[-1] in end)
            assert each.score == pytest.approx(each.beam.cumulative_logprob / each.beam.length**params.length_penalty)
            stopped += each.stopped
        short += all(each.stopped for each in found) and max_tokens > 2
    assert stopped > 150, "few outputs end with an end token"
    assert short > 10, "few searches are over before max_tokens"


def test_a_search_of_one_beam_is_greedy(model: torch.nn.Module) -> None:
    params = BeamSearchParams(beam_width=1, max_tokens=6)
    with torch.inference_mode():
        greedy = model.generate(torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=6, pad_token_id=0)
    (found,) = search_with(model, [5, 6], BeamSearch(params, 6, NO_END))
    assert tokens(found) == greedy[0, 2:].tolist()


def told(*pairs: tuple[int, float]) -> TokenLogprobs:
    return [0, *[token for token, _ in pairs]], [-50.0, *[value for _, value in pairs]], 1


def test_equally_good_beams_are_ranked_by_their_parents_place_then_by_likelihood() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=3), 3, NO_END)
    assert search.advance([told((7, -1.0), (3, -1.0), (9, -1.0))]) == [(0, 7), (0, 3)]
    assert search.advance([told((1, -1.0), (2, -2.0)), told((5, -1.0), (4, -2.0))]) == [(0, 1), (1, 5)]


def test_a_beam_tells_the_log_probabilities_and_ranks_of_its_tokens() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=1, logprobs=1), 1, NO_END)
    assert search.advance([told((7, -1.0), (3, -1.5), (9, -1.5))]) == []
    first, second = search.hypotheses
    assert first.beam.logprobs == ([7, 7], [-1.0, -1.0], 1)
    assert second.beam.logprobs == ([3, 7], [-1.5, -1.0], 2)


def test_what_is_no_number_never_becomes_a_beam() -> None:
    nan = float("nan")
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=4), 4, NO_END)
    assert search.advance([told((1, nan), (2, -1.0), (3, float("-inf")))]) == [(0, 2)]
    assert search.advance([told((1, nan), (2, nan))]) == []
    assert [tokens(each) for each in search.hypotheses] == [[2]]


def test_stopping_a_search_ranks_its_beams_among_the_finished_ones() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), 9, frozenset({1}))
    assert search.advance([told((5, -0.5), (1, -0.9), (6, -1.0), (7, -4.0))]) == [(0, 5), (0, 6)]
    search.stop()
    assert [(tokens(each), each.stopped) for each in search.hypotheses] == [([5], False), ([1], True)]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("beam_width", 0, "at least 1 and at most 64"),
        ("beam_width", 65, "at least 1 and at most 64"),
        ("max_tokens", 0, "at least 1"),
        ("length_penalty", float("inf"), "finite"),
        ("length_penalty", 33, "at most 32"),
        ("early_stopping", "always", "true, false or 'never'"),
        ("early_stopping", 1, "true, false or 'never'"),
        ("temperature", 0.7, "0 or 1"),
        ("logprobs", 21, "at most 20"),
        ("ignore_eos", 1, "bool"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(field: str, value: Any, words: str) -> None:
    with pytest.raises(RequestError, match=f"{field} must be .*{words}.*, got {value!r}") as caught:
        BeamSearchParams(**{field: value})
    assert caught.value.param == field


def test_parameters_survive_the_wire() -> None:
    params = BeamSearchParams(3, None, True, 1.0, -0.5, True, "never", 4, False, False)
    assert BeamSearchParams.from_dict(params.to_dict()) == params
    with pytest.raises(RequestError, match="unknown beam search parameter 'n'"):
        BeamSearchParams.from_dict({"n": 3})
