"""Brings every form in which a prompt may be given into one; knows no tokenizer, no model and no request.

A prompt is text, a list of token ids, or a dict of either (`{"prompt": …}`, `{"prompt_token_ids": …}`), as in vLLM.
The dict may also hold a `cache_salt`: only requests of the same salt share cached prefixes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from configs.errors import RequestError
from nanoengine.beam_params import BeamSearchParams
from nanoengine.sampling_params import SamplingParams

Message: TypeAlias = Mapping[str, Any]
PromptInput: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"

_CONTENT_KEYS = ("prompt", "prompt_token_ids")
_DICT_KEYS = (*_CONTENT_KEYS, "cache_salt")
MAX_CACHE_SALT_CHARS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: `text`, `token_ids`, or both when it is tokenised already.

    `messages` is a conversation that a remote server is to render; a local engine renders it before it gets here.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[Message] | None = None
    cache_salt: str = ""


def check_cache_salt(salt: object) -> str:
    """A salt as given, None as the empty one. Raises RequestError."""
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 0 < len(salt) <= MAX_CACHE_SALT_CHARS:
        raise RequestError(
            f"cache_salt must be a string of 1 to {MAX_CACHE_SALT_CHARS} characters, got {salt!r:.100}", "cache_salt"
        )
    if any("\ud800" <= char <= "\udfff" for char in salt):
        raise RequestError("cache_salt holds a lone surrogate", "cache_salt")
    return salt


def parse_prompt(prompt: object) -> Prompt:
    """Read one prompt. Raises RequestError for anything but text, token ids, or a dict of them."""
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, list | tuple):
        return Prompt(token_ids=_token_ids(prompt))
    if isinstance(prompt, Mapping):
        return _from_mapping(prompt)
    raise RequestError(
        f"a prompt must be text, a list of token ids, or a dict with {' or '.join(_CONTENT_KEYS)}, "
        f"got {type(prompt).__name__}",
        "prompt",
    )


def parse_prompts(prompts: object) -> list[Prompt]:
    """Read one prompt or a list of prompts; a list of ints is one prompt.

    Raises RequestError, which names the prompt's index when there are several.
    """
    if not isinstance(prompts, list | tuple) or (prompts and _is_number(prompts[0])):
        return [parse_prompt(prompts)]
    parsed = []
    for index, prompt in enumerate(prompts):
        try:
            parsed.append(parse_prompt(prompt))
        except RequestError as error:
            raise at_index(error, index, len(prompts)) from None
    return parsed


def parse_conversations(messages: object) -> list[list[Message]]:
    """Read one conversation (a list of messages) or a list of conversations. Raises RequestError."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages must be a list of messages and not empty", "messages")
    conversations = [messages] if isinstance(messages[0], Mapping) else messages
    for index, conversation in enumerate(conversations):
        if (
            not isinstance(conversation, list | tuple)
            or not conversation
            or not all(isinstance(message, Mapping) and "role" in message for message in conversation)
        ):
            error = RequestError("a conversation must be a list of dicts with role and content", "messages")
            raise at_index(error, index, len(conversations))
    return [list(conversation) for conversation in conversations]


def pair_params(params: object, num_prompts: int) -> list[SamplingParams | None]:
    """One SamplingParams for each prompt; a single one serves all, None means the model's defaults.

    Raises RequestError when the numbers differ or something else was given.
    """
    if isinstance(params, list | tuple):
        if len(params) != num_prompts:
            raise RequestError(
                f"sampling_params must be one for all prompts or one for each, got {len(params)} for {num_prompts}",
                "sampling_params",
            )
        return [check_params(each) for each in params]
    return [check_params(params)] * num_prompts


def check_params(params: object) -> SamplingParams | None:
    """The parameters of one request; None stands for the model's defaults. Raises RequestError for another type."""
    if params is None:
        return None
    if isinstance(params, BeamSearchParams):
        raise RequestError(
            "sampling_params must be a SamplingParams; beam_search takes BeamSearchParams", "sampling_params"
        )
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params must be a SamplingParams, got {type(params).__name__}", "sampling_params")
    return params


def check_beam_params(params: object) -> BeamSearchParams:
    """The parameters of one beam search. Raises RequestError for another type."""
    if not isinstance(params, BeamSearchParams):
        raise RequestError(f"params must be a BeamSearchParams, got {type(params).__name__}", "params")
    return params


def at_index(error: RequestError, index: int, count: int) -> RequestError:
    """The same error, saying which of several prompts it is about."""
    if count == 1:
        return error
    return RequestError(f"prompt {index}: {error.message}", error.param, error.code)


def _is_number(value: object) -> bool:
    # A bool or a float opens a list of ids too: a wrong one, which is refused as such.
    return isinstance(value, int | float)


def _token_ids(ids: Sequence[object]) -> list[int]:
    for position, token in enumerate(ids):
        if type(token) is not int:  # a bool is an int to Python, and never a token id that somebody meant
            raise RequestError(
                f"token ids must be ints, got {token!r:.100} ({type(token).__name__}) at position {position}",
                "prompt",
            )
    return list(ids)  # type: ignore[arg-type]  # the loop has looked at each


def _from_mapping(prompt: Mapping[Any, Any]) -> Prompt:
    unknown = [key for key in prompt if key not in _DICT_KEYS]
    if unknown:
        raise RequestError(f"unknown key {unknown[0]!r:.100} in a prompt; known: {', '.join(_DICT_KEYS)}", "prompt")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt must be text, got {type(text).__name__}", "prompt")
    if token_ids is not None and not isinstance(token_ids, list | tuple):
        raise RequestError(f"prompt_token_ids must be a list of ints, got {type(token_ids).__name__}", "prompt")
    if text is None and token_ids is None:
        raise RequestError(f"a prompt's dict must hold {' or '.join(_CONTENT_KEYS)}", "prompt")
    salt = check_cache_salt(prompt.get("cache_salt"))
    return Prompt(text, None if token_ids is None else _token_ids(token_ids), cache_salt=salt)
