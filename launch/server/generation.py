"""Runs the prompts of one HTTP request and sends what comes of them, whole or as server-sent events.

It knows the engine's stream of outputs and ASGI, and leaves the shape of an answer to `formats`. Wherever it waits it
also listens for the client's hanging up, which ends the request in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from configs.errors import RequestError, from_wire
from launch.server.engine import Engine
from launch.server.errors import from_exception
from launch.server.formats import AnswerFormat
from nanoengine.beam_params import BeamSearchParams
from nanoengine.outputs import RequestOutput
from nanoengine.prompts import PromptInput, at_index
from nanoengine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A stream's status line waits for the first output, so that what is refused gets a status of its own; a request that
# waits longer than this in the queue is certainly accepted.
STATUS_WAIT_SECONDS = 5.0

_DONE = b"data: [DONE]\n\n"


async def respond(
    request: Request,
    engine: Engine,
    prompts: list[PromptInput],
    params: SamplingParams | BeamSearchParams,
    answer_id: str,
    answer: AnswerFormat,
    stream: bool,
    scheduling: dict[str, Any],
) -> Response:
    """Run the prompts, tokenised already, and answer. `scheduling` holds further arguments of `Engine.generate`.

    Raises:
        RequestError, EngineError: what fails before there is anything to send.
    """
    outputs = _all_outputs(engine, prompts, params, answer_id, scheduling)
    hang_up = asyncio.ensure_future(_hang_up(request.receive))
    if stream:
        return await _begin_stream(_events(outputs, answer), hang_up)
    try:
        finished = await _unless(hang_up, _collect(outputs, len(prompts)))
    finally:
        await _cancelled(hang_up)
    return JSONResponse(answer.whole(finished)) if finished is not None else _nobody()


# -- outputs ----------------------------------------------------------------------------------------------------


async def _all_outputs(
    engine: Engine,
    prompts: list[PromptInput],
    params: SamplingParams | BeamSearchParams,
    answer_id: str,
    scheduling: dict[str, Any],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of all prompts as they come, each with its prompt's index. Leaving it aborts what is not finished."""

    def run(prompt: PromptInput, request_id: str) -> AsyncGenerator[RequestOutput, None]:
        if isinstance(params, BeamSearchParams):
            return engine.beam_search(prompt, params, request_id, **scheduling)
        return engine.generate(prompt, params, request_id, **scheduling)

    if len(prompts) == 1:
        async with contextlib.aclosing(run(prompts[0], answer_id)) as single:
            async for output in single:
                yield 0, _unless_failed(output)
        return
    # Bounded, so that a slow client holds up the reading of outputs, which then merge, and no memory fills up.
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue(maxsize=len(prompts))

    async def read(index: int) -> None:
        try:
            async with contextlib.aclosing(run(prompts[index], f"{answer_id}-{index}")) as several:
                async for output in several:
                    await queue.put((index, output))
        except RequestError as error:
            await queue.put((index, at_index(error, index, len(prompts))))
        except Exception as error:  # travels to the one who reads
            await queue.put((index, error))

    readers = [asyncio.create_task(read(index)) for index in range(len(prompts))]
    try:
        num_open = len(prompts)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            num_open -= item.finished
            yield index, _unless_failed(item)
    finally:
        await _cancelled(*readers)


def _unless_failed(output: RequestOutput) -> RequestOutput:
    """Raise the error of a request that failed while it ran."""
    for each in output.outputs:
        if each.finish_reason == "error":
            raise from_wire({"kind": each.error_kind, "message": each.error or "the request failed"})
    return output


async def _collect(outputs: AsyncGenerator[tuple[int, RequestOutput], None], num_prompts: int) -> list[RequestOutput]:
    async with contextlib.aclosing(outputs):
        last = {index: output async for index, output in outputs}
    return [last[index] for index in range(num_prompts)]


# -- server-sent events -----------------------------------------------------------------------------------------


async def _events(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None], answer: AnswerFormat
) -> AsyncGenerator[bytes, None]:
    """One piece of the body for each output that adds something."""
    async with contextlib.aclosing(outputs):
        async for index, output in outputs:
            piece = b"".join([_event(chunk) for chunk in answer.chunks(index, output)])
            if piece:
                yield piece
    usage = answer.usage_chunk()
    if usage is not None:
        yield _event(usage)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _begin_stream(events: AsyncGenerator[bytes, None], hang_up: asyncio.Future[None]) -> Response:
    """Wait for the first event, for a while, and answer with the stream. Raises what fails until then."""
    first = asyncio.ensure_future(anext(events))
    try:
        await _either(first, hang_up, STATUS_WAIT_SECONDS)
        if first.done():
            first.result()
        elif hang_up.done():
            await _closed(events, first)
            return _nobody()
    except BaseException:
        await _closed(events, first, hang_up)
        raise
    return EventStream(first, events, hang_up)


class EventStream(Response):
    """A response that sends events until they end or the client hangs up, and then closes their source.

    What fails once the stream has begun is sent as an event. `[DONE]` ends the stream either way.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: asyncio.Future[bytes], events: AsyncGenerator[bytes, None], hang_up: asyncio.Future[None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events, self._hang_up = first, events, hang_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sender = asyncio.create_task(self._send_all(send))
        try:
            await _either(sender, self._hang_up)
            if sender.done():
                sender.result()
        finally:
            await _cancelled(sender)
            await _closed(self._events, self._first, self._hang_up)

    async def _send_all(self, send: Send) -> None:
        try:
            await _send_body(send, await self._first)
            async for event in self._events:
                await _send_body(send, event)
        except Exception as error:  # the status is long gone, so the error becomes an event
            shown = from_exception(error)
            if shown.status == 500:
                logger.error("a stream failed", exc_info=error)
            await _send_body(send, _event(shown.body()))
        await _send_body(send, _DONE, more=False)


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    # Waits while the client reads slowly; the outputs merge meanwhile.
    await send({"type": "http.response.body", "body": body, "more_body": more})


# -- the client's hanging up ------------------------------------------------------------------------------------


async def _hang_up(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(hang_up: asyncio.Future[None], work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when the client hangs up first; the work is cancelled then."""
    task = asyncio.create_task(work)
    try:
        await _either(task, hang_up)
        return task.result() if task.done() else None
    finally:
        await _cancelled(task)


async def _either(one: asyncio.Future[Any], other: asyncio.Future[Any], seconds: float | None = None) -> None:
    await asyncio.wait([one, other], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


def _nobody() -> Response:
    """What is answered to a client that has gone; nobody reads it, and logs know the number."""
    return Response(status_code=499)


async def _closed(events: AsyncGenerator[bytes, None], *futures: asyncio.Future[Any]) -> None:
    """Cancel what still waits, then close the events, which ends their requests."""
    await _cancelled(*futures)
    await events.aclose()


async def _cancelled(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    # Their results, errors included, interest nobody any more.
    await asyncio.gather(*futures, return_exceptions=True)
