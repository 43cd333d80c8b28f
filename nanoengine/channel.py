"""Authenticated messages between the scheduler and its ranks; it knows neither what a step computes nor who dies.

A frame is

    tag (32 bytes) | magic, epoch, channel, direction, rank, sequence number, length | payload

and the tag is an HMAC-SHA256, under a key that only the scheduler and its own ranks hold, over everything behind
it. A frame is parsed only after its tag was found right and its header is the one expected next, and then by an
unpickler that builds primitives alone. ZeroMQ stays inside `Link`; a wait has a deadline, always.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import hmac
import io
import logging
import math
import os
import pickle
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import zmq

from configs.engine import EngineConfig
from configs.errors import ChannelError, DeadlineError
from nanoengine.control_block import ControlBlock, Phase, RankWords
from nanoengine.limited_log import LimitedLog
from nanoengine.listener import Listener
from nanoengine.step import Epoch, Forget, GaveUp, StepInput, StepOutput

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 256 * 2**20
"""Largest frame either side accepts: far above what the settings allow (2**20 tokens a step take 5 MB)."""

KEY_BYTES = 32
SEND_TIMEOUT = 0.5
"""A message waits for room only when the peer is gone or stopped: far fewer are under way than a queue holds."""
SPIN_SECONDS = 1e-3
IDLE_POLL = 5.0

_MAGIC = b"nano"
_TAG_BYTES = 32
_HEADER = struct.Struct("<4sQQBBIQQ")
_READABLE = int(zmq.POLLIN)  # arithmetic on zmq's enum takes as long as asking the socket
_HIGH_WATER_MARK = 16  # two steps in flight and a few words of control


class Direction(enum.IntEnum):
    """Who a frame is for."""

    TO_RANK = 1
    TO_SCHEDULER = 2


class Channel(enum.IntEnum):
    """What a payload is: a control message (tag and fields), or a packed step."""

    CONTROL = 1
    STEP = 2


_CHANNELS = frozenset(Channel)

# ---------------------------------------------------------------------------------------------- messages


class BlockCounts(NamedTuple):
    """K/V blocks of a rank: on its device, and in its part of the swap space."""

    device: int
    host: int = 0

    @classmethod
    def least(cls, counts: Iterable[BlockCounts]) -> BlockCounts:
        """What every rank has: block ids mean the same on all of them."""
        return cls(*map(min, zip(*counts, strict=True)))


@dataclasses.dataclass(slots=True)
class Hello:
    """Rank → scheduler: connected; the socket's file may go."""

    pid: int


@dataclasses.dataclass(slots=True)
class Begin:
    """Scheduler → rank of a spare group: it is needed, load the model."""


@dataclasses.dataclass(slots=True)
class Loaded:
    """Rank → scheduler: the model is loaded; as many K/V blocks as this would fit."""

    max_kv_blocks: int
    dtype: str
    device: str
    max_host_blocks: int = 0


@dataclasses.dataclass(slots=True)
class Allocate:
    """Scheduler → rank: make a cache of so many blocks (the minimum over ranks) and warm up."""

    num_blocks: int
    num_host_blocks: int = 0


@dataclasses.dataclass(slots=True)
class Ready:
    """Rank → scheduler: warmed up, send steps."""


@dataclasses.dataclass(slots=True)
class Stop:
    """Scheduler → rank: leave, together with the others."""


@dataclasses.dataclass(slots=True)
class Failed:
    """Rank → scheduler: `error` is `configs.errors.to_wire` of what was raised."""

    error: dict[str, Any]
    traceback: str


Control = Hello | Begin | Loaded | Allocate | Ready | Stop | Failed | GaveUp | Forget
Message = Control | StepInput | StepOutput

_TAGS: dict[int, type[Any]] = dict(
    enumerate((Hello, Loaded, Allocate, Ready, Stop, Failed, Begin, GaveUp, Forget), start=1)
)
_TAG_OF = {kind: tag for tag, kind in _TAGS.items()}


def encode(message: Message) -> tuple[Channel, bytes]:
    """Render a message once; the same bytes go to every rank."""
    if isinstance(message, StepInput | StepOutput):
        return Channel.STEP, message.pack()
    fields = [getattr(message, field.name) for field in dataclasses.fields(message)]
    return Channel.CONTROL, pickle.dumps((_TAG_OF[type(message)], *fields), protocol=5)


def decode(channel: Channel, direction: Direction, payload: bytes | memoryview) -> Message:
    """Inverse of `encode` for an authenticated payload. Raises ChannelError when it is malformed."""
    columns = restricted_loads(payload)
    if channel is Channel.STEP:
        return StepInput.unpack(columns) if direction is Direction.TO_RANK else StepOutput.unpack(columns)
    try:
        tag, *fields = columns
        message: Control = _TAGS[tag](*fields)
        return message
    except (TypeError, ValueError, KeyError) as error:
        raise ChannelError(f"malformed control message: {error}") from error


class _PrimitiveUnpickler(pickle.Unpickler):
    """Builds what needs no class: None, bool, int, float, str, bytes, tuple, list, dict and set."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise ChannelError(f"a payload names {module_name}.{global_name}; only primitives are accepted")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ChannelError("a payload holds a persistent id; only primitives are accepted")


def restricted_loads(payload: bytes | memoryview) -> Any:
    """Unpickle primitives; the one place of the product where pickle is read.

    Raises:
        ChannelError: the payload names a class or function, or is no pickle.
    """
    try:
        return _PrimitiveUnpickler(io.BytesIO(payload)).load()
    except ChannelError:
        raise
    except Exception as error:  # pickle raises almost anything on garbage
        raise ChannelError(f"malformed payload: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------------------ frames


class FrameWriter:
    """Seals the frames of one direction of one rank in one epoch."""

    def __init__(self, key: bytes, epoch: Epoch, direction: Direction, rank: int) -> None:
        self._mac = hmac.new(key, digestmod="sha256")
        self._epoch, self._direction, self._rank = epoch, direction, rank
        self._sequence = 0

    def seal(self, channel: Channel, payload: bytes) -> bytes:
        """The next frame. Raises ChannelError when the payload is larger than any receiver accepts."""
        size = _TAG_BYTES + _HEADER.size + len(payload)
        if size > MAX_FRAME_BYTES:
            raise ChannelError(f"a frame of {size} bytes exceeds the limit of {MAX_FRAME_BYTES}")
        self._sequence += 1
        header = _HEADER.pack(_MAGIC, *self._epoch, channel, self._direction, self._rank, self._sequence, len(payload))
        mac = self._mac.copy()
        mac.update(header)
        mac.update(payload)
        return b"".join((mac.digest(), header, payload))


class FrameReader:
    """Opens the frames of one direction of one rank in one epoch, each once and in order.

    Attributes:
        rejected: how many frames were refused, by reason.
        broken: a genuine frame is missing, so the stream can not go on.
    """

    def __init__(self, key: bytes, epoch: Epoch, direction: Direction, rank: int) -> None:
        self._mac = hmac.new(key, digestmod="sha256")
        self._epoch, self._direction, self._rank = epoch, direction, rank
        self._sequence = 0
        self.rejected: collections.Counter[str] = collections.Counter()
        self.broken = False

    def open(self, frame: bytes) -> tuple[Channel, memoryview]:
        """Channel and payload of the next frame; raises ChannelError, having parsed nothing, for any other."""
        if not _TAG_BYTES + _HEADER.size <= len(frame) <= MAX_FRAME_BYTES:
            raise self._reject("size", f"a frame of {len(frame)} bytes")
        view = memoryview(frame)
        mac = self._mac.copy()
        mac.update(view[_TAG_BYTES:])
        if not hmac.compare_digest(mac.digest(), view[:_TAG_BYTES]):
            raise self._reject("authentication", "a frame that is not genuine")
        payload = view[_TAG_BYTES + _HEADER.size :]
        route = self._direction, self._rank, self._sequence + 1, len(payload)
        if view[_TAG_BYTES : _TAG_BYTES + _HEADER.size] == _HEADER.pack(_MAGIC, *self._epoch, Channel.STEP, *route):
            self._sequence += 1
            return Channel.STEP, payload
        return self._open_other(view, payload)

    def _open_other(self, view: memoryview, payload: memoryview) -> tuple[Channel, memoryview]:
        """What is not the next step: a control message, or a frame that does not belong here."""
        magic, incarnation, group, channel, direction, rank, sequence, length = _HEADER.unpack_from(view, _TAG_BYTES)
        epoch = Epoch(incarnation, group)
        if epoch != self._epoch:
            raise self._reject("epoch", f"a frame of epoch {tuple(epoch)} in epoch {tuple(self._epoch)}")
        route = (magic, direction, rank, length)
        if route != (_MAGIC, self._direction, self._rank, len(payload)) or channel not in _CHANNELS:
            raise self._reject("route", f"a frame of direction {direction} and rank {rank}, made for another link")
        if sequence <= self._sequence:
            raise self._reject("replay", f"frame {sequence} again after frame {self._sequence}")
        if sequence > self._sequence + 1:
            self.broken = True
            raise self._reject("gap", f"frame {sequence} right after frame {self._sequence}")
        self._sequence = sequence
        return Channel(channel), payload

    def _reject(self, reason: str, what: str) -> ChannelError:
        self.rejected[reason] += 1
        sender = "the scheduler" if self._direction is Direction.TO_RANK else f"rank {self._rank}"
        return ChannelError(f"on the link from {sender}: refused {what}")


# ------------------------------------------------------------------------------------------------- links


class Link:
    """One end of the connection between the scheduler and one rank: an ipc socket behind typed messages.

    The scheduler binds in its private run directory once it knows the rank's process, the only one that is let in;
    the rank connects and says Hello, and `unlink` takes the file away. A Link belongs to one thread.

    Attributes:
        on_rejected: called with the number of refused frames whenever it has grown.
    """

    def __init__(self, key: bytes, epoch: Epoch, rank: int, end: Direction) -> None:
        """`end` is the direction this end receives: TO_RANK on the rank's side."""
        other = Direction.TO_SCHEDULER if end is Direction.TO_RANK else Direction.TO_RANK
        self._end = end
        self._writer = FrameWriter(key, epoch, other, rank)
        self._reader = FrameReader(key, epoch, end, rank)
        self._peer = f"rank {rank}" if end is Direction.TO_SCHEDULER else "the scheduler"
        self._listener: Listener | None = None
        self._log = LimitedLog(logger)
        self.on_rejected: Callable[[int], None] = lambda number: None
        self._recv_timeout = -1  # milliseconds, as the socket has it
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, _HIGH_WATER_MARK),
            (zmq.RCVHWM, _HIGH_WATER_MARK),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.RECONNECT_IVL, -1),  # the file is gone by then, and a broken group is replaced as a whole
        ):
            self.socket.setsockopt(option, value)

    def bind(self, path: Path, peer_pid: int | None = None) -> None:
        """Listen at `path`, to the process `peer_pid` alone where one is named.

        Raises:
            ConfigError: the system cannot hold so long a path.
        """
        self._listener = Listener(self.socket, path, peer_pid)

    def connect(self, path: Path) -> None:
        """Connect to where the other end has bound."""
        self.socket.connect(f"ipc://{path}")

    def unlink(self) -> None:
        """Let nobody else connect once the peer is: the socket's file goes. Harmless twice.

        ZeroMQ's own unbind would end the connection too.
        """
        if self._listener is not None:
            self._listener.unlink()

    @property
    def rejected(self) -> collections.Counter[str]:
        """How many frames were refused, by reason; `process` counts connections of other processes."""
        turned_away = 0 if self._listener is None else self._listener.turned_away
        return self._reader.rejected + collections.Counter(process=turned_away)

    def send(self, message: Message, timeout: float = SEND_TIMEOUT) -> None:
        """Send one message; see `send_encoded`."""
        self.send_encoded(*encode(message), timeout)

    def send_encoded(self, channel: Channel, payload: bytes, timeout: float = SEND_TIMEOUT) -> None:
        """Send what `encode` rendered.

        Raises:
            ChannelError: it is too large; nothing was sent.
            DeadlineError: the peer has not taken what was sent before within `timeout` seconds.
        """
        frame = self._writer.seal(channel, payload)
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            if not self.socket.poll(round(timeout * 1000), zmq.POLLOUT):
                raise DeadlineError(f"{self._peer} took no message for {timeout:g} s") from None
            self.socket.send(frame, zmq.NOBLOCK)

    def receive(self, timeout: float = 0) -> Message | None:
        """The next message, or None when none comes within `timeout` seconds. Refused frames are dropped.

        Raises:
            ChannelError: a genuine frame is missing or malformed: the link is of no more use.
        """
        deadline = time.monotonic() + timeout if timeout else None
        while (frame := self._next_frame(deadline)) is not None:
            try:
                channel, payload = self._reader.open(frame)
            except ChannelError as error:
                if self._reader.broken:
                    raise
                self._log.warning(error.message)
                self.on_rejected(self._reader.rejected.total())
                continue
            return decode(channel, self._end, payload)
        return None

    def is_readable(self) -> bool:
        """Whether a frame is there. Asking costs a third of the exception that says there is none."""
        return bool(int(self.socket.get(zmq.EVENTS)) & _READABLE)

    def _next_frame(self, deadline: float | None) -> bytes | None:
        if deadline is None:
            return self.socket.recv(zmq.NOBLOCK) if self.is_readable() else None
        milliseconds = max(0, math.ceil((deadline - time.monotonic()) * 1000))
        if milliseconds != self._recv_timeout:
            self.socket.setsockopt(zmq.RCVTIMEO, milliseconds)
            self._recv_timeout = milliseconds
        try:
            return self.socket.recv()
        except zmq.Again:
            return None

    def close(self, linger: float = 0) -> None:
        """Close the socket, giving what was sent `linger` seconds to leave. Harmless twice."""
        self.socket.close(linger=round(linger * 1000))


# -------------------------------------------------------------------------------------- the rank's end


class RankPort:
    """What a rank's process has of the world: its number, its configuration, and its end of the channel.

    Attributes:
        collective_fd: an anonymous file that all ranks share, for collectives on CPU; None at world size 1.
        run_dir: the group's private directory, for a rendezvous file.
        num_threads: this rank's share of the cores.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        epoch: Epoch,
        link: Link,
        control: ControlBlock,
        *,
        run_dir: Path,
        collective_fd: int | None,
        num_threads: int,
    ) -> None:
        self.config, self.rank, self.epoch = config, rank, epoch
        self.world_size = config.parallel.world_size
        self.run_dir, self.collective_fd, self.num_threads = run_dir, collective_fd, num_threads
        self._link, self._control = link, control
        self._words: RankWords = control.ranks[rank]
        link.on_rejected = self._count_rejected

    def set_phase(self, phase: Phase) -> None:
        """Show the scheduler what this rank is doing."""
        self._words.phase = phase

    def await_begin(self) -> bool:
        """Wait, as a rank of a spare group, until it is needed; False when asked to leave instead."""
        self.set_phase(Phase.PARKED)
        command = self._next_command()
        if isinstance(command, Begin):
            return True
        self._expect_stop(command)
        return False

    def report_loaded(self, fitting: BlockCounts, dtype: str, device: str) -> BlockCounts | None:
        """Say how many K/V blocks would fit; returns how many to allocate, or None when asked to leave instead."""
        self._link.send(Loaded(fitting.device, dtype, device, fitting.host))
        command = self._next_command()
        if isinstance(command, Allocate):
            return BlockCounts(command.num_blocks, command.num_host_blocks)
        self._expect_stop(command)
        return None

    def report_ready(self) -> None:
        """Say that steps can come."""
        self.set_phase(Phase.READY)
        self._link.send(Ready())

    def steps(self, forget: Callable[[], None] = lambda: None) -> Iterator[StepInput]:
        """The steps to compute, until the scheduler asks to leave. Each ends with the next request for one.

        `forget` is called where all steps before are void; who keeps nothing of them needs none.
        """
        while True:
            command = self._next_command()
            if isinstance(command, Forget):
                forget()
                continue
            if not isinstance(command, StepInput):
                self._expect_stop(command)
                return
            self._words.begin(command.step_id)
            yield command
            self._words.end(command.step_id)

    def is_command_waiting(self) -> bool:
        """Whether the next step, or another command, is there already."""
        return self._link.is_readable()

    def send_output(self, output: StepOutput | GaveUp) -> None:
        """Send what came of a step: its output, which rank 0 alone does, or that there was no memory for it."""
        self._link.send(output)

    def report_failure(self, error: dict[str, Any], traceback: str) -> None:
        """Say what was raised; the process should end then. The scheduler kills the other ranks."""
        self.set_phase(Phase.FAILED)
        self._link.send(Failed(error, traceback))

    def close(self) -> None:
        """Close this end; what was sent has a second to leave."""
        self._link.close(linger=1)

    def _count_rejected(self, number: int) -> None:
        self._words.rejected = number

    def _expect_stop(self, command: Message) -> None:
        if not isinstance(command, Stop):
            raise ChannelError(f"rank {self.rank} cannot use a {type(command).__name__} now")
        self.set_phase(Phase.LEAVING)

    def _next_command(self) -> Message:
        """Spin for as long as the next step of a busy engine takes to come, then block on the socket."""
        begun, words = self._words.begun, self._control
        end = time.monotonic() + (SPIN_SECONDS if begun else 0)
        while words.submitted <= begun and not words.stop_requested and time.monotonic() < end:
            os.sched_yield()
        while True:
            command = self._link.receive(IDLE_POLL)
            if command is not None:
                return command
            if words.stop_requested:
                return Stop()
