"""What a client may ask of the sampler, validated on construction; knows neither tensors nor how a token is drawn.

The transforms are applied in this order: bias and penalties, temperature, top-k, top-p, min-p, draw. What may not be
drawn at all (bad words, what is not allowed, an early end) is masked before the temperature too, so that greedy
decoding heeds it. Names and meanings are vLLM's.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from configs.engine import ModelConfig
from configs.errors import ConfigError, RequestError
from configs.fields import setting, validate
from nanoengine.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS_IDS = 1024
MAX_LOGIT_BIAS = 100.0
MAX_ALLOWED_TOKEN_IDS = 2**18
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 1024
MIN_TEMPERATURE = 0.01
MAX_INT = 2**31 - 1
MAX_SEED = ModelConfig.__dataclass_fields__["seed"].metadata["maximum"]


class SamplingType(enum.IntEnum):
    """How a row's token is chosen."""

    GREEDY = 0
    RANDOM = 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are sampled and when it ends.

    Raises:
        RequestError: on construction, naming the field, its value and the allowed range.
    """

    n: int = setting(1, "outputs of one prompt", minimum=1, maximum=MAX_SEQUENCES)
    best_of: int | None = setting(
        None, "generate so many, show the n of the highest log-probability; None: n", minimum=1, maximum=MAX_SEQUENCES
    )
    temperature: float = setting(1.0, "0 is greedy; otherwise the logits are divided by it", minimum=0)
    top_p: float = setting(1.0, "keep the likeliest tokens that together reach this probability", above=0, maximum=1)
    top_k: int = setting(-1, "keep this many of the likeliest tokens; -1 or 0 keeps all", minimum=-1, maximum=MAX_INT)
    min_p: float = setting(0.0, "drop tokens below this share of the likeliest one's probability", minimum=0, maximum=1)
    seed: int | None = setting(None, "the same seed gives the same tokens", minimum=0, maximum=MAX_SEED)
    max_tokens: int | None = setting(
        16, "tokens to generate at most; None: up to max_model_len", minimum=1, maximum=MAX_INT
    )
    min_tokens: int = setting(
        0, "tokens to generate at least: eos and stops wait until then", minimum=0, maximum=MAX_INT
    )
    ignore_eos: bool = setting(False, "go on after the end-of-sequence token")
    presence_penalty: float = setting(0.0, "taken from the logit of each generated token", minimum=-2, maximum=2)
    frequency_penalty: float = setting(0.0, "the same, once for each time it was generated", minimum=-2, maximum=2)
    repetition_penalty: float = setting(
        1.0, "divides a positive logit of each token of prompt and output, multiplies a negative one", above=0
    )
    logprobs: int | None = setting(
        None, "likeliest tokens whose log-probabilities are told beside the chosen one's", minimum=0, maximum=20
    )
    prompt_logprobs: int | None = setting(
        None, "the same for each token of the prompt but the first; 0 tells of that token alone", minimum=0, maximum=20
    )
    include_stop_str_in_output: bool = setting(False, "show the stop string, or stop token, that ended the text")
    skip_special_tokens: bool = setting(True, "leave special tokens out of the text")
    detokenize: bool = setting(True, "make text; false gives token ids alone")
    stop: Sequence[str] | str | None = ()
    stop_token_ids: Sequence[int] | None = ()
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    # What the front end makes of bad_words, or what is given where there is no tokenizer.
    bad_words_token_ids: Sequence[Sequence[int]] | None = ()
    # The form that the output must have; an eos ends it where the form is complete, even under ignore_eos.
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._normalise_lists()
        try:
            validate(self)
        except ConfigError as error:
            raise RequestError(error.message, error.field) from None
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of must be from n ({self.n}) to {MAX_SEQUENCES}, got {self.best_of}", "best_of")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}", "min_tokens"
            )
        if self.stop and not self.detokenize:
            raise RequestError("stop strings are found in the text: detokenize must be true, got False", "detokenize")
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %g is raised to %g", self.temperature, MIN_TEMPERATURE)
            object.__setattr__(self, "temperature", MIN_TEMPERATURE)

    def _normalise_lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        allowed = self.allowed_token_ids
        if allowed is not None:
            if isinstance(allowed, list | tuple) and not allowed:
                raise RequestError("allowed_token_ids must hold at least 1 token id, got []", "allowed_token_ids")
            allowed = tuple(dict.fromkeys(_token_ids("allowed_token_ids", allowed, MAX_ALLOWED_TOKEN_IDS)))
        words = () if self.bad_words_token_ids is None else self.bad_words_token_ids
        if not isinstance(words, list | tuple) or len(words) > 2 * MAX_BAD_WORDS or not all(words):
            raise RequestError(
                f"bad_words_token_ids must be at most {2 * MAX_BAD_WORDS} lists of token ids, none empty, "
                f"got {words!r:.200}", "bad_words_token_ids",
            )  # fmt: skip
        normalised = {
            "stop": _strings("stop", stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS),
            "logit_bias": None if self.logit_bias is None else _bias(self.logit_bias),
            "allowed_token_ids": allowed,
            "bad_words": _strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS),
            "bad_words_token_ids": tuple(_token_ids("bad_words_token_ids", ids, MAX_BAD_WORD_CHARS) for ids in words),
            "structured_outputs": StructuredOutputsParams.of(self.structured_outputs),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)

    @property
    def sampling_type(self) -> SamplingType:
        """GREEDY when nothing is left to chance, RANDOM otherwise."""
        return SamplingType.GREEDY if self.temperature == 0 else SamplingType.RANDOM

    @property
    def num_sequences(self) -> int:
        """How many sequences are generated for a prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def ranks_candidates(self) -> bool:
        """Whether more sequences are generated than are shown."""
        return self.num_sequences > self.n

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for a message."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.logit_bias is not None:  # neither JSON nor our msgpack has keys that are numbers
            data["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        if isinstance(self.structured_outputs, StructuredOutputsParams):  # always, where there are any
            data["structured_outputs"] = self.structured_outputs.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SamplingParams:
        """Inverse of `to_dict`; validates again. Raises RequestError for an unknown field."""
        unknown = set(data) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise RequestError(f"unknown sampling parameter {sorted(unknown)[0]!r}", sorted(unknown)[0])
        return cls(**data)


def _strings(name: str, value: object, max_count: int, max_chars: int) -> tuple[str, ...]:
    """A list of strings, none empty; None is an empty one."""
    strings = () if value is None else value
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        also = "a string or " if name == "stop" else ""
        raise RequestError(f"{name} must be {also}a list of strings, got {strings!r:.200}", name)
    if len(strings) > max_count or not all(0 < len(text) <= max_chars for text in strings):
        raise RequestError(
            f"{name} must be at most {max_count} strings of 1 to {max_chars} characters, "
            f"got {len(strings)} of lengths {[len(text) for text in strings][: max_count + 1]}", name,
        )  # fmt: skip
    # JSON can carry half a surrogate pair, which is no text: nothing matches it, and no message holds it.
    if any("\ud800" <= char <= "\udfff" for text in strings for char in text):
        raise RequestError(f"{name} must be text, got a lone surrogate", name)
    return tuple(strings)


def _token_ids(name: str, value: object, max_count: int) -> tuple[int, ...]:
    """A list of token ids; None is an empty one. Whether the model has them is checked where it is known."""
    ids = () if value is None else value
    if isinstance(ids, list | tuple) and len(ids) > max_count:
        raise RequestError(f"{name} must be at most {max_count} ids, got {len(ids)}", name)
    if not isinstance(ids, list | tuple) or not all(type(token) is int and 0 <= token <= MAX_INT for token in ids):
        raise RequestError(f"{name} must be a list of token ids, got {ids!r:.200}", name)
    return tuple(ids)


def _bias(value: object) -> dict[int, float]:
    """Token ids (numbers, or strings of digits as in JSON) with their bias, clamped as OpenAI and vLLM do it."""
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIAS_IDS:
        raise RequestError(
            f"logit_bias must map at most {MAX_LOGIT_BIAS_IDS} token ids to numbers, got {value!r:.200}", "logit_bias"
        )
    biases = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key
        if type(token) is not int or not 0 <= token <= MAX_INT:
            raise RequestError(f"logit_bias must have token ids as keys, got {key!r:.100}", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
            raise RequestError(
                f"logit_bias must have finite numbers as values, got {bias!r:.100} for token {token}", "logit_bias"
            )
        biases[token] = max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, float(bias)))
    return biases
