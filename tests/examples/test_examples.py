"""Each example, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import chat_templates
from tests.launch.fake_engine import FakeEngine, served
from tests.launch.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ["offline", "minimal_generate", "stream_client", "tools_client", "chat"]


def run(name: str, *arguments: str, given: str = "") -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # also where the packages are not installed
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ServerProcess() as server:
        yield server.wait_ready()


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_says_what_the_example_does(name: str) -> None:
    text = run(name, "--help")
    assert f"python examples/{name}.py" in text
    assert "--max-" in text


def test_tools_client_runs_what_is_called_and_sends_the_results(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path, chat_templates.TOOLS, max_model_len=2048)
    call = '<tool_call>{"name": "Add", "arguments": {"a": 17, "b": 25}}</tool_call>'
    engine.script = [f"Let me see.\n{call}\n{call.replace('17', '1')}", "It is 42."]
    with served(engine) as url:
        out = run("tools_client", "--base-url", f"{url}/v1", "What is 17 + 25?")
    assert out.splitlines() == [
        "Let me see.",
        '[Add {"a": 17, "b": 25} → 42.0]',
        '[Add {"a": 1, "b": 25} → 26.0]',
        "It is 42.",
    ]
    assert engine.tokenizer is not None
    assert "tool\n42.0" in engine.tokenizer.decode(engine.prompts[-1])


def test_offline_completes_and_chats() -> None:
    text = run("offline", "--max-tokens", "8")
    assert re.search("'中国的首都是' -> '北京", text)
    assert re.search("'日本的首都是哪里？' -> '.*东京", text)


def test_minimal_generate_prints_the_answer_and_nothing_else() -> None:
    out = run("minimal_generate", "--prompt", "中国的首都是", "--max-new-tokens", "8", "--device", "cpu")
    assert out.startswith("北京")
    assert len(out.splitlines()) == 1


def test_chat_remembers_and_forgets() -> None:
    out = run(
        "chat", "--max-tokens", "16", given="中国的首都是哪里？\n\n/reset\n法国的首都是哪里？\n/exit\n不会到这里\n"
    )
    first, second = out.splitlines()
    assert "北京" in first
    assert "巴黎" in second


def test_stream_client_streams_both_kinds_of_answers(url: str) -> None:
    assert "北京" in run("stream_client", "--base-url", f"{url}/v1", "中国的首都是哪里？")
    assert "北京" in run(
        "stream_client", "--base-url", f"{url}/v1", "--completion", "中国的首都是", "--max-tokens", "8"
    )
