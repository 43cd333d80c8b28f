"""Clients that ask, and look at what comes: whole or as a stream, to the end or not. They know nothing of faults.

What a client may be told instead of the right answer: that the engine recovers or that the queue is full (503 and 429,
after which it asks again), and what it asked for itself (an end by /abort, a 504 after `timeout`). Anything else is a
fault of the server, and so is a request that does not end.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from launch.bench.chaos.answers import Answer
from launch.bench.chaos.traffic import ID_PREFIXES, Case
from launch.client.connection import ClientError, HttpClient, Response
from launch.client.events import EventParser

# How a request is asked for, and how often in a hundred.
WAYS = {"whole": 26, "stream": 34, "resumed": 14, "aborted": 9, "dropped": 9, "timed out": 8}
_NEEDS_STREAM = frozenset({"stream", "resumed", "aborted"})
# Why an engine that will serve again refuses right now, by the code of the error.
_COME_AGAIN = frozenset({"recovering", "queue_full"})
_RETRY_SECONDS = 1.0  # what Retry-After says
_MAX_ANSWER_BYTES = 16 * 2**20
_DONE = "[DONE]"


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of one request. Times are of `time.monotonic`.

    `result` is right, aborted, dropped, timed out or refused, which are as they should be, or wrong, failed or stuck.
    `silence` is the longest time without news of a stream, from its sending on.
    """

    case: Case
    way: str
    request_id: str
    began: float
    ended: float = 0.0
    result: str = ""
    detail: str = ""
    silence: float = 0.0
    num_tokens: int = 0

    @property
    def is_good(self) -> bool:
        """Whether the server did what it should."""
        return self.result in ("right", "aborted", "dropped", "timed out", "refused")


class _Refused(Exception):
    """Come again."""


class Record:
    """All outcomes, and how often clients were told to come again, by code."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.refusals: collections.Counter[str] = collections.Counter()
        # Refused by hanging up before an answer came: the server may have accepted it or not.
        self.num_unsure = 0


class Clients:
    """Asks one server, on one event loop, each request on a connection of its own.

    Args:
        expected: the undisturbed answers; a case that is not in it is not compared.
        patience: seconds after which a request counts as stuck.
    """

    def __init__(self, http: HttpClient, record: Record, patience: float) -> None:
        self.expected: dict[Case, Answer] = {}
        self._http, self._record, self._patience = http, record, patience
        self._number = 0
        self._asking: set[asyncio.Task[Outcome]] = set()

    def hang_up(self) -> None:
        """Break off what is being asked; nothing is noted of it."""
        for task in self._asking:
            task.cancel()

    async def ask_on(self, cases: Sequence[Case], ways: Mapping[str, int], dice: random.Random) -> None:
        """Be one client: ask at random, one request after the other, until cancelled."""
        while True:
            case = dice.choice(cases)
            possible = {way: often for way, often in ways.items() if case.can_stream or way not in _NEEDS_STREAM}
            [way] = dice.choices(list(possible), list(possible.values()))
            outcome = await self.ask(case, way, dice)
            if outcome.result == "failed":
                await asyncio.sleep(_RETRY_SECONDS)  # a server that is not there fails at once

    async def ask(self, case: Case, way: str, dice: random.Random, insist: bool = True) -> Outcome:
        """Ask, again where the server says so if we `insist`, and note what becomes of it.

        A cancellation lets the request come to its end first: one that is broken off tells nothing.
        """
        asking = asyncio.create_task(self._ask(case, way, dice, insist))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            await asking
            raise

    async def _ask(self, case: Case, way: str, dice: random.Random, insist: bool) -> Outcome:
        self._number += 1
        outcome = Outcome(case, way, f"chaos-{self._number}", time.monotonic())
        try:
            async with asyncio.timeout(self._patience):
                while not outcome.result:
                    try:
                        await self._play(outcome, dice)
                    except _Refused as refusal:
                        self._record.refusals[str(refusal)] += 1
                        if not insist:
                            outcome.result = "refused"
                            break
                        await asyncio.sleep(_RETRY_SECONDS * dice.uniform(0.3, 1.0))
        except TimeoutError:
            outcome.result, outcome.detail = "stuck", f"no end after {self._patience:g} s"
            self._record.num_unsure += case.num_requests
        except ClientError as error:
            outcome.result, outcome.detail = "failed", f"{error.kind}: {error.message}"
        except Exception as error:  # an answer of a shape that it should not have
            outcome.result, outcome.detail = "failed", f"{type(error).__name__}: {error}"
        outcome.ended = time.monotonic()
        self._record.outcomes.append(outcome)
        return outcome

    async def _play(self, outcome: Outcome, dice: random.Random) -> None:
        answer = Answer()
        match outcome.way:
            case "whole":
                await self._whole(outcome, answer)
            case "timed out":
                try:
                    await self._whole(outcome, answer, timeout=dice.uniform(0.01, 0.5))
                except ClientError as error:
                    if error.status != 504:
                        raise
                    outcome.result = "timed out"
                    return
            case "dropped":
                if not await self._dropped(outcome, answer, dice):
                    outcome.result, outcome.detail = _judged(
                        "dropped", answer.difference_so_far(self.expected[outcome.case])
                    )
                    return
            case "resumed":
                await self._resumed(outcome, answer, dice)
            case "aborted":
                await self._aborted(outcome, answer, dice)
            case _:
                async for _ in self._events(outcome, answer):
                    pass
        self._judge(outcome, answer)

    def _judge(self, outcome: Outcome, answer: Answer) -> None:
        outcome.num_tokens = answer.num_tokens
        expected = self.expected.get(outcome.case)
        if expected is None:
            self.expected[outcome.case] = answer
            outcome.result = "right"
        elif "abort" in answer.finish_reasons and outcome.way == "aborted":
            outcome.result, outcome.detail = _judged("aborted", answer.difference_so_far(expected))
        else:
            outcome.result, outcome.detail = _judged("right", answer.difference(expected))

    # -- ways ---------------------------------------------------------------------------------------------------

    async def _whole(self, outcome: Outcome, answer: Answer, **fields: Any) -> None:
        async with self._request(outcome, fields) as response:
            answer.add(_object(await response.read(_MAX_ANSWER_BYTES)))

    async def _aborted(self, outcome: Outcome, answer: Answer, dice: random.Random) -> None:
        """Ask for its end in the middle."""
        left = dice.randrange(8)
        async for _ in self._events(outcome, answer):
            if left == 0:
                await self._post("/abort", {"request_id": outcome.request_id})
            left -= 1

    async def _dropped(self, outcome: Outcome, answer: Answer, dice: random.Random) -> bool:
        """Hang up in the middle; whether the answer was complete before that."""
        try:
            async with asyncio.timeout(dice.uniform(0, 0.6)):
                if outcome.case.can_stream and dice.random() < 0.7:
                    async for _ in self._events(outcome, answer):
                        pass
                else:
                    await self._whole(outcome, answer)
        except TimeoutError:
            self._record.num_unsure += outcome.case.num_requests
            return False
        return True

    async def _resumed(self, outcome: Outcome, answer: Answer, dice: random.Random) -> None:
        """Read a stream in several parts, hanging up in between and naming the last event that came."""
        parser, path = EventParser(), f"/v1/streams/{ID_PREFIXES[outcome.case.path]}{outcome.request_id}"
        async with contextlib.aclosing(self._events(outcome, answer, parser, {"X-Stream-Resume": "1"})) as events:
            if await _read_until(events, dice.randrange(1, 12)):
                return
        while True:
            await asyncio.sleep(dice.uniform(0, 0.5))
            last_id, parser = parser.last_id, EventParser()
            async with self._http.request("GET", path, headers={"Last-Event-ID": last_id}) as response:
                if response.status == 204:
                    return
                await _check(response)
                async with contextlib.aclosing(_read_events(response, parser, answer, outcome)) as events:
                    if await _read_until(events, dice.randrange(1, 25)):
                        return

    # -- below --------------------------------------------------------------------------------------------------

    async def _events(
        self,
        outcome: Outcome,
        answer: Answer,
        parser: EventParser | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[None, None]:
        """Ask for a stream and add it to the answer, as it comes. Leaving it hangs up."""
        asked: dict[str, Any] = {"stream": True}
        if "sampling_params" not in outcome.case.body:
            asked["stream_options"] = {"include_usage": True}
        async with self._request(outcome, asked, headers) as response:
            async for _ in _read_events(response, parser or EventParser(), answer, outcome):
                yield

    @contextlib.asynccontextmanager
    async def _request(
        self, outcome: Outcome, fields: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Response, None]:
        body = json.dumps({**outcome.case.body, **fields}).encode()
        own = {"X-Request-Id": outcome.request_id, **(headers or {})}
        async with self._http.request("POST", outcome.case.path, body, own) as response:
            await _check(response)
            yield response

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        async with self._http.request("POST", path, json.dumps(body).encode()) as response:
            await _check(response)
            await response.read(_MAX_ANSWER_BYTES)


async def _read_events(
    response: Response, parser: EventParser, answer: Answer, outcome: Outcome
) -> AsyncGenerator[None, None]:
    """Add the events of a stream to the answer; yields after each read of the socket that brought some.

    Raises:
        ClientError: an error event, or an end without [DONE].
    """
    since, is_done = time.monotonic(), False
    async with contextlib.aclosing(response.pieces()) as pieces:
        async for piece in pieces:
            events = parser.feed(piece)
            for data in events:
                if data == _DONE:
                    is_done = True
                    continue
                chunk = _object(data.encode())
                if chunk.get("error"):
                    raise ClientError("error event", str(chunk["error"].get("message")))
                answer.add(chunk)
            if events:
                now = time.monotonic()
                outcome.silence, since = max(outcome.silence, now - since), now
                yield
    if not is_done:
        raise ClientError("cut off", f"a stream ended without {_DONE}")


async def _read_until(events: AsyncGenerator[None, None], number: int) -> bool:
    """Take so many at most; whether they came to their end."""
    async for _ in events:
        number -= 1
        if number == 0:
            return False
    return True


async def _check(response: Response) -> None:
    """Raise what an answer other than 200 says."""
    if response.status == 200:
        return
    body = await response.read(_MAX_ANSWER_BYTES)
    try:
        error = _object(body).get("error") or {}
    except ClientError:
        error = {"message": body[:200].decode(errors="replace")}
    if error.get("code") in _COME_AGAIN:
        raise _Refused(error["code"])
    raise ClientError(f"HTTP {response.status}", str(error.get("message")), response.status, error.get("code"))


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ClientError("bad answer", f"no JSON object: {body[:100]!r}")
    return found


def _judged(good: str, difference: str | None) -> tuple[str, str]:
    return (good, "") if difference is None else ("wrong", difference)
