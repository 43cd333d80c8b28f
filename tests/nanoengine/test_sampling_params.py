"""What a client may ask for, and what it is told when it asks for something else."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from configs.errors import RequestError
from nanoengine.sampling_params import SamplingParams, SamplingType


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "finite"),
        ("temperature", "hot", "float"),
        ("top_p", 0.0, "greater than 0 and at most 1"),
        ("top_p", 1.5, "at most 1"),
        ("top_k", -2, "at least -1"),
        ("top_k", 1.5, "int"),
        ("min_p", 1.01, "at most 1"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "at most"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", True, "int"),
        ("n", 65, "at most 64"),
        ("n", 0, "at least 1"),
        ("best_of", 65, "at most 64"),
        ("best_of", 0, "at least 1"),
        ("ignore_eos", 1, "bool"),
        ("stop", [""], "1 to 1024 characters"),
        ("stop", ["x"] * 17, "at most 16"),
        ("stop", [3], "list of strings"),
        ("stop", 0, "list of strings"),
        ("stop_token_ids", [-1], "token ids"),
        ("stop_token_ids", ["a"], "token ids"),
        ("stop_token_ids", list(range(300)), "at most 256"),
        ("presence_penalty", 2.01, "at most 2"),
        ("frequency_penalty", -2.5, "at least -2"),
        ("repetition_penalty", 0, "greater than 0"),
        ("min_tokens", 17, "at most max_tokens (16)"),
        ("min_tokens", -1, "at least 0"),
        ("logprobs", 21, "at most 20"),
        ("logit_bias", {"a": 1}, "token ids as keys"),
        ("logit_bias", {-1: 1}, "token ids as keys"),
        ("logit_bias", {1: float("nan")}, "finite numbers"),
        ("logit_bias", [3], "must map"),
        ("logit_bias", dict.fromkeys(range(1025), 1), "at most 1024"),
        ("allowed_token_ids", [], "at least 1"),
        ("allowed_token_ids", [1.0], "token ids"),
        ("bad_words", [""], "1 to 1024 characters"),
        ("bad_words", ["x"] * 129, "at most 128"),
        ("bad_words", "no", "list of strings"),
        ("bad_words_token_ids", [[]], "none empty"),
    ],
)
def test_value_out_of_range_names_field_value_and_range(field: str, value: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in str(caught.value)
    assert words in str(caught.value)


def test_temperature_zero_is_greedy_and_a_tiny_one_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    assert SamplingParams(temperature=0).sampling_type is SamplingType.GREEDY
    with caplog.at_level(logging.WARNING):
        tiny = SamplingParams(temperature=0.001)
    assert tiny.temperature == 0.01
    assert tiny.sampling_type is SamplingType.RANDOM
    assert "0.001" in caplog.text


def test_dict_round_trip_and_unknown_field() -> None:
    params = SamplingParams(
        temperature=0.5, top_k=5, stop="x", stop_token_ids=[1], max_tokens=None, logit_bias={7: 500}
    )
    assert params.logit_bias == {7: 100.0}
    assert SamplingParams.from_dict(params.to_dict()) == params
    with pytest.raises(RequestError, match="unknown sampling parameter 'beam'"):
        SamplingParams.from_dict({"beam": 3})
