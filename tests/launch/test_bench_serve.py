"""`bench serve`: what is sent and when, what is noted of each token, and what becomes of it; then a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from launch.bench import __main__ as bench
from launch.bench import latency, plot
from launch.bench.datasets import DatasetSpec, LoadRequest, load
from launch.bench.load import LoadResult, LoadSpec, Record, due_times, run_load
from launch.client.api import ApiClient
from tests.launch.fake_engine import ANSWER, FakeEngine
from tests.launch.scripted_server import MODELS, ScriptedServer, json_answer, streamed, tokens, usage
from tests.launch.server_process import ROOT, ServerProcess
from tests.waiting import until, until_async


def run_bench(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench", "serve", *options])
    return bench.main()


# -- when requests are sent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 100.0])
def test_requests_are_due_at_the_rate_and_as_evenly_as_asked(burstiness: float) -> None:
    times = due_times(LoadSpec("", request_rate=8, burstiness=burstiness), 2001)
    assert times[0] == 0
    assert times[-1] == pytest.approx(2000 / 8)
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    # The coefficient of variation of a gamma distribution is 1/sqrt(shape); of a Poisson process's gaps it is 1.
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.15)


def test_without_a_rate_all_are_due_at_once() -> None:
    assert due_times(LoadSpec(""), 3) == [0, 0, 0]
    assert due_times(LoadSpec("", request_rate=2), 1) == [0]


# -- what is sent -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_prompts_within_the_lengths() -> None:
    spec = DatasetSpec(input_len=100, output_len=10, range_ratio=0.5)
    requests = load(spec, 200)
    assert requests == load(spec, 200)
    assert requests[0].prompt != load(DatasetSpec(input_len=100, range_ratio=0.5, seed=1), 1)[0].prompt
    lengths = [len(request.prompt) for request in requests]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert statistics.pstdev(lengths) > 20
    assert {request.output_len for request in requests} == set(range(5, 16))
    assert all(100 <= token < 2000 for request in requests for token in request.prompt if isinstance(token, int))


@pytest.mark.parametrize("as_text", [False, True])
def test_shared_prefixes_are_shared_and_suffixes_are_not(as_text: bool) -> None:
    spec = DatasetSpec("shared-prefix", input_len=5, prefix_len=20, num_prefixes=3, as_text=as_text)
    prompts = [request.prompt for request in load(spec, 50)]
    tokens_of = [prompt.split() if isinstance(prompt, str) else prompt for prompt in prompts]
    assert len({tuple(each[:20]) for each in tokens_of}) == 3
    assert len({tuple(each) for each in tokens_of}) == 50
    assert {len(each) for each in tokens_of} == {25}


def test_a_file_gives_its_own_prompts_and_lengths(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "output_len": 7}\n\n{"prompt": [1, 2]}\n{"prompt": "b", "max_tokens": 3}\n')
    assert load(DatasetSpec("jsonl", path=file, output_len=5), None) == [
        LoadRequest("a", 7),
        LoadRequest([1, 2], 5),
        LoadRequest("b", 3),
    ]
    file.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"prompt": "b"}')
    first, second = load(DatasetSpec("jsonl", path=file, endpoint="chat", as_text=True), None)
    assert first.is_conversation
    assert not second.is_conversation


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 must be an object with either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "line 2 must be an object with either"),
        ('{"prompt": ""}', "line 2: prompt must be text or a list of token ids, and not empty"),
        ('{"prompt": [1.5]}', "line 2: prompt must be"),
        ('{"messages": [{"content": "a"}]}', "line 2: messages must be a list of objects with a role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: messages need --endpoint chat"),
        ('{"prompt": "a", "output_len": 0}', "line 2: output_len must be a whole number of at least 1, got 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(ConfigError, match=message):
        load(DatasetSpec("jsonl", path=file), None)


@pytest.mark.parametrize(
    "options",
    [
        ("--request-rate", "0"),
        ("--request-rate", "nan"),
        ("--burstiness", "-1"),
        ("--burstiness", "2"),
        ("--prefix-len", "9"),
        ("--dataset", "jsonl", "--dataset-path", "x.jsonl", "--input-len", "9"),
        ("--endpoint", "chat", "--vocab-size", "5000"),
        ("--max-concurrency", "0"),
        ("--num-prompts", "0"),
        ("--num-warmups", "-1"),
        ("--timeout", "0"),
        ("--input-len", "0"),
        ("--range-ratio", "1"),
        ("--vocab-size", "100"),
        ("--dataset", "jsonl"),
        ("--dataset-path", "x.jsonl"),
        ("--dataset", "jsonl", "--dataset-path", "not/there.jsonl"),
        ("--endpoint", "chat", "--prompts", "ids"),
        ("--extra-body", "[1]"),
        ("--extra-body", '{"stream": false}'),
        ("--goodput", "itl:5"),
        ("--goodput", "ttft:soon"),
        ("--sweep", "rate=1"),
        ("--sweep", "request-rate=1,x"),
        ("--sweep", "max-concurrency=1.5"),
        ("--sweep", "request-rate=1", "--request-rate", "2"),
        ("--plot", "a.png"),
        ("--plot", "a.jpg", "--sweep", "request-rate=1"),
        ("--plot", "not/there/a.png", "--sweep", "request-rate=1"),
        ("--save-requests",),
        ("--output", "not/there/a.json"),
        ("--base-url", "localhost"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    assert run_bench(monkeypatch, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m launch.bench serve: error: ")


# -- what is noted ----------------------------------------------------------------------------------------------


async def play(script: Any, endpoint: str = "completions", **spec: Any) -> tuple[LoadResult, ScriptedServer]:
    server = ScriptedServer(script)
    async with server.serve() as url:
        api = ApiClient(url)
        result = await run_load(api, [LoadRequest([1, 2], 9)], LoadSpec("m", endpoint, **spec))
        api.close()
    return result, server


async def test_tokens_are_counted_by_the_server_and_gaps_by_chunks() -> None:
    """Seven tokens in three chunks, the last two in one read of the socket: no chunk is taken for a token."""
    head, first, second, third, *rest = streamed(tokens("a"), tokens("bcd"), tokens("efg", "length"), usage(5, 7))
    result, server = await play(lambda *_: [head, 0.03, first, 0.06, second + third, *rest])
    (record,) = result.records
    assert (record.input_tokens, record.output_tokens, record.finish_reason) == (5, 7, "length")
    assert record.ttft is not None
    assert record.last is not None
    assert 0.03 <= record.ttft < record.last
    assert len(record.gaps) == 2
    assert record.gaps[0] >= 0.06
    assert record.gaps[1] == 0
    assert record.tpot == pytest.approx(sum(record.gaps) / 6)
    assert server.bodies[0] == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_a_chunk_with_a_role_alone_is_no_token() -> None:
    def delta(**fields: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": fields}]}

    opening, first, *rest = streamed(delta(role="assistant", content=""), delta(content="a"), usage(5, 1))[1:]
    head = streamed()[0]
    result, server = await play(lambda *_: [head, opening, 0.05, first, *rest], "chat", fields={"top_k": 3})
    (record,) = result.records
    assert record.ttft is not None
    assert record.ttft >= 0.05
    assert record.gaps == []
    assert record.tpot is None
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies[0]["max_completion_tokens"] == 9
    assert server.bodies[0]["top_k"] == 3


@pytest.mark.parametrize(
    ("script", "kind", "patience"),
    [
        (streamed(tokens("a")), "no usage", 60),
        (streamed(usage(5, 0)), "empty answer", 60),
        ([*streamed(tokens("a"))[:2], 60.0], "timeout", 0.1),
    ],
)
async def test_an_answer_that_cannot_be_measured_is_an_error(script: list[Any], kind: str, patience: float) -> None:
    result, _ = await play(lambda *_: script, timeout=patience)
    assert [record.error_kind for record in result.records] == [kind]


async def test_no_more_than_asked_for_are_open_at_once(engine: FakeEngine, url: str) -> None:
    engine.delay = 0.002
    api = ApiClient(url)
    result = await run_load(api, load(DatasetSpec(input_len=5, as_text=True), 12), LoadSpec("demo", max_concurrency=3))
    api.close()
    assert result.peak_concurrency == 3
    assert len(result.records) == 12
    assert [record.error_kind for record in result.records] == [None] * 12


async def test_cancelled_it_keeps_what_was_complete_and_hangs_up_on_the_rest(engine: FakeEngine, url: str) -> None:
    engine.held_after, engine.answers = 50, {"short": "a", "long": "word " * 400}
    api = ApiClient(url)
    requests = [LoadRequest("short", 9), LoadRequest("long", 200)]
    running = asyncio.create_task(run_load(api, requests, LoadSpec("demo")))
    await until_async(lambda: len(engine.params) == 2 and len(engine.open) == 1)
    await asyncio.sleep(0.3)  # the short one has been answered, and its client, here, has the time to read that
    running.cancel()
    result = await running
    api.close()
    assert result.interrupted
    assert [record.error_kind for record in result.records] == [None, "interrupted"]
    await until_async(lambda: not engine.open)


# -- what becomes of it -----------------------------------------------------------------------------------------


def test_figures_are_of_what_was_completed() -> None:
    good = [Record(i, 11, ttft=0.1 * i, last=0.1 * i + 1, gaps=[0.5, 0.5], output_tokens=11) for i in (1, 2, 3)]
    for record in good:
        record.input_tokens, record.cached_tokens = 50, 16
    bad = [Record(4, 1, error_kind="HTTP 429", error="full"), Record(5, 1, error_kind="HTTP 429", error="again")]
    result = LoadResult([*good, *bad], seconds=2.0, peak_concurrency=5)
    figures = latency.figures(result, {"ttft": 250, "tpot": 100})
    assert (figures["sent"], figures["completed"], figures["failed"]) == (5, 3, 2)
    assert figures["errors"] == {"HTTP 429": {"count": 2, "first": "full"}}
    assert figures["ttft_ms"] == {"mean": 200, "p50": 200, "p90": 300, "p99": 300}
    assert figures["tpot_ms"]["p50"] == 100
    assert figures["itl_ms"]["mean"] == 500
    assert figures["e2e_ms"]["p99"] == 1300
    assert figures["output_tokens_per_s"] == 16.5
    assert figures["total_tokens_per_s"] == 91.5
    assert figures["cached_tokens"] == 48
    assert figures["goodput"]["good"] == 2
    text = latency.render(figures)
    assert "3 of 5 requests completed in 2.00 s, up to 5 at once" in text
    assert "2 x HTTP 429: full" in text


def test_nothing_completed_has_no_figures_and_no_crash() -> None:
    figures = latency.figures(LoadResult([Record(0, 1, error_kind="connect", error="x")], seconds=1), {"e2e": 1})
    assert figures["ttft_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert "1 x connect: x" in latency.render(figures)
    assert "-/-/-" in latency.render_sweep("request-rate", [(math.inf, figures)])


def test_a_run_against_our_server(
    engine: FakeEngine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    options = ["--base-url", url, "--prompts", "text", "--input-len", "5", "--num-prompts", "6", "--output-len", "99"]
    assert run_bench(monkeypatch, *options, "--output", str(file), "--save-requests", "--api-key", "secret") == 0
    report = json.loads(file.read_text())
    assert "secret" not in file.read_text()
    assert report["model"] == "demo"
    assert report["settings"]["input_len"] == 5
    assert report["settings"]["range_ratio"] == 0, "a default is told like what was given"
    assert report["settings"]["prefix_len"] is None, "what the data set does not have is not"
    (run,) = report["runs"]
    assert len(engine.params) == 7, "one warm-up, which is not measured"
    assert engine.tokenizer is not None
    assert run["output_tokens"] == 6 * (len(engine.tokenizer.encode(ANSWER)) + 1)
    assert run["input_tokens"] == sum(map(len, engine.prompts[1:]))
    assert run["short_answers"] == 6
    assert [each["finish_reason"] for each in run["requests"]] == ["stop"] * 6
    assert "6 of 6 requests completed" in capsys.readouterr().out
    assert {params.temperature for params in engine.params} == {0}


def test_errors_are_counted_and_the_run_goes_on(
    engine: FakeEngine, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base-url", url, "--endpoint", "chat", "--input-len", "5", "--num-prompts", "4"]
    engine.fail_after = 3
    assert run_bench(monkeypatch, *options) == 1
    assert "warming up failed: error event: rank 1 fell over" in capsys.readouterr().err
    assert run_bench(monkeypatch, *options, "--num-warmups", "0") == 1
    assert "4 x error event: rank 1 fell over" in capsys.readouterr().out
    engine.queue_is_full = True
    assert run_bench(monkeypatch, *options, "--num-warmups", "0") == 1
    assert "4 x HTTP 429" in capsys.readouterr().out
    assert run_bench(monkeypatch, *options, "--model", "gpt") == 2
    assert "it has: demo" in capsys.readouterr().err


def test_token_ids_that_are_refused_are_explained(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(monkeypatch, "--base-url", url, "--num-prompts", "2", "--vocab-size", "100000") == 1
    assert "--prompts text" in capsys.readouterr().err


def test_a_sweep_draws_its_curve(
    engine: FakeEngine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture, file = tmp_path / "curve.png", tmp_path / "result.json"
    engine.delay = 0.001
    options = ["--base-url", url, "--input-len", "5", "--vocab-size", "300", "--num-prompts", "6", "--output-len", "9"]
    files = ["--plot", str(picture), "--output", str(file)]
    assert run_bench(monkeypatch, *options, *files, "--sweep", "request-rate=100,inf") == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    runs = json.loads(file.read_text())["runs"]
    assert [run["request-rate"] for run in runs] == [100, "inf"]
    assert [run["completed"] for run in runs] == [6, 6]
    assert len({tuple(prompt) for prompt in engine.prompts}) == 14, "a prompt came twice: the prefix cache answers it"
    assert capsys.readouterr().out.count("\n|") == 4


def test_a_sweep_that_the_server_does_not_survive_keeps_its_first_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(number: int, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return json_answer(MODELS)
        return streamed(tokens("a"), usage(3, 1)) if number < 5 else json_answer({"detail": "gone"}, "503 X")

    async def measure() -> int:
        async with ScriptedServer(script).serve() as url:
            options = ["--base-url", url, "--num-prompts", "3", "--sweep", "max-concurrency=1,2,3"]
            return await asyncio.to_thread(run_bench, monkeypatch, *options)

    assert asyncio.run(measure()) == 1
    shown = capsys.readouterr()
    assert shown.out.count("\n|") == 3
    assert shown.err == 'error: run 2 of 3: warming up failed: HTTP 503: status 503: {"detail": "gone"}\n'


def test_without_matplotlib_a_plot_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plot.check(Path("a.png"))


def test_another_server_is_measured_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One that refuses the fields that only ours knows."""

    def script(number: int, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return json_answer(MODELS)
        unknown = body.keys() - {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
        if unknown:
            return json_answer({"error": {"message": f"unknown {unknown}"}}, "400 Bad Request")
        return streamed(tokens("a", "length"), usage(3, 1))

    async def measure() -> int:
        async with ScriptedServer(script).serve() as url:
            return await asyncio.to_thread(run_bench, monkeypatch, "--base-url", url, "--num-prompts", "3")

    assert asyncio.run(measure()) == 0
    assert "3 of 3 requests completed" in capsys.readouterr().out


# -- as a program -----------------------------------------------------------------------------------------------


def test_ctrl_c_prints_what_was_measured(engine: FakeEngine, url: str, tmp_path: Path) -> None:
    engine.delay = 0.01
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "launch.bench", "serve", "--base-url", url, "--prompts", "text"]
    command += ["--input-len", "5", "--num-prompts", "5000", "--max-concurrency", "4", "--output", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    until(lambda: len(engine.params) >= 20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""
    assert "interrupted: the figures are of what was complete by then" in out
    report = json.loads(file.read_text())
    assert report["interrupted"]
    assert report["runs"][0]["completed"] >= 10
    assert report["runs"][0]["errors"]["interrupted"]["count"] == 4


def test_it_starts_without_what_it_does_not_need() -> None:
    code = (
        "import sys; import launch.bench.__main__, launch.bench.serve;"
        "sys.exit(', '.join(n for n in ('torch', 'transformers', 'fastapi', 'matplotlib') if n in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_real_server_is_measured(tmp_path: Path) -> None:
    """Every token in a chunk of its own or with others, as many as were asked for, whatever their text."""
    file = tmp_path / "result.json"
    with ServerProcess() as server:
        command = [sys.executable, "-m", "launch.bench", "serve", "--base-url", server.wait_ready()]
        command += ["--num-prompts", "8", "--input-len", "40", "--output-len", "12", "--ignore-eos"]
        command += ["--output", str(file), "--save-requests", "--request-rate", "50"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    (run,) = json.loads(file.read_text())["runs"]
    assert (run["completed"], run["input_tokens"], run["output_tokens"]) == (8, 8 * 40, 8 * 12)
    assert run["finish_reasons"] == {"length": 8}
    assert all(0 < each["ttft"] <= each["last"] for each in run["requests"])
    assert max(len(each["gaps"]) for each in run["requests"]) > 3, "the first token came late, with the others"
