"""Runs the prompts of one HTTP request and sends what comes of them, whole or as server-sent events.

It knows the engine's stream of outputs and ASGI, and leaves the shape of an answer to `formats`. Wherever it waits it
also listens for the client's hanging up, which ends the request in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from configs.errors import RequestError, from_wire
from launch.server.engine import Engine
from launch.server.events import DONE, EventStream, event
from launch.server.formats import AnswerFormat
from launch.server.peers import Relayed
from launch.server.streams import StreamStore, keeper_gone, next_number, wants_resume
from launch.server.waiting import cancelled, closed, either, hang_up
from nanoengine.beam_params import BeamSearchParams
from nanoengine.outputs import RequestOutput
from nanoengine.prompts import PromptInput, at_index
from nanoengine.sampling_params import SamplingParams

T = TypeVar("T")

# A stream's status line waits for the first output, so that what is refused gets a status of its own; a request that
# waits longer than this in the queue is certainly accepted.
STATUS_WAIT_SECONDS = 5.0


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
    is_kept = wants_resume(request, stream)
    outputs = _all_outputs(engine, prompts, params, answer_id, scheduling)
    if stream:
        events = _events(outputs, answer)
        if not is_kept:
            return await _begin_stream(request, events)
        store: StreamStore = request.app.state.streams
        return await _begin_stream(request, store.start(request, answer_id, events).read(0), answer_id)
    leaving = asyncio.ensure_future(hang_up(request.receive))
    try:
        finished = await _unless(leaving, _collect(outputs, len(prompts)))
    finally:
        await cancelled(leaving)
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
        except Exception as error:  # travels to the one who reads
            await queue.put((index, error))

    readers = [asyncio.create_task(read(index)) for index in range(len(prompts))]
    try:
        num_open = len(prompts)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, RequestError):
                raise at_index(item, index, len(prompts))
            if isinstance(item, Exception):
                raise item
            num_open -= item.finished
            yield index, _unless_failed(item)
    finally:
        await cancelled(*readers)


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


async def resume(request: Request, stream_id: str, last_event_id: str | None) -> Response:
    """Send what follows the event that the client names of a stream that is kept; whoever read it before is let go.

    Another front end may keep it, which then answers through this one.

    Raises:
        RequestError, ApiError: there is no such stream or event.
    """
    store: StreamStore = request.app.state.streams
    if (path := store.elsewhere(stream_id)) is not None:
        return Relayed(request, path, keeper_gone(stream_id))
    stream = store.find(request, stream_id)
    number = next_number(request, stream, last_event_id)
    if stream.done and number == stream.end > 0:
        return Response(status_code=204)  # which tells an EventSource to come no more
    return await _begin_stream(request, stream.read(number), stream_id)


async def _events(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None], answer: AnswerFormat
) -> AsyncGenerator[list[bytes], None]:
    """The events of each output that adds something, and of the end."""
    async with contextlib.aclosing(outputs):
        async for index, output in outputs:
            batch = [event(chunk) for chunk in answer.chunks(index, output)]
            if batch:
                yield batch
    usage = answer.usage_chunk()
    yield [DONE] if usage is None else [event(usage), DONE]


async def _begin_stream(
    request: Request, events: AsyncGenerator[list[bytes], None], stream_id: str | None = None
) -> Response:
    """Wait for the first events, for a while, and answer with the stream. Raises what fails until then."""
    leaving = asyncio.ensure_future(hang_up(request.receive))
    first = asyncio.ensure_future(_first(events))
    try:
        await either(first, leaving, STATUS_WAIT_SECONDS)
        if first.done():
            first.result()
        elif leaving.done():
            leaving.result()
            await closed(events, first)
            return _nobody()
    except BaseException:
        await closed(events, first, leaving)
        raise
    return EventStream(first, events, leaving, stream_id)


async def _first(events: AsyncGenerator[list[bytes], None]) -> list[bytes]:
    return await anext(events, [])


# -- the client's hanging up ------------------------------------------------------------------------------------


async def _unless(leaving: asyncio.Future[None], work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when the client hangs up first; the work is cancelled then."""
    task = asyncio.create_task(work)
    try:
        await either(task, leaving)
        return task.result() if task.done() else leaving.result()
    finally:
        await cancelled(task)


def _nobody() -> Response:
    """What is answered to a client that has gone; nobody reads it, and logs know the number."""
    return Response(status_code=499)
