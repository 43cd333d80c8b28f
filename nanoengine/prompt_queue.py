"""The prompts that wait for their first token, and how many of them there may be; knows no request but by its name."""

from __future__ import annotations

from configs.engine import ServerConfig
from configs.errors import QueueFullError


class PromptQueue:
    """Lengths of the prompts that wait, by the request's name."""

    def __init__(self, limits: ServerConfig) -> None:
        self._limits = limits
        self._num_tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._num_tokens)

    def add(self, name: str, num_tokens: int) -> None:
        """A request waits."""
        self._num_tokens[name] = num_tokens

    def leave(self, name: str) -> None:
        """It waits no more. Harmless twice."""
        self._num_tokens.pop(name, None)

    def check(self, num_requests: int) -> None:
        """Raise QueueFullError unless so many more may wait."""
        limits, queued = self._limits, len(self)
        if queued + num_requests > limits.max_queued_requests:
            raise QueueFullError(
                f"{queued} requests are queued and {num_requests} more would exceed max_queued_requests "
                f"({limits.max_queued_requests}); try again later"
            )
        limit, num_tokens = limits.max_queued_tokens, sum(self._num_tokens.values())
        if limit is not None and num_tokens >= limit:
            raise QueueFullError(
                f"prompts of {num_tokens} tokens are queued, and max_queued_tokens is {limit}; try again later"
            )
