"""`LLM(base_url=…)` against a small HTTP server that follows a script."""

from __future__ import annotations

import http.server
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError, EngineDeadError, EngineError, RequestError, UnknownModelError
from nanoengine.llm import LLM
from nanoengine.outputs import RequestOutput
from nanoengine.remote import MAX_CONNECTIONS
from nanoengine.sampling_params import SamplingParams

Reply = tuple[int, Any]


class Server(http.server.ThreadingHTTPServer):
    """Answers with `reply(path, body)`, and notes what it was asked."""

    daemon_threads = True
    request_queue_size = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any] | None, str | None]] = []
        self.reply: Callable[[str, dict[str, Any]], Reply] = answer
        self.hung_up = 0
        self.release = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hung_up += 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, None, self.headers["Authorization"]))
        if self.headers["Authorization"] == "Bearer wrong":
            self.send(401, {"error": {"message": "a valid key is needed"}})
        else:
            self.send(200, {"object": "list", "data": [{"id": "small"}, {"id": "large"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        self.send(*self.server.reply(self.path, body))

    def send(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def answer(path: str, body: dict[str, Any]) -> Reply:
    prompt = body.get("prompt") or body["messages"][-1]["content"]
    text = f"<{prompt}>"
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "token_ids": [1, 2], "prompt_token_ids": [3, 4, 5]}
    choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def llm(server: Server) -> Iterator[LLM]:
    with LLM(base_url=server.url) as llm:
        yield llm


def only(outputs: list[RequestOutput]) -> RequestOutput:
    [output] = outputs
    return output


def test_answers_come_in_the_order_of_the_prompts(llm: LLM, server: Server) -> None:
    count = 2 * MAX_CONNECTIONS
    outputs = llm.generate([f"p{n}" for n in range(count)], SamplingParams(temperature=0), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == [f"<p{n}>" for n in range(count)]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert (outputs[0].prompt, outputs[0].prompt_token_ids, outputs[0].outputs[0].token_ids) == (
        "p0",
        [3, 4, 5],
        [1, 2],
    )


def test_only_what_differs_from_the_defaults_is_sent(llm: LLM, server: Server) -> None:
    """And what a checkpoint may have its own default for, unless there are no parameters at all."""
    given = [None, SamplingParams(), SamplingParams(seed=1, stop="x", max_tokens=None)]
    llm.generate([[0], [1, 2], [3]], given, use_tqdm=False)  # type: ignore[arg-type]
    bodies = sorted((body for _, body, _ in server.asked if body), key=len)
    common = {"model": "small", "return_token_ids": True}
    assert bodies[0] == {**common, "prompt": [0], "max_tokens": 16}
    common |= {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert bodies[1:] == [
        {**common, "prompt": [1, 2], "max_tokens": 16},
        {**common, "prompt": [3], "max_tokens": None, "seed": 1, "stop": ["x"]},
    ]


def test_a_conversation_is_rendered_by_the_server(llm: LLM, server: Server) -> None:
    output = only(llm.chat([{"role": "user", "content": "hello"}], use_tqdm=False))
    assert output.outputs[0].text == "<hello>"
    path, body, _ = server.asked[-1]
    assert path == "/v1/chat/completions"
    assert body is not None
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    with pytest.raises(RequestError, match="chat template"):
        llm.chat([{"role": "user", "content": "hello"}], chat_template_kwargs={"x": 1})
    with pytest.raises(RequestError, match="no JSON form"):
        llm.chat([{"role": "user", "content": object()}], use_tqdm=False)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_address_may_be_written_in_each_form(server: Server, suffix: str) -> None:
    with LLM(base_url=server.url + suffix, api_key="secret") as llm:
        assert only(llm.generate("x", use_tqdm=False)).finished
    assert [path for path, _, _ in server.asked] == ["/v1/models", "/v1/completions"]
    assert {key for _, _, key in server.asked} == {"Bearer secret"}


def test_a_model_is_chosen_by_name_and_an_unknown_one_lists_the_known(server: Server) -> None:
    with LLM("large", base_url=server.url) as llm:
        llm.generate("x", use_tqdm=False)
    assert server.asked[-1][1] is not None
    assert server.asked[-1][1]["model"] == "large"
    with pytest.raises(UnknownModelError, match="small, large"):
        LLM("huge", base_url=server.url)


def test_a_request_that_fails_does_not_stop_the_others(llm: LLM, server: Server) -> None:
    def reply(path: str, body: dict[str, Any]) -> Reply:
        prompt = str(body["prompt"])
        if prompt == "long":
            return 400, {"error": {"message": "too long", "param": "prompt", "code": "context_length_exceeded"}}
        if prompt == "odd":
            return 200, {"choices": [{}]}
        if prompt == "broken":
            return 502, b"<html>"
        return answer(path, body)

    server.reply = reply
    outputs = llm.generate(["long", "fine", "odd", "broken"], use_tqdm=False)
    errors = [output.outputs[0].error for output in outputs]
    assert errors[0] == "too long"
    assert errors[1] is None
    assert "unreadable answer" in str(errors[2])
    assert "502" in str(errors[3])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "error", "error"]


@pytest.mark.parametrize(
    ("url", "key", "error", "words"),
    [
        ("http://127.0.0.1:1", None, EngineError, "cannot reach"),
        ("127.0.0.1:8000", None, ConfigError, "base_url"),
        ("ftp://127.0.0.1", None, ConfigError, "base_url"),
        (None, "wrong", EngineError, "a valid key is needed"),
    ],
)
def test_a_server_that_does_not_serve_is_reported_at_once(
    server: Server, url: str | None, key: str | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        LLM(base_url=url or server.url, api_key=key)


def test_empty_prompts_and_wrong_types_are_refused_here(llm: LLM, server: Server) -> None:
    for prompts in ("", [[]], None, [1.5]):
        with pytest.raises(RequestError):
            llm.generate(prompts, use_tqdm=False)  # type: ignore[arg-type]
    assert len(server.asked) == 1


def slow(server: Server) -> Callable[[str, dict[str, Any]], Reply]:
    def reply(path: str, body: dict[str, Any]) -> Reply:
        server.release.wait(20)
        return answer(path, body)

    return reply


def test_an_interrupt_hangs_up_and_leaves_the_client_usable(llm: LLM, server: Server) -> None:
    server.reply = slow(server)
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["x"] * (MAX_CONNECTIONS + 3), use_tqdm=False)
    timer.join()
    server.reply = answer
    assert only(llm.generate("y", use_tqdm=False)).outputs[0].text == "<y>"
    assert time.monotonic() - began < 10


def test_requests_one_at_a_time_and_aborted(llm: LLM, server: Server) -> None:
    server.reply = slow(server)
    names = [llm.add_request("x"), llm.add_request("y", request_id="mine")]
    assert llm.step(timeout=0.05) == []
    llm.abort("mine")
    llm.abort("unknown")
    aborted = only(llm.step())
    assert (aborted.request_id, aborted.outputs[0].finish_reason) == ("mine", "abort")
    server.release.set()
    assert only(llm.step()).request_id == names[0]
    assert not llm.has_unfinished_requests()


def test_close_hangs_up_and_is_harmless_twice(llm: LLM, server: Server) -> None:
    server.reply = slow(server)
    llm.add_request("x")
    time.sleep(0.05)
    began = time.monotonic()
    llm.close()
    llm.close()
    assert time.monotonic() - began < 5
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("x", use_tqdm=False)


def test_our_own_server_and_this_client_understand_each_other(tmp_path: Path) -> None:
    from tests.launch.fake_engine import ANSWER, FakeEngine, served

    engine = FakeEngine(tmp_path)
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode("a")
    with served(engine) as url, LLM(base_url=url) as llm:
        params = SamplingParams(max_tokens=50, top_k=3, min_p=0.1, stop_token_ids=[5], ignore_eos=True, seed=9)
        outputs = [*llm.generate(["a", ids], params, use_tqdm=False)]
        assert [output.outputs[0].text for output in outputs] == [ANSWER, ANSWER]
        assert [output.prompt_token_ids for output in outputs] == [ids, ids]
        assert all(output.outputs[0].token_ids for output in outputs)
        assert engine.params[-1] == params, "a parameter changed on its way"
        llm.generate(ids, SamplingParams(max_tokens=None), use_tqdm=False)
        assert engine.params[-1].max_tokens is None, "no limit became some limit on its way"
        [chat] = llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
        assert chat.outputs[0].text == ANSWER
        [refused] = llm.generate([10**6], use_tqdm=False)
        assert (refused.outputs[0].finish_reason, bool(refused.outputs[0].error)) == ("error", True)


def test_log_probabilities_come_through_a_server_as_from_an_engine_of_ones_own(tmp_path: Path) -> None:
    from tests.launch.fake_engine import FakeEngine, served

    engine = FakeEngine(tmp_path)
    conversation = [{"role": "user", "content": "hi"}]
    with served(engine) as url, LLM(base_url=url) as llm:
        params = SamplingParams(max_tokens=50, logprobs=2, prompt_logprobs=1)
        outputs = llm.generate("ab", params, use_tqdm=False) + llm.chat(conversation, params, use_tqdm=False)
        assert engine.params == [params, params]
        for output, prompt in zip(outputs, engine.prompts, strict=True):
            told, chosen = output.prompt_logprobs, output.outputs[0]
            assert told == [None, *(engine._logprobs(token, 1) for token in prompt[1:])]
            assert chosen.logprobs == [engine._logprobs(token, 2) for token in chosen.token_ids]
            assert chosen.cumulative_logprob == -3.0 * len(chosen.token_ids)
        plain = only(llm.generate("ab", use_tqdm=False))
        assert (plain.prompt_logprobs, plain.outputs[0].logprobs) == (None, None)
        assert plain.outputs[0].cumulative_logprob is None


def test_log_probabilities_without_token_ids_are_an_error(llm: LLM, server: Server) -> None:
    def reply(path: str, body: dict[str, Any]) -> Reply:
        status, whole = answer(path, body)
        whole["choices"][0]["logprobs"] = {"tokens": ["a", "b"]}
        return status, whole

    server.reply = reply
    output = only(llm.generate("x", SamplingParams(logprobs=1), use_tqdm=False))
    assert "without token ids" in str(output.outputs[0].error)
    body = server.asked[-1][1]
    assert body is not None
    assert body["logprobs"] == 1


def test_priority_and_timeout_of_each_way_to_ask(llm: LLM, server: Server) -> None:
    conversations = [[{"role": "user", "content": text}] for text in "ab"]
    llm.chat(conversations, use_tqdm=False, priority=[1, 2], timeout=3)
    llm.generate(["a", "b"], use_tqdm=False, priority=[4, 5])
    llm.generate("a", use_tqdm=False, priority=None)
    llm.add_request("a", priority=6, timeout=2.5)
    llm.step()
    asked = [(body.get("priority"), body.get("timeout")) for _, body, _ in server.asked if body]
    assert sorted(asked[:2]) == [(1, 3), (2, 3)]
    assert sorted(asked[2:4]) == [(4, None), (5, None)]
    assert asked[4:] == [(None, None), (6, 2.5)]
    for ask in (llm.generate, llm.chat):
        with pytest.raises(RequestError, match="priority must be one for all") as refused:
            ask(conversations if ask == llm.chat else ["a", "b"], priority=[1])  # type: ignore[operator]
        assert refused.value.param == "priority"


@pytest.mark.parametrize(
    ("status", "code", "kind"), [(429, "queue_full", "QueueFullError"), (504, "request_timeout", "RequestTimeoutError")]
)
def test_full_queue_and_passed_deadline_are_told_apart(
    llm: LLM, server: Server, status: int, code: str, kind: str
) -> None:
    server.reply = lambda path, body: (status, {"error": {"message": "try later", "code": code}})
    prompt = {"prompt": "a", "cache_salt": "tenant"}
    [output] = llm.generate(prompt, use_tqdm=False, priority=2, timeout=1.5)
    assert (output.outputs[0].error, output.outputs[0].error_kind) == ("try later", kind)
    body = server.asked[-1][1]
    assert body is not None
    assert (body["priority"], body["timeout"], body["cache_salt"]) == (2, 1.5, "tenant")
