"""What `/metrics` shows: vLLM's names and buckets, each request counted once, several front ends added up."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from configs.errors import EngineDeadError, RequestTimeoutError, WorkerError, to_wire
from launch.front_dir import FrontDir
from launch.server.app import create_app
from launch.server.metrics import ServerMetrics
from launch.server.shared_numbers import OwnerNumbers, SharedNumbers
from nanoengine.engine_client import EngineClient
from nanoengine.engine_stats import RESTART_REASONS, SCHEDULER_RESTART_REASONS
from nanoengine.engine_status import EngineCondition, SchedulerRestartStats
from nanoengine.journal import RequestJournal
from nanoengine.messages import TOTALS, Deltas, Hello, Ready, Stats, TokenDelta
from nanoengine.prompts import Prompt
from nanoengine.sampling_params import SamplingParams
from tests.launch.fake_engine import MAX_MODEL_LEN, FakeEngine
from tests.launch.prometheus_text import PREFIX, by_label, families, total
from tests.launch.server_process import ROOT
from tests.waiting import PATIENCE

SECRET = "what nobody may read in a log"


class Front:
    """An app over a FakeEngine, and a real EngineClient whose requests the app counts."""

    def __init__(self, folder: Path, front_dir: FrontDir | None = None, **settings: Any) -> None:
        self.engine = FakeEngine(folder, **settings)
        if front_dir is not None:
            self.engine.stats = Stats(1, 1, steps_by_tokens=[0] * 14)
        self.app = create_app(self.engine, front_dir=front_dir)
        self.client = EngineClient(self.engine.config, self.engine.tokenizer, recorder=self.engine.recorder)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://test"
        )

    def add(self, prompt: str = "abc", **params: Any) -> RequestJournal:
        return self.client.add(self.client.check(Prompt(text=prompt), SamplingParams(**params)))

    def tell(self, journal: RequestJournal, *deltas: tuple[int, int, list[int], str | None], **more: Any) -> None:
        made = [TokenDelta(journal.wire_id, index, start, ids, why) for index, start, ids, why in deltas]
        for name, value in more.items():
            setattr(made[-1], name, value)
        self.client.handle(Deltas(1, made))

    async def scrape(self, accept: str = "") -> str:
        answer = await self.http.get("/metrics", headers={"Accept": accept})
        assert answer.status_code == 200
        return answer.text


@pytest.fixture
async def front(tmp_path: Path) -> Any:
    front = Front(tmp_path)
    yield front
    await front.http.aclose()


def committed() -> Iterator[tuple[str, str, list[str]]]:
    for line in (Path(__file__).parent / "metrics.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, kind, *rest = line.split()
            yield name, kind, rest


async def test_names_kinds_labels_and_buckets_are_the_committed_ones(front: Front) -> None:
    await front.http.get("/version")  # http_requests has no labels before the first one
    found = families(await front.scrape())
    assert list(found) == [name for name, _, _ in committed()]
    for name, kind, rest in committed():
        family = found[name]
        assert family.type == kind, name
        assert family.documentation, name
        if kind == "histogram":
            bounds = [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]
            assert [*map(float, bounds)] == [*map(float, rest), float("inf")], name
        else:
            assert {tuple(sample.labels) for sample in family.samples} == {tuple(sorted(rest))}, name
        assert all(sample.labels["model_name"] == "demo" for sample in family.samples), name


async def test_openmetrics_is_spoken_to_those_who_ask_for_it(front: Front) -> None:
    text = await front.scrape("application/openmetrics-text; version=1.0.0")
    assert PREFIX + "request_success" in {family.name for family in parse_openmetrics(text)}


async def test_each_request_ends_in_one_way(front: Front) -> None:
    stopped, matched, cut = front.add(), front.add(stop="c"), front.add(max_tokens=2, n=2)
    aborted, failed, late, refused = front.add(), front.add(), front.add(), front.add()
    front.add()  # stays open
    ids = front.client.encode(Prompt(text="abcd")).token_ids or []
    front.tell(stopped, (0, 0, ids[:1], None), (0, 1, ids[1:2], "stop"))
    front.tell(matched, (0, 0, ids, None))
    front.tell(cut, (0, 0, [5, 6], "length"), (1, 0, [7], "stop"))
    front.tell(aborted, (0, 0, [5], None))
    front.client.abort(aborted.request_id)
    front.tell(failed, (0, 0, [], "error"), error=to_wire(WorkerError("rank 1 fell over")))
    front.tell(late, (0, 0, [5], "error"), error=to_wire(RequestTimeoutError("too late")))
    front.client.abort(refused.request_id)
    text = await front.scrape()
    assert total(text, "requests_accepted_total") == 8
    assert by_label(text, "request_success_total", "finished_reason") == {"stop": 2, "length": 1, "abort": 2}
    assert by_label(text, "request_failure_total", "reason") == {"error": 1, "timeout": 1}
    assert total(text, "generation_tokens_total") == 2 + 3 + 3 + 1 + 1, "none behind a stop string"
    assert total(text, "prompt_tokens_total") == 5 * stopped.num_prompt_tokens, "of those that got a token"
    assert total(text, "time_to_first_token_seconds_count") == 5
    assert total(text, "request_generation_tokens_sum") == 2 + 3 + 3
    assert total(text, "request_max_num_generation_tokens_sum") == 2 + 3 + 2
    assert total(text, "request_prompt_tokens_count") == total(text, "e2e_request_latency_seconds_count") == 3
    assert total(text, "request_params_n_sum") == 9
    front.client.fail(EngineDeadError("gone"))
    text = await front.scrape()
    assert by_label(text, "request_failure_total", "reason") == {"error": 2, "timeout": 1}


async def test_times_are_those_of_the_request(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    journal = front.add(n=2, ignore_eos=True)
    for at, delta in (
        (1003.0, (0, 0, [5], None)),
        (1003.5, (1, 0, [5], None)),
        (1004.0, (0, 1, [6, 7], None)),  # two on their way together
        (1005.0, (0, 3, [8], "length")),
        (1006.0, (1, 1, [8], "length")),
    ):
        now = at
        front.tell(journal, delta, metrics={"queue_seconds": 2.0})
    text = await front.scrape()
    assert total(text, "time_to_first_token_seconds_sum") == 3
    assert total(text, "inter_token_latency_seconds_count") == 4, "one less than each sequence has tokens"
    assert total(text, "inter_token_latency_seconds_sum") == 0.5 + 0.5 + 1 + 2.5
    assert total(text, "inter_token_latency_seconds_bucket", le="0.5") == 2
    assert total(text, "request_queue_time_seconds_sum") == 2
    assert total(text, "request_prefill_time_seconds_sum") == 1
    assert total(text, "request_decode_time_seconds_sum") == 3
    assert total(text, "request_inference_time_seconds_sum") == 4
    assert total(text, "e2e_request_latency_seconds_sum") == 6
    assert total(text, "request_time_per_output_token_seconds_sum") == 1


async def test_the_engines_numbers_are_the_schedulers(front: Front) -> None:
    text = await front.scrape()
    assert total(text, "kv_cache_usage_perc") == total(text, "num_requests_running") == 0, "nothing is known yet"
    stats = Stats(
        1, 1, num_running=3, num_waiting=2, num_swapped=1, num_blocks=40, num_used_blocks=10, num_cached_blocks=5,
        num_host_blocks=8, num_used_host_blocks=2, num_cached_host_blocks=1, num_query_tokens=100, num_hit_tokens=60,
        num_host_hit_tokens=20, num_preemptions=7, num_swaps=3, num_prefill_tokens=90, num_step_tokens=500,
        steps_by_tokens=[4, 5] + [0] * 11 + [1],
    )  # fmt: skip
    front.engine.stats = stats
    text = await front.scrape()
    shown = [total(text, f"num_requests_{state}") for state in ("running", "waiting", "swapped")]
    assert shown == [3, 2, 1]
    assert total(text, "kv_cache_usage_perc") == 0.25
    assert [total(text, "kv_blocks", tier="device", state=state) for state in ("used", "cached", "free")] == [10, 5, 25]
    assert [total(text, "kv_blocks", tier="host", state=state) for state in ("used", "cached", "free")] == [2, 1, 5]
    assert (total(text, "prefix_cache_queries_total"), total(text, "prefix_cache_hits_total")) == (100, 60)
    assert (total(text, "host_prefix_cache_queries_total"), total(text, "host_prefix_cache_hits_total")) == (60, 20)
    assert by_label(text, "num_preemptions_total", "mode") == {"recompute": 4, "swap": 3}
    assert total(text, "prefill_tokens_total") == 90
    assert total(text, "iteration_tokens_total_count") == 10
    assert total(text, "iteration_tokens_total_bucket", le="8.0") == 9
    assert total(text, "engine_ready") == 1
    front.engine.is_ready = False  # it died
    text = await front.scrape()
    assert total(text, "num_requests_running") == total(text, "kv_cache_usage_perc") == total(text, "engine_ready") == 0
    assert total(text, "prefix_cache_queries_total") == 100, "a counter does not go back"


async def test_recoveries_are_counted(front: Front) -> None:
    text = await front.scrape()
    assert by_label(text, "worker_restarts_total", "reason") == dict.fromkeys(RESTART_REASONS, 0)
    rest = [0] * 12
    first = Stats(
        1, 3, num_query_tokens=10, num_step_tokens=7, steps_by_tokens=[2, 1, *rest], restarts={"died": 2, "start": 1},
        recovery_seconds=2.5, num_requests_resumed=6, num_tokens_recomputed=40, num_requests_condemned=1,
        num_steps_given_up=5, num_scheduler_faults=3, num_frames_rejected=4,
    )  # fmt: skip
    front.client.handle(first)
    front.engine.stats = front.client.stats
    text = await front.scrape()
    restarts = by_label(text, "worker_restarts_total", "reason")
    assert {reason: number for reason, number in restarts.items() if number} == {"died": 2, "start": 1}
    assert total(text, "recovery_seconds_total") == 2.5
    assert total(text, "requests_resumed_total") == 6
    names = ("tokens_recomputed", "requests_condemned", "steps_given_up", "scheduler_faults", "frames_rejected")
    assert [total(text, f"{name}_total") for name in names] == [40, 1, 5, 3, 4]
    front.engine.restart_stats = SchedulerRestartStats(Counter(died=2, silent=1), 4.5)
    assert front.engine.recorder is not None
    front.engine.recorder.resumed(3)
    text = await front.scrape()
    restarts = by_label(text, "scheduler_restarts_total", "reason")
    assert restarts == dict.fromkeys(SCHEDULER_RESTART_REASONS, 0) | {"died": 2, "silent": 1}
    assert by_label(text, "recovery_seconds_total", "process") == {"worker": 2.5, "scheduler": 4.5}
    assert by_label(text, "requests_resumed_total", "process") == {"worker": 6, "scheduler": 3}


async def test_the_next_scheduler_is_told_what_the_last_one_counted(front: Front) -> None:
    client = front.client
    client.attach(EngineCondition(1, "ipc://first"))
    assert client.outbox[0] == Hello(client.client_id, None)
    client.outbox.clear()
    client.handle(Ready(1, 8, 16, MAX_MODEL_LEN, "float32", "cpu"))
    client.handle(Stats(1, 1, num_running=2, num_swaps=3, restarts={"died": 1}))
    front.add()
    front.add()
    client.attach(EngineCondition(2, "ipc://second", restarts=SchedulerRestartStats(Counter(died=1), 1.5)))
    greeting = client.outbox[0]
    assert isinstance(greeting, Hello)
    assert greeting.totals is not None
    assert greeting.totals.keys() == set(TOTALS)
    assert (greeting.totals["num_swaps"], greeting.totals["restarts"]) == (3, {"died": 1})
    assert total(await front.scrape(), "requests_resumed_total", process="scheduler") == 2


async def test_a_front_end_that_was_started_again_shows_no_totals_before_it_knows_them(tmp_path: Path) -> None:
    """They would look like those of a new engine, and then like a burst."""
    front = Front(tmp_path, FrontDir(tmp_path, "1"))
    front.engine.stats = None
    async with front.http:
        assert (await front.http.get("/metrics")).status_code == 503
        front.engine.stats = Stats(1, 1, steps_by_tokens=[0] * 14)
        await front.scrape()


async def test_http_answers_are_counted_by_route_and_status(front: Front) -> None:
    ask: Callable[[str, Any], Any] = lambda path, body: front.http.post(path, json=body)  # noqa: E731
    await ask("/v1/completions", {"model": "demo", "prompt": "a"})
    await ask("/v1/completions", {"model": "demo", "prompt": "a", "stream": True})
    await ask("/v1/completions", {"model": "demo", "prompt": "a", "temperature": -1})
    await ask("/v1/completions", {"model": "gpt", "prompt": "a"})
    await ask("/v1/chat/completions", {"model": "demo", "messages": []})
    front.engine.queue_is_full = True
    await ask("/v1/completions", {"model": "demo", "prompt": "a"})
    front.engine.queue_is_full, front.engine.raise_at_once = False, RuntimeError("a fault of ours")
    await ask("/v1/completions", {"model": "demo", "prompt": "a"})
    front.engine.is_ready = False
    await ask("/v1/completions", {"model": "demo", "prompt": "a"})
    for path in (f"/nowhere/{SECRET}", f"/v1/models/{SECRET}", "/v1/models", "/livez"):
        await front.http.get(path)
    text = await front.scrape()
    completions = {"method": "POST", "handler": "/v1/completions"}
    counted = {status: total(text, "http_requests_total", **completions, status=status)
               for status in ("200", "400", "404", "429", "500", "503")}  # fmt: skip
    assert counted == {"200": 2, "400": 1, "404": 1, "429": 1, "500": 1, "503": 1}
    assert total(text, "http_requests_total", handler="/v1/models/{model:path}", status="404") == 1
    assert total(text, "http_requests_total", handler="other", status="404") == 1
    assert SECRET not in text
    assert by_label(text, "request_refused_total", "reason") == {
        "invalid": 2, "unauthorized": 0, "not_found": 1, "too_large": 0, "queue_full": 1, "unavailable": 1,
    }  # fmt: skip


async def test_who_has_no_key_is_counted_and_sees_no_numbers(tmp_path: Path) -> None:
    front = Front(tmp_path, api_key="k")
    async with front.http:
        assert (await front.http.get("/metrics")).status_code == 401
        assert (await front.http.post("/v1/completions", json={})).status_code == 401
        front.http.headers["Authorization"] = "Bearer k"
        text = await front.scrape()
    assert total(text, "request_refused_total", reason="unauthorized") == 1
    assert total(text, "http_requests_total", status="401") == 2


async def test_the_access_log_names_route_status_and_request_and_nothing_a_client_wrote(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "launch.server.access")
    await front.http.post(f"/v1/completions?q={SECRET}", json={"model": "demo", "prompt": SECRET})
    await front.http.get(f"/{SECRET}")
    await front.http.get("/health")
    lines = [record for record in caplog.records if record.name == "launch.server.access"]
    assert [(line.levelname, *line.fields.values()) for line in lines] == [  # type: ignore[attr-defined]
        ("INFO", "POST", "/v1/completions", 200, lines[0].fields["seconds"]),  # type: ignore[attr-defined]
        ("INFO", "GET", "other", 404, lines[1].fields["seconds"]),  # type: ignore[attr-defined]
        ("DEBUG", "GET", "/health", 200, lines[2].fields["seconds"]),  # type: ignore[attr-defined]
    ]
    assert re.search(r"POST /v1/completions 200 in \d+\.\d+ s", lines[0].getMessage())
    assert len({line.request_id for line in lines}) == 3  # type: ignore[attr-defined]
    assert not any(SECRET in str(vars(line)) for line in lines)


async def test_no_access_log_where_none_is_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    front = Front(tmp_path, access_log=False)
    async with front.http:
        await front.http.post("/v1/completions", json={"model": "demo", "prompt": "a"})
        assert total(await front.scrape(), "http_requests_total") == 1, "it is counted all the same"
    assert not [record for record in caplog.records if record.name == "launch.server.access"]


# -- several front ends -------------------------------------------------------------------------------------------

_OTHER = """
import asyncio, pathlib, sys
from launch.front_dir import FrontDir
from tests.launch.test_server_metrics import Front

async def main():
    front = Front(pathlib.Path(sys.argv[1]), FrontDir(pathlib.Path(sys.argv[2]), sys.argv[1][-1]))
    journal = front.add(max_tokens=2)
    front.tell(journal, (0, 0, [5, 6], "length"))
    await front.http.get("/livez")
    await asyncio.sleep(0.8)

asyncio.run(main())
"""


async def test_front_ends_in_several_processes_are_added_up_and_outlived(tmp_path: Path) -> None:
    """The others' numbers stay when they are gone, and the engine's are not added up."""
    front = Front(tmp_path, FrontDir(tmp_path, "0"))
    front.engine.stats = Stats(1, 1, num_running=3, num_blocks=10, steps_by_tokens=[0] * 14)
    others = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        command = [sys.executable, "-c", _OTHER, str(tmp_path / str(number)), str(tmp_path)]
        others.append(await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=subprocess.PIPE))
    for other in others:
        _, errors = await other.communicate()
        assert other.returncode == 0, errors.decode()
    front.tell(front.add(max_tokens=2), (0, 0, [5], "stop"))
    async with front.http:
        text = await front.scrape()
    assert total(text, "requests_accepted_total") == 3
    assert by_label(text, "request_success_total", "finished_reason") == {"stop": 1, "length": 2, "abort": 0}
    assert total(text, "generation_tokens_total") == 5
    assert total(text, "request_generation_tokens_bucket", le="1.0") == 1
    assert total(text, "request_generation_tokens_bucket", le="2.0") == 3
    assert total(text, "http_requests_total", handler="/livez") == 2
    assert total(text, "num_requests_running") == 3


async def test_requests_that_a_dead_front_end_had_open_end_as_errors(tmp_path: Path) -> None:
    """Else they would stay open in the sum for ever."""
    front, dead = (Front(tmp_path, FrontDir(tmp_path, name)) for name in "12")
    shared, owner = FrontDir(tmp_path, "2").metrics, OwnerNumbers(MAX_MODEL_LEN)
    for _ in range(3):
        dead.add()
    dead.client.abort(dead.add().request_id)
    async with front.http, dead.http:
        for _ in range(500):
            if total(await front.scrape(), "requests_accepted_total") == 4:
                break
            await asyncio.sleep(0.02)
        owner.note_restart(shared, os.getpid())
        text = await front.scrape()
        assert total(text, "front_end_restarts_total") == 1
        assert total(text, "requests_accepted_total") == 4
        assert by_label(text, "request_failure_total", "reason") == {"error": 3, "timeout": 0}
        assert by_label(text, "request_success_total", "finished_reason") == {"stop": 0, "length": 0, "abort": 1}
        owner.note_restart(shared, os.getpid())  # another one, which had the same process id and told nothing
        text = await front.scrape()
    assert (total(text, "front_end_restarts_total"), total(text, "request_failure_total")) == (2, 3)


async def test_numbers_of_a_running_stream_reach_the_others(tmp_path: Path) -> None:
    """Between its first and its last token no request begins or ends; the tokens are told all the same."""
    one, other = (Front(tmp_path, FrontDir(tmp_path, name)) for name in "12")
    journal = one.add()
    await asyncio.sleep(0.01)
    one.tell(journal, (0, 0, [5, 6, 7], None))
    async with one.http, other.http:
        deadline = time.monotonic() + PATIENCE
        while total(text := await other.scrape(), "generation_tokens_total") < 3:
            assert time.monotonic() < deadline, text
            await asyncio.sleep(0.02)
        assert total(text, "generation_tokens_total") == 3
        assert total(text, "requests_accepted_total") == 1


def test_a_directory_that_is_gone_harms_nobody(tmp_path: Path) -> None:
    """It goes with the engine, which may die before its front ends."""
    metrics = ServerMetrics(MAX_MODEL_LEN)
    shared = SharedNumbers(tmp_path / "metrics", metrics, MAX_MODEL_LEN)
    shared.write()
    (file,) = (tmp_path / "metrics").iterdir()
    assert json.loads(file.read_text())["counters"]
    file.unlink()
    (tmp_path / "metrics").rmdir()
    shared.write()
    assert shared.sum().to_dict() == metrics.numbers.to_dict()
