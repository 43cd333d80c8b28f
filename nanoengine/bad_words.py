"""Turns the words that an output must not hold into token ids; knows no request and no sampler."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from configs.errors import RequestError
from nanoengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanoengine.tokenizer import Tokenizer


def with_bad_word_ids(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """Add each word's ids, and those of the word behind a space unless they end in the former anyway.

    Raises RequestError without a tokenizer, and for what it cannot encode.
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
