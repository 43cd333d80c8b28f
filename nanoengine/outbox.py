"""What the front ends have to be told: makes deltas of what happened to a sequence; knows no queue and no socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from configs.errors import RequestError, to_wire
from nanoengine.messages import AddRequest, TokenDelta
from nanoengine.sequence import Sequence


class ClientDelta(NamedTuple):
    """A delta and the front end it is for."""

    client_id: str
    delta: TokenDelta


class Outbox:
    """Deltas in the order in which things happened, until they are taken."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deltas: list[ClientDelta] = []

    def refuse(self, message: AddRequest, error: RequestError) -> None:
        """Queue the answer to a request that will not be served, to each of the sequences that its client expects."""
        for index in range(max(1, len(message.journal))):
            delta = TokenDelta(message.request_id, index, 0, [], finish_reason="error", error=to_wire(error))
            self._deltas.append(ClientDelta(message.client_id, delta))

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
            delta.stop_reason, delta.error, delta.metrics = seq.stop_reason, seq.error, self._metrics(seq)
        self._deltas.append(ClientDelta(seq.request.client_id, delta))

    def _metrics(self, seq: Sequence) -> dict[str, float]:
        request = seq.request
        scheduled = self._clock() if request.first_scheduled_time is None else request.first_scheduled_time
        return {
            "num_cached_tokens": request.num_cached_tokens,
            "num_preemptions": sum(each.num_preemptions for each in request.seqs),
            "queue_seconds": max(0.0, scheduled - request.arrival_time),
        }

    def take(self) -> list[ClientDelta]:
        """Everything since the last call, in order."""
        deltas, self._deltas = self._deltas, []
        return deltas
