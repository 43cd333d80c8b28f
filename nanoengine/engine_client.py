"""The front end's side of the engine: checks requests, journals them and follows their tokens; knows no socket.

Whoever owns the transport hands in what arrived (`handle`), sends what stands in `outbox`, in order, and calls
`watch` about once a second while `is_waiting`. When the scheduler is gone it says so (`detach`), and when there is
another one too (`attach`): that one gets every open request with the tokens that are journalled. One `EngineClient`
belongs to one thread (`encode` excepted).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from configs.engine import EngineConfig
from configs.errors import (
    ChannelError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    NanoEngineError,
    RequestError,
    RequestTimeoutError,
    from_wire,
)
from nanoengine.beam_params import BeamSearchParams
from nanoengine.engine_stats import totals_of
from nanoengine.engine_status import EngineCondition, SchedulerRestartStats
from nanoengine.engine_view import Observer
from nanoengine.journal import CheckedRequest, RequestJournal, SequenceJournal
from nanoengine.messages import (
    Abort,
    AbortNamed,
    AddRequest,
    Deltas,
    EngineFailure,
    EngineState,
    Hello,
    Message,
    Ready,
    Recovering,
    ResetPrefixCache,
    Resubmit,
    StateRequest,
    Stats,
    TokenDelta,
    spelt_out,
)
from nanoengine.prompt_queue import PromptQueue
from nanoengine.prompts import Prompt
from nanoengine.recorder import RequestRecorder
from nanoengine.request_checks import check_priority, check_request_id, checked_request, checked_timeout
from nanoengine.sampling_params import SamplingParams
from nanoengine.silence import Silence

if TYPE_CHECKING:
    from nanoengine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Missing tokens are asked for at most this often, and this many times without a single token in between.
REPLAY_INTERVAL = 0.5
MAX_REPLAYS = 20


class EngineClient:
    """Journals of one front end's requests, and the messages that keep a scheduler at work on them.

    A request without a seed gets the next number of a generator that is seeded with the setting `seed` when the
    client is made: the same requests in the same order give the same tokens again, and two requests of the same
    prompt differ.

    Args:
        config: resolved.
        tokenizer: None when the engine runs without one; then token ids go in and out.
        clock: monotonic seconds.
        recorder: is told of each request's life.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        client_id: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        recorder: RequestRecorder | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.client_id = client_id or uuid.uuid4().hex
        self.outbox: deque[Message] = deque()
        self.facts: Ready | None = None  # what the scheduler told of itself; None until it is ready
        self.stats: Stats | None = None  # the latest that the scheduler told
        self._past_totals: dict[str, Any] | None = None  # of the schedulers before the one that is attached
        self.failure: EngineDeadError | None = None  # why no request can be served any more
        self.recovering_from: NanoEngineError | None = None  # why open requests pause for a moment
        self.restart_stats = SchedulerRestartStats()
        self._recorder = recorder or RequestRecorder()
        self._live: dict[str, RequestJournal] = {}  # by wire id
        self.observer = Observer(self._live.values())
        self._by_request_id: dict[str, RequestJournal] = {}
        self._queue = PromptQueue(config.server)  # by wire id
        self._serial = itertools.count()
        self._seeds = random.Random(config.model.seed)
        self._incarnation = 0
        self._clock = clock
        # Ranks that are threads of the scheduler keep it from answering for as long as a step.
        is_blocked = config.parallel.executor == "inprocess"
        self._silence = Silence(config.parallel.step_timeout if is_blocked else 0.0)
        self._is_attached = True

    # -- requests -----------------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Requests that will still get tokens."""
        return len(self._live)

    @property
    def num_queued(self) -> int:
        """Those of them that wait for their first token."""
        return len(self._queue)

    @property
    def is_waiting(self) -> bool:
        """Whether something is due from the scheduler, so that `watch` must be called."""
        return self.failure is None and (bool(self._live) or self.recovering_from is not None)

    def open_request_ids(self) -> list[str]:
        """Ids of the requests that will still get tokens, oldest first."""
        return list(self._by_request_id)

    def encode(self, prompt: Prompt) -> Prompt:
        """Give a prompt of text its token ids. Touches no state: long texts may be encoded in another thread.

        Raises:
            RequestError: the engine runs without a tokenizer, or the text is not valid Unicode.
        """
        if prompt.token_ids is not None:
            return prompt
        assert prompt.text is not None, "a prompt is text or token ids"
        if self.tokenizer is None:
            raise RequestError(
                "the engine runs without a tokenizer (skip_tokenizer_init): give token ids instead of text", "prompt"
            )
        return dataclasses.replace(prompt, token_ids=self.tokenizer.encode(prompt.text))

    def check(
        self, prompt: Prompt, params: SamplingParams | BeamSearchParams | None = None, grammar: str = ""
    ) -> CheckedRequest:
        """Check a request against model and settings; nothing is sent.

        A prompt must leave room for one token within max_model_len. More tokens than fit are not refused: the
        output ends there with finish reason `length`, as vLLM's engine does it, and so does max_tokens None.
        Parameters that are given are taken as they are; the checkpoint's defaults stand in for None. Whoever calls
        has compiled their structured_outputs to `grammar`.

        Raises:
            RequestError: it cannot be served as it stands; `param` names the field at fault.
        """
        return checked_request(self.encode(prompt), params, grammar, self.config, self.tokenizer)

    def check_queue(self, num_requests: int = 1) -> None:
        """Raise QueueFullError unless so many more requests may wait for their first token. Costs no tokenising."""
        self._queue.check(num_requests)

    def add(
        self,
        request: CheckedRequest,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> RequestJournal:
        """Open a journal and queue the request for the scheduler.

        Args:
            priority: the lower, the sooner, under the policy `priority`.
            timeout: seconds within which it must be complete; the setting `request_timeout` is an upper bound.

        Raises:
            RequestError: the id is malformed or belongs to a request that is not finished yet, the priority is no
                number of 32 bits, or the timeout is not positive.
            EngineDeadError: the engine is gone.
        """
        self.check_alive()
        serial = next(self._serial)
        if request_id is None:
            request_id = str(serial)
            while request_id in self._by_request_id:
                request_id += "'"  # somebody chose a number as an id
        check_request_id(request_id)
        if request_id in self._by_request_id:
            raise RequestError(f"request_id {request_id!r} belongs to a request that still runs", "request_id")
        check_priority(priority)
        if not self.is_waiting:
            self._silence.heard(self._clock())  # an idle scheduler was not silent, it had nothing to say
        journal = RequestJournal(
            request_id,
            f"{request_id}.{serial}",
            request.prompt,
            request.prompt_token_ids,
            request.params,
            request.max_tokens,
            self._draw_seed(request.params),
            priority,
            time.time(),
            self.tokenizer,
            request.cache_salt,
            checked_timeout(timeout, self.config.server.request_timeout),
            request.grammar,
            request.beams,
        )
        messages = journal.submission(self.client_id)
        self._recorder.accepted(journal)  # what may fail comes before anybody knows of it
        self._queue.add(journal.wire_id, len(request.prompt_token_ids))
        self._live[journal.wire_id] = self._by_request_id[request_id] = journal
        self.outbox.extend(messages)
        return journal

    def _draw_seed(self, params: SamplingParams) -> int:
        drawn = self._seeds.getrandbits(63)  # drawn even when not needed: a seed on one request moves no other
        return drawn if params.seed is None else params.seed

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> RequestJournal | None:
        """End a request, or one sequence of it, here and now; the scheduler is told.

        Returns its journal, or None when there is nothing (left) to abort, which is harmless.
        """
        journal = self._by_request_id.get(request_id)
        if journal is None:
            return None
        ended = [each for each in journal.sequences if not each.is_finished and index in (None, each.index)]
        for sequence in ended:
            sequence.finish("abort")
        if not ended:
            return None
        self.outbox.append(Abort(journal.wire_id, index, reason))
        self._forget_if_finished(journal)
        return journal

    def abort_named(self, named: AbortNamed) -> list[RequestJournal]:
        """End all requests that a message names; returns their journals."""
        ended = [self.abort(each) for each in self._by_request_id.copy() if named.stands_for(each)]
        return [journal for journal in ended if journal is not None]

    def resubmit_all(self) -> list[AddRequest | Abort]:
        """The messages that hand every unfinished request to a scheduler that knows nothing of them."""
        return [message for journal in self._live.values() for message in journal.submission(self.client_id)]

    def reset_prefix_cache(self) -> None:
        """No request from here on hits what is cached now. Raises EngineDeadError when the engine is gone."""
        self.check_alive()
        self.outbox.append(ResetPrefixCache())

    def _forget_if_finished(self, journal: RequestJournal) -> None:
        if not journal.finished:
            return
        journal.metrics.finished_time = time.time()
        self._queue.leave(journal.wire_id)
        self._by_request_id.pop(journal.request_id, None)
        self._live.pop(journal.wire_id, None)
        try:
            self.observer.ended(journal)
            self._recorder.ended(journal)
        except Exception:  # who counts must not be the end of who is counted
            logger.exception("the end of a request was not recorded", extra={"request_id": journal.request_id})

    # -- one scheduler after the other --------------------------------------------------------------------------

    def attach(self, condition: EngineCondition) -> None:
        """There is a new connection, to the scheduler that serves by `condition`: greet it, and hand it what is open.

        It answers with Ready. What an earlier scheduler still says is dropped.
        """
        self.restart_stats = dataclasses.replace(
            condition.restarts, requests_resumed=self.restart_stats.requests_resumed
        )
        if self.stats is not None:
            self._past_totals = totals_of(self.stats)
        others = [message for message in self.outbox if isinstance(message, AbortNamed | StateRequest)]
        self.outbox.clear()  # of this front end's requests the journals know better
        self.hello()
        if self._incarnation:
            self.restart_stats.requests_resumed += len(self._live)
            self._recorder.resumed(len(self._live))
        self.outbox.extend(self.resubmit_all())
        self.outbox.extend(others)
        self._incarnation, self._is_attached = condition.incarnation, True
        self._silence.heard(self._clock())

    def detach(self, condition: EngineCondition) -> None:
        """The connection is gone, and so is the scheduler: requests pause until there is another one."""
        self._is_attached = False
        if self.failure is None:  # it may have said so itself
            self.recovering_from = condition.cause
        self._silence.heard(self._clock())

    # -- what the scheduler says --------------------------------------------------------------------------------

    def hello(self) -> None:
        """Queue a greeting; the scheduler answers with Ready."""
        self.outbox.append(Hello(self.client_id, self._past_totals))

    def handle(self, message: Message) -> list[RequestJournal]:
        """Take a message of the scheduler; returns the requests that have news, each once.

        Raises ChannelError for a message that no scheduler sends.
        """
        self._silence.heard(self._clock())
        if isinstance(message, AbortNamed):
            return self.abort_named(message)
        if not isinstance(message, Ready | Recovering | Resubmit | Deltas | EngineState | Stats | EngineFailure):
            raise ChannelError(f"a scheduler does not send {type(message).__name__}")
        if message.incarnation < self._incarnation:
            return []  # last words of a scheduler that was replaced
        if message.incarnation > self._incarnation:
            replaced, self._incarnation = self._incarnation > 0, message.incarnation
            if replaced:
                self.outbox.extend(self.resubmit_all())
        match message:
            case Ready():
                self.facts, self.recovering_from = message, None
            case Recovering():
                self.recovering_from = from_wire(message.error)
            case Resubmit():
                self.outbox.extend(self.resubmit_all())
            case EngineState():
                self.observer.state = message
            case Stats():
                self.stats = message
            case EngineFailure():
                return self.fail(from_wire(message.error))
            case Deltas():
                deltas = [*spelt_out(message.deltas)]  # first of all: a message is taken, or can be sent again
                updated = [journal for delta in deltas if (journal := self._take(delta)) is not None]
                return list(dict.fromkeys(updated))
        return []

    def _take(self, delta: TokenDelta) -> RequestJournal | None:
        try:
            return self._accept(delta)
        except Exception as error:  # whatever a tokenizer may raise: a request that fails, fails alone
            logger.exception("a request failed in the front end", extra={"request_id": delta.request_id})
            journal = self._live.get(delta.request_id)
            if journal is not None:
                if not journal.finished:
                    self._fail_request(journal, EngineError(f"the front end failed: {type(error).__name__}: {error}"))
                    self.outbox.append(Abort(journal.wire_id, None, "error"))
                self._forget_if_finished(journal)
            return journal

    def _accept(self, delta: TokenDelta) -> RequestJournal | None:
        journal = self._live.get(delta.request_id)
        if journal is None or not 0 <= delta.index < len(journal.sequences):
            return None  # finished or aborted meanwhile
        sequence = journal.sequences[delta.index]
        if sequence.is_finished:
            return None
        if delta.metrics is not None:
            journal.add_metrics(delta.metrics)
        changed = self._apply(journal, sequence, delta)
        self._forget_if_finished(journal)
        return journal if changed else None

    def _apply(self, journal: RequestJournal, sequence: SequenceJournal, delta: TokenDelta) -> bool:
        """Accept the next tokens and how they end, if they do; says whether anything changed."""
        told = delta.prompt_logprobs is not None and journal.add_prompt_logprobs(delta.prompt_logprobs)
        if delta.finish_reason in ("abort", "error"):  # true whatever tokens are missing
            return self._apply_ended(journal, sequence, delta)
        length = len(sequence.token_ids)
        if delta.start > length or journal.lacks_prompt_before(delta):
            return self._ask_again(journal, urgent=delta.finish_reason is not None) or told
        if delta.start + len(delta.token_ids) < length:
            return told  # known already, and so is what follows it
        new = delta.token_ids[length - delta.start :]
        if not new and delta.finish_reason is None:
            return told
        logprobs = None if delta.logprobs is None else delta.logprobs[length - delta.start :]
        matched = sequence.append(new, hide_last=delta.finish_reason == "stop", logprobs=logprobs)
        if new:
            self._note_tokens(journal, sequence, len(sequence.token_ids) - length)
            self._queue.leave(journal.wire_id)
        if matched is not None:
            sequence.finish("stop", matched)
            if delta.finish_reason is None:
                self.outbox.append(Abort(journal.wire_id, sequence.index, "stop"))
        elif delta.finish_reason is not None:
            sequence.finish(delta.finish_reason, delta.stop_reason)
        return True

    def _apply_ended(self, journal: RequestJournal, sequence: SequenceJournal, delta: TokenDelta) -> bool:
        error = None if delta.error is None else from_wire(delta.error)
        length = len(sequence.token_ids)
        matched = None
        if delta.start <= length:
            new = delta.token_ids[length - delta.start :]
            logprobs = None if delta.logprobs is None else delta.logprobs[length - delta.start :]
            matched = sequence.append(new, logprobs=logprobs)
            if new:
                self._note_tokens(journal, sequence, len(sequence.token_ids) - length)
        if matched is not None:
            sequence.finish("stop", matched)
            return True
        if delta.finish_reason == "error":
            journal.failure = error = error or EngineError("the engine gave no reason")
        sequence.finish(str(delta.finish_reason), error=None if error is None else error.message)
        return True

    def _note_tokens(self, journal: RequestJournal, sequence: SequenceJournal, num_tokens: int) -> None:
        now = time.time()
        self._recorder.got_tokens(journal, sequence, num_tokens, now)
        journal.touch(now)
        sequence.last_token_time = now

    def _ask_again(self, journal: RequestJournal, urgent: bool) -> bool:
        """Tokens are missing: have the scheduler send everything behind the journal once more."""
        now = self._clock()
        if now < journal.next_replay and not urgent:
            return False
        journal.num_replays += 1
        if journal.num_replays > MAX_REPLAYS:
            self._fail_request(journal, EngineError("tokens were lost between scheduler and front end"))
            self.outbox.append(Abort(journal.wire_id, None, "error"))
            return True
        journal.next_replay = now + REPLAY_INTERVAL
        named = {"request_id": journal.request_id}
        logger.warning("tokens of a request are missing; asking for them again", extra=named)
        self.outbox.extend(journal.submission(self.client_id))
        return False

    # -- failure ------------------------------------------------------------------------------------------------

    def fail(self, cause: NanoEngineError) -> list[RequestJournal]:
        """The engine is gone: every open request ends with an error and no new one is taken. Harmless twice."""
        if self.failure is None:
            self.failure, self.recovering_from = EngineDeadError.because_of(cause), None
        self.outbox.clear()
        failed = list(self._live.values())
        for journal in failed:  # first of all: nobody must wait in vain if what follows fails
            self._fail_request(journal, self.failure)
        for journal in failed:
            self._forget_if_finished(journal)
        return failed

    def drop_unsendable(self, message: Message, error: ChannelError) -> list[RequestJournal]:
        """A message cannot be sent whatever happens: the request that it belongs to, if any, ends with the error."""
        logger.error("a %s cannot be sent: %s", type(message).__name__, error.message)
        journal = self._live.get(message.request_id) if isinstance(message, AddRequest | Abort) else None
        if journal is None:
            return []
        self._fail_request(journal, RequestError(f"the request cannot be sent to the scheduler: {error.message}"))
        self._forget_if_finished(journal)
        return [journal]

    def check_alive(self) -> None:
        """Raise EngineDeadError, with the cause, when the engine is gone."""
        if self.failure is not None:
            raise EngineDeadError.because_of(
                self.failure
            )  # a new one: a raised exception collects the traceback of each raise

    def watch(self) -> list[RequestJournal]:
        """Ask a silent scheduler for a sign of life; returns the requests whose time is over while there is none."""
        now = self._clock()
        if not self._is_attached:
            self._silence.heard(now)
            return self._expire(time.time())
        if self._silence.look(now) and self.is_waiting:
            self.hello()
        return []

    @property
    def hung(self) -> DeadlineError | None:
        """Why the scheduler must be taken for dead although its process lives: it was silent for too long."""
        if not self.is_waiting or not self._silence.is_too_long:
            return None
        return DeadlineError(f"the scheduler has not said anything for {self._silence.seconds:.0f} s")

    def _expire(self, now: float) -> list[RequestJournal]:
        """End the requests whose deadlines have passed, as a scheduler would."""
        due = [journal for journal in self._live.values() if journal.is_overdue(now)]
        for journal in due:
            error = RequestTimeoutError(f"the request was not complete within {journal.timeout:g} s")
            self._fail_request(journal, error)
            self._forget_if_finished(journal)
        return due

    @staticmethod
    def _fail_request(journal: RequestJournal, error: NanoEngineError) -> None:
        journal.failure = error
        for sequence in journal.sequences:
            if not sequence.is_finished:
                sequence.fail(error.message)
