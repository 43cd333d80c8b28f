"""The states of a real server, brought about by what happens to its processes; all they mean is in test_health.py."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.launch.server_process import ServerProcess
from tests.waiting import until

SECONDS = 60.0
ASKED = {"prompt": "Once", "temperature": 0, "max_tokens": 8, "ignore_eos": True}


class Probed:
    """A server, and what it says of itself."""

    def __init__(self, *arguments: str) -> None:
        self.server = ServerProcess(*arguments)
        self._pool = concurrent.futures.ThreadPoolExecutor(4)

    @property
    def url(self) -> str:
        """Where it listens, which it says before it loads."""
        pattern = r"listening on (http://[^;\s]+)"
        until(lambda: re.search(pattern, "".join(self.server.err)), SECONDS)
        return re.findall(pattern, "".join(self.server.err))[0]

    def state(self) -> tuple[int, str, str]:
        """Status, code and message of /readyz, while /livez is 200."""
        assert httpx.get(f"{self.url}/livez").status_code == 200
        answer = httpx.get(f"{self.url}/readyz")
        body = answer.json()
        error = body.get("error", {})
        return answer.status_code, body.get("status") or error["code"], error.get("message", "")

    def until(self, status: int, code: str, message: str = "") -> None:
        """Wait for a state."""

        def is_there() -> bool:
            now = self.state()
            return now[:2] == (status, code) and message in now[2]

        until(is_there, SECONDS, lambda: self.server.err)

    def ask(self) -> concurrent.futures.Future[httpx.Response]:
        """Ask for a completion, in a thread."""
        return self._pool.submit(httpx.post, f"{self.url}/v1/completions", json=ASKED, timeout=SECONDS)

    def refused(self) -> tuple[int, str]:
        """Status and code of a request for a completion, which is refused."""
        answer = self.ask().result()
        return answer.status_code, answer.json()["error"]["code"]

    def child(self, name: str = "nano-worker") -> psutil.Process:
        """The process of this name, as soon as there is one."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            for child in psutil.Process(self.server.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # one that ended just now
                    found.extend([child] if child.name().startswith(name) else [])
            return bool(found)

        until(is_there, SECONDS, lambda: self.server.err)
        return found[0]

    def close(self) -> None:
        with self.server:
            pass
        self._pool.shutdown()


@pytest.fixture
def options() -> list[str]:
    return ["--max-queued-requests", "2", "--step-timeout", "3"]


@pytest.fixture
def probed(options: list[str]) -> Iterator[Probed]:
    probed = Probed(*options)
    yield probed
    probed.close()


@pytest.mark.timeout(300)  # on a busy machine each of five processes may take half a minute to start
def test_health_follows_what_happens_to_the_processes(probed: Probed) -> None:
    loading = probed.child()
    loading.send_signal(signal.SIGSTOP)
    probed.until(503, "loading")
    assert probed.refused() == (503, "loading")
    loading.send_signal(signal.SIGCONT)
    probed.server.wait_ready(SECONDS)
    probed.until(200, "ready")
    assert probed.ask().result().status_code == 200  # the first steps of a group have more time than the next ones

    probed.child().send_signal(signal.SIGSTOP)  # whatever is asked now stays open
    waiting = [probed.ask(), probed.ask()]
    probed.until(200, "queue_full")
    assert probed.refused() == (429, "queue_full")
    probed.until(503, "recovering", "stopped by a signal")
    assert [each.result().status_code for each in waiting] == [200, 200]
    probed.until(200, "ready")

    probed.child().kill()
    probed.until(503, "recovering", "rank 0 died (killed by signal 9 (SIGKILL))")
    probed.until(200, "ready")

    scheduler = probed.child("nano-scheduler")
    scheduler.kill()
    probed.until(503, "recovering", "killed by signal 9 (SIGKILL)")
    probed.until(200, "ready")

    stopped = probed.child()
    stopped.send_signal(signal.SIGSTOP)
    waiting = [probed.ask()]
    until(lambda: httpx.get(f"{probed.url}/load").json()["server_load"] == 1)
    probed.server.process.send_signal(signal.SIGTERM)
    probed.until(503, "draining")
    assert probed.refused() == (503, "draining")
    stopped.send_signal(signal.SIGCONT)
    assert waiting[0].result().status_code == 200
    assert probed.server.process.wait(SECONDS) == 0


@pytest.mark.parametrize("options", [["--max-restarts", "0", "--no-exit-on-failure"]])
def test_health_says_that_nothing_will_be_served_any_more(probed: Probed) -> None:
    probed.server.wait_ready(SECONDS)
    probed.child().kill()
    probed.until(503, "engine_dead", "rank 0 died")
    assert probed.refused() == (503, "engine_dead")
    assert probed.server.stop(seconds=10) == 0
