"""What a client may ask of a beam search, validated on construction; knows neither beams nor how they are ranked.

Names are vLLM's, and transformers' where vLLM has none (`early_stopping`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from configs.errors import ConfigError, RequestError
from configs.fields import setting, validate
from nanoengine.sampling_params import SamplingParams

MAX_BEAM_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class BeamSearchParams:
    """How wide and how long a beam search goes, and how its outcomes are ranked (see `nanoengine.beam_search`).

    Raises:
        RequestError: on construction, naming the field, its value and the allowed range.
    """

    beam_width: int = setting(5, "beams, and outputs, of one prompt", minimum=1, maximum=MAX_BEAM_WIDTH)
    max_tokens: int | None = setting(16, "tokens to generate at most; None: up to max_model_len", minimum=1)
    ignore_eos: bool = setting(False, "no token ends a beam")
    # Both say that the model's own probabilities count: 0 because nothing is drawn, 1 because nothing is divided.
    temperature: float = setting(0.0, "0 or 1: a beam search draws nothing", minimum=0, maximum=1)
    length_penalty: float = setting(
        1.0, "outputs are ranked by their log-probability over length ** length_penalty", minimum=-32, maximum=32
    )
    include_stop_str_in_output: bool = setting(False, "show the token that ended the text")
    early_stopping: bool | str = False
    logprobs: int | None = setting(
        None, "likeliest tokens whose log-probabilities are told beside the chosen one's", minimum=0, maximum=20
    )
    skip_special_tokens: bool = setting(True, "leave special tokens out of the text")
    detokenize: bool = setting(True, "make text; false gives token ids alone")

    def __post_init__(self) -> None:
        try:
            validate(self)
        except ConfigError as error:
            raise RequestError(error.message, error.field) from None
        if self.temperature not in (0, 1):
            raise RequestError(
                f"temperature must be 0 or 1 in a beam search, which draws nothing, got {self.temperature!r}",
                "temperature",
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                f"early_stopping must be true, false or 'never', got {self.early_stopping!r:.100}", "early_stopping"
            )

    def sampling_params(self) -> SamplingParams:
        """What the rest of the engine needs to know: so many outputs, so long, shown like this.

        The chosen tokens' log-probabilities are always told, since their sum is.
        """
        return SamplingParams(
            n=self.beam_width,
            temperature=0.0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            detokenize=self.detokenize,
        )

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for a message."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BeamSearchParams:
        """Inverse of `to_dict`; validates again. Raises RequestError for an unknown field."""
        unknown = set(data) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise RequestError(f"unknown beam search parameter {sorted(unknown)[0]!r}", sorted(unknown)[0])
        return cls(**data)
