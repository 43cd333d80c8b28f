"""Front ends that know of each other: a stream is resumed through any of them, and a load is that of all."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.front_dir import FrontDir
from launch.server import peers
from nanoengine.messages import Stats
from tests.launch.fake_engine import FakeEngine, served
from tests.launch.http_answers import error_of
from tests.launch.prometheus_text import total
from tests.launch.test_server_streams import ASKED, RESUME, TEXT, ids_of, read_some, text_of
from tests.waiting import until

KEYS = ("one", "two")
AUTHORIZED = {"headers": {"Authorization": "Bearer one"}}


class Pair:
    """Two front ends with an engine each, the first of which answers slowly."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.path = folder / "fronts"
        self.dirs = [FrontDir(self.path, name) for name in "12"]
        self.engines = [FakeEngine(folder / name, api_key=KEYS, api_server_count=2) for name in "12"]
        self.engines[0].answers, self.engines[0].delay = {"a": TEXT}, 0.01
        for engine in self.engines:  # each has heard the engine's totals, without which it shows no numbers
            engine.stats = Stats(1, 1, steps_by_tokens=[0] * 14)
        pairs = zip(self.engines, self.dirs, strict=True)
        self.urls = [stack.enter_context(served(engine, front_dir)) for engine, front_dir in pairs]

    def begin(self, num_events: int = 4) -> tuple[list[str], str]:
        """The first events of a stream of the first front end, whose client hangs up then; and the stream's id."""
        begun = read_some(self.urls[0], num_events, extra=AUTHORIZED["headers"])
        return begun, ids_of(begun[0])[0].rpartition(":")[0]

    def resume(self, stream_id: str, last: str | None = None, key: str = "one", **more: Any) -> httpx.Response:
        """Ask the second one for it."""
        headers = {"Authorization": f"Bearer {key}"} | ({} if last is None else {"Last-Event-ID": last})
        return httpx.get(f"{self.urls[1]}/v1/streams/{stream_id}", headers=headers, timeout=20, **more)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(tmp_path, stack)


def test_a_stream_goes_on_through_another_front_end(pair: Pair) -> None:
    begun, stream_id = pair.begin()
    last = ids_of(begun[-1])[-1]
    rest = pair.resume(stream_id, last)
    assert rest.headers["content-type"].startswith("text/event-stream")
    assert rest.headers["x-stream-id"] == stream_id
    assert text_of("".join(begun) + rest.text) == TEXT
    ids = ids_of("".join(begun) + rest.text)
    assert [int(each.rpartition(":")[2]) for each in ids] == list(range(len(ids)))
    assert not pair.engines[0].aborted
    assert not pair.engines[1].prompts
    # What has ended is told by its keeper, too: all of it, from any event on, and that there is nothing more.
    whole = pair.resume(stream_id).text
    assert whole.endswith(rest.text)
    assert pair.resume(stream_id, params={"last_event_id": last}).text == rest.text
    assert pair.resume(stream_id, ids[-1]).status_code == 204
    error = error_of(pair.resume(stream_id, f"{stream_id}:999"), 400)
    assert error["param"] == "Last-Event-ID"
    error_of(pair.resume(stream_id, key="two"), 404)
    error_of(pair.resume(stream_id, key="three"), 401)
    error_of(pair.resume("cmpl-../../1"), 404)

    def counted() -> float:
        text = httpx.get(f"{pair.urls[1]}/metrics", **AUTHORIZED).text
        return total(text, "http_requests_total", handler="/v1/streams/{stream_id}", status="200")

    until(lambda: counted() == 3)  # a client has read the last byte of an answer before that is counted
    httpx.get(f"{pair.urls[0]}/livez")  # has it tell its numbers, within half a second
    until(lambda: "/livez" in httpx.get(f"{pair.urls[1]}/metrics", **AUTHORIZED).text)
    assert counted() == 3, "each is counted once, by the front end that was asked"


def test_a_reader_that_leaves_the_other_front_end_leaves_the_stream(pair: Pair) -> None:
    pair.engines[0].delay = 0.02
    _, stream_id = pair.begin(1)
    path = f"{pair.urls[1]}/v1/streams/{stream_id}"
    with httpx.stream("GET", path, **AUTHORIZED) as first:
        pieces = first.iter_text()
        begun = next(pieces)
        whole = httpx.get(f"{pair.urls[0]}/v1/streams/{stream_id}", timeout=20, **AUTHORIZED).text
        left = begun + "".join(pieces)  # the latest reader has it, whichever way either came
    assert text_of(whole) == TEXT
    assert whole.startswith(left)


def test_one_id_is_one_stream_among_all_front_ends(pair: Pair) -> None:
    headers = AUTHORIZED["headers"] | RESUME | {"X-Request-Id": "mine"}
    assert httpx.post(f"{pair.urls[0]}/v1/completions", json=ASKED, headers=headers, timeout=20).status_code == 200
    for url in pair.urls:
        error = error_of(httpx.post(f"{url}/v1/completions", json=ASKED, headers=headers), 409)
        assert error["code"] == "stream_exists"


def test_a_stream_whose_keeper_has_died_is_told_to_be_gone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = FrontDir(pair.path, "3")
    dead.listen().close()
    assert dead.claim("cmpl-dead")
    error = error_of(pair.resume("cmpl-dead"), 404)
    assert "has died" in error["message"]
    assert httpx.get(f"{pair.urls[0]}/load", **AUTHORIZED).json()["server_load"] == 0
    dead.clear()
    assert "kept no longer" in error_of(pair.resume("cmpl-dead"), 404)["message"]
    assert dead.others() == [pair.path / "1.http", pair.path / "2.http"]
    monkeypatch.setattr(peers, "RELAY_SECONDS", 0.1)
    monkeypatch.setattr(peers, "ASK_SECONDS", 0.1)
    with FrontDir(pair.path, "4").listen():  # it accepts, and never answers
        assert FrontDir(pair.path, "4").claim("cmpl-hung")
        error = error_of(pair.resume("cmpl-hung"), 503)
        assert (error["code"], "front end 4" in error["message"]) == ("front_end_silent", True)
        error_of(httpx.get(f"{pair.urls[0]}/load", **AUTHORIZED), 503)


def test_a_stream_breaks_off_when_its_keeper_dies(pair: Pair) -> None:
    keeper = FrontDir(pair.path, "5")
    assert keeper.claim("cmpl-cut")
    with keeper.listen() as listener:
        listener.setblocking(True)

        def answer_and_die() -> None:
            connection: socket.socket
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\nid: 1\n\r\n")

        thread = threading.Thread(target=answer_and_die)
        thread.start()
        with pytest.raises(httpx.RemoteProtocolError):
            pair.resume("cmpl-cut")
        thread.join(30)


def test_the_load_is_that_of_all_front_ends(pair: Pair) -> None:
    pair.engines[0].open = {"a", "b"}
    pair.engines[1].open = {"c"}
    for url in pair.urls:
        assert httpx.get(f"{url}/load", **AUTHORIZED).json() == {"server_load": 3, "running": 3, "waiting": 0}
        assert httpx.get(f"{url}/load").status_code == 401


def test_a_claim_is_given_up_when_its_stream_is_forgotten(tmp_path: Path) -> None:
    here, there = FrontDir(tmp_path / "fronts", "1"), FrontDir(tmp_path / "fronts", "2")
    engine = FakeEngine(tmp_path, stream_resume_seconds=1.0)
    with served(engine, here) as url:
        stream_id = httpx.post(f"{url}/v1/completions", json=ASKED, headers=RESUME).headers["x-stream-id"]
        assert (there.claim(stream_id), here.claim(stream_id)) == (False, True)
        there.release(stream_id)  # which it has not
        assert there.elsewhere(stream_id) == tmp_path / "fronts" / "1.http"
        until(lambda: there.elsewhere(stream_id) is None)
    assert not list((tmp_path / "fronts" / "streams").iterdir())
