"""Which requests can be served at all, and in what order; knows neither blocks nor steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from configs.errors import RequestError
from nanoengine.messages import AddRequest
from nanoengine.sequence import Sequence

# Under the policy `priority`, one level is worth as much as having arrived this many seconds earlier: whoever waits
# overtakes every later request of a better level in the end, so nobody starves.
AGEING_SECONDS = 10.0

# Share of the blocks that admission leaves free at least, so that the sequences which run already can grow a little
# before somebody must be preempted.
WATERMARK = 0.01

ServingOrder = Callable[[Sequence], tuple[float, int, int]]


@dataclasses.dataclass(frozen=True)
class SchedulerLimits:
    """What the scheduler must respect, gathered from the settings and from what the workers reported."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    num_host_blocks: int = 0
    preemption_mode: str = "recompute"
    eos_token_ids: frozenset[int] = frozenset()
    vocab_size: int = 2**63
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    policy: str = "fcfs"
    max_decode_gap: float = 0.0


def serving_order(policy: str) -> ServingOrder:
    """The sort key of a policy: the least is served first and gives way last. It never changes for a sequence."""
    if policy == "priority":
        return _by_priority
    assert policy == "fcfs", f"unknown policy {policy}"
    return _by_arrival


def _by_arrival(seq: Sequence) -> tuple[float, int, int]:
    return 0.0, seq.first_seq_id, seq.seq_id


def _by_priority(seq: Sequence) -> tuple[float, int, int]:
    return seq.request.arrival_time + AGEING_SECONDS * seq.request.priority, seq.first_seq_id, seq.seq_id


def reserved_blocks(seq: Sequence, num_running: int, limits: SchedulerLimits) -> int:
    """How many blocks the admission of `seq` must leave free beside the `num_running` that run already.

    A sequence that had to give way comes back only when each that runs then can grow by a block: otherwise it might go
    again at once, and its way back would have been for nothing.
    """
    if not num_running or limits.num_kv_blocks == 1:
        return 0
    watermark = max(1, int(WATERMARK * limits.num_kv_blocks))
    return max(watermark, num_running + 1) if seq.num_preemptions else watermark


def check_admissible(message: AddRequest, limits: SchedulerLimits) -> None:
    """Raise RequestError for a request that can never be served."""
    prompt = message.prompt_token_ids
    if not prompt:
        raise RequestError("the prompt must hold at least 1 token, got none", "prompt")
    if len(prompt) >= limits.max_model_len:
        raise RequestError(
            f"the prompt must be at most {limits.max_model_len - 1} tokens long (max_model_len "
            f"{limits.max_model_len} less one to generate), got {len(prompt)}",
            "prompt",
            "context_length_exceeded",
        )
    capacity = limits.num_kv_blocks * limits.block_size
    longest = len(prompt) + max(map(len, message.journal), default=0) + 1
    if longest > capacity:
        raise RequestError(
            f"prompt and first output of {longest} tokens can never fit the K/V cache of {capacity} tokens "
            f"({limits.num_kv_blocks} blocks of {limits.block_size})",
            "prompt",
            "context_length_exceeded",
        )
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < limits.vocab_size)
        raise RequestError(f"token ids must be from 0 to {limits.vocab_size - 1}, got {wrong}", "prompt")
    if any(entry and (min(entry) < 0 or max(entry) >= limits.vocab_size) for entry in message.journal):
        raise RequestError(f"journalled token ids must be from 0 to {limits.vocab_size - 1}", "journal")
