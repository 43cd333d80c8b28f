"""What follows when a group of ranks has failed: is another one started, when, and which request may be to blame?

It decides over the scheduler's requests and keeps the counts; `engine.EngineCore` ends and starts the groups. It knows
no process and no socket.

A request that crashes its ranks each time, or for which there is never enough memory, must not take the others with
it. Whoever was in a step in flight when a group failed, or gave up the step, gets a strike, unless it has come on by
some tokens since the last one. From two strikes on, requests begin to run one at a time, those with the most strikes
first, and each new one must come on by some tokens before the next follows; only the one on trial is struck for a
failure meanwhile. Whose fourth strike comes while it runs alone, as the first of an epoch does, ends with an error.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable

from configs.errors import EngineError, NanoEngineError, StepError, WorkerError
from nanoengine.circuit_breaker import CircuitBreaker, pause_before
from nanoengine.scheduler import Scheduler
from nanoengine.sequence import Request
from nanoengine.starting_over import successor

logger = logging.getLogger(__name__)

# Who has come on by so many tokens is not what the group failed of. Two steps may be in flight, and a prefill samples
# a token, so fewer would clear a request whose every decode crashes.
INNOCENT_TOKENS = 4
SUSPECT_STRIKES = 2
GUILTY_STRIKES = 4


@dataclasses.dataclass
class RecoveryStats:
    """Counts since the scheduler started.

    Attributes:
        restarts: groups started in place of failed ones, by `reason` of the failure (`WorkerError.reason`; "start"
            for a group that failed while it started).
        seconds: from each failure until a group was ready again, added up, and the last of them.
        requests_resumed: open requests that went on with a new group, once for each group.
        tokens_recomputed: tokens whose keys and values were lost with a group.
        requests_condemned: requests that ended with an error because they crash every group.
        steps_given_up: steps for which the ranks found no memory; every open sequence was computed again.
        scheduler_faults: times when the scheduler itself raised, and another one took its place.
    """

    restarts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0
    last_seconds: float = 0.0
    requests_resumed: int = 0
    tokens_recomputed: int = 0
    requests_condemned: int = 0
    steps_given_up: int = 0
    scheduler_faults: int = 0


@dataclasses.dataclass
class _Suspicion:
    """`num_tokens` is what the request had when it got the last of its strikes."""

    strikes: int
    num_tokens: int


class Recovery:
    """One scheduler's failures. Call `failed`, then `resumed` when a group serves again, and `review` between steps."""

    def __init__(
        self, scheduler: Scheduler, max_restarts: int, window: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds that only go forward."""
        self.stats = RecoveryStats()
        self.error: NanoEngineError | None = None
        """What is being recovered from; None while a group serves."""
        self.next_start = 0.0
        """By `clock`: when the next group is to start."""
        self._scheduler, self._clock = scheduler, clock
        self._breaker = CircuitBreaker(max_restarts, window, clock)
        self._fault_breaker = CircuitBreaker(max_restarts, window, clock)
        self._since = 0.0
        self._num_failed_starts = 0
        self._suspicions: dict[Request, _Suspicion] = {}
        self._to_try: collections.deque[Request] = collections.deque()

    def failed(self, error: NanoEngineError, *, num_steps: int) -> bool:
        """A group failed that brought `num_steps` steps, or that did not even start; whether another one may follow."""
        now = self._clock()
        if self.error is None:
            self._since, self._num_failed_starts = now, 0
            reason = error.reason if isinstance(error, WorkerError) else "failed"
            self._count_lost()
            if self._accuse(error):
                self._breaker.reset()
        else:
            self._num_failed_starts += 1
            reason = "start"
        self.error = error
        if not self._breaker.allows(futile=num_steps == 0):
            return False
        self.stats.restarts[reason] += 1
        self.next_start = now + pause_before(self._num_failed_starts)
        return True

    def resumed(self) -> float:
        """A new group is ready, and the scheduler is in its epoch; returns how long it took in seconds."""
        self.stats.last_seconds = self._clock() - self._since
        self.stats.seconds += self.stats.last_seconds
        self.stats.requests_resumed += len(self._scheduler.requests)
        self.error = None
        self._line_up()
        return self.stats.last_seconds

    def step_given_up(self, error: StepError) -> None:
        """The ranks found no memory for a step and forget everything: let the scheduler start over."""
        self.stats.steps_given_up += 1
        self._count_lost()
        self._accuse(error)
        self.stats.requests_resumed += len(self._scheduler.requests)
        self._scheduler.give_up_steps(error.step_id)
        self._line_up()

    def replace_scheduler(self) -> Scheduler | None:
        """Another scheduler in place of this one, which raised; None when that has happened too often of late.

        It knows no request: what the old one made of them is not to be trusted. Each time counts as futile, for there
        is no telling whose fault it was.
        """
        if not self._fault_breaker.allows(futile=True):
            return None
        self.stats.scheduler_faults += 1
        self._scheduler = successor(self._scheduler)
        self._suspicions.clear()
        self._to_try.clear()
        return self._scheduler

    def _count_lost(self) -> None:
        self.stats.tokens_recomputed += sum(
            min(seq.num_computed_tokens, seq.num_tokens) for seq in (*self._scheduler.running, *self._scheduler.waiting)
        )

    def _line_up(self) -> None:
        """Who is suspected begins alone, one after the other."""
        suspects = [request for request, each in self._suspicions.items() if each.strikes >= SUSPECT_STRIKES]
        suspects.sort(key=lambda request: (-self._suspicions[request].strikes, _num_tokens(request)))
        self._to_try = collections.deque(suspects)
        self._try_next()

    def review(self) -> None:
        """Let the next request begin when the one on trial has come on, or ended. Costs nothing without a trial."""
        trial = self._scheduler.trial
        if trial is None:
            return
        if trial.is_finished() or _num_tokens(trial) - self._suspicions[trial].num_tokens >= INNOCENT_TOKENS:
            del self._suspicions[trial]
            self._try_next()

    def _try_next(self) -> None:
        trial = None
        while self._to_try and trial is None:
            trial = self._to_try.popleft()
            if trial.is_finished():
                del self._suspicions[trial]
                trial = None
        self._scheduler.trial = trial
        if trial is not None:
            logger.info("request %s runs apart: ranks may have failed of it", trial.request_id)

    def _accuse(self, error: NanoEngineError) -> bool:
        """Give strikes to the requests in flight; whether one of them was found guilty."""
        scheduler = self._scheduler
        flights = [[*flight.steady.seqs, *(each.seq for each in flight.records)] for flight in scheduler.in_flight]
        in_flight = dict.fromkeys(seq.request for seqs in flights for seq in seqs if not seq.is_finished)
        trial, scheduler.trial = scheduler.trial, None
        for request in [request for request in self._suspicions if request.is_finished()]:
            del self._suspicions[request]
        for request in in_flight if trial is None else [trial] if trial in in_flight else []:
            known = self._suspicions.get(request)
            if known is None or _num_tokens(request) - known.num_tokens >= INNOCENT_TOKENS:
                known = self._suspicions[request] = _Suspicion(0, 0)
            known.strikes, known.num_tokens = known.strikes + 1, _num_tokens(request)
            if known.strikes >= GUILTY_STRIKES and len(in_flight) == 1:
                self._condemn(request, known.strikes, error)
                return True
        return False

    def _condemn(self, request: Request, strikes: int, error: NanoEngineError) -> None:
        logger.error("request %s is given up: ranks failed of it %d times", request.request_id, strikes)
        del self._suspicions[request]
        self.stats.requests_condemned += 1
        message = (
            f"the request was given up: the ranks failed {strikes} times while they computed it, at last while they "
            f"computed nothing else ({error.message})"
        )
        self._scheduler.fail(request, EngineError(message))


def _num_tokens(request: Request) -> int:
    return sum(seq.num_completion_tokens for seq in request.seqs)
