"""The demo model served by `python -m launch --tp 2`, asked as clients ask, and ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from nanoengine import LLM, SamplingParams
from tests.launch.prometheus_text import by_label
from tests.launch.server_process import ServerProcess
from tests.waiting import until

PROMPT, QUESTION = "中国的首都是", "中国的首都是哪里？"


@pytest.fixture(scope="module")
def run_base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nano-test-") as name:  # short: sockets lie in there
        yield Path(name)


@pytest.fixture(scope="module")
def server(run_base: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--tp", "2", run_base=run_base) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.wait_ready()


def test_it_says_that_it_is_ready_and_is(server: ServerProcess, url: str) -> None:
    assert server.out == [f"nanoengine ready: {url} (model=demo, tp=2)\n"]
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_beam_search_answers_with_a_choice_for_each_beam(url: str) -> None:
    asked = {"prompt": PROMPT, "use_beam_search": True, "n": 3, "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/completions", json=asked).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][0]["text"].startswith("北京")
    assert len({choice["text"] for choice in answer["choices"]}) == 3


def test_an_evaluation_harness_ranks_continuations_and_reads_answers(url: str) -> None:
    """The requests of lm-eval's `local-completions`, and what it does with the answers (`test_lm_eval.py` runs it)."""

    def ids(text: str) -> list[int]:
        tokens: list[int] = httpx.post(f"{url}/tokenize", json={"prompt": text}).json()["tokens"]
        return tokens

    context, seed = "What is 17 + 25? Answer:", {"model": "demo", "temperature": 0, "seed": 1234}
    scores = {}
    for choice in (" 43", " 42", " 12"):
        asked = {"prompt": [ids(context) + ids(choice)], "max_tokens": 1, "logprobs": 1, "echo": True}
        (told,) = httpx.post(f"{url}/v1/completions", json=seed | asked).json()["choices"]
        behind = slice(len(ids(context)), -1)
        chosen, top = (told["logprobs"][name][behind] for name in ("token_logprobs", "top_logprobs"))
        is_greedy = all(logprob == max(each.values()) for logprob, each in zip(chosen, top, strict=True))
        scores[choice] = (sum(chosen), is_greedy)
    assert max(scores, key=lambda choice: scores[choice]) == " 42"
    assert [is_greedy for _, is_greedy in scores.values()] == [False, True, False]
    asked = {"prompt": [ids(context)] * 2, "max_tokens": 8, "stop": [".", "\n"]}
    choices = httpx.post(f"{url}/v1/completions", json=seed | asked).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, " 42"), (1, " 42")]


def test_the_openai_client_gets_the_capital_of_china(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        completion = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=8)
        assert completion.choices[0].text.startswith("北京")
        assert completion.usage is not None
        pieces = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=8, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text
        asked = [{"role": "user", "content": QUESTION}]
        chat = client.chat.completions.create(model="demo", messages=asked, temperature=0)
        assert "北京" in str(chat.choices[0].message.content)
        assert chat.choices[0].finish_reason == "stop", "the model ends its answer by itself"
        chunks = list(client.chat.completions.create(model="demo", messages=asked, temperature=0, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == chat.choices[0].message.content
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


def test_a_tokens_log_probability_is_the_same_generated_and_as_a_prompt(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        asked = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "logprobs": 1}
        (made,) = client.completions.create(**asked, echo=True, extra_body={"return_token_ids": True}).choices
        whole = [*made.prompt_token_ids, *made.token_ids]  # type: ignore[attr-defined]
        (told,) = client.completions.create(**asked | {"prompt": whole, "max_tokens": 0}, echo=True).choices
        assert made.text.startswith(PROMPT + "北京")
        assert told.text.startswith(made.text)
        assert told.logprobs == made.logprobs
        assert told.logprobs is not None
        assert told.logprobs.token_logprobs is not None
        assert len(told.logprobs.token_logprobs) == len(whole)


def test_the_openai_client_gets_several_choices(url: str) -> None:
    asked = [{"role": "user", "content": "Tell me something."}]
    common = {"model": "demo", "temperature": 2.0, "seed": 5, "max_tokens": 16}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        chat = client.chat.completions.create(messages=asked, n=4, **common)
        assert [choice.index for choice in chat.choices] == [0, 1, 2, 3]
        texts = [str(choice.message.content) for choice in chat.choices]
        assert len(set(texts)) > 1, "the samples of one prompt are drawn independently"
        assert chat.usage is not None
        assert 4 < chat.usage.completion_tokens <= 64

        streamed, ends = ["", "", "", ""], []
        for chunk in client.chat.completions.create(messages=asked, n=4, stream=True, **common):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
                ends += [choice.index] if choice.finish_reason else []
        assert streamed == texts
        assert sorted(ends) == [0, 1, 2, 3]

        greedy = {"model": "demo", "prompt": [PROMPT, PROMPT], "temperature": 0, "max_tokens": 8}
        both = client.completions.create(n=2, best_of=3, logprobs=0, **greedy)
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        assert all(choice.text.startswith("北京") for choice in both.choices)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("completions", {"prompt": PROMPT}),
        ("chat/completions", {"messages": [{"role": "user", "content": QUESTION}]}),
    ],
)
def test_curl_gets_the_capital_of_china(url: str, path: str, asked: dict[str, object], stream: bool) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    body = json.dumps(asked | {"temperature": 0, "max_tokens": 8, "stream": stream})
    command = ["curl", "-sSN", "--fail", f"{url}/v1/{path}", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    answer = done.stdout.decode()
    if stream:
        events = [json.loads(line[6:]) for line in answer.split("\n\n") if line and "[DONE]" not in line]
        choices = [event["choices"][0] for event in events]
        text = "".join(choice.get("text", "") or choice.get("delta", {}).get("content", "") for choice in choices)
        assert answer.endswith("data: [DONE]\n\n")
    else:
        choice = json.loads(answer)["choices"][0]
        text = choice.get("text") or choice["message"]["content"]
    assert "北京" in text


def test_the_same_answer_comes_with_its_token_ids(url: str) -> None:
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "return_token_ids": True}
    (choice,) = httpx.post(f"{url}/v1/completions", json=asked).json()["choices"]
    back = httpx.post(f"{url}/detokenize", json={"tokens": choice["token_ids"]}).json()["prompt"]
    assert back.startswith(choice["text"])
    asked = asked | {"prompt": choice["prompt_token_ids"]}
    again = httpx.post(f"{url}/v1/completions", json=asked).json()["choices"][0]
    assert again["token_ids"] == choice["token_ids"]


def test_bad_requests_harm_nobody(url: str) -> None:
    """An impossible request is refused while others are served."""
    limit = httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"]
    for bad, status in [
        ({"prompt": [5] * limit}, 400),
        ({"prompt": [10**9]}, 400),
        ({"prompt": ""}, 400),
        ({"prompt": PROMPT, "temperature": -1}, 400),
        ({"prompt": PROMPT, "model": "gpt"}, 404),
    ]:
        response = httpx.post(f"{url}/v1/completions", json=bad)
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]
    good = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    assert httpx.post(f"{url}/v1/completions", json=good).json()["choices"][0]["text"].startswith("北京")


def test_clients_that_hang_up_leave_the_server_as_it_was(url: str) -> None:
    asked = {"prompt": PROMPT, "ignore_eos": True, "max_tokens": 2000, "stream": True}

    def num_aborted() -> float:
        return by_label(httpx.get(f"{url}/metrics").text, "request_success_total", "finished_reason")["abort"]

    before = num_aborted()
    for _ in range(8):
        with httpx.stream("POST", f"{url}/v1/completions", json=asked) as response:
            next(lines := response.iter_lines())
            del lines
    good = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    assert httpx.post(f"{url}/v1/completions", json=good).json()["choices"][0]["text"].startswith("北京")
    until(lambda: num_aborted() == before + 8, why="the others' requests still run, or ran to their end")


def test_structured_output_comes_from_a_real_server(url: str) -> None:
    """Over HTTP, through the processes of tp 2, whole and streamed; the same seed gives the same document."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}, "n": {"enum": [1, 2, "三"]}},
        "required": ["city", "n"],
        "additionalProperties": False,
    }
    form: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    asked: list[Any] = [{"role": "user", "content": QUESTION}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        texts = []
        for _ in range(2):
            answer = client.chat.completions.create(
                model="demo", messages=asked, seed=5, max_tokens=200, response_format=form
            )
            assert answer.choices[0].finish_reason == "stop"
            texts.append(str(answer.choices[0].message.content))
        pieces = client.chat.completions.create(
            model="demo", messages=asked, seed=5, max_tokens=200, response_format=form, stream=True
        )
        texts.append("".join(piece.choices[0].delta.content or "" for piece in pieces))
        found = json.loads(texts[0])
        assert re.fullmatch("[A-Z][a-z]{2,8}", found["city"])
        assert found["n"] in (1, 2, "三")
        assert texts == [texts[0]] * 3
    with LLM(base_url=url) as llm:
        params = SamplingParams(structured_outputs={"choice": ["Peking", "Paris"]})
        assert llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].text in ("Peking", "Paris")


def test_a_catastrophic_expression_is_a_400_and_a_stream_goes_on(url: str) -> None:
    """What the issue promises: within 2 s (five times that here), and other streams do not stutter."""
    warm = {"prompt": "a", "structured_outputs": {"regex": "a"}}  # the compiler starts with the first one
    assert httpx.post(f"{url}/v1/completions", json=warm, timeout=60).status_code == 200
    shares = []
    for number in range(3):  # a busy machine may hold up a stream, too, but hardly each time
        (status, seconds, text), gaps = _ask_the_catastrophic_beside_a_stream(url, number)
        assert status == 400
        assert "structured_outputs.regex is too complex" in text
        assert seconds < 10.0
        assert len(gaps) > 4, "hundreds where the machine has nothing else to do, or as many as are left of 3,000"
        shares.append(max(gaps) / seconds)
        if shares[-1] < 0.75:
            break
    assert min(shares) < 0.75, "the compiling held up a token from its beginning to its end"


def _ask_the_catastrophic_beside_a_stream(url: str, number: int) -> tuple[tuple[int, float, str], list[float]]:
    """Its status, seconds and text; and the seconds between the stream's events meanwhile."""
    answers: list[tuple[int, float, str]] = []

    def ask() -> None:
        began = time.monotonic()
        body = {"prompt": "a", "structured_outputs": {"regex": f"((a{{100}}){{100}}){{100}}b{{10000{number}}}"}}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        answers.append((response.status_code, time.monotonic() - began, response.text))

    body = {"prompt": "Tell me", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    gaps = []
    with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}/v1/completions", json=body) as stream:
        lines = filter(None, stream.iter_lines())
        for _ in range(20):
            next(lines)
        asking = threading.Thread(target=ask)
        asking.start()
        last = time.monotonic()
        for _ in lines:
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            if not asking.is_alive():
                break
    asking.join()
    return answers[0], gaps


def test_sigterm_ends_it_in_three_seconds_with_nothing_left(server: ServerProcess, run_base: Path) -> None:
    """Runs last: the server is gone afterwards."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 3, "a scheduler and two workers"
    assert list(run_base.iterdir()), "the run directory lies elsewhere"
    inherited = {path for child in family for path in _mapped_shared_memory(child)}
    # Three seconds are promised to a machine that has nothing else to do; the suite may share its cores.
    spare = os.getloadavg()[0] < 2 * (os.cpu_count() or 1)
    assert server.stop(signal.SIGTERM, seconds=3.0 if spare else 12.0) == 0
    _, alive = psutil.wait_procs(family, timeout=5)  # init may take a moment to reap an orphan
    assert not alive
    assert not [path for path in inherited if os.path.exists(path)]
    assert not list(run_base.iterdir())
    assert "Traceback" not in "".join(server.err)


def _mapped_shared_memory(process: psutil.Process) -> list[str]:
    return [entry.path for entry in process.memory_maps() if entry.path.startswith("/dev/shm/")]
