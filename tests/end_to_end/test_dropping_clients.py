"""Clients that drop at random moments: what they held is given back, and nobody else's answer changes for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from configs.engine import EngineConfig
from launch.front_end import FrontEnd
from launch.keys import ApiKeys
from launch.listener import listening
from nanoengine import AsyncLLM
from tests.end_to_end.engine_in_thread import EngineInThread
from tests.waiting import until_async

NUM_STAYING, NUM_DROPPING = 8, 1000


class Server:
    """A front end over an engine in a thread."""

    def __init__(self, engine: EngineInThread, llm: AsyncLLM, port: int) -> None:
        self.scheduler, self.llm, self.port = engine.core.scheduler, llm, port

    async def connect(self, asked: dict[str, Any], cut: int | None = None) -> tuple[Any, asyncio.StreamWriter]:
        """Send a request, or its first `cut` bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = json.dumps(asked).encode()
        head = (
            f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        writer.write((head.encode() + b"\r\n" + body)[:cut])
        return reader, writer

    async def answer(self, asked: dict[str, Any]) -> dict[int, list[int]]:
        """The token ids of each output of a stream that is read to its end."""
        reader, writer = await self.connect(asked)
        tokens: dict[int, list[int]] = {}
        while (line := await reader.readline()) != b"data: [DONE]\n":
            assert line, "the stream broke off"
            if line.startswith(b"data: "):
                for output in json.loads(line[6:])["outputs"]:
                    tokens.setdefault(output["index"], []).extend(output["token_ids"])
        writer.close()
        return tokens

    async def drop(self, asked: dict[str, Any], rng: random.Random) -> None:
        """Go away at some moment: before the whole request is sent, before the first token, or anywhere behind it."""
        await asyncio.sleep(rng.random() * 2)
        cut = rng.randrange(20, 200) if rng.random() < 0.1 else None
        reader, writer = await self.connect(asked, cut)
        if rng.random() < 0.7 and cut is None:
            for _ in range(rng.randrange(1, 40)):
                await reader.readline()
        else:
            await asyncio.sleep(rng.random() * 0.5)
        # Some close in good order, with what was sent to them unread, others break off.
        writer.close() if rng.random() < 0.5 else writer.transport.abort()

    async def idle(self, seconds: float = 60.0) -> None:
        """Wait until nothing is open any more."""
        await until_async(lambda: not self.llm.num_unfinished and not self.scheduler.has_work, seconds)
        await until_async(lambda: not self.scheduler.num_in_flight)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with tempfile.TemporaryDirectory(prefix="nano-test-") as folder:
        config = EngineConfig.create(
            executor="inprocess", device="cpu", dtype="float32", num_kv_blocks=600, check_invariants=True, port=0,
            max_num_seqs=64, shutdown_timeout=0.0,
        ).resolve()  # fmt: skip
        engine = EngineInThread(config, Path(folder))
        llm = AsyncLLM(config=config, engine=engine)
        stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ready = asyncio.Event()
        with listening(config.server, False) as (listener,):
            running = asyncio.create_task(FrontEnd(llm, listener, ApiKeys(), stop, ready.set).run())
            try:
                await asyncio.wait_for(ready.wait(), 60)
                yield Server(engine, llm, listener.getsockname()[1])
            finally:
                with contextlib.suppress(asyncio.InvalidStateError):
                    stop.set_result(None)
                await running
        assert engine.error is None


def request(number: int, max_tokens: int) -> dict[str, Any]:
    params = {"max_tokens": max_tokens, "ignore_eos": True, "seed": number, "n": 1 + number % 3 // 2}
    prompt = [(7 * number + place) % 300 for place in range(4 + number % 60)]
    return {"input_ids": prompt, "stream": True, "sampling_params": params}


async def test_a_thousand_clients_that_drop_leave_no_block_in_use_and_change_no_answer(server: Server) -> None:
    rng = random.Random(5)
    staying = [request(number, 40) for number in range(NUM_STAYING)]
    alone = [await server.answer(asked) for asked in staying]
    dropping = [asyncio.create_task(server.drop(request(number, 300), rng)) for number in range(NUM_DROPPING)]
    together = []
    while not all(task.done() for task in dropping):
        together.append(await asyncio.gather(*(server.answer(asked) for asked in staying)))
    await asyncio.gather(*dropping)
    assert together
    assert all(answers == alone for answers in together)
    await server.idle(60)
    blocks = server.scheduler.blocks
    assert blocks.num_free_blocks == 600
    server.scheduler.check_invariants()
    assert await server.answer(staying[0]) == alone[0]


async def test_a_request_is_aborted_within_a_tenth_of_a_second_of_its_clients_going(server: Server) -> None:
    """Measured from the client's close to the engine's books; the best of seven, since a busy machine adds to it."""
    seconds = []
    for number in range(7):
        reader, writer = await server.connect(request(number, 3000))
        for _ in range(10):
            assert await reader.readline()
        assert server.llm.num_unfinished == 1
        begun = time.monotonic()
        writer.transport.abort()
        await until_async(lambda: not server.llm.num_unfinished and not server.scheduler.has_work)
        seconds.append(time.monotonic() - begun)
    assert min(seconds) < 0.1
