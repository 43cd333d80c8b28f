"""Metrics and log of the served demo model: they add up after a mixed run, and nothing stays counted as running."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from configs.engine import EngineConfig
from launch.supervisor import with_server_defaults
from tests.launch.prometheus_text import by_label, total
from tests.launch.server_process import ServerProcess
from tests.waiting import PATIENCE, until_async

PROMPT = "Tell me a story about Lily the bear, the garden and the flute. " * 2
ENDLESS = {"ignore_eos": True, "max_tokens": 3000}
LATE = {"n": 16, "temperature": 1.0, "timeout": 4, **ENDLESS}
"""Its first tokens come in time, and 3,000 steps of 16 rows do not, by far."""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    options = ["--max-queued-requests", "8", "--log-format", "json", "--log-stats-interval", "0.5"]
    with ServerProcess(*options) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.wait_ready()


def test_a_server_logs_status_lines_unless_it_shall_not_and_a_program_does_not() -> None:
    assert EngineConfig.create().server.log_stats_interval is None
    assert with_server_defaults(EngineConfig.create()).server.log_stats_interval == 10
    assert with_server_defaults(EngineConfig.create(log_stats_interval=0)).server.log_stats_interval == 0


async def ask(client: httpx.AsyncClient, **body: object) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": "demo", "prompt": PROMPT, "temperature": 0} | body)


async def hang_up(client: httpx.AsyncClient) -> None:
    """Leave a stream in the middle."""
    body = {"model": "demo", "prompt": PROMPT, "stream": True, **ENDLESS}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        await anext(answer.aiter_lines())


async def until_at_rest(client: httpx.AsyncClient, num_http: int) -> str:
    """The metrics, once nothing runs and `num_http` completions are answered: a client reads its last byte before."""
    deadline = time.monotonic() + PATIENCE
    while True:
        text = (await client.get("/metrics")).text
        ended = sum(by_label(text, "request_success_total", "finished_reason").values())
        ended += sum(by_label(text, "request_failure_total", "reason").values())
        answered = total(text, "http_requests_total", handler="/v1/completions") >= num_http
        at_rest = ended == total(text, "requests_accepted_total") and total(text, "num_requests_running") == 0
        if answered and at_rest:
            return text
        assert time.monotonic() < deadline, text
        await asyncio.sleep(0.05)


async def test_metrics_add_up_after_a_mixed_run(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        answers = await asyncio.gather(
            ask(client, max_tokens=20),
            ask(client, max_tokens=20, n=2, temperature=1.0, seed=1),
            ask(client, prompt=[PROMPT, "中国的首都是"], max_tokens=10),
            ask(client, max_tokens=200, stop=" "),
            ask(client, **LATE),
            hang_up(client),
        )
        answers += await asyncio.gather(
            ask(client, temperature=-1),
            ask(client, prompt=[PROMPT] * 9),
            ask(client, prompt=[1] * 5000),
            ask(client, model="gpt"),
            ask(client, max_tokens=64, stream=True, stream_options={"include_usage": True}, ignore_eos=True),
        )
        text = await until_at_rest(client, 11)
    statuses = Counter(answer.status_code for answer in answers if answer is not None)
    assert statuses == {200: 5, 504: 1, 400: 2, 429: 1, 404: 1}
    refused = by_label(text, "request_refused_total", "reason")
    assert {reason: number for reason, number in refused.items() if number} == {
        "invalid": 2, "queue_full": 1, "not_found": 1,
    }  # fmt: skip
    assert by_label(text, "request_failure_total", "reason") == {"error": 0, "timeout": 1}
    success = by_label(text, "request_success_total", "finished_reason")
    assert success["abort"] == 1
    # One a prompt: the whole answers (1 + 1 + 2 + 1), and the stream.
    assert success["stop"] + success["length"] == 6
    assert success["stop"] >= 1, "the stop string"
    assert total(text, "requests_accepted_total") == 8
    whole = [answer.json()["usage"] for answer in answers[:4] if answer is not None]
    assert answers[-1] is not None
    streamed = json.loads(answers[-1].text.split("data: ")[-2])["usage"]
    told = sum(usage["completion_tokens"] for usage in [*whole, streamed])
    assert total(text, "request_generation_tokens_sum") == told, "what clients were told, and no more"
    prompts = sum(usage["prompt_tokens"] for usage in [*whole, streamed])
    assert total(text, "request_prompt_tokens_sum") == prompts
    assert total(text, "http_requests_total", handler="/v1/completions") == 11
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds"):
        assert total(text, f"{name}_count") == 6
    assert total(text, "time_to_first_token_seconds_count") == 8
    # Nothing is left behind.
    for gauge in ("num_requests_running", "num_requests_waiting", "num_requests_swapped", "kv_cache_usage_perc"):
        assert total(text, gauge) == 0
    assert total(text, "kv_blocks", tier="device", state="used") == 0
    assert total(text, "prefix_cache_hits_total") > 0, "most prompts were the same"


async def test_the_log_is_json_with_ids_and_a_status_line_and_without_prompts(server: ServerProcess, url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        client.headers["X-Request-Id"] = "chosen-by-the-client"
        answer = await ask(client, max_tokens=700, ignore_eos=True)
        written = answer.json()["choices"][0]["text"]
        assert (await ask(client, temperature=-3)).status_code == 400
        await until_at_rest(client, 0)
    await until_async(lambda: any("chosen-by-the-client" in line and '"status"' in line for line in list(server.err)))
    await until_async(lambda: sum('"status": 400' in line for line in list(server.err)) >= 1)
    lines = [json.loads(line) for line in server.err]
    for line in lines:
        assert {"time", "level", "process", "pid", "logger", "message"} <= line.keys()
    everything = "".join(server.err)
    assert "Lily" not in everything
    assert written[:20] not in everything
    asked = [line for line in lines if line["logger"] == "launch.server.access"]
    assert all(line["request_id"] for line in asked)
    assert "chosen-by-the-client" in {line["request_id"] for line in asked}
    assert {line["status"] for line in asked} >= {200, 400, 404, 429, 504}
    assert {line["process"] for line in lines} >= {"server", "scheduler", "worker rank 0"}
    status_lines = [line for line in lines if line["message"].startswith("running: ")]
    assert status_lines
    assert {line["process"] for line in status_lines} == {"scheduler"}


async def test_metrics_of_two_front_ends_are_the_sum_at_each_of_them() -> None:
    with ServerProcess("--api-server-count", "2") as server:
        url = server.wait_ready()

        async def scrape() -> str:
            async with httpx.AsyncClient(base_url=url, verify=False) as client:  # anew, perhaps to the other one
                return (await client.get("/metrics")).text

        async def ask_anew() -> None:
            async with httpx.AsyncClient(base_url=url, verify=False, timeout=60) as client:
                assert (await ask(client, max_tokens=5, ignore_eos=True)).status_code == 200

        await asyncio.gather(*(ask_anew() for _ in range(16)))
        deadline, num_right = time.monotonic() + 2 * PATIENCE, 0
        while num_right < 16:  # in a row, so that both have answered
            text = await scrape()
            is_right = total(text, "request_success_total") == 16 and total(text, "num_requests_running") == 0
            num_right = num_right + 1 if is_right else 0
            assert time.monotonic() < deadline, text
        assert total(text, "generation_tokens_total") == 80
        assert total(text, "http_requests_total", handler="/v1/completions") == 16
        assert total(text, "engine_ready") == 1
