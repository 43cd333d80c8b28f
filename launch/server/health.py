"""The states of a server, in one table, and which of them it is in: behind the probes and behind each refusal.

It reads the engine and the front end's lifecycle, queues no work, and knows no route. `/livez` needs none of it: it
says that this process answers, whatever the state.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from configs.errors import QueueFullError
from launch.server.engine import Engine
from launch.server.errors import RATE_LIMIT, UNAVAILABLE, ApiError
from launch.server.lifecycle import Lifecycle


class _Row(NamedTuple):
    code: str
    probe: int
    request: int


class State(_Row, enum.Enum):
    """What the server is in.

    Attributes:
        code: the `status` or the error's `code` that is told.
        probe: what /readyz and /health answer.
        request: what a new request for generation is answered with; 200 if it is taken. Behind 429 and 503 stands
            Retry-After.
    """

    READY = _Row("ready", 200, 200)
    # Balancers leave it where it is: the others would fill up the sooner, and the answer says when to come again.
    QUEUE_FULL = _Row("queue_full", 200, 429)
    LOADING = _Row("loading", 503, 503)
    # Ranks or the scheduler died, hang, or raised; others are started, and open requests go on with them.
    RECOVERING = _Row("recovering", 503, 503)
    DRAINING = _Row("draining", 503, 503)
    # The breaker is open, or the front end itself broke down: nothing will be served any more.
    DEAD = _Row("engine_dead", 503, 503)


class Condition(NamedTuple):
    """A state and, where requests are refused, why."""

    state: State
    why: str = ""

    def error(self) -> ApiError:
        """The answer to a request that is refused."""
        kind = RATE_LIMIT if self.state.request == 429 else UNAVAILABLE
        return ApiError(self.state.request, self.why, kind, code=self.state.code)


def condition_of(engine: Engine, lifecycle: Lifecycle) -> Condition:
    """Where the server stands now; the first that holds."""
    if (failure := engine.failure) is not None:
        return Condition(State.DEAD, failure.message)
    if lifecycle.draining:
        return Condition(State.DRAINING, "the server is shutting down")
    if not engine.is_ready:
        if (cause := engine.recovering_from) is not None:
            return Condition(State.RECOVERING, f"the engine recovers from a failure: {cause.message}")
        return Condition(State.LOADING, "the model is still loading")
    try:
        engine.check_queue()
    except QueueFullError as error:
        return Condition(State.QUEUE_FULL, error.message)
    return Condition(State.READY)
