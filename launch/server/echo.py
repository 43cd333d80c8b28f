"""What an answer repeats of its prompt: its text in front, and log-probabilities; knows neither engine nor route."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from nanoengine.outputs import CompletionOutput, Logprob, RequestOutput

# JSON has no infinity; OpenAI and vLLM send this for what can hardly come.
LEAST_LOGPROB = -9999.0

# The log-probabilities of a token by token id: None for the first of a prompt, which nothing predicts.
TokenEntry = tuple[int, "dict[int, Logprob] | None"]


@dataclasses.dataclass(frozen=True)
class Echo:
    """What stands in front of the answers of one HTTP request.

    Attributes:
        texts: for each prompt what is repeated of it.
        alone: nothing follows it (`max_tokens` 0): the one token that was generated all the same is not shown.
        num_logprobs: how many of the likeliest tokens are shown at each token of the prompt; None shows no
            log-probabilities of it.
        token_text: what a token is shown as.
    """

    texts: Sequence[str]
    token_text: Callable[[int], str]
    alone: bool = False
    num_logprobs: int | None = None

    def applied(self, number: int, output: RequestOutput) -> RequestOutput:
        """The output of prompt `number` with its text in front."""
        text = self.texts[number]
        return dataclasses.replace(output, outputs=[self._with_text(text, each) for each in output.outputs])

    def _with_text(self, text: str, output: CompletionOutput) -> CompletionOutput:
        if not self.alone:
            return dataclasses.replace(output, text=text + output.text)
        reason = "length" if output.finish_reason == "stop" else output.finish_reason
        logprobs: list[dict[int, Logprob]] | None = None if output.logprobs is None else []
        return dataclasses.replace(
            output, text=text, token_ids=[], logprobs=logprobs, finish_reason=reason, stop_reason=None
        )

    def entries(self, output: RequestOutput) -> list[TokenEntry]:
        """The prompt's tokens with `num_logprobs` of the likeliest each, although more may have been computed.

        Of a request that was aborted before its first token, as many as were told of.
        """
        if self.num_logprobs is None or output.prompt_logprobs is None:
            return []
        shown: list[TokenEntry] = []
        for token_id, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=False):
            if entry is not None:
                entry = {
                    each: told for each, told in entry.items() if each == token_id or told.rank <= self.num_logprobs
                }
            shown.append((token_id, entry))
        return shown


def show_entries(entries: Sequence[dict[int, Logprob] | None]) -> list[dict[str, dict[str, Any]] | None]:
    """Log-probabilities by token id, as vLLM gives those of prompts."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": max(told.logprob, LEAST_LOGPROB),
                "rank": told.rank,
                "decoded_token": told.decoded_token,
            }
            for token_id, told in entry.items()
        }
        for entry in entries
    ]
