"""Frames that nobody else can make, payloads that can do nothing, and sockets that never hang."""

from __future__ import annotations

import copyreg
import os
import pickle
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from configs.errors import ChannelError, ConfigError, DeadlineError
from nanoengine import channel
from nanoengine.channel import (
    Allocate,
    Channel,
    Direction,
    Failed,
    FrameReader,
    FrameWriter,
    Hello,
    Link,
    Loaded,
    Message,
    Ready,
    Stop,
    decode,
    encode,
    restricted_loads,
)
from nanoengine.step import Epoch, RowParams, SequenceState, StepInput, StepOutput

KEY = bytes(range(32))
EPOCH = Epoch(3, 7)


def writer(
    key: bytes = KEY, epoch: Epoch = EPOCH, direction: Direction = Direction.TO_RANK, rank: int = 1
) -> FrameWriter:
    return FrameWriter(key, epoch, direction, rank)


def reader() -> FrameReader:
    return FrameReader(KEY, EPOCH, Direction.TO_RANK, 1)


def big_step(num_rows: int, num_tokens: int) -> StepInput:
    rows = [
        SequenceState(i, list(range(num_tokens)), 0, [i], True, num_tokens, RowParams(1.0, 0, 1.0, 0.0, 2**63 - 1, 0))
        for i in range(num_rows)
    ]
    return StepInput(EPOCH, 1, [(0, 1, 2)], rows, [9])


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# -------------------------------------------------------------------------------------------------- frames


def test_frames_pass_in_order() -> None:
    sealed, opened = writer(), reader()
    for number in range(3):
        kind, payload = opened.open(sealed.seal(Channel.STEP, b"payload %d" % number))
        assert (kind, bytes(payload)) == (Channel.STEP, b"payload %d" % number)
    assert not opened.rejected


@pytest.mark.parametrize("at", [0, 31, 32, 40, 50, 52, 56, 64, 73, 74, -1], ids=lambda at: f"byte{at}")
def test_a_frame_with_one_bit_changed_is_refused(at: int) -> None:
    frame = bytearray(writer().seal(Channel.CONTROL, b"payload"))
    frame[at] ^= 1
    opened = reader()
    with pytest.raises(ChannelError, match="not genuine"):
        opened.open(bytes(frame))
    assert opened.rejected == {"authentication": 1}


def frame_of(**other: Any) -> bytes:
    return writer(**other).seal(Channel.CONTROL, b"payload")


ELSEWHERE = {
    "wrong-key": (frame_of(key=bytes(32)), "authentication"),
    "other-rank": (frame_of(rank=0), "route"),
    "other-direction": (frame_of(direction=Direction.TO_SCHEDULER), "route"),
    "older-group": (frame_of(epoch=Epoch(3, 6)), "epoch"),
    "older-incarnation": (frame_of(epoch=Epoch(2, 9)), "epoch"),
    "truncated": (frame_of()[:-1], "authentication"),
    "longer": (frame_of() + b"\0", "authentication"),
    "short": (frame_of()[:60], "size"),
    "empty": (b"", "size"),
    "spliced": (frame_of()[:32] + frame_of(rank=0)[32:], "authentication"),
}


@pytest.mark.parametrize(("frame", "reason"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_frame_made_elsewhere_is_refused_and_the_next_genuine_one_passes(frame: bytes, reason: str) -> None:
    opened = reader()
    with pytest.raises(ChannelError):
        opened.open(frame)
    assert opened.rejected == {reason: 1}
    assert not opened.broken
    assert opened.open(frame_of())[0] is Channel.CONTROL


def test_a_replayed_frame_is_refused() -> None:
    sealed, opened = writer(), reader()
    frames = [sealed.seal(Channel.CONTROL, b"%d" % number) for number in range(3)]
    for frame in frames:
        opened.open(frame)
    for frame in frames:
        with pytest.raises(ChannelError, match="again"):
            opened.open(frame)
    assert opened.rejected == {"replay": 3}
    assert not opened.broken


def test_reordered_frames_break_the_link_rather_than_run_out_of_order() -> None:
    sealed, opened = writer(), reader()
    first, second = sealed.seal(Channel.CONTROL, b"1"), sealed.seal(Channel.CONTROL, b"2")
    with pytest.raises(ChannelError, match="right after"):
        opened.open(second)
    assert opened.broken
    opened.open(first)
    assert opened.rejected == {"gap": 1}


def test_oversized_frames_are_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = writer().seal(Channel.STEP, bytes(2000))
    monkeypatch.setattr(channel, "MAX_FRAME_BYTES", 1000)
    opened = reader()
    with pytest.raises(ChannelError, match="refused a frame of"):
        opened.open(frame)
    with pytest.raises(ChannelError, match="exceeds the limit of 1000"):
        writer().seal(Channel.STEP, bytes(2000))


def test_nothing_is_parsed_before_it_is_authenticated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A canary in a forged frame: neither the header nor the payload may be looked into."""

    def parsed(*_: Any) -> None:
        raise AssertionError("parsed")

    frame = bytearray(writer(key=bytes(32)).seal(Channel.CONTROL, pickle.dumps(Canary(tmp_path / "canary"))))
    monkeypatch.setattr(channel, "_HEADER", _Refusing(parsed))
    monkeypatch.setattr(channel, "restricted_loads", parsed)
    with pytest.raises(ChannelError, match="not genuine"):
        reader().open(bytes(frame))
    assert not (tmp_path / "canary").exists()


class _Refusing:
    size = struct.calcsize("<4sQQBBIQQ")

    def __init__(self, parsed: Callable[..., None]) -> None:
        self.unpack_from = parsed


# -------------------------------------------------------------------------------------------------- payloads


def test_an_authenticated_payload_still_cannot_name_a_class(tmp_path: Path) -> None:
    payload = pickle.dumps((1, Canary(tmp_path / "canary")))
    with pytest.raises(ChannelError, match=r"names .*mkdir"):
        decode(Channel.CONTROL, Direction.TO_RANK, payload)
    assert not (tmp_path / "canary").exists()


def test_a_payload_cannot_reach_the_extension_registry() -> None:
    copyreg.add_extension("os", "getcwd", 0xEE)
    try:
        with pytest.raises(ChannelError, match="names"):
            restricted_loads(pickle.dumps(os.getcwd, protocol=2))
    finally:
        copyreg.remove_extension("os", "getcwd", 0xEE)


@pytest.mark.parametrize(
    "payload",
    [b"", b"garbage", b"\x80\x05.", b"\x80\x05]\x94.."[:3], b"P0\n.", b"\x80\x05\x97.", pickle.dumps(b"x" * 99)[:50]],
    ids=["empty", "garbage", "no-value", "cut", "persistent-id", "buffer", "truncated"],
)
def test_a_malformed_payload_is_a_channel_error(payload: bytes) -> None:
    with pytest.raises(ChannelError):
        restricted_loads(payload)


@pytest.mark.parametrize("columns", [None, 7, (), (99,), (3,), (3, 1, 2, 3), ([], 1), {"a": 1}], ids=repr)
def test_a_control_message_that_does_not_fit_is_a_channel_error(columns: Any) -> None:
    for kind in Channel:
        with pytest.raises(ChannelError):
            decode(kind, Direction.TO_RANK, pickle.dumps(columns))


@pytest.mark.parametrize(
    "message",
    [
        Hello(12),
        Loaded(7, "bfloat16", "cpu", 5),
        Allocate(3, 2),
        Ready(),
        Stop(),
        Failed({"kind": "ConfigError", "message": "m", "field": None}, "trace"),
        big_step(2, 3),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_survive_the_journey(message: Message) -> None:
    assert decode(encode(message)[0], Direction.TO_RANK, encode(message)[1]) == message


def test_an_output_survives_the_journey() -> None:
    output = StepOutput(EPOCH, 4, [1, 2], [[], [5, 6]], 0.5)
    assert decode(encode(output)[0], Direction.TO_SCHEDULER, encode(output)[1]) == output


# -------------------------------------------------------------------------------------------------- links


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """pytest's own directories may be longer than a socket's path can be."""
    path = Path(tempfile.mkdtemp(prefix="nano", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def links(short_dir: Path) -> Iterator[tuple[Link, Link]]:
    """The scheduler's end and the rank's."""
    scheduler = Link(KEY, EPOCH, 1, end=Direction.TO_SCHEDULER)
    rank = Link(KEY, EPOCH, 1, end=Direction.TO_RANK)
    scheduler.bind(short_dir / "s")
    rank.connect(short_dir / "s")
    yield scheduler, rank
    rank.close()
    scheduler.close()


def test_a_step_of_64_prompts_of_4096_tokens_passes(links: tuple[Link, Link]) -> None:
    """nano-vllm's slot holds 1 MiB; this step does not fit into it."""
    scheduler, rank = links
    rank.send(Hello(1))
    assert scheduler.receive(5) == Hello(1)
    step = big_step(64, 4096)
    assert len(encode(step)[1]) > 2**19
    scheduler.send(step)
    assert rank.receive(5) == step


def test_the_socket_file_goes_and_the_connection_stays(links: tuple[Link, Link], short_dir: Path) -> None:
    scheduler, rank = links
    rank.send(Hello(1))
    assert scheduler.receive(5) == Hello(1)
    scheduler.unlink()
    scheduler.unlink()
    assert list(short_dir.iterdir()) == []
    scheduler.send(Allocate(1))
    assert rank.receive(5) == Allocate(1)
    rank.send(Ready())
    assert scheduler.receive(5) == Ready()


def test_forged_frames_on_the_socket_are_dropped_and_counted(short_dir: Path) -> None:
    """Whoever gets at the socket file before the rank does can disturb nothing by what he writes."""
    scheduler = Link(KEY, EPOCH, 1, end=Direction.TO_SCHEDULER)
    scheduler.bind(short_dir / "s")
    intruder = zmq.Context.instance().socket(zmq.PAIR)
    intruder.linger = 0
    try:
        intruder.connect(f"ipc://{short_dir / 's'}")
        genuine = FrameWriter(KEY, EPOCH, Direction.TO_SCHEDULER, 1)
        first = genuine.seal(*encode(Hello(1)))
        for frame in (
            b"",
            pickle.dumps(Canary(short_dir / "canary")),
            FrameWriter(bytes(32), EPOCH, Direction.TO_SCHEDULER, 1).seal(Channel.CONTROL, b"x"),
            FrameWriter(KEY, Epoch(3, 6), Direction.TO_SCHEDULER, 1).seal(*encode(Ready())),
            first,
            first,
            genuine.seal(*encode(Ready())),
        ):
            intruder.send(frame)
        assert scheduler.receive(5) == Hello(1)
        assert scheduler.receive(5) == Ready()
        assert scheduler.receive(0.05) is None
        assert scheduler.rejected == {"size": 2, "authentication": 1, "epoch": 1, "replay": 1}
        assert not (short_dir / "canary").exists()
    finally:
        intruder.close()
        scheduler.close()


def test_a_lost_frame_is_an_error_and_not_a_wait(links: tuple[Link, Link]) -> None:
    scheduler, rank = links
    rank._writer.seal(Channel.CONTROL, b"lost")
    rank.send(Ready())
    with pytest.raises(ChannelError, match="right after"):
        scheduler.receive(5)


def test_receive_and_send_come_back_at_their_deadline(short_dir: Path) -> None:
    link = Link(KEY, EPOCH, 2, end=Direction.TO_SCHEDULER)
    link.bind(short_dir / "s")
    try:
        start = time.monotonic()
        assert link.receive(0.2) is None
        with pytest.raises(DeadlineError, match="rank 2 took no message"):
            link.send(Stop(), timeout=0.2)
        assert 0.3 < time.monotonic() - start < 2
    finally:
        link.close()


def test_closing_with_an_unsent_message_and_a_dead_peer_does_not_hang(short_dir: Path) -> None:
    """Without LINGER 0 the context waits for ever for a peer that never comes."""
    context = zmq.Context()
    link = Link(KEY, EPOCH, 0, end=Direction.TO_RANK)
    link.socket.close()
    link.socket = context.socket(zmq.PAIR)
    link.connect(short_dir / "nobody")
    link.send(Hello(1))
    start = time.monotonic()
    link.close()
    link.close()
    context.term()
    assert time.monotonic() - start < 1


def test_a_socket_path_too_long_for_the_system_is_a_clear_error(short_dir: Path) -> None:
    link = Link(KEY, EPOCH, 0, end=Direction.TO_SCHEDULER)
    with pytest.raises(ConfigError, match=r"the system allows 107.*TMPDIR"):
        link.bind(short_dir / ("x" * 120))
    link.close()
