"""Changes logits before they are sampled: bias, penalties, and masks of what may not come; knows no model and no draw.

In vLLM's order: bias, repetition penalty, frequency and presence penalty, masks. A row keeps the distinct ids that it
has seen, with their counts, so a step touches these logits alone and not the whole vocabulary. Everything is
elementwise, so a row's bits do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from nanoengine.step import RowExtras

if TYPE_CHECKING:
    from workers.structured import RowMatcher

Int64Array = npt.NDArray[np.int64]


class _Tally:
    """Distinct token ids and how often each came, as arrays with room to grow: counting one more is O(1)."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        ids, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
        self._ids, self._counts = ids, counts.astype(np.int64)
        self._slots = {token: slot for slot, token in enumerate(ids.tolist())}

    @property
    def ids(self) -> Int64Array:
        """(num_distinct,)."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Int64Array:
        """(num_distinct,), of `ids`."""
        return self._counts[: len(self._slots)]

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            room = np.zeros(max(64, len(self._ids)), dtype=np.int64)
            self._ids, self._counts = np.concatenate((self._ids, room)), np.concatenate((self._counts, room))
        self._ids[slot] = token
        self._counts[slot] += 1


class RowProcessor:
    """One row's extras and what they need of its past.

    Args:
        extras: of the row.
        num_prompt_tokens: where its output begins.
        past_token_ids: prompt and output so far when `extras` look back, else not needed.
        matcher: behind the output so far, where the extras have a grammar; what masks the row then is `constrain`.
    """

    def __init__(
        self,
        extras: RowExtras,
        num_prompt_tokens: int,
        past_token_ids: Sequence[int],
        matcher: RowMatcher | None = None,
    ) -> None:
        self.extras = extras
        self.matcher = matcher
        self.num_prompt_tokens = num_prompt_tokens
        self.bias_ids = np.array([token for token, _ in extras.logit_bias], dtype=np.int64)
        self.biases = np.array([bias for _, bias in extras.logit_bias], dtype=np.float32)
        self.allowed_ids = np.array(extras.allowed_token_ids, dtype=np.int64)
        self._allowed = frozenset(extras.allowed_token_ids)
        self._num_tokens = len(past_token_ids)
        self._generated = list(past_token_ids[num_prompt_tokens:])
        self.seen = _Tally(past_token_ids if extras.repetition_penalty != 1.0 else ())
        self.output = _Tally(self._generated if extras.frequency_penalty or extras.presence_penalty else ())
        self._bad_tokens = frozenset(word[0] for word in extras.bad_words if len(word) == 1)
        self._bad_words: dict[int, list[tuple[int, ...]]] = {}  # by the last id before the one to mask
        for word in extras.bad_words:
            if len(word) > 1:
                self._bad_words.setdefault(word[-2], []).append(word)

    def observe(self, start: int, token_ids: Sequence[int]) -> None:
        """Count tokens that stand from position `start` on; those that are known already are not counted again."""
        if not self.extras.looks_back:
            return
        for token in token_ids[max(0, self._num_tokens - start) :]:
            self._num_tokens += 1
            self._generated.append(token)
            if self.matcher is not None:
                self.matcher.observe(token)
            if self.extras.repetition_penalty != 1.0:
                self.seen.add(token)
            if self.extras.frequency_penalty or self.extras.presence_penalty:
                self.output.add(token)

    def bad_token_ids(self) -> set[int]:
        """Ids that would complete a bad word."""
        banned = set(self._bad_tokens)
        if self._generated:
            for word in self._bad_words.get(self._generated[-1], ()):
                if tuple(self._generated[1 - len(word) :]) == word[:-1]:
                    banned.add(word[-1])
        return banned

    def banned(self, num_generated: int) -> set[int]:
        """Ids that may not come next. What would leave no allowed token at all is not banned."""
        banned = self.bad_token_ids()
        if num_generated < self.extras.min_tokens:
            banned.update(self.extras.stop_token_ids)
        return set() if banned and self._allowed and self._allowed <= banned else banned


def process(logits: torch.Tensor, rows: Sequence[tuple[int, int, RowProcessor]]) -> None:
    """Change the logits of some rows, in place. Those that have a grammar are masked by `structured.constrain`.

    Args:
        logits: (num_rows, vocab_size) float32.
        rows: (row of logits, position that the sampled token will have, processor), only rows that have extras.
    """
    _add_bias(logits, [(row, each) for row, _, each in rows if len(each.bias_ids)])
    _penalise_repetition(logits, [(row, each) for row, _, each in rows if len(each.seen.ids)])
    _penalise_output(logits, [(row, each) for row, _, each in rows if len(each.output.ids)])
    free = [row for row in rows if row[2].matcher is None]
    for row, _, each in free:
        if len(each.allowed_ids):
            allowed = torch.from_numpy(each.allowed_ids).to(logits.device)
            kept = logits[row].index_select(0, allowed)
            logits[row].fill_(-torch.inf).index_copy_(0, allowed, kept)
    banned = [(row, each.banned(position - each.num_prompt_tokens)) for row, position, each in free]
    where = _places(logits, [(row, np.array(sorted(ids), dtype=np.int64)) for row, ids in banned if ids])
    if where is not None:
        logits.index_put_(where, logits.new_tensor(-torch.inf))


def _add_bias(logits: torch.Tensor, rows: list[tuple[int, RowProcessor]]) -> None:
    where = _places(logits, [(row, each.bias_ids) for row, each in rows])
    if where is not None:
        biases = torch.from_numpy(np.concatenate([each.biases for _, each in rows])).to(logits.device)
        logits.index_put_(where, logits[where] + biases)


def _penalise_repetition(logits: torch.Tensor, rows: list[tuple[int, RowProcessor]]) -> None:
    """As transformers' RepetitionPenaltyLogitsProcessor (Keskar et al., "CTRL", 2019)."""
    where = _places(logits, [(row, each.seen.ids) for row, each in rows])
    if where is not None:
        penalty = _spread(logits, ((each.extras.repetition_penalty, len(each.seen.ids)) for _, each in rows))
        values = logits[where]
        logits.index_put_(where, torch.where(values < 0, values * penalty, values / penalty))


def _penalise_output(logits: torch.Tensor, rows: list[tuple[int, RowProcessor]]) -> None:
    """As OpenAI defines it: less frequency_penalty for each time a token was generated, less presence_penalty once."""
    where = _places(logits, [(row, each.output.ids) for row, each in rows])
    if where is not None:
        counts = torch.from_numpy(np.concatenate([each.output.counts for _, each in rows])).to(logits.device)
        frequency = _spread(logits, ((each.extras.frequency_penalty, len(each.output.ids)) for _, each in rows))
        presence = _spread(logits, ((each.extras.presence_penalty, len(each.output.ids)) for _, each in rows))
        logits.index_put_(where, logits[where] - frequency * counts - presence)


def _places(logits: torch.Tensor, parts: list[tuple[int, Int64Array]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Row and column, (num_places,) each, of every id of every part; None when there is none."""
    if not parts:
        return None
    rows = np.repeat([row for row, _ in parts], [len(ids) for _, ids in parts])
    places = torch.from_numpy(np.stack((rows, np.concatenate([ids for _, ids in parts])))).to(logits.device)
    return places[0], places[1]


def _spread(logits: torch.Tensor, parts: Iterable[tuple[float, int]]) -> torch.Tensor:
    """(num_places,) float32: each value as often as its row has places."""
    values, repeats = zip(*parts, strict=True)
    return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), repeats)).to(logits.device)
