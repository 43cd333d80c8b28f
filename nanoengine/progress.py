"""The progress bar of `LLM.generate`: finished prompts, and tokens a second; knows requests by their counts only."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Protocol

# The bar redraws itself at most this often; the speeds need not be computed more often than that.
_INTERVAL = 0.1


class Counted(Protocol):
    """What the bar needs of a request."""

    @property
    def finished(self) -> bool: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_generated_tokens(self) -> int: ...


class Progress:
    """A tqdm bar over prompts that shows prefill and decode speed, both since its start; silent when not enabled.

    A prompt counts as prefilled once its first token is there.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        self._bar: Any = None
        if enabled:
            from tqdm.auto import tqdm  # late: a server never draws one

            self._bar = tqdm(total=total, desc="Generating", unit="prompt", dynamic_ncols=True)
        self._started = time.perf_counter()
        self._next_postfix = _INTERVAL
        self._seen: dict[int, int] = {}  # id of the request -> its generated tokens
        self.num_prefilled = 0
        self.num_decoded = 0
        self.num_finished = 0

    def update(self, request: Counted) -> None:
        """Count what is new of a request."""
        before, now = self._seen.get(id(request), 0), request.num_generated_tokens
        if before == 0 and now > 0:
            self.num_prefilled += request.num_prompt_tokens
        self.num_decoded += now - before
        self._seen[id(request)] = now
        if request.finished:
            self.num_finished += 1
        if self._bar is not None:
            self._draw(int(request.finished))

    def _draw(self, num_finished: int) -> None:
        elapsed = time.perf_counter() - self._started
        if elapsed >= self._next_postfix or self.num_finished == self._bar.total:
            self._next_postfix = elapsed + _INTERVAL
            self._bar.set_postfix_str(
                f"prefill {self.num_prefilled / elapsed:.0f} tok/s, decode {self.num_decoded / elapsed:.0f} tok/s",
                refresh=num_finished == 0,
            )
        if num_finished:
            self._bar.update(num_finished)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
