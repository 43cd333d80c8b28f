"""Real clients against a real uvicorn: the openai package, curl, and clients that hang up or read slowly."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import socket
import subprocess
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.launch.fake_engine import ANSWER, FakeEngine
from tests.waiting import until

HI = [{"role": "user", "content": "hi"}]


def test_the_openai_client_completes_and_chats(engine: FakeEngine, url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").id == "demo"
        completion = client.completions.create(model="demo", prompt="a", max_tokens=50)
        assert completion.choices[0].text == ANSWER
        assert completion.usage is not None
        chat = client.chat.completions.create(model="demo", messages=HI)
        assert chat.choices[0].message.content == ANSWER
        assert chat.choices[0].finish_reason == "stop"
        # What came back can be sent again, as clients do in a conversation.
        again = [*HI, chat.choices[0].message, {"role": "user", "content": "more"}]
        assert client.chat.completions.create(model="demo", messages=again).choices[0].message.content == ANSWER
        extra = {"top_k": 3, "min_p": 0.1, "ignore_eos": True, "return_token_ids": True}
        chosen = client.completions.create(model="demo", prompt="a", extra_body=extra).choices[0]
        assert chosen.model_extra is not None
        assert chosen.model_extra["token_ids"]
    assert engine.params[-1].top_k == 3


def test_the_openai_client_reads_log_probabilities(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        legacy = client.completions.create(model="demo", prompt="a", max_tokens=3, logprobs=2).choices[0].logprobs
        assert legacy is not None
        assert legacy.token_logprobs == [-3.0] * 3
        chat = client.chat.completions.create(model="demo", messages=HI, logprobs=True, top_logprobs=4).choices[0]
        assert chat.logprobs is not None
        assert chat.logprobs.content is not None
        assert [top.logprob for top in chat.logprobs.content[0].top_logprobs] == [-1, -2, -3, -4]
        with client.chat.completions.stream(model="demo", messages=HI, logprobs=True) as stream:
            final = stream.get_final_completion().choices[0].logprobs
        assert final is not None
        assert final.content is not None
        assert len(final.content) == len(chat.logprobs.content)


def test_the_openai_client_streams(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        pieces = list(client.completions.create(model="demo", prompt="a", max_tokens=50, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == ANSWER
        chunks = list(
            client.chat.completions.create(
                model="demo", messages=HI, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
        with client.chat.completions.stream(model="demo", messages=HI) as stream:
            assert stream.get_final_completion().choices[0].message.content == ANSWER


async def test_the_async_openai_client_streams_side_by_side(engine: FakeEngine, url: str) -> None:
    engine.delay = 0.002
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:

        async def ask() -> str:
            stream = await client.chat.completions.create(model="demo", messages=HI, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*[ask() for _ in range(16)]) == [ANSWER] * 16
    assert not engine.open
    assert not engine.aborted


def test_the_openai_client_raises_its_own_errors(engine: FakeEngine, url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="demo", prompt="a", temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt", messages=HI)
        assert missing.value.code == "model_not_found"
        engine.is_ready = False
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="demo", prompt="a")
        engine.is_ready, engine.fail_after = True, 3
        with pytest.raises(openai.APIError, match="rank 1 fell over"):
            list(client.completions.create(model="demo", prompt="a", stream=True))


def test_curl_gets_an_answer_and_a_stream(url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    asked = {"prompt": "a", "max_tokens": 50}
    command = ["curl", "-sN", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    whole = subprocess.run([*command, json.dumps(asked)], capture_output=True, timeout=20, check=True)
    assert json.loads(whole.stdout)["choices"][0]["text"] == ANSWER
    streamed = subprocess.run([*command, json.dumps(asked | {"stream": True})], capture_output=True, timeout=20)
    assert streamed.stdout.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
@pytest.mark.parametrize(("stream", "num_read"), [(False, 0), (True, 0), (True, 200)])
def test_a_client_that_hangs_up_ends_its_request(
    engine: FakeEngine, url: str, prompt: object, stream: bool, num_read: int
) -> None:
    """Before the first token as well as in mid-stream; otherwise its blocks stay taken."""
    engine.delay = 0.1 if num_read else 1.0
    engine.answers = dict.fromkeys("abc", "word " * 40)
    address = urlsplit(url)
    body = json.dumps({"prompt": prompt, "max_tokens": 60, "stream": stream}).encode()
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: len(engine.open) == len(prompt))
        received = 0
        while received < num_read:
            received += len(connection.recv(4096))
    until(lambda: not engine.open, 3.0)
    assert len(engine.aborted) == len(prompt)  # type: ignore[arg-type]


def test_others_stream_on_while_one_client_does_not_read(engine: FakeEngine, url: str) -> None:
    """A slow reader must hold up nobody else, nor make the server collect text for it without end."""
    address = urlsplit(url)
    slow = http.client.HTTPConnection(str(address.hostname), address.port)
    slow.request(
        "POST",
        "/v1/completions",
        json.dumps({"prompt": ["a"] * 50, "stream": True, "return_token_ids": True}),
        {"Content-Type": "application/json"},
    )
    begun = time.monotonic()
    for _ in range(5):
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 50})
        assert response.json()["choices"][0]["text"] == ANSWER
    assert time.monotonic() - begun < 5
    slow.close()
    until(lambda: not engine.open)


def test_a_stream_that_waits_long_for_its_turn_begins_anyway(
    engine: FakeEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.server.generation.STATUS_WAIT_SECONDS", 0.05)
    engine.held_after = 0
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 2}
    ) as response:
        assert response.status_code == 200
        engine.held_after = None
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
