"""`bench chaos` notices what it is there to notice: a wrong token, a stuck request, a leak, counts that disagree."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from launch.bench import __main__ as bench
from launch.bench.chaos import report, traffic
from launch.bench.chaos.answers import Answer
from launch.bench.chaos.clients import WAYS, Clients, Outcome, Record
from launch.bench.chaos.faults import FAULTS, Plan
from launch.bench.chaos.traffic import COMPLETIONS, Case
from launch.bench.chaos.watch import Sample, trends
from launch.client.connection import HttpClient
from tests.launch.scripted_server import ScriptedServer, event, json_answer, piece, stream_head, streamed

CASE = Case("greedy", COMPLETIONS, {"prompt": "x", "max_tokens": 4})


def choice(text: str, ids: list[int], finish_reason: str | None = None, index: int = 0) -> dict[str, Any]:
    logprobs = {"tokens": [str(each) for each in ids], "token_logprobs": [-0.5] * len(ids)}
    return {"index": index, "text": text, "token_ids": ids, "logprobs": logprobs, "finish_reason": finish_reason}


def completion(*choices: dict[str, Any], num_tokens: int = 4) -> dict[str, Any]:
    usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "prompt_tokens_details": {"cached_tokens": 1}}
    return {"id": "x", "created": 1, "choices": [*choices], "usage": usage}


WHOLE = completion(choice("abcd", [1, 2, 3, 4], "length"))
CHUNKS = [
    {"choices": [choice("ab", [1, 2])], "usage": None},
    {"choices": [choice("cd", [3, 4], "length")], "usage": None},
    completion(),
]


def answer_of(*told: dict[str, Any]) -> Answer:
    answer = Answer()
    for each in told:
        answer.add(each)
    return answer


# ------------------------------------------------------------------------------------------------------ answers


def test_a_stream_equals_the_whole_answer_and_a_chat_its_deltas() -> None:
    assert answer_of(*CHUNKS).difference(answer_of(WHOLE)) is None
    message = {"index": 0, "message": {"role": "assistant", "content": "hi", "refusal": None}, "finish_reason": "stop"}
    deltas = [{"role": "assistant", "content": ""}, {"content": "h"}, {"content": "i"}]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    assert answer_of(*chunks, end).difference(answer_of({"choices": [message]})) is None
    ids = [{"outputs": [{"index": 0, "token_ids": [token], "finish_reason": None}]} for token in (5, 6)]
    assert answer_of(*ids).difference(answer_of({"outputs": [{"index": 0, "token_ids": [5, 6]}]})) is None


@pytest.mark.parametrize(
    ("told", "where"),
    [
        (completion(choice("abcd", [1, 2, 9, 4], "length")), "0.token_ids[2]: expected 3, got 9"),
        (completion(choice("abcd", [1, 2, 3], "length")), "0.token_ids: expected 4 entries, got 3"),
        (completion(choice("abce", [1, 2, 3, 4], "length")), "0.text: expected 'abcd', got 'abce'"),
        (completion(choice("abcd", [1, 2, 3, 4], "stop")), "0.finish_reason: expected 'length', got 'stop'"),
        (completion(choice("abcd", [1, 2, 3, 4], "length"), num_tokens=5), "completion_tokens: expected 4, got 5"),
        (completion(choice("abcd", [1, 2, 3, 4], "length"), choice("", [], index=1)), "choices: expected"),
    ],
)
def test_the_first_difference_is_named(told: dict[str, Any], where: str) -> None:
    assert where in (answer_of(told).difference(answer_of(WHOLE)) or "")


def test_what_was_broken_off_must_be_a_beginning() -> None:
    whole = answer_of(WHOLE)
    assert Answer().difference_so_far(whole) is None
    assert answer_of(CHUNKS[0]).difference_so_far(whole) is None
    assert answer_of({"choices": [choice("ab\ufffd", [1, 2], "abort")]}).difference_so_far(whole) is None
    assert answer_of({"choices": [choice("ax", [1, 2])]}).difference_so_far(whole)
    assert answer_of({"choices": [choice("ab", [2])]}).difference_so_far(whole)
    assert answer_of({"choices": [choice("ab", [1], index=3)]}).difference_so_far(whole)


# ------------------------------------------------------------------------------------------------------ clients


@contextlib.asynccontextmanager
async def clients_of(
    script: Callable[[int, str, Any], bytes | Iterable[bytes | float]], patience: float = 30
) -> AsyncIterator[tuple[Clients, Record]]:
    async with ScriptedServer(script).serve() as url:
        http, record = HttpClient(url), Record()
        clients = Clients(http, record, patience)
        clients.expected[CASE] = answer_of(WHOLE)
        yield clients, record
        http.close()


async def asked(script: Callable[[int, str, Any], Any], way: str, patience: float = 30) -> Outcome:
    async with clients_of(script, patience) as (clients, record):
        outcome = await clients.ask(CASE, way, random.Random(1))
        assert record.outcomes == [outcome]
        return outcome


async def test_right_answers_are_right_whole_and_streamed() -> None:
    assert (await asked(lambda *_: json_answer(WHOLE), "whole")).result == "right"
    outcome = await asked(lambda *_: [*streamed(*CHUNKS)], "stream")
    assert (outcome.result, outcome.num_tokens) == ("right", 4)
    aborted = [{"choices": [choice("ab", [1, 2], "abort")]}]
    script = lambda _, path, __: json_answer({}) if path == "/abort" else streamed(*aborted)  # noqa: E731
    assert (await asked(script, "aborted")).result == "aborted"
    late = json_answer({"error": {"message": "too late", "code": "request_timeout"}}, "504 Gateway Timeout")
    assert (await asked(lambda *_: late, "timed out")).result == "timed out"


@pytest.mark.parametrize(
    ("script", "way", "result", "detail"),
    [
        (lambda *_: json_answer(completion(choice("abcd", [1, 2, 3, 5], "length"))), "whole", "wrong", "token_ids[3]"),
        (lambda *_: streamed(CHUNKS[0], CHUNKS[0], *CHUNKS[1:]), "stream", "wrong", "0.text"),
        (lambda *_: streamed(CHUNKS[1], CHUNKS[2]), "stream", "wrong", "0.text"),
        (lambda *_: streamed({"choices": [choice("ab", [1, 2], "abort")]}), "stream", "wrong", ""),
        (lambda *_: [stream_head(), event(CHUNKS[0]), piece(b"")], "stream", "failed", "without [DONE]"),
        (lambda *_: streamed(CHUNKS[0], {"error": {"message": "gone"}}), "stream", "failed", "error event: gone"),
        (lambda *_: json_answer({"error": {"message": "oh"}}, "500 X"), "whole", "failed", "HTTP 500: oh"),
        (lambda *_: json_answer({"choices": [{}]}), "whole", "failed", "KeyError"),
        (lambda *_: [stream_head(), event(CHUNKS[0]), 60.0], "stream", "stuck", "no end after 0.2 s"),
    ],
)  # fmt: skip
async def test_what_is_not_right_is_noticed(script: Any, way: str, result: str, detail: str) -> None:
    outcome = await asked(script, way, 0.2 if result == "stuck" else 30)
    assert outcome.result == result
    assert detail in outcome.detail
    assert not outcome.is_good


async def test_who_is_told_to_come_again_does_so() -> None:
    refusal = json_answer({"error": {"message": "later", "code": "recovering"}}, "503 Service Unavailable")
    async with clients_of(lambda number, *_: json_answer(WHOLE) if number else refusal) as (clients, record):
        assert (await clients.ask(CASE, "whole", random.Random(1))).result == "right"
        assert record.refusals == {"recovering": 1}
    async with clients_of(lambda *_: refusal) as (clients, record):
        assert (await clients.ask(CASE, "whole", random.Random(1), insist=False)).result == "refused"


async def test_a_stream_is_resumed_behind_the_last_event_that_came() -> None:
    """The client hangs up after one event, and reads the rest."""
    numbers = iter((1, 24))
    dice = SimpleNamespace(randrange=lambda *_: next(numbers), uniform=lambda *_: 0)
    first = piece(b"id: cmpl-chaos-1:0\ndata: " + json.dumps(CHUNKS[0]).encode() + b"\n\n")
    server = ScriptedServer(lambda number, *_: streamed(*CHUNKS[1:]) if number else [stream_head(), first, 60.0])
    async with server.serve() as url:
        http, record = HttpClient(url), Record()
        clients = Clients(http, record, 30)
        clients.expected[CASE] = answer_of(WHOLE)
        outcome = await clients.ask(CASE, "resumed", dice)
        http.close()
    assert (outcome.result, outcome.detail) == ("right", "")
    assert server.paths == [COMPLETIONS, "/v1/streams/cmpl-chaos-1"]
    assert "X-Stream-Resume: 1" in server.heads[0]
    assert "Last-Event-ID: cmpl-chaos-1:0" in server.heads[1]


# --------------------------------------------------------------------------------- plans, trends, counts, options


def test_the_same_seed_asks_the_same_and_every_kind_and_fault_has_its_turn() -> None:
    bodies = [case.body for case in traffic.cases(3, 2, 40)]
    assert bodies == [case.body for case in traffic.cases(3, 2, 40)] != [case.body for case in traffic.cases(4, 2, 40)]
    assert all("seed" in str(body) or body.get("temperature") == 0 or "use_beam_search" in body for body in bodies)
    plans = [Plan(list(FAULTS), 2.0, random.Random(5)) for _ in range(2)]
    turns = [[plan.next() for _ in FAULTS] for plan in plans]
    assert turns[0] == turns[1]
    assert sorted(name for _, name in turns[0]) == sorted(FAULTS)
    assert all(1 <= pause <= 3 for pause, _ in turns[0])


def samples(memory: Callable[[int], int], pid: Callable[[int], int] = lambda number: 7) -> list[Sample]:
    return [
        Sample(
            float(number), {"ranks": [pid(number)]}, {"ranks": 1}, {"ranks": memory(number)}, {"ranks": 9}, {"ranks": 3}
        )
        for number in range(100)
    ]


def test_what_grows_is_told_from_what_only_moves() -> None:
    noisy = [*random.Random(1).choices(range(100 * 2**20), k=100)]
    assert trends(samples(noisy.__getitem__))["ranks"]["memory"].is_flat
    peak = trends(samples(lambda number: 2**30 if number == 60 else 2**20))["ranks"]
    assert all(trend.is_flat and trend.growth == 0 for trend in peak.values())
    leak = trends(samples(lambda number: number * 2**20))["ranks"]["memory"]
    assert not leak.is_flat
    assert leak.per_minute == pytest.approx(60 * 2**20)
    assert leak.growth == pytest.approx(74 * 2**20), "the first quarter is warming up"
    assert trends(samples(lambda number: number * 2**20, lambda number: number // 10))["ranks"]["memory"].is_flat
    assert trends([]) == trends(samples(lambda number: 1)[:3]) == {}


def metrics(**counts: int) -> str:
    labels = {"stop": "success_total{finished_reason", "length": "success_total{finished_reason"}
    labels |= {"abort": labels["stop"], "error": "failure_total{reason", "timeout": "failure_total{reason"}
    lines = [f"nanoengine:requests_accepted_total {counts.pop('accepted')}"]
    lines += [f'nanoengine:request_{labels[name]}="{name}"}} {count}' for name, count in counts.items()]
    return "\n".join(["# TYPE nanoengine:requests_accepted counter", *lines, ""])


def test_counts_that_disagree_are_noticed() -> None:
    record = Record()
    for result, times in (("right", 5), ("aborted", 2), ("timed out", 1), ("dropped", 2), ("refused", 3)):
        record.outcomes += [Outcome(CASE, "whole", "id", 0.0, result=result) for _ in range(times)]
    record.num_unsure = 2
    for counts, complaint in (
        ({"accepted": 9, "stop": 1, "length": 4, "abort": 3, "error": 0, "timeout": 1}, None),
        ({"accepted": 8, "stop": 5, "length": 0, "abort": 2, "error": 0, "timeout": 1}, None),
        (
            {"accepted": 9, "stop": 5, "length": 0, "abort": 2, "error": 0, "timeout": 1},
            "9 requests were accepted, but 8",
        ),
        ({"accepted": 11, "stop": 8, "length": 0, "abort": 2, "error": 0, "timeout": 1}, "clients saw the end of 8"),
        (
            {"accepted": 8, "stop": 5, "length": 0, "abort": 2, "error": 1, "timeout": 0},
            "0 requests ended with timeout",
        ),
    ):
        _, problems = report.reconcile(metrics(**counts), record)
        assert bool(problems) == bool(complaint), problems
        assert complaint is None or any(complaint in problem for problem in problems), problems


def test_of_requests_asked_for_at_once_each_may_end_in_its_own_way() -> None:
    """Of two that were timed out at once one may have been complete, or have been aborted with the other."""
    record = Record()
    pair = Case("two prompts", COMPLETIONS, {"prompt": ["x", "y"], "max_tokens": 4})
    record.outcomes = [Outcome(pair, "timed out", "id", 0.0, result="timed out") for _ in range(3)]
    for counts, is_right in (
        ({"accepted": 6, "stop": 0, "length": 0, "abort": 0, "error": 0, "timeout": 6}, True),
        ({"accepted": 6, "stop": 1, "length": 0, "abort": 2, "error": 0, "timeout": 3}, True),
        ({"accepted": 6, "stop": 0, "length": 0, "abort": 4, "error": 0, "timeout": 2}, False),
        ({"accepted": 7, "stop": 0, "length": 0, "abort": 0, "error": 0, "timeout": 7}, False),
    ):
        assert (report.reconcile(metrics(**counts), record)[1] == []) == is_right, counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes must be greater than 0, got 0"),
        (["--clients", "0"], "--clients must be at least 1, got 0"),
        (["--output", "not/there/x.json"], "--output: there is no folder not/there"),
        (["--", "--max-restarts", "0"], "with --max-restarts 0 it does not"),
        (["--", "--tpp", "2"], "unknown option --tpp"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "chaos", *options])
    assert bench.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sum(WAYS.values()) == 100
