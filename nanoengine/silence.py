"""How long the scheduler has been silent while somebody waits for it, and when to ask it for a sign of life.

A scheduler answers a greeting at once, whatever its ranks do, so one that does not hangs, or is stopped. It knows no
message.
"""

from __future__ import annotations

# A scheduler that is silent this long while requests are open is asked for a sign of life (Hello, answered by Ready),
# again and again, and is taken for dead after so long.
PING_INTERVAL = 5.0
SILENCE_SECONDS = 30.0
# Between two looks no more than this counts as silence: this process may have been suspended itself.
_LONGEST_LOOK_GAP = 2.0


class Silence:
    """Call `heard` when the scheduler said something, and `look` about once a second while somebody waits for it.

    Args:
        patience: seconds that it may be silent beyond SILENCE_SECONDS.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self._limit = SILENCE_SECONDS + patience
        self.seconds = self._next_ping = self._last_look = 0.0

    def heard(self, now: float) -> None:
        """It lives, or it had nothing to say."""
        self.seconds, self._next_ping, self._last_look = 0.0, PING_INTERVAL, now

    def look(self, now: float) -> bool:
        """Let the time pass until `now`, in seconds of a clock that only goes forward; says whether to ask it."""
        self.seconds += min(max(0.0, now - self._last_look), _LONGEST_LOOK_GAP)
        self._last_look = now
        if self.seconds <= self._next_ping:
            return False
        self._next_ping = self.seconds + PING_INTERVAL
        return True

    @property
    def is_too_long(self) -> bool:
        """Whether it must be taken for dead."""
        return self.seconds > self._limit
