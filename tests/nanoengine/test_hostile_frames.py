"""What a process of the same user that holds no key may send to the scheduler and its ranks: all of it for nothing."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import pickle
import random
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from configs.engine import EngineConfig
from configs.errors import ChannelError
from nanoengine import channel, messages
from nanoengine.channel import Channel, Direction, FrameReader, FrameWriter, Link, Stop, encode
from nanoengine.connection import SchedulerConnection
from nanoengine.engine_client import EngineClient
from nanoengine.executor import MultiprocessExecutor
from nanoengine.front_socket import FrontSocket
from nanoengine.limited_log import LimitedLog
from nanoengine.prompts import parse_prompt
from nanoengine.run_dir import RunDir
from nanoengine.sampling_params import SamplingParams
from nanoengine.step import Epoch
from tests.nanoengine.scheduler_driver import Driver

EPOCH = Epoch(2, 3)
NUM_FRAMES = 10_000
_found: list[str] = []  # classes that an unpickler was asked for while a test listens
_listening = threading.Event()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and _listening.is_set():
        _found.append(".".join(map(str, arguments)))


@pytest.fixture
def found() -> Iterator[list[str]]:
    """What any unpickler of this process looks up. An audit hook can not be removed, so there is one, which sleeps."""
    if not getattr(sys, "_nanoengine_audit", False):
        sys.addaudithook(_audit)
        sys._nanoengine_audit = True  # type: ignore[attr-defined]
    _found.clear()
    _listening.set()
    yield _found
    _listening.clear()


class Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def hostile_frames(key: bytes, seen: list[bytes], payload: bytes) -> Iterator[bytes]:
    """Endless frames of somebody who has seen genuine ones (`seen`, all of them opened already), without the key."""
    picks = random.Random(5)
    forged = FrameWriter(bytes(32), EPOCH, Direction.TO_RANK, 1)
    elsewhere = FrameWriter(key, Epoch(2, 2), Direction.TO_RANK, 1)  # what an earlier group with this key had sent
    other_rank = FrameWriter(key, EPOCH, Direction.TO_RANK, 0)
    for number in itertools.count():
        frame, other = picks.choice(seen), picks.choice(seen)
        match number % 8:
            case 0:
                yield forged.seal(picks.choice(list(Channel)), payload)
            case 1:
                yield frame
            case 2:
                yield frame[:73] + payload  # a genuine tag and header before another payload
            case 3:
                yield frame[: picks.randrange(len(frame))]
            case 4:
                at = picks.randrange(len(frame))
                yield frame[:at] + bytes([frame[at] ^ 1 << picks.randrange(8)]) + frame[at + 1 :]
            case 5:
                yield frame + payload + bytes(picks.randrange(1000))
            case 6:
                yield picks.choice((elsewhere, other_rank)).seal(Channel.STEP, payload)
            case _:
                yield picks.choice((payload, frame[32:], other[:32] + frame[32:] if other != frame else b""))


def test_ten_thousand_hostile_frames_are_counted_and_none_is_unpickled(
    found: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, loaded = os.urandom(32), []
    monkeypatch.setattr(channel, "restricted_loads", lambda payload: loaded.append(payload))
    sealed, opened = (
        FrameWriter(key, EPOCH, Direction.TO_RANK, 1),
        FrameReader(key, EPOCH, Direction.TO_RANK, 1),
    )
    seen = [sealed.seal(Channel.STEP, b"payload %d" % number) for number in range(20)]
    for frame in seen:
        opened.open(frame)
    payload = pickle.dumps(Canary(tmp_path / "canary"))
    for frame in itertools.islice(hostile_frames(key, seen, payload), NUM_FRAMES):
        with pytest.raises(ChannelError):
            opened.open(frame)
    assert opened.rejected.total() == NUM_FRAMES
    assert set(opened.rejected) == {"authentication", "epoch", "route", "replay", "size"}
    assert not opened.broken
    assert not loaded
    assert not found
    assert not (tmp_path / "canary").exists()
    assert opened.open(sealed.seal(Channel.STEP, b"the next"))[1] == b"the next"


def test_a_link_under_a_flood_delivers_what_is_genuine(found: list[str], tmp_path: Path) -> None:
    """All frames over one socket, as if the intruder had got hold of the peer's connection."""
    key, path = os.urandom(32), Path("/tmp") / f"nano-{uuid.uuid4().hex[:12]}"
    link = Link(key, EPOCH, 1, end=Direction.TO_RANK)
    counts: list[int] = []
    link.on_rejected = counts.append
    link.bind(path)
    peer = zmq.Context.instance().socket(zmq.PAIR)
    peer.linger = 0
    try:
        peer.connect(f"ipc://{path}")
        sealed = FrameWriter(key, EPOCH, Direction.TO_RANK, 1)
        first = sealed.seal(*encode(Stop()))
        peer.send(first)
        assert link.receive(5) == Stop()
        frames = hostile_frames(key, [first], pickle.dumps(Canary(tmp_path / "canary")))
        for _ in range(50):
            for frame in itertools.islice(frames, 8):
                peer.send(frame)
            peer.send(sealed.seal(*encode(Stop())))
            assert link.receive(5) == Stop()
        assert link.rejected.total() == 400 == counts[-1]
        assert not found
        assert not (tmp_path / "canary").exists()
    finally:
        peer.close()
        link.close()
        link.unlink()


# ------------------------------------------------------------------------------------------- a running group

_INTRUDER = """
import glob, sys, time, zmq
folder, end, sockets, tried = sys.argv[1], time.monotonic() + 30, [], set()
print("here", flush=True)
while time.monotonic() < end and not glob.glob(folder + "/done"):
    for path in set(glob.glob(folder + "/run/g*")) - tried:
        tried.add(path)
        socket = zmq.Context.instance().socket(zmq.PAIR)
        socket.linger = 0
        socket.connect("ipc://" + path)
        sockets.append(socket)
    for socket in sockets:
        try:
            for _ in range(100):
                socket.send(b"x" * 200, zmq.NOBLOCK)
        except zmq.Again:
            pass
    time.sleep(0.0005)
print(len(tried), flush=True)
"""


def test_another_process_can_neither_speak_to_a_rank_nor_keep_it_out(caplog: pytest.LogCaptureFixture) -> None:
    """It is connected before the rank is; a socket with one peer would take it for the rank, which never gets in."""
    folder = Path("/tmp") / f"nano-{uuid.uuid4().hex[:12]}"
    run_dir = folder / "run"
    run_dir.mkdir(parents=True, mode=0o700)
    config = EngineConfig.create(tensor_parallel_size=2, start_timeout=30.0).resolve()
    executor = MultiprocessExecutor(config, run_dir, "tests.nanoengine.fake_worker:run_worker")
    intruder = subprocess.Popen([sys.executable, "-c", _INTRUDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert intruder.stdout is not None
        assert intruder.stdout.readline() == "here\n"
        executor.start(Epoch(1, 1))
        (folder / "done").touch()
        assert int(intruder.stdout.readline()) > 0
        assert executor.frames_rejected > 0
        assert list(run_dir.iterdir()) == []
        before = executor.frames_rejected
        executor.stop()
        assert executor.frames_rejected == before
        assert "another process" in caplog.text
    finally:
        executor.stop()
        intruder.kill()
        intruder.communicate()
        (folder / "done").unlink(missing_ok=True)
        run_dir.rmdir()
        folder.rmdir()


def test_the_run_directory_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask says: another user can not even list it, let alone connect to what lies in it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    before = os.umask(0)
    try:
        run_dir = RunDir.create()
    finally:
        os.umask(before)
    try:
        assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700
        assert run_dir.path.stat().st_uid == os.getuid()
        if os.getuid() == 0:
            code = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.listdir(sys.argv[1])"
            child = subprocess.run(
                [sys.executable, "-I", "-c", code, str(run_dir.path)], capture_output=True, text=True
            )
            assert "PermissionError" in child.stderr
    finally:
        run_dir.remove()


# --------------------------------------------------------------------------------------- the front ends' socket


def request_values(**other: Any) -> list[Any]:
    fields: dict[str, Any] = {
        "client_id": "me", "request_id": "r", "prompt_token_ids": [1, 2], "params": SamplingParams().to_dict(),
        "seed": 1, "arrival_time": 0.0, "priority": 0, "journal": [[]], "cache_salt": "", "timeout": None,
        "num_prompt_logprobs": 0, "grammar": "",
    }  # fmt: skip
    return [2, *(fields | other).values()]


def deep(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


_BAD_VALUES: list[Any] = [None, True, -1, 2**63, 1.5, float("nan"), "x", b"x", [], [None], ["x"], {"a": 1}, [[2**63]]]
_FIELDS = ("client_id", "request_id", "prompt_token_ids", "params", "seed", "arrival_time", "priority", "journal",
           "cache_salt", "timeout", "num_prompt_logprobs", "grammar")  # fmt: skip
GARBAGE = [
    b"", b"\xc1", b"garbage", deep(5), deep(100_000), b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    pickle.dumps(Path("/")), *(msgpack.packb(value) for value in _BAD_VALUES),
    *(msgpack.packb([tag, *rest]) for tag in (*range(10), "a", None, [1]) for rest in ([], [1], [1] * 12, [None] * 3)),
    msgpack.packb([3, 5, None, "why"]), msgpack.packb([3, "r", "x", "why"]), msgpack.packb([3, "r" * 2000, 1, "why"]),
]  # fmt: skip


def test_garbage_from_a_process_of_the_same_user_is_counted_and_nothing_else(
    found: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = Path("/tmp") / f"nano-{uuid.uuid4().hex[:12]}"
    front = FrontSocket(f"ipc://{path}", 1)
    client = zmq.Context.instance().socket(zmq.DEALER)
    client.linger = 0
    try:
        client.connect(f"ipc://{path}")
        requests = [
            msgpack.packb(request_values(**{name: value}))
            for name in _FIELDS
            for value in _BAD_VALUES
            if not isinstance(value, int) or abs(value) <= 2**64
        ]
        sent, taken = 0, []
        with caplog.at_level(logging.WARNING):
            for frame in [*GARBAGE, *requests, messages.encode(messages.Hello("me"))]:
                client.send(frame)
                sent += 1
                while not (front.socket.poll(0)):
                    time.sleep(0.0001)
                taken.extend(front.receive())
        assert isinstance(taken[-1][1], messages.Hello)
        assert front.rejected.total() == sent - len(taken)
        assert front.rejected.total() > 150
        assert len(caplog.records) < 20
        driver = Driver()
        for client_id, message in taken:  # what came through is well-formed, and served or refused
            if isinstance(message, messages.AddRequest):
                driver.scheduler.add(message)
                assert client_id
        driver.scheduler.schedule()
        assert not found
    finally:
        client.close()
        front.close()
        path.unlink(missing_ok=True)


def test_the_log_of_refusals_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    log = LimitedLog(logging.getLogger("limited"), lambda: now)
    for _ in range(1000):
        log.warning("refused")
    assert len(caplog.records) == 1
    now = 1.5
    log.warning("refused")
    assert caplog.messages[-1] == "refused (and 999 more since the last such line)"


def test_a_request_that_cannot_be_packed_fails_alone() -> None:
    """It stayed at the head of the queue: every later request failed with it. A number of 65 bits was enough."""
    path = Path("/tmp") / f"nano-{uuid.uuid4().hex[:12]}"
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.linger = 0
    router.bind(f"ipc://{path}")
    client = EngineClient(EngineConfig.create(skip_tokenizer_init=True).resolve(), None)
    connection = SchedulerConnection(f"ipc://{path}", client)
    try:
        params = SamplingParams(max_tokens=2, detokenize=False)
        bad, good = (client.add(client.check(parse_prompt([1, 2, 3]), params)) for _ in range(2))
        next(each for each in client.outbox if isinstance(each, messages.AddRequest)).seed = 2**64
        updated, _ = connection.pump()
        assert updated == [bad]
        assert bad.failure is not None
        assert good.failure is None
        assert router.poll(5000)
        sent = messages.decode(router.recv_multipart()[1])
        assert isinstance(sent, messages.AddRequest)
        assert sent.request_id == good.wire_id
    finally:
        connection.close()
        router.close()
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "totals",
    [
        [1], {"num_running": 1}, {"num_swaps": -1}, {"num_swaps": 1.5}, {"num_swaps": True}, {"num_swaps": 2**63},
        {"num_swaps": [1]}, {"recovery_seconds": float("nan")}, {"recovery_seconds": -0.5}, {"recovery_seconds": 1},
        {"steps_by_tokens": [1] * 65}, {"steps_by_tokens": ["a"]}, {"steps_by_tokens": {}}, {"restarts": {"died": "a"}},
        {"restarts": {1: 1}}, {"restarts": {"r" * 1025: 1}}, {"restarts": {str(i): 1 for i in range(65)}},
    ],
)  # fmt: skip
def test_totals_that_no_scheduler_tells_are_refused(totals: Any) -> None:
    frame = msgpack.packb([messages._TAG_OF[messages.Hello], "me", totals])
    with pytest.raises(ChannelError):
        messages.decode_from_front(frame)


def test_every_message_of_a_front_end_is_let_through_and_no_other() -> None:
    """Whoever adds one says in its first line who sends it, and has its fields checked."""
    samples: dict[type[Any], Any] = {
        messages.Hello: messages.Hello("me"),
        messages.AddRequest: messages.AddRequest(*request_values()[1:]),
        messages.Abort: messages.Abort("r", None, "why"),
        messages.AbortNamed: messages.AbortNamed(["r"]),
    }
    for kind in messages._TAGS.values():
        is_from_front = str(kind.__doc__).startswith("Front end →")
        if kind in samples or (is_from_front and not messages._FIELDS[kind]):
            assert is_from_front, kind
            message = samples.get(kind) or kind()
            assert isinstance(messages.decode_from_front(messages.encode(message)), kind)
            for name in messages._FIELDS[kind]:
                broken = copy.copy(message)
                setattr(broken, name, b"no such type")
                with pytest.raises(ChannelError, match=name):
                    messages.decode_from_front(messages.encode(broken))
            continue
        assert not is_from_front, f"{kind.__name__} has fields that decode_from_front does not check"
        with pytest.raises(ChannelError):
            messages.decode_from_front(msgpack.packb([messages._TAG_OF[kind], *[None] * len(messages._FIELDS[kind])]))
