"""Whether a request can be served by this model with these settings; opens no journal, and knows no transport."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

from configs.engine import EngineConfig
from configs.errors import RequestError
from nanoengine.beam_params import BeamSearchParams
from nanoengine.beam_search import beams_of
from nanoengine.journal import CheckedRequest
from nanoengine.prompts import Prompt, check_params
from nanoengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanoengine.tokenizer import Tokenizer

MAX_REQUEST_ID_CHARS = 256
MAX_TIMEOUT = 10**9


def checked_request(
    prompt: Prompt,
    params: SamplingParams | BeamSearchParams | None,
    grammar: str,
    config: EngineConfig,
    tokenizer: Tokenizer | None,
) -> CheckedRequest:
    """See `EngineClient.check`; the prompt is encoded. Raises RequestError."""
    beams = beams_of(params, config.resolved_checkpoint)
    asked = params if beams is None else beams.sampling_params()
    checked = check_params(asked) or SamplingParams(**config.default_sampling)
    assert bool(grammar) == (checked.structured_outputs is not None), "compile structured_outputs first"
    token_ids = prompt.token_ids or []
    check_prompt(token_ids, config)
    check_against_model(checked, config, tokenizer)
    if checked.bad_words:
        checked = tokenise_bad_words(checked, tokenizer)
    room = config.max_model_len - len(token_ids)
    max_tokens = room if checked.max_tokens is None else min(checked.max_tokens, room)
    return CheckedRequest(prompt.text, token_ids, checked, max_tokens, prompt.cache_salt, grammar, beams)


def check_prompt(token_ids: list[int], config: EngineConfig) -> None:
    """Raise RequestError for a prompt that is empty, too long to leave room for a token, or not of the vocabulary."""
    if not token_ids:
        raise RequestError("the prompt must hold at least 1 token, got none", "prompt")
    limit = config.max_model_len
    if len(token_ids) >= limit:
        raise RequestError(
            f"the prompt must be at most {limit - 1} tokens long, which leaves room for 1 token within "
            f"max_model_len ({limit}); got {len(token_ids)} tokens",
            "prompt",
            "context_length_exceeded",
        )
    _check_vocabulary(token_ids, config, "prompt", "token ids of the prompt")


def check_against_model(params: SamplingParams, config: EngineConfig, tokenizer: Tokenizer | None) -> None:
    """Raise RequestError for parameters that this model or its tokenizer cannot serve."""
    _check_vocabulary(params.stop_token_ids or (), config, "stop_token_ids", "stop_token_ids")
    _check_vocabulary(params.logit_bias or (), config, "logit_bias", "token ids of logit_bias")
    _check_vocabulary(params.allowed_token_ids or (), config, "allowed_token_ids", "allowed_token_ids")
    for ids in params.bad_words_token_ids or ():
        _check_vocabulary(ids, config, "bad_words_token_ids", "bad_words_token_ids")
    stops = {*config.resolved_checkpoint.eos_token_ids, *(params.stop_token_ids or ())}
    if params.min_tokens and params.allowed_token_ids and stops.issuperset(params.allowed_token_ids):
        raise RequestError(
            "allowed_token_ids must hold a token that does not end the output, since min_tokens is "
            f"{params.min_tokens}; got {list(params.allowed_token_ids)!r:.200}", "allowed_token_ids",
        )  # fmt: skip
    if params.stop and tokenizer is None:
        raise RequestError(
            "stop strings need a tokenizer, and the engine runs without one (skip_tokenizer_init): use stop_token_ids",
            "stop",
        )


def tokenise_bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """Add each word's ids, and those of the word behind a space unless they end in the former anyway.

    Raises:
        RequestError: there is no tokenizer, or a word is not valid Unicode.
    """
    if tokenizer is None:
        raise RequestError(
            "bad_words need a tokenizer, and the engine runs without one (skip_tokenizer_init): "
            "use bad_words_token_ids",
            "bad_words",
        )
    found = [tuple(ids) for ids in params.bad_words_token_ids or ()]
    for word in params.bad_words or ():
        try:
            bare = tuple(tokenizer.encode(word.lstrip() or word, add_special_tokens=False))
            spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        except RequestError as error:
            raise RequestError(f"bad_words: {error.message}", "bad_words") from None
        found += [bare] if spaced[-len(bare) :] == bare else [bare, spaced]
    return dataclasses.replace(params, bad_words_token_ids=tuple(dict.fromkeys(filter(None, found))))


def check_request_id(request_id: object) -> None:
    """Raise RequestError for an id that no message can carry."""
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise RequestError(
            f"request_id must be a string of 1 to {MAX_REQUEST_ID_CHARS} characters, got {request_id!r:.100}",
            "request_id",
        )
    if any("\ud800" <= char <= "\udfff" for char in request_id):
        raise RequestError("request_id holds a lone surrogate", "request_id")


def check_priority(priority: object) -> None:
    """Raise RequestError for a priority that no message can carry."""
    if type(priority) is not int or not -(2**31) <= priority < 2**31:
        raise RequestError(f"priority must be an integer of 32 bits, got {priority!r:.100}", "priority")


def checked_timeout(asked: object, limit: float | None) -> float | None:
    """Seconds within which a request must be complete: what is asked for, at most `limit`. Raises RequestError."""
    if asked is None:
        return limit
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 < asked <= MAX_TIMEOUT:
        raise RequestError(
            f"timeout must be a positive number of seconds, at most {MAX_TIMEOUT}, got {asked!r:.99}", "timeout"
        )
    return asked if limit is None else min(asked, limit)


def _check_vocabulary(token_ids: Collection[int], config: EngineConfig, param: str, what: str) -> None:
    vocab_size = config.resolved_checkpoint.vocab_size
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    position, token = next((at, token) for at, token in enumerate(token_ids) if not 0 <= token < vocab_size)
    raise RequestError(f"{what} must be from 0 to {vocab_size - 1}, got {token} at position {position}", param)
