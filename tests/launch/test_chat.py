"""The terminal chat: typed at on a pseudo-terminal, and fed through pipes; with an invented engine and the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.chat.conversation import Answer, Conversation
from tests.launch.fake_engine import ANSWER, FakeEngine, served
from tests.launch.pseudo_terminal import PseudoTerminal
from tests.launch.server_process import ROOT
from tests.waiting import until

CHAT = [sys.executable, "-m", "launch.chat"]


def asked(engine: FakeEngine) -> str:
    """The last prompt, as text."""
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(engine.prompts[-1])


def piped(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAT, *arguments], input=text, cwd=ROOT, capture_output=True, text=True, timeout=60)


# -- data -------------------------------------------------------------------------------------------------------


def test_a_conversation_remembers_and_forgets() -> None:
    conversation = Conversation("Be brief.")
    conversation.add("a", "b")
    assert [message["role"] for message in conversation.with_message("c")] == ["system", "user", "assistant", "user"]
    conversation.reset()
    assert conversation.with_message("c") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "c"},
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("/help", ("help", "")),
        (" /system  Be brief.\nAlways. ", ("system", "Be brief.\nAlways.")),
        ("/etc/hosts is what?", None),
        ("a /help", None),
        ("//", None),
    ],
)
def test_what_a_command_is(message: str, expected: tuple[str, str] | None) -> None:
    assert Conversation.command_of(message) == expected


def test_thoughts_are_no_part_of_an_answer() -> None:
    answer = Answer()
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "yes"}, {}]
    taken = [answer.take({"choices": [{"delta": delta}]}) for delta in deltas]
    assert taken == [("", ""), ("", "hm"), ("yes", ""), ("", "")]
    assert answer.text == "yes"
    assert "does not say" in answer.stats()
    answer.take({"choices": [], "usage": {"completion_tokens": 3}})
    assert answer.stats().startswith("3 tokens in ")


# -- on a terminal ----------------------------------------------------------------------------------------------


def test_a_conversation_on_a_terminal(engine: FakeEngine, url: str) -> None:
    with PseudoTerminal("launch.chat", "--base-url", url, "--temperature", "0.5", "--stats") as terminal:
        terminal.expect("/help lists commands, Ctrl-D leaves)\n> ")
        terminal.type("one\n")
        terminal.expect(ANSWER + "\n(")
        terminal.expect(" tokens/s)\n> ")
        assert engine.params[-1].temperature == 0.5
        terminal.type("two \\\n")
        terminal.expect("… ")
        terminal.type("lines\n")
        terminal.expect(ANSWER)
        assert asked(engine).count("user") == 2
        assert f"user\none\nassistant\n{ANSWER}\nuser\n" in asked(engine)
        assert "two \nlines" in asked(engine)
        terminal.type("/reset\n")
        terminal.expect("(the conversation is forgotten)\n> ")
        terminal.type('"""three\nand\n\nfour"""\n')
        terminal.expect(ANSWER)
        assert "user\nthree\nand\n\nfour\nassistant" in asked(engine)
        assert "one" not in asked(engine)
        terminal.type("/system Be brief.\n")
        terminal.expect("(instructions set, the conversation begins anew)\n> ")
        terminal.type("five\n")
        terminal.expect(ANSWER)
        assert asked(engine).startswith("system\nBe brief.\nuser\nfive\n")
        assert "three" not in asked(engine)
        terminal.type("/help\n")
        terminal.expect("/system TEXT")
        terminal.type("/what\n")
        terminal.expect("(there is no command /what; /help lists them)")
        terminal.expect("> ")
        terminal.control("d")
        assert terminal.end() == 0
    assert len(engine.prompts) == 4


def test_ctrl_c_stops_the_answer_and_not_the_program(engine: FakeEngine, url: str) -> None:
    engine.delay, engine.answers = 0.05, {"user\ngo on\nassistant\n\n": "北京 " + "word " * 40}
    with PseudoTerminal("launch.chat", "--base-url", url) as terminal:
        terminal.expect("> ")
        terminal.type("go on\n")
        terminal.expect("北京")
        terminal.control("c")
        terminal.expect("\n(stopped)\n> ")
        until(lambda: not engine.open)
        assert len(engine.aborted) == 1, "the server was not told until the answer was complete"
        engine.delay = 0
        terminal.type("again\n")
        terminal.expect(ANSWER)
        assert "assistant\n北京" in asked(engine), "what had come of the answer is part of the conversation"
        assert asked(engine).count("word") < 40
        terminal.expect("> ")
        terminal.type("half a li")
        terminal.expect("half a li")
        terminal.control("c")
        terminal.expect("(Ctrl-D or /exit leaves)\n> ")
        terminal.type("/exit\n")
        assert terminal.end() == 0


def test_ctrl_c_before_the_first_token_forgets_the_question(engine: FakeEngine, url: str) -> None:
    engine.delay = 30
    with PseudoTerminal("launch.chat", "--base-url", url) as terminal:
        terminal.expect("> ")
        terminal.type("never mind\n")
        until(lambda: engine.open)
        terminal.control("c")
        terminal.expect("(stopped)\n> ")
        until(lambda: not engine.open)
        engine.delay = 0
        terminal.type("again\n")
        terminal.expect(ANSWER)
        assert "never mind" not in asked(engine)


def test_what_goes_wrong_is_explained_and_the_chat_goes_on(engine: FakeEngine, url: str) -> None:
    with PseudoTerminal("launch.chat", "--base-url", url, "--max-tokens", "40") as terminal:
        terminal.expect("> ")
        terminal.type("word " * 300 + "\n")
        terminal.expect("(the conversation does not fit into the model's 256 tokens: /reset begins anew")
        engine.fail_after = 2
        terminal.type("fail\n")
        terminal.expect("(no answer: error event: rank 1 fell over)\n> ")
        engine.fail_after, engine.queue_is_full = None, True
        terminal.type("full\n")
        terminal.expect("(no answer: HTTP 429: ")
        engine.queue_is_full = False
        terminal.type("fine\n")
        terminal.expect(ANSWER)
        terminal.expect("> ")  # a Ctrl-D before the prompt is the terminal's, not the chat's
        assert all(word not in asked(engine) for word in ("word", "fail", "full"))
        terminal.control("d")
        assert terminal.end() == 0


def test_an_answer_that_is_cut_off_is_said_to_be(engine: FakeEngine, url: str) -> None:
    with PseudoTerminal("launch.chat", "--base-url", url, "--max-tokens", "3") as terminal:
        terminal.expect("> ")
        terminal.type("hi\n")
        terminal.expect("(cut off by --max-tokens 3 or the model's 256 tokens)\n> ")


def test_an_answer_cannot_do_anything_to_the_terminal(engine: FakeEngine, url: str) -> None:
    """Escape sequences in an answer could clear the screen, or worse."""
    evil = "a\x1b[2Jb\x07c\x9bd"
    engine.answers = {"user\nhi\nassistant\n\n": evil}
    assert piped("hi\n", "--base-url", url).stdout == evil + "\n", "a program gets what the model said"
    with PseudoTerminal("launch.chat", "--base-url", url) as terminal:
        terminal.expect("> ")
        terminal.type("hi\n")
        terminal.expect("a[2Jbcd\n> ")


# -- through pipes ----------------------------------------------------------------------------------------------


def test_messages_of_a_file_are_answered_in_turn(engine: FakeEngine, url: str) -> None:
    done = piped(
        "one\n\n/system Be brief.\ntwo \\\nlines\nlast", "--base-url", url + "/v1", "--stats", "--model", "demo"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ANSWER}\n" * 3
    assert len(done.stderr.splitlines()) == 4
    assert "system\nBe brief." in asked(engine)
    assert "two \nlines" in asked(engine)


def test_a_message_of_a_file_that_fails_ends_the_program(engine: FakeEngine, url: str) -> None:
    engine.fail_after = 0
    done = piped("one\ntwo\n", "--base-url", url)
    assert done.returncode == 1
    assert "rank 1 fell over" in done.stderr
    assert len(engine.prompts) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--base-url", "nowhere"], 2, "base_url must be like"),
        (["--base-url", "http://127.0.0.1:1"], 1, "cannot reach"),
        (["--base-url", "http://127.0.0.1:1", "--tp", "2"], 2, "--tp is no option of the chat"),
        (["--max-tokens", "0"], 2, "--max-tokens must be at least 1"),
        (["--tpp", "2"], 2, "did you mean --tp?"),
        (["--model", "nope"], 2, "unknown model"),
        (["demo"], 2, "unexpected argument 'demo'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], code: int, message: str) -> None:
    done = piped("", *arguments)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith("launch.chat: error: ")
    assert message in line


def test_the_key_and_the_model_are_the_servers(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path, api_key="secret")
    with served(engine) as url:
        assert "HTTP" not in piped("hi\n", "--base-url", url, "--api-key", "secret").stderr
        assert piped("hi\n", "--base-url", url, "--api-key", "wrong").returncode == 1
        assert piped("hi\n", "--base-url", url, "--api-key", "secret", "--model", "gpt").returncode == 2


def test_it_starts_without_what_it_does_not_need() -> None:
    code = (
        "import sys; import launch.chat.__main__;"
        "sys.exit(', '.join(n for n in ('torch', 'transformers', 'fastapi', 'numpy') if n in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- with a server of its own -----------------------------------------------------------------------------------


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_server_of_its_own_answers_survives_ctrl_c_and_ends_with_the_terminal() -> None:
    with PseudoTerminal("launch.chat", "--temperature", "0", "--num-kv-blocks", "256") as terminal:
        terminal.expect("(starting a server …)")
        terminal.expect("> ", 60)
        terminal.type("中国的首都是哪里？\n")
        terminal.expect("\n北京")
        terminal.expect("> ")
        terminal.type("Tell me a story about Lily the bear, the garden and the flute.\n")
        terminal.expect("flute.\n")  # the line is taken: until then a Ctrl-C may wait for another key
        terminal.control("c")
        terminal.expect("> ")
        terminal.type("What is 17 + 25?\n")
        terminal.expect("42")
        everyone = family(terminal.process)
        assert len(everyone) >= 4, "the chat, the server, the scheduler and a worker"
        terminal.close()  # the kernel tells the chat with SIGHUP
        assert terminal.process.wait(20) == 128 + signal.SIGHUP
        assert_gone(everyone)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_is_left_when_the_chat_is_killed_while_its_server_loads(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [*CHAT], cwd=ROOT, env=os.environ, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with process:
        until(lambda: len(family(process)) >= 3)
        everyone = family(process)
        process.send_signal(number)
        assert process.wait(20) == code
        assert_gone(everyone)
