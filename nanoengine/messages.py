"""Messages between front ends and the scheduler: small dataclasses with an explicit tag table, packed with msgpack.

A message is an array: its tag, then its fields in order. There are no method names on the wire, and this module
knows neither sockets nor what a message leads to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from configs.errors import ChannelError
from nanoengine.step import PromptLogprobs

MAX_MESSAGE_BYTES = 256 * 2**20


@dataclasses.dataclass(slots=True)
class Hello:
    """Front end → scheduler: here I am; answer with Ready as soon as the engine is.

    `totals` is what the schedulers before this one have counted, as far as they told: those of `Stats` in `TOTALS`.
    """

    client_id: str
    totals: dict[str, Any] | None = None


@dataclasses.dataclass(slots=True)
class AddRequest:
    """Front end → scheduler: serve this; sending it twice is harmless.

    `journal[i]` holds the tokens already journalled for sequence `i`: after a restart they are computed again as
    if they had just been sampled, and the answer goes on behind them. `seed` was drawn by the front end.
    `params` is `SamplingParams.to_dict()`. Only requests of the same `cache_salt` share cached prefixes.
    `timeout` seconds after its arrival the request ends with an error, complete or not. `num_prompt_logprobs` entries
    of the prompt's log-probabilities are journalled already. `grammar` is what the outputs must match, in llguidance's
    form; the front end has compiled it.
    `beam_search` is `BeamSearchParams.to_dict()`: the outputs, as many as its width, are told at the end, best first.
    Such a request has no journal to go on from, and starts again.
    """

    client_id: str
    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    seed: int
    arrival_time: float
    priority: int
    journal: list[list[int]]
    cache_salt: str = ""
    timeout: float | None = None
    num_prompt_logprobs: int = 0
    grammar: str = ""
    beam_search: dict[str, Any] | None = None


@dataclasses.dataclass(slots=True)
class Abort:
    """Front end → scheduler: end (request, index); index None means every sequence of the request."""

    request_id: str
    index: int | None
    reason: str


@dataclasses.dataclass(slots=True)
class AbortNamed:
    """Front end → scheduler → every other front end: end the requests that one of `names` stands for; None: all.

    For clients that ask one front end to end what another one serves.
    """

    names: list[str] | None

    def stands_for(self, request_id: str) -> bool:
        """Whether a name is this id, or that of an HTTP request with several prompts of which it is one (`NAME-0`)."""
        whole, _, number = request_id.rpartition("-")
        return self.names is None or request_id in self.names or (number.isdecimal() and whole in self.names)


@dataclasses.dataclass(slots=True)
class ResetPrefixCache:
    """Front end → scheduler: no later request may hit what is cached now."""


@dataclasses.dataclass(slots=True)
class Ready:
    """Scheduler → front end: the engine serves; what was learnt at run time comes along.

    `group` numbers the groups of ranks that this scheduler has started, the present one included.
    """

    incarnation: int
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    dtype: str
    device: str
    group: int = 1


@dataclasses.dataclass(slots=True)
class Recovering:
    """Scheduler → front end: the ranks failed and are being replaced; open requests go on with the next Ready.

    `error` is `configs.errors.to_wire` of what happened to them.
    """

    incarnation: int
    error: dict[str, Any]


@dataclasses.dataclass(slots=True)
class Resubmit:
    """Scheduler → front end: I know none of your requests any more; add again what you have not seen the end of."""

    incarnation: int


@dataclasses.dataclass(slots=True)
class TokenDelta:
    """New tokens of one sequence, from position `start` of its output on.

    The receiver accepts only the next position, drops lower ones and replays its request on a gap.
    `finish_reason` is stop, length, abort or error with the last delta, else None; `stop_reason` is the stop
    token id that matched, if one did (never eos). `error` is `configs.errors.to_wire` of what failed.
    `metrics` comes with the first tokens and the last: seconds and counts, see `outputs.RequestMetrics`. `logprobs`,
    where they are asked for, holds a `step.TokenLogprobs` for each of `token_ids`. `prompt_logprobs` holds further
    entries of the prompt's, which come before the first token; their positions are accepted and asked for again like
    those of tokens.
    """

    request_id: str
    index: int
    start: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: dict[str, Any] | None = None
    metrics: dict[str, float] | None = None
    logprobs: list[Any] | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclasses.dataclass(slots=True)
class TokenColumns:
    """One new token for each of many sequences that go on: what is in entry i of each column belongs together.

    The token of sequence (`request_ids[i]`, `indices[i]`) stands at position `offsets[i] + shift` of its output.
    """

    request_ids: list[str]
    indices: list[int]
    offsets: list[int]
    shift: int
    token_ids: list[int]

    def __post_init__(self) -> None:
        if not len(self.request_ids) == len(self.indices) == len(self.offsets) == len(self.token_ids):
            raise ValueError("columns of different lengths")


def spelt_out(entries: Iterable[TokenDelta | TokenColumns]) -> Iterator[TokenDelta]:
    """The same with a delta for each entry of the columns."""
    for entry in entries:
        if isinstance(entry, TokenDelta):
            yield entry
            continue
        columns = zip(entry.request_ids, entry.indices, entry.offsets, entry.token_ids, strict=True)
        for request_id, index, offset, token in columns:
            yield TokenDelta(request_id, index, offset + entry.shift, [token])


@dataclasses.dataclass(slots=True)
class Deltas:
    """Scheduler → front end: what one step brought for this front end (merged over steps when it is slow), in order."""

    incarnation: int
    deltas: Sequence[TokenDelta | TokenColumns]


@dataclasses.dataclass(slots=True)
class StateRequest:
    """Front end → scheduler: somebody watches; answer with EngineState."""


class BlockMap(NamedTuple):
    """The blocks of one tier of the K/V cache by state; what is not counted is free.

    Each byte of the columns stands for a cell of `blocks_per_cell` blocks that follow each other, and says which
    share of them is in that state, from 0 (none) to 255 (all), rounded up. `held` by one sequence, `shared` by several.
    The columns cover the first `num_mapped` blocks, behind which all are free.
    """

    num_blocks: int
    num_mapped: int
    blocks_per_cell: int
    num_cached: int
    num_held: int
    num_shared: int
    cached: bytes
    held: bytes
    shared: bytes


class SharedPrefix(NamedTuple):
    """Blocks at the front of several sequences: `num_blocks` of them, which save `num_saved` copies.

    `root`, the first of the blocks, names it as long as it is shared.
    """

    root: int
    num_seqs: int
    num_blocks: int
    num_saved: int


class SequenceRow(NamedTuple):
    """One sequence that runs or waits. `age` is in seconds since its request arrived."""

    request_id: str
    output_index: int
    status: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_completion_tokens: int
    num_blocks: int
    num_shared_blocks: int
    num_preemptions: int
    age: float


@dataclasses.dataclass(slots=True)
class EngineState:
    """Scheduler → front end: what goes on between two steps, bounded in size; see `engine_state`.

    Token counts are totals of the scheduler's life: generated ones, and those of prompts that were looked up in the
    prefix cache and found there. `time` is in seconds of `time.time()`. A byte of `prefix_cells` says for a cell of
    `device` which of `prefixes` lies in it, counted from 1, or 0. `rows` holds the first in serving order.
    """

    incarnation: int
    time: float
    num_running: int
    num_waiting: int
    num_swapped: int
    num_preemptions: int
    num_generated_tokens: int
    num_query_tokens: int
    num_hit_tokens: int
    device: BlockMap
    host: BlockMap
    prefixes: list[SharedPrefix]
    prefix_cells: bytes
    rows: list[SequenceRow]

    def __post_init__(self) -> None:
        # A message brings lists where tuples were.
        self.device, self.host = BlockMap(*self.device), BlockMap(*self.host)
        self.prefixes = [SharedPrefix(*each) for each in self.prefixes]
        self.rows = [SequenceRow(*each) for each in self.rows]


@dataclasses.dataclass(slots=True)
class Stats:
    """Scheduler → front end: what goes on, about once a second while there is work and once when it is done.

    Sequences by state; blocks of the device and of the host tier: all, held by sequences, and cached (the rest is
    free). Then totals of the engine's life, over all of its schedulers: tokens that were looked up in the prefix cache
    and found there (on the host, of those), preemptions (by swapping, of those), what `engine_stats.StepTotals` and
    `recovery.RecoveryStats` count, and the frames of ranks and messages of front ends that were refused.
    """

    incarnation: int
    group: int
    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    num_host_blocks: int = 0
    num_used_host_blocks: int = 0
    num_cached_host_blocks: int = 0
    num_query_tokens: int = 0
    num_hit_tokens: int = 0
    num_host_hit_tokens: int = 0
    num_preemptions: int = 0
    num_swaps: int = 0
    num_prefill_tokens: int = 0
    num_generated_tokens: int = 0
    num_step_tokens: int = 0
    steps_by_tokens: list[int] = dataclasses.field(default_factory=list)
    restarts: dict[str, int] = dataclasses.field(default_factory=dict)
    recovery_seconds: float = 0.0
    num_requests_resumed: int = 0
    num_tokens_recomputed: int = 0
    num_requests_condemned: int = 0
    num_steps_given_up: int = 0
    num_scheduler_faults: int = 0
    num_frames_rejected: int = 0


TOTALS = (
    "num_query_tokens", "num_hit_tokens", "num_host_hit_tokens", "num_preemptions", "num_swaps", "num_prefill_tokens",
    "num_generated_tokens", "num_step_tokens", "steps_by_tokens", "restarts", "recovery_seconds",
    "num_requests_resumed", "num_tokens_recomputed", "num_requests_condemned", "num_steps_given_up",
    "num_scheduler_faults", "num_frames_rejected",
)  # fmt: skip
"""What in `Stats` only grows."""


@dataclasses.dataclass(slots=True)
class EngineFailure:
    """Scheduler → front end: the engine can serve no more; `error` is `configs.errors.to_wire` of the cause."""

    incarnation: int
    error: dict[str, Any]


ToScheduler = Hello | AddRequest | Abort | AbortNamed | ResetPrefixCache | StateRequest
ToFrontEnd = Ready | Recovering | Resubmit | Deltas | AbortNamed | EngineState | Stats | EngineFailure
Message = ToScheduler | ToFrontEnd

_TAGS: dict[int, type[Any]] = {
    1: Hello,
    2: AddRequest,
    3: Abort,
    4: Ready,
    5: Deltas,
    6: EngineFailure,
    7: ResetPrefixCache,
    8: Stats,
    9: Recovering,
    20: StateRequest,
    21: EngineState,
    30: AbortNamed,
    31: Resubmit,
}
_TAG_OF = {kind: tag for tag, kind in _TAGS.items()}
_FIELDS = {
    kind: tuple(field.name for field in dataclasses.fields(kind))
    for kind in (*_TAGS.values(), TokenDelta, TokenColumns)
}


def _values(message: Any) -> list[Any]:
    return [getattr(message, name) for name in _FIELDS[type(message)]]


def _delta(values: list[Any]) -> TokenDelta | TokenColumns:
    """An entry of `Deltas`: columns begin with a list of request ids where a delta has its one."""
    if isinstance(values[0], list):
        return TokenColumns(*values)
    delta = TokenDelta(*values)
    if delta.prompt_logprobs is not None:
        delta.prompt_logprobs = PromptLogprobs.checked(delta.prompt_logprobs)
    return delta


def encode(message: Message) -> bytes:
    """Pack a message; raises ChannelError when it cannot be packed, or is larger than any receiver accepts."""
    values = _values(message)
    if isinstance(message, Deltas):
        values[1] = [_values(delta) for delta in message.deltas]
    try:
        frame: bytes = msgpack.packb([_TAG_OF[type(message)], *values])
    except (OverflowError, ValueError, TypeError) as error:  # a number of more than 64 bits, half a surrogate pair
        raise ChannelError(f"a {type(message).__name__} cannot be packed: {error}") from error
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ChannelError(f"a {type(message).__name__} of {len(frame)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    return frame


def decode(frame: bytes) -> Message:
    """Unpack a message; raises ChannelError when it is malformed or of an unknown tag."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ChannelError(f"a message of {len(frame)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        tag, *values = msgpack.unpackb(frame)
        kind = _TAGS[tag]
        if kind is Deltas:
            values[1] = [_delta(entry) for entry in values[1]]
        message: Message = kind(*values)
        return message
    except (ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
        raise ChannelError(f"malformed message: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------- what the scheduler takes from a front end

_NO_STATS = Stats(0, 0)

_MAX_INT, _MAX_TEXT, _MAX_TOTALS = 2**63 - 1, 1024, 64


def decode_from_front(frame: bytes) -> Message:
    """`decode` for the scheduler: a message that a front end may send, each field of its own type.

    Whatever runs as this user can reach the socket, and all front ends' requests live in the process that reads it, so
    nothing of another form may get further. Raises ChannelError.
    """
    message = decode(frame)
    if not isinstance(message, ToScheduler):
        raise ChannelError(f"a front end may not send a {type(message).__name__}")
    wrong = _wrong_field(message)
    if wrong:
        raise ChannelError(f"malformed {type(message).__name__}: {wrong}")
    return message


def _wrong_field(message: Message) -> str:
    match message:
        case AddRequest():
            return _wrong_in_request(message)
        case Abort():
            fits = {
                "request_id": _is_text(message.request_id),
                "index": message.index is None or _is_int(message.index),
                "reason": _is_text(message.reason),
            }
        case AbortNamed():
            fits = {"names": message.names is None or _are_texts(message.names)}
        case Hello():
            fits = {
                "client_id": _is_text(message.client_id),
                "totals": message.totals is None or _are_totals(message.totals),
            }
        case _:
            fits = {}  # one without fields
    return next((name for name, fit in fits.items() if not fit), "")


def _wrong_in_request(message: AddRequest) -> str:
    fits = {
        "client_id": _is_text(message.client_id),
        "request_id": _is_text(message.request_id),
        "prompt_token_ids": _are_ints(message.prompt_token_ids),
        "params": _are_fields(message.params),
        "seed": _is_int(message.seed) and message.seed >= 0,
        "arrival_time": _is_seconds(message.arrival_time),
        "priority": _is_int(message.priority),
        "journal": isinstance(message.journal, list) and all(_are_ints(entry) for entry in message.journal),
        "cache_salt": isinstance(message.cache_salt, str),
        "timeout": message.timeout is None or _is_seconds(message.timeout),
        "num_prompt_logprobs": _is_int(message.num_prompt_logprobs) and message.num_prompt_logprobs >= 0,
        "grammar": isinstance(message.grammar, str),
        "beam_search": message.beam_search is None or _are_fields(message.beam_search),
    }
    return next((name for name, fit in fits.items() if not fit), "")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_text, values))


def _are_fields(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(name, str) for name in values)


def _is_int(value: object) -> bool:
    return type(value) is int and -_MAX_INT <= value <= _MAX_INT


def _are_ints(values: object) -> bool:
    # By type first: min() and max() then cost a tenth of a look at each.
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        return False
    return not values or (min(values) >= -_MAX_INT and max(values) <= _MAX_INT)


def _are_totals(values: object) -> bool:
    """Of the names and types that `Stats` has, and no more than a scheduler tells."""
    return isinstance(values, dict) and values.keys() <= set(TOTALS) and all(map(_is_total, values.items()))


def _is_total(entry: tuple[str, Any]) -> bool:
    name, value = entry
    keys = value if isinstance(value, dict) else ()
    numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    fits = all(map(_is_text, keys)) and all(type(each) in (int, float) and 0 <= each <= _MAX_INT for each in numbers)
    return fits and len(numbers) <= _MAX_TOTALS and type(value) is type(getattr(_NO_STATS, name))


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
