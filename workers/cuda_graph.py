"""Captured forward passes of decode batches: what would be hundreds of launches a step becomes one.

A graph is captured for some numbers of rows; a batch runs in the smallest that holds it, and rows that only fill it up
have no keys (their attention is 0) and the slot -1 (their K/V goes nowhere). Each graph reads the same buffers, into
which a step's tensors are copied; block tables are as wide as the longest sequence needs, and what an earlier step
left behind a row's own blocks is never read. This module knows a forward pass as a function, and neither model,
sampler nor communicator.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import TypeAlias

import torch

from workers.forward_context import AttentionMetadata
from workers.input_batch import Batch

logger = logging.getLogger(__name__)

Forward: TypeAlias = Callable[[torch.Tensor, torch.Tensor, AttentionMetadata], torch.Tensor]
"""(input_ids, positions, metadata) to hidden states, one row a token."""

Recorder: TypeAlias = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], object], torch.Tensor]]
"""Makes of a computation one that can be started again, and the tensor where its result stands then."""

_LARGEST = 512
"""Rows above which a step computes for so long that its launches are hidden anyway."""


def sizes_to_capture(max_num_seqs: int) -> list[int]:
    """Numbers of rows, ascending; between two of them, at most 15 rows (31 above 256) are computed in vain."""
    largest = min(max_num_seqs, _LARGEST)
    sizes = [1, 2, 4, 8, 16, 24, *range(32, 257, 16), *range(288, _LARGEST + 1, 32)]
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """The graphs of one rank.

    Args:
        forward: the model's forward pass; with equal metadata it must launch the same kernels each time.
        max_num_seqs: rows of the largest batch.
        max_model_len: keys of the longest sequence.
        block_size: tokens in a block.
        device: where the model lives.
        record: how a computation is captured; by default as a CUDA graph.
    """

    def __init__(
        self,
        forward: Forward,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        record: Recorder | None = None,
    ) -> None:
        self._forward = forward
        self._max_model_len, self._block_size = max_model_len, block_size
        self._sizes = sizes_to_capture(max_num_seqs)
        self._record = record or CudaRecorder(device)
        largest, width = self._sizes[-1], -(-max_model_len // block_size)
        # Columns: input id, position, slot, number of keys. Each is one piece of memory.
        self._rows = torch.zeros((4, largest), dtype=torch.int64, device=device)
        self._padding = torch.tensor([[0], [0], [-1], [0]], device=device).repeat(1, largest)
        self._tables = torch.zeros((largest, width), dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[Callable[[], object], torch.Tensor]] = {}
        self._captured: list[int] = []

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows that are captured, ascending."""
        return self._captured

    def capture(self) -> None:
        """Capture every size, the largest first, whose memory the others share. Every rank must call it together.

        When the memory ends, what is captured by then stays, and other batches run as they would without graphs.
        """
        began = time.perf_counter()
        self._rows.copy_(self._padding)
        for size in reversed(self._sizes):
            try:
                self._graphs[size] = self._record(self._computation(size))
                self._captured.insert(0, size)
            except torch.OutOfMemoryError as error:
                logger.warning("no memory for the CUDA graph of %d rows, batches run without: %s", size, error)
                break
        logger.info("captured CUDA graphs of %s rows in %.2f s", self.sizes, time.perf_counter() - began)

    def run(self, batch: Batch) -> torch.Tensor | None:
        """Compute a batch of decodes.

        Returns:
            (num_rows, hidden_size), valid until the next call; None when no graph holds the batch.
        """
        num_rows = len(batch.seq_ids)
        sizes = self._captured
        if len(batch.input_ids) != num_rows or not sizes or num_rows > sizes[-1]:
            return None
        size = sizes[bisect.bisect_left(sizes, num_rows)]
        metadata = batch.metadata
        assert metadata.device_seq_lens is not None, "the batch keeps its lengths on the host alone"
        columns = (batch.input_ids, batch.positions, metadata.slot_mapping, metadata.device_seq_lens)
        width = metadata.block_tables.shape[1]
        targets, sources = [*self._rows[:, :num_rows]], [*columns]
        if num_rows < size:
            # Rows of a larger batch before, which would write into blocks that are somebody else's by now.
            targets += self._rows[:, num_rows:size]
            sources += self._padding[:, num_rows:size]
        torch._foreach_copy_(targets, sources)  # in one launch, as each of them is one piece of memory
        self._tables[:num_rows, :width].copy_(metadata.block_tables)
        replay, hidden = self._graphs[size]
        replay()
        return hidden[:num_rows]

    def _computation(self, size: int) -> Callable[[], torch.Tensor]:
        ids, positions, slots, seq_lens = self._rows[:, :size]
        batch = AttentionMetadata(
            query_lens=[1] * size,
            seq_lens=[self._max_model_len] * size,  # a bound: the kernels read `device_seq_lens`
            slot_mapping=slots,
            block_tables=self._tables[:size],
            block_size=self._block_size,
            device_seq_lens=seq_lens,
        )
        # A plan of its own for each call: what a backend derives from the buffers belongs into the graph.
        return lambda: self._forward(ids, positions, dataclasses.replace(batch, plan=None))


class CudaRecorder:
    """Captures computations as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all of them: cuBLAS keeps a workspace for each stream that it has seen, 32 MiB on an H100.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Run a computation once, so that all of it is compiled and allocated, and capture it then.

        Raises:
            torch.OutOfMemoryError: there is no room for it.
        """
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread of this process (NCCL's watchdog) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = compute()
        return graph.replay, result
