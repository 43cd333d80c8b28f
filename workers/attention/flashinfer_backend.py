"""Paged attention by FlashInfer (https://github.com/flashinfer-ai/flashinfer); knows no model and no scheduler.

A wrapper of theirs is planned once a step, on the host and from the host's numbers, and run in each layer; so no CUDA
graph may hold it. Steps of decodes alone have a wrapper of their own, any other goes to the one for prompts whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.library_backend import LibraryBackend
from workers.forward_context import AttentionMetadata
from workers.staging import send

LEAST_WORKSPACE_BYTES = 128 << 20
"""What their documentation recommends."""

LARGEST_TILE = 128
"""Rows of a program of theirs; two programs share a processor."""

NUM_TURNS = 2
"""A plan goes to the device from a pinned buffer of its wrapper, which the next plan overwrites, perhaps before it
went. While a step is put together, the last but one is being computed and its plan has long arrived."""


@dataclasses.dataclass(slots=True)
class _Turn:
    """Wrappers that one step uses, and the next but one again.

    Attributes:
        decode: a `BatchDecodeWithPagedKVCacheWrapper`.
        prefill: a `BatchPrefillWithPagedKVCacheWrapper`.
        planned: recorded behind the last plan's transfer; None on a CPU.
    """

    decode: Any
    prefill: Any
    planned: torch.cuda.Event | None


@dataclasses.dataclass(slots=True)
class _Plan:
    """The wrapper that is planned for the step, with the scale that it was told."""

    wrapper: Any
    scale: float


class FlashInferBackend(LibraryBackend):
    """The cache is in their layout "HND", K and V in one tensor."""

    name = "flashinfer"
    package = "flashinfer"
    least_version = (0, 3)
    head_dims = (64, 128, 256)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._turns: list[_Turn] = []
        self._turn = 0
        self._workspace_bytes = 0

    def forward(self, q: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float) -> torch.Tensor:
        """See `AttentionBackend.forward`. Every layer must have the same scale."""
        if not isinstance(metadata.plan, _Plan):
            metadata.plan = self._plan_step(metadata, q, cache, scale)
        plan = metadata.plan
        assert scale == plan.scale, f"planned with scale {plan.scale}, this layer has {scale}"
        out: torch.Tensor = plan.wrapper.run(q, cache)
        return out

    def _plan_step(self, metadata: AttentionMetadata, q: torch.Tensor, cache: torch.Tensor, scale: float) -> _Plan:
        num_kv_heads, block_size, head_dim = cache.shape[2:]
        seq_lens = np.array(metadata.seq_lens, dtype=np.int64)
        num_blocks = -(-seq_lens // block_size)
        starts = _starts(num_blocks)
        last_lens = seq_lens - (num_blocks - 1) * block_size
        pages = (self._host(starts), self._pages(metadata, num_blocks, starts), self._host(last_lens))
        shape = (q.shape[1], num_kv_heads, head_dim, block_size)
        types = {"q_data_type": q.dtype, "kv_data_type": cache.dtype, "sm_scale": scale}
        turn = self._next_turn(q.shape[1] // num_kv_heads, head_dim)
        if max(metadata.query_lens) == 1:
            wrapper = turn.decode
            wrapper.plan(*pages, *shape, **types)
        else:
            wrapper = turn.prefill
            query_starts = self._host(_starts(np.array(metadata.query_lens, dtype=np.int64)))
            wrapper.plan(query_starts, *pages, *shape, causal=True, **types)
        if turn.planned is not None:
            turn.planned.record()
        return _Plan(wrapper, scale)

    def _pages(
        self, metadata: AttentionMetadata, num_blocks: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """(sum of num_blocks,) int32 on the device: the blocks of each sequence, one sequence after another."""
        tables = metadata.block_tables
        column = np.arange(starts[-1]) - np.repeat(starts[:-1], num_blocks)
        place = np.repeat(np.arange(len(num_blocks)), num_blocks) * tables.shape[1] + column
        return tables.reshape(-1).index_select(0, send(place, tables.device)).to(torch.int32)

    def _host(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """int32 on the host, where plans read them; pinned, so that their way to the device makes nobody wait."""
        on_host = torch.from_numpy(numbers.astype(np.int32))
        return on_host.pin_memory() if self._device.type == "cuda" else on_host

    def _next_turn(self, group: int, head_dim: int) -> _Turn:
        # Of keys that are split, each program leaves a float32 result, for each of `group` query heads, and its weight.
        split_bytes = 2 * self._num_processors * group * LARGEST_TILE * (head_dim + 1) * 4
        needed = max(LEAST_WORKSPACE_BYTES, split_bytes + 256)
        if needed > self._workspace_bytes:
            # To be zero at first; stretches of the stream use it in turn, so that all wrappers may share one.
            workspace = torch.zeros(needed, dtype=torch.uint8, device=self._device)
            self._turns, self._workspace_bytes = [self._make_turn(workspace) for _ in range(NUM_TURNS)], needed
        self._turn = (self._turn + 1) % NUM_TURNS
        turn = self._turns[self._turn]
        if turn.planned is not None:
            turn.planned.synchronize()
        return turn

    def _make_turn(self, workspace: torch.Tensor) -> _Turn:
        on_gpu = self._device.type == "cuda"
        return _Turn(
            # The kernels without tensor cores know only some numbers of query heads a K/V head.
            decode=self._library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True),
            prefill=self._library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND"),
            planned=torch.cuda.Event() if on_gpu else None,  # type: ignore[no-untyped-call]
        )


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(len(lengths) + 1,): where each of pieces of these lengths begins, and the end."""
    return np.concatenate((np.zeros(1, dtype=np.int64), lengths.cumsum()))
