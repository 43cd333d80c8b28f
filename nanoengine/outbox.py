"""What the front ends have to be told: makes deltas of what happened to a sequence; knows no queue and no socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from configs.errors import NanoEngineError, to_wire
from nanoengine.decode_set import SteadyRows
from nanoengine.messages import AddRequest, TokenColumns, TokenDelta, spelt_out
from nanoengine.sequence import Sequence
from nanoengine.step import PromptLogprobs


class ClientDelta(NamedTuple):
    """A delta and the front end it is for."""

    client_id: str
    delta: TokenDelta


class ClientDeltas:
    """What was told since the last time, in order; spelt out, one `ClientDelta` a sequence, for whoever iterates.

    Attributes:
        entries: (client id, what it is told): one entry for all steady decodes of a step, one for each other row.
    """

    def __init__(self, entries: list[tuple[str, TokenDelta | TokenColumns]]) -> None:
        self.entries = entries

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __iter__(self) -> Iterator[ClientDelta]:
        for client_id, entry in self.entries:
            for delta in spelt_out([entry]):
                yield ClientDelta(client_id, delta)


class Outbox:
    """Deltas in the order in which things happened, until they are taken."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: list[tuple[str, TokenDelta | TokenColumns]] = []

    def refuse(self, message: AddRequest, error: NanoEngineError) -> None:
        """Queue the answer to a request that will not be served, to each of the sequences that its client expects."""
        for index in range(max(1, len(message.journal))):
            delta = TokenDelta(message.request_id, index, 0, [], finish_reason="error", error=to_wire(error))
            self._entries.append((message.client_id, delta))

    def emit(self, seq: Sequence, start: int) -> None:
        """Queue the tokens of `seq` from output position `start` on, and how it ended if it did."""
        token_ids = seq.token_ids[seq.num_prompt_tokens + start :]
        is_finished = seq.status.is_finished
        if not token_ids and not is_finished:
            return
        delta = TokenDelta(seq.request.request_id, seq.index, start, token_ids)
        if seq.logprobs is not None:
            delta.logprobs = seq.logprobs[start:]
        if is_finished:
            delta.finish_reason = seq.status.finish_reason
            delta.stop_reason, delta.error = seq.stop_reason, seq.error
        if is_finished or start == 0:  # it may end in the front end, by a stop string, and no last word be heard
            delta.metrics = self._metrics(seq)
        self._entries.append((seq.request.client_id, delta))

    def emit_columns(self, rows: SteadyRows, age: int, token_ids: list[int]) -> None:
        """Queue a token for each of the rows that took a step at that age. Neither list changes from now on."""
        first = rows.client_ids[0]
        if rows.client_ids.count(first) == len(rows):
            columns = TokenColumns(rows.request_ids, rows.indices, rows.offsets, age, token_ids)
            self._entries.append((first, columns))
            return
        numbers_of: dict[str, list[int]] = {}
        for number, client_id in enumerate(rows.client_ids):
            numbers_of.setdefault(client_id, []).append(number)
        for client_id, numbers in numbers_of.items():
            columns = TokenColumns(
                [rows.request_ids[i] for i in numbers],
                [rows.indices[i] for i in numbers],
                [rows.offsets[i] for i in numbers],
                age,
                [token_ids[i] for i in numbers],
            )
            self._entries.append((client_id, columns))

    def emit_prompt(self, seq: Sequence, chunk: PromptLogprobs | None) -> None:
        """Queue log-probabilities of the prompt of `seq`, if there are any; they come before its first token."""
        if chunk is not None:
            delta = TokenDelta(seq.request.request_id, seq.index, 0, [], prompt_logprobs=chunk)
            self._entries.append((seq.request.client_id, delta))

    def _metrics(self, seq: Sequence) -> dict[str, float]:
        request = seq.request
        scheduled = self._clock() if request.first_scheduled_time is None else request.first_scheduled_time
        return {
            "num_cached_tokens": request.num_cached_tokens,
            "num_preemptions": sum(each.num_preemptions for each in request.seqs),
            "queue_seconds": max(0.0, scheduled - request.arrival_time),
        }

    def take(self) -> ClientDeltas:
        """Everything since the last call, in order."""
        entries, self._entries = self._entries, []
        return ClientDeltas(entries)
