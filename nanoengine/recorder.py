"""What a front end tells of its requests' lives to whoever keeps count; the one here keeps none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoengine.journal import RequestJournal, SequenceJournal


class RequestRecorder:
    """Is told of each request that was accepted, of its tokens, and of its end, each once and in this order.

    It is called on the thread of the `EngineClient`, between a token's arrival and its being shown: be quick.
    """

    def accepted(self, journal: RequestJournal) -> None:
        """A request was checked and is on its way to the scheduler."""

    def got_tokens(self, journal: RequestJournal, sequence: SequenceJournal, num_tokens: int, now: float) -> None:
        """So many tokens of a sequence arrived at `now`; the journals still know the times of those before."""

    def resumed(self, num_requests: int) -> None:
        """So many open requests were handed to another scheduler, in place of one that is gone."""

    def ended(self, journal: RequestJournal) -> None:
        """It is over: complete, aborted or failed."""
