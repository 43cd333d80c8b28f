"""Checking grammars in a process of their own: what is let through, what is stopped in time, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import EngineDeadError, QueueFullError, RequestError
from nanoengine import AsyncLLM, SamplingParams, grammar_compiler
from nanoengine.grammar_compiler import GrammarCompiler
from nanoengine.processes import is_stopped
from nanoengine.structured_outputs import StructuredOutputsParams
from tests.nanoengine.process_tools import alive, descendants
from tests.waiting import eventually, until

NESTED: dict[str, Any] = {"type": "string"}
for _ in range(100):
    NESTED = {"type": "object", "properties": {"a": NESTED}}
BOMB = {
    f"d{i}": {"type": "object", "properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "abcdefghij"}}
    for i in range(30)
} | {"d30": {"type": "string"}}
PRODUCT = {
    f"d{i}": {
        "allOf": [
            {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "string", "maxLength": i + 3}]},
            {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "string", "minLength": i + 1}]},
        ]
    }
    for i in range(20)
} | {"d20": {"type": "string"}}
# Each is served or refused within the time; which of them, the library may change.
CATASTROPHIC: list[dict[str, Any]] = [
    {"regex": "(a+)+$"},
    {"regex": "(a|aa)+b"},
    {"regex": "a{1000000000}"},
    {"regex": "((a{100}){100}){100}"},
    {"regex": "(.*a.{500})+b"},
    {"regex": "(" * 30000 + ")" * 30000},
    {"regex": "|".join(f"{chr(97 + i % 26)}.{{0,20}}{i}" for i in range(4000))},
    {"grammar": "start: A\nA: " + " & ".join(f"/(?s:.*){chr(97 + i)}(?s:.*)/" for i in range(20))},
    {"grammar": "start: " + "(" * 30000},
    {"grammar": 'root ::= r0\nr4000 ::= "a"\n' + "".join(f"r{i} ::= r{i + 1}\n" for i in range(4000))},
    {"grammar": 'start: e\ne: e e e | "a" | ""'},
    {"json": NESTED},
    {"json": {"$defs": BOMB, "$ref": "#/$defs/d0"}},
    {"json": {"$defs": PRODUCT, "$ref": "#/$defs/d0"}},
    {"json": {"$ref": "#"}},
    {"json": {"type": "array", "minItems": 10**9, "items": {"type": "string"}}},
    {"json": {"type": "string", "minLength": 10**9}},
    {"json": {"const": "x" * 60000}},
]


@pytest.fixture(scope="module")
def config() -> EngineConfig:
    return EngineConfig.create(model="demo").resolve()


@pytest.fixture
def compiler(config: EngineConfig) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(config)
    yield compiler
    compiler.close()


def form(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


def refusal(compiler: GrammarCompiler, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        compiler.compile(form(**fields)).result(60)
    assert caught.value.param == "structured_outputs"
    return caught.value.message


def test_nothing_is_started_before_it_is_needed_and_nothing_is_left(config: EngineConfig) -> None:
    compiler = GrammarCompiler(config)
    before = descendants()
    grammar = compiler.compile(form(regex="[0-9]+")).result(60)
    assert json.loads(grammar) == {"grammars": [{"lark_grammar": "start: /[0-9]+/"}]}
    (process,) = set(descendants()) - set(before)
    compiler.close()
    compiler.close()
    assert not alive([process])
    with pytest.raises(EngineDeadError):
        compiler.compile(form(regex="[0-9]+"))


def test_what_is_wrong_is_said_and_kept(compiler: GrammarCompiler) -> None:
    assert "structured_outputs.regex cannot be matched" in refusal(compiler, regex="(")
    assert "structured_outputs.json cannot be matched" in refusal(compiler, json={"type": "foo"})
    assert "not a valid grammar" in refusal(compiler, grammar="root := x")
    assert "structured_outputs.json" in refusal(compiler, json={"allOf": [{"type": "string"}, {"type": "null"}]})
    first = compiler.compile(form(regex="a"))
    assert first.result(60)
    asked = []
    compiler._ask = lambda *_: asked.append(1)  # type: ignore[assignment,func-returns-value,method-assign]
    assert compiler.compile(form(regex="a")).result(1) == first.result()
    assert "structured_outputs.regex" in refusal(compiler, regex="(")
    assert not asked


def test_the_answers_are_bounded(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED", 3)
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED_CHARS", 1000)
    for i in range(5):
        compiler.compile(form(regex=f"a{i}")).result(60)
    assert len(compiler._answers) == 3
    compiler.compile(form(regex="b" * 800)).result(60)
    assert compiler._num_chars == sum(len(answer.grammar) for answer in compiler._answers.values()) <= 1000


@pytest.mark.timeout(300)
def test_a_catastrophic_form_is_answered_within_two_seconds(compiler: GrammarCompiler) -> None:
    """Two seconds are what a machine takes that has nothing else to do; the limit by the clock is what makes it so."""
    assert grammar_compiler.COMPILE_SECONDS < 2
    compiler.compile(form(regex="a")).result(60)  # it runs
    for fields in CATASTROPHIC:
        began = time.monotonic()
        with contextlib.suppress(RequestError):
            compiler.compile(form(**fields)).result(60)
        assert time.monotonic() - began < 5 * grammar_compiler.COMPILE_SECONDS, f"{fields!r:.100}"
        compiler.compile(form(choice=[f"{fields!r:.1000}"])).result(60)  # waits for a new process where one was killed


def test_one_that_takes_too_long_is_killed(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.compile(form(regex="a")).result(60)
    assert compiler._process is not None
    os.kill(compiler._process.pid, signal.SIGSTOP)  # stands for a grammar without end
    until(lambda: compiler._process is not None and is_stopped(compiler._process.pid))  # a signal takes its time
    began = time.monotonic()
    assert "too complex: it did not compile within 1.5 s" in refusal(compiler, regex="b")
    assert 1.4 < time.monotonic() - began < 7.5
    assert compiler.compile(form(regex="c")).result(60), "another process has taken its place"
    assert "too complex" in refusal(compiler, regex="b"), "kept for a while"
    monkeypatch.setattr("nanoengine.grammar_compiler.time.monotonic", lambda: time.time() + 1e9)
    assert compiler.compile(form(regex="b")).result(60), "but not for ever: it may have been the machine"


def test_a_killed_process_is_replaced(compiler: GrammarCompiler) -> None:
    compiler.compile(form(regex="a")).result(60)
    assert compiler._process is not None
    first = compiler._process.pid
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: not alive([first]))
    assert compiler.compile(form(regex="b")).result(60)


async def test_the_event_loop_does_not_wait(compiler: GrammarCompiler) -> None:
    """What other streams would notice of somebody's catastrophic regular expression."""
    gaps, last, done = [], time.monotonic(), False

    async def beat() -> None:
        nonlocal last
        while not done:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    heart = asyncio.create_task(beat())
    with contextlib.suppress(RequestError):
        await asyncio.wrap_future(compiler.compile(form(regex="((a{100}){100}){100}")))
    done = True
    await heart
    assert len(gaps) > 20
    assert sorted(gaps)[len(gaps) * 9 // 10] < 0.1, "a few may be the machine's"


def test_whoever_waits_too_long_is_told_to_come_again(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_WAIT_SECONDS", -1)
    with pytest.raises(QueueFullError):
        compiler.compile(form(regex="a")).result(60)
    monkeypatch.setattr(grammar_compiler, "MAX_WAITING", 0)
    with pytest.raises(QueueFullError):
        compiler.compile(form(regex="b"))


def test_callers_of_the_same_form_share_the_answer(compiler: GrammarCompiler) -> None:
    futures = [compiler.compile(form(regex="abc")) for _ in range(3)]
    assert len({future.result(60) for future in futures}) == 1
    assert futures[0] is futures[1]


async def test_whoever_gives_up_takes_the_answer_from_nobody() -> None:
    """Requests of the same form wait for one answer, and a client may hang up."""
    llm = AsyncLLM("demo")
    params = SamplingParams(structured_outputs={"regex": "[a-f]{3}"})
    first, second = (asyncio.create_task(llm._compile(params)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert "[a-f]{3}" in await second
    assert first.cancelled()
    await llm.close()
    with pytest.raises(EngineDeadError):
        await llm._compile(params)


def test_what_waits_when_it_is_closed_ends_with_an_error(config: EngineConfig) -> None:
    compiler = GrammarCompiler(config)
    futures = [compiler.compile(form(regex=f"((a{{100}}){{100}}){{{n}}}")) for n in (99, 100)]
    compiler.close()
    assert all(isinstance(future.exception(1), EngineDeadError) for future in futures)
    assert not compiler._pending


def test_an_engine_that_cannot_give_it_says_why(tmp_path: Path) -> None:
    def why(**settings: Any) -> str:
        compiler = GrammarCompiler(EngineConfig.create(**({"model": "demo"} | settings)).resolve())
        try:
            return refusal(compiler, regex="a")
        finally:
            compiler.close()

    assert "without a tokenizer (skip_tokenizer_init)" in why(skip_tokenizer_init=True)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "no tokenizer.json" in why(tokenizer=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "grammars cannot be matched with" in why(tokenizer=str(tmp_path))


def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    code = (
        "from configs.engine import EngineConfig\n"
        "from nanoengine.grammar_compiler import GrammarCompiler\n"
        "from nanoengine.structured_outputs import StructuredOutputsParams\n"
        "import sys, time\n"
        "compiler = GrammarCompiler(EngineConfig.create(model='demo').resolve())\n"
        "compiler.compile(StructuredOutputsParams(regex='a')).result(60)\n"
        "assert 'llguidance' not in sys.modules, 'a front end has no use for it'\n"
        "print(compiler._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        child = int(owner.stdout.readline())
        assert alive([child])
        owner.kill()
        owner.wait()
        assert eventually(lambda: not alive([child]))
