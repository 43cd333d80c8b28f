"""Log-probabilities at every position of a prompt, chunk by chunk; knows neither attention nor sampling.

Logits at all positions of a long chunk would take gigabytes, so hidden states go through the language-model head in
slices, and of each slice only what was asked for is kept. Every rank cuts the same slices in the same order, since the
head gathers its shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from configs.errors import EngineError
from nanoengine.step import PromptLogprobs, SequenceState
from workers.logprobs import pick

# Float32 logits of one slice; their log-softmax takes as much again.
SLICE_BYTES = 64 * 2**20


@dataclasses.dataclass(slots=True)
class PromptSpan:
    """Consecutive entries (see `PromptLogprobs`) that one row of a step tells.

    Attributes:
        row: its number in the step.
        first_token: which of the step's tokens has the logits of the first entry.
        start: number of the first entry.
        token_ids: the token that each entry tells of.
        number: how many of the likeliest tokens are told beside it.
    """

    row: int
    first_token: int
    start: int
    token_ids: Sequence[int]
    number: int


@dataclasses.dataclass(slots=True)
class _Prompt:
    """What is still to be told of a prompt: its entries from number `start` on."""

    start: int
    token_ids: Sequence[int]
    number: int


class PromptRows:
    """The rows whose prompts are told of, by seq_id, until the last entry was computed."""

    def __init__(self) -> None:
        self._prompts: dict[int, _Prompt] = {}

    def begin(self, state: SequenceState) -> None:
        """Take note of a row's full state.

        Raises:
            EngineError: it came without its prompt, or begins behind what it is to tell.
        """
        self.drop(state.seq_id)
        if state.extras is None or state.extras.num_prompt_logprobs < 0:
            return
        start, length = state.extras.first_prompt_logprob, state.num_prompt_tokens
        if state.num_computed_tokens > start or len(state.past_token_ids) < length:
            raise EngineError(
                f"sequence {state.seq_id} is to tell of its {length} prompt tokens from position {start} on, "
                f"but begins at {state.num_computed_tokens} and came with {len(state.past_token_ids)} tokens"
            )
        self._prompts[state.seq_id] = _Prompt(start, state.past_token_ids[:length], state.extras.num_prompt_logprobs)

    def drop(self, seq_id: int) -> None:
        """Forget a row; harmless when it tells nothing."""
        self._prompts.pop(seq_id, None)

    def spans(self, states: Sequence[SequenceState], num_decodes: int = 0) -> list[PromptSpan]:
        """What this step tells, in the order of its rows. Costs nothing where no row tells anything.

        Before `states` stand `num_decodes` rows of a token each, none of which tells anything.
        """
        spans: list[PromptSpan] = []
        if not self._prompts:
            return spans
        num_tokens = num_decodes
        for row, state in enumerate(states, start=num_decodes):
            first_token, num_tokens = num_tokens, num_tokens + len(state.token_ids)
            prompt = self._prompts.get(state.seq_id)
            if prompt is None:
                continue
            start, total = prompt.start, len(prompt.token_ids) - 1
            end = min(state.num_computed_tokens + len(state.token_ids), total)
            if end > start:
                first = first_token + start - state.num_computed_tokens
                spans.append(PromptSpan(row, first, start, prompt.token_ids[start + 1 : end + 1], prompt.number))
                prompt.start = end
            if end == total:
                self.drop(state.seq_id)
        return spans


def tell_prompts(
    compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
    hidden: torch.Tensor,
    spans: Sequence[PromptSpan],
    vocab_size: int,
) -> dict[int, PromptLogprobs]:
    """What is asked of each span, by its row; nothing on other ranks than 0, which take part all the same.

    Args:
        compute_logits: maps (num_rows, hidden_size) to (num_rows, vocab_size) float32 on rank 0, to None elsewhere.
        hidden: (num_tokens, hidden_size), all tokens of the step.
        spans: at least one.
    """
    lengths = [len(span.token_ids) for span in spans]
    where = np.concatenate([np.arange(span.first_token, span.first_token + len(span.token_ids)) for span in spans])
    chosen = np.concatenate([np.asarray(span.token_ids, dtype=np.int64) for span in spans])
    places = torch.from_numpy(np.stack((where, chosen))).to(hidden.device)  # (2, num_entries)
    number = max(span.number for span in spans)
    found = []
    for tokens, targets in torch.split(places, max(1, SLICE_BYTES // (4 * vocab_size)), dim=1):
        logits = compute_logits(hidden.index_select(0, tokens))
        if logits is not None:
            found.append(pick(logits.log_softmax(dim=-1), targets, number))
        del logits  # before the next slice is made
    if not found:
        return {}
    columns = (torch.split(torch.cat(column), lengths) for column in zip(*found, strict=True))
    return {span.row: _pack(span, *parts) for span, *parts in zip(spans, *columns, strict=True)}


def _pack(span: PromptSpan, ids: torch.Tensor, values: torch.Tensor, ranks: torch.Tensor) -> PromptLogprobs:
    width = min(1 + span.number, ids.shape[1])
    return PromptLogprobs(
        span.start,
        width,
        ids[:, :width].to("cpu", torch.int32).numpy().tobytes(),
        values[:, :width].cpu().numpy().tobytes(),
        ranks.to("cpu", torch.int32).numpy().tobytes(),
    )
