"""What a client may ask of the sampler, validated on construction; knows neither tensors nor how a token is drawn.

The transforms are applied in this order: temperature, top-k, top-p, min-p, draw. Names and meanings are vLLM's.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Sequence
from typing import Any

from configs.engine import ModelConfig
from configs.errors import ConfigError, RequestError
from configs.fields import setting, validate

logger = logging.getLogger(__name__)

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MIN_TEMPERATURE = 0.01
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

    n: int = setting(1, "outputs of one prompt (only 1 until forking is built)", minimum=1, maximum=1)
    temperature: float = setting(1.0, "0 is greedy; otherwise the logits are divided by it", minimum=0)
    top_p: float = setting(1.0, "keep the likeliest tokens that together reach this probability", above=0, maximum=1)
    top_k: int = setting(-1, "keep this many of the likeliest tokens; -1 or 0 keeps all", minimum=-1)
    min_p: float = setting(0.0, "drop tokens below this share of the likeliest one's probability", minimum=0, maximum=1)
    seed: int | None = setting(None, "the same seed gives the same tokens", minimum=0, maximum=MAX_SEED)
    max_tokens: int | None = setting(16, "tokens to generate at most; None: up to max_model_len", minimum=1)
    ignore_eos: bool = setting(False, "go on after the end-of-sequence token")
    stop: Sequence[str] | str | None = ()
    stop_token_ids: Sequence[int] | None = ()

    def __post_init__(self) -> None:
        self._normalise_lists()
        try:
            validate(self)
        except ConfigError as error:
            raise RequestError(error.message, error.field) from None
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %g is raised to %g", self.temperature, MIN_TEMPERATURE)
            object.__setattr__(self, "temperature", MIN_TEMPERATURE)

    def _normalise_lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
            raise RequestError(f"stop must be a string or a list of strings, got {stop!r}", "stop")
        if len(stop) > MAX_STOP_STRINGS or not all(0 < len(text) <= MAX_STOP_STRING_CHARS for text in stop):
            raise RequestError(
                f"stop must be at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_STRING_CHARS} characters, "
                f"got {len(stop)} of lengths {[len(text) for text in stop][: MAX_STOP_STRINGS + 1]}", "stop",
            )  # fmt: skip
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, list | tuple) or not all(type(token) is int and token >= 0 for token in ids):
            raise RequestError(f"stop_token_ids must be a list of token ids, got {ids!r:.200}", "stop_token_ids")
        if len(ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids must be at most {MAX_STOP_TOKEN_IDS} ids, got {len(ids)}", "stop_token_ids"
            )
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    @property
    def sampling_type(self) -> SamplingType:
        """GREEDY when nothing is left to chance, RANDOM otherwise."""
        return SamplingType.GREEDY if self.temperature == 0 else SamplingType.RANDOM

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for a message."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SamplingParams:
        """Inverse of `to_dict`; validates again. Raises RequestError for an unknown field."""
        unknown = set(data) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise RequestError(f"unknown sampling parameter {sorted(unknown)[0]!r}", sorted(unknown)[0])
        return cls(**data)


@dataclasses.dataclass(frozen=True)
class BeamSearchParams:
    """Beam search, declared here so that its name stands; running one is refused until it is built."""

    beam_width: int = 5
    max_tokens: int = 16
