"""One rank's engine room: model, K/V cache and rows, put together to compute one step after another.

It decides nothing: what a step holds is the scheduler's choice, where tokens go the executor's. It knows neither
processes nor sockets; the communicator is handed to it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import torch

from configs.engine import EngineConfig
from configs.errors import EngineError
from nanoengine.step import PREVIOUS_SAMPLE, Epoch, RowParams, SequenceState, StepInput, StepOutput, TokenLogprobs
from workers.cuda_graph import DecodeGraphs, Recorder
from workers.forward_context import AttentionMetadata, ForwardContext, forward_context
from workers.input_batch import Batch, InputBatch
from workers.kv_cache import (
    KVCacheSpec,
    copy_blocks,
    free_gpu_memory,
    free_host_memory,
    max_host_blocks,
    max_kv_blocks,
)
from workers.launched_step import LaunchedStep, SampledIds
from workers.layers.attention import Attention
from workers.logits_processors import process
from workers.logprobs import log_probabilities, token_logprobs
from workers.memory import explained
from workers.model_loader import ModelLoader, resolve_dtype
from workers.models.decoder import Decoder
from workers.parallel import Communicator
from workers.prompt_logprobs import tell_prompts
from workers.sampler import launch_sample
from workers.staging import Staging
from workers.structured import BoolArray, GrammarMatchers, constrain

logger = logging.getLogger(__name__)

_PROBE_EPOCH = Epoch(0, 0)
_MANY_KEYS = 160
"""So many that a row that decodes has them split (`workers.kernels.attention.num_splits`)."""
_PROBE_PARAMS = RowParams(temperature=1.0, top_k=8, top_p=0.9, min_p=0.01, seed=0, sequence_index=0)


class ModelRunner:
    """Computes the steps of one rank. Every rank of a group makes the same calls in the same order.

    Args:
        config: resolved.
        device: where model and cache live; the number of threads is the caller's business.
        communicator: this rank's.

    Attributes:
        all_logits: whether `compute_logits` returns the logits of rows of which only the argmax is needed, too. A
            group of several ranks leaves those on the ranks where they are; the attribute is the same on all ranks.
    """

    def __init__(self, config: EngineConfig, device: torch.device, communicator: Communicator) -> None:
        self._config = config
        self._device = device
        self._staging = Staging(device)
        self._communicator = communicator
        self.all_logits = communicator.world_size == 1
        self._dtype = resolve_dtype(config, device)
        self._model: Decoder | None = None
        self._kv_caches: list[torch.Tensor] = []
        self._host_cache: torch.Tensor | None = None
        self._batch: InputBatch | None = None
        self._graphs: DecodeGraphs | None = None
        self._use_kernel = False
        # Rank 0 only: what the last step sampled, for rows of the next step that say PREVIOUS_SAMPLE: where a
        # sequence's token stands in the ids, which may still be under way on the device.
        self._previous: dict[int, int] = {}
        self._previous_ids = SampledIds.none()
        # Rank 0 only: what the outputs' grammars allow, computed beside the forward pass.
        self._grammars = GrammarMatchers(config, torch.get_num_threads()) if communicator.rank == 0 else None
        self._masks: Future[BoolArray] | None = None

    @property
    def dtype_name(self) -> str:
        """Type of weights, activations and K/V, e.g. `bfloat16`."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def model(self) -> Decoder:
        """The decoder, after `load_model`."""
        assert self._model is not None, "load_model() comes first"
        return self._model

    def load_model(self) -> None:
        """Load this rank's share of the weights.

        Raises:
            CheckpointError: the checkpoint is incomplete, misshapen or of a refused format.
            CapacityError: the GPU has not enough memory for it.
        """
        if self._grammars is not None:
            self._grammars.load()
        what = f"this rank's share of {self._config.model.model} as {self.dtype_name}"
        with explained(self._device, what, "use more ranks (--tp) or a smaller dtype"):
            self._model = ModelLoader(self._config).load_model(self._device, self._communicator, self._dtype)
        self._use_kernel = self._spec().backend.uses_triton

    def max_kv_blocks(self) -> int:
        """How many K/V blocks this rank can hold; on a GPU this runs the largest step to see what it leaves.

        Raises:
            CapacityError: more is asked for than there is, or not even one sequence fits.
        """
        if self._device.type != "cuda":
            return max_kv_blocks(self._config, self._spec(), False, free_host_memory)
        config = self._config
        num_sharing = -(-self._communicator.world_size // torch.cuda.device_count())
        what = f"a step of max_num_batched_tokens {config.scheduler.max_num_batched_tokens}"
        with explained(self._device, what, "lower --max-num-batched-tokens or --max-num-seqs, or use more ranks"):
            free = free_gpu_memory(
                self._device,
                config.cache.gpu_memory_utilization,
                self._run_largest_step,
                num_sharing,
                self._communicator.barrier,
            )
        return max_kv_blocks(config, self._spec(), True, lambda: free)

    def max_host_blocks(self) -> int:
        """How many K/V blocks this rank's swap space holds.

        Raises:
            CapacityError: the host has not that much memory.
        """
        return max_host_blocks(self._config, self._spec(), free_host_memory)

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        """Make the cache, of as many blocks as all ranks agreed on, and forget every row.

        Raises:
            CapacityError: the memory is not there after all.
        """
        self._kv_caches = self._spec().allocate(num_blocks, self._device)
        self._host_cache = self._spec().allocate_host(num_host_blocks, self._device)
        self._graphs = None  # they hold the old cache
        self.forget_rows()

    def forget_rows(self) -> None:
        """Go on as after `allocate`, on the same cache: whatever a step that broke off has left is dropped."""
        self._batch = self._make_batch(len(self._kv_caches[0]))
        self._previous = {}
        masks, self._masks = self._masks, None
        if masks is not None and not masks.cancel():
            wait([masks])  # it is at work on matchers of rows that were dropped
        if self._grammars is not None:
            self._grammars.forget_failures()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # perhaps there was memory, in pieces

    def warm_up(self) -> None:
        """Run one small prefill and one decode through model and sampler, so that no request waits for first calls.

        Leaves no row; what it wrote into the cache, nobody reads. On a GPU decode batches are captured then, and
        whatever other kernels a step may launch are compiled.
        """
        config = self._config
        room = min(config.max_model_len, len(self._kv_caches[0]) * config.cache.block_size)
        length = min(4, config.scheduler.max_num_batched_tokens, max(1, room - 1))
        blocks = list(range(-(-min(length + 1, room) // config.cache.block_size)))
        prompt = SequenceState(-1, [0] * length, 0, blocks, True, length, _PROBE_PARAMS)
        self.execute(StepInput(_PROBE_EPOCH, 1, [], [prompt], []))
        if length < room:
            decode = SequenceState(-1, [PREVIOUS_SAMPLE], length, [], True)
            self.execute(StepInput(_PROBE_EPOCH, 2, [], [decode], []))
        self.execute(StepInput(_PROBE_EPOCH, 3, [], [], [-1]))
        if self._device.type == "cuda":
            self.warm_up_mixed()
        capturable = self._spec().backend.capturable and self._communicator.capturable
        if self._device.type == "cuda" and capturable and not config.model.enforce_eager:
            self.capture_graphs()

    def warm_up_mixed(self) -> None:
        """Run decodes of few keys and of many, beside prompts and alone: other kernels take these. Leaves no row."""
        config, block_size = self._config, self._config.cache.block_size
        most = min(config.max_model_len, config.scheduler.max_num_batched_tokens, len(self._kv_caches[0]) * block_size)
        if most < _MANY_KEYS + 2 or config.scheduler.max_num_seqs < 2:
            return
        lengths = {-2: 4, -3: _MANY_KEYS, -4: 4}
        blocks = list(range(-(-(_MANY_KEYS + 2) // block_size)))  # of all of them: what is computed does not matter
        before: list[SequenceState] = []
        for number, (seq_id, length) in enumerate(lengths.items(), start=4):
            prompt = SequenceState(seq_id, [0] * length, 0, blocks, True, length, _PROBE_PARAMS)
            self.execute(StepInput(_PROBE_EPOCH, number, [], [*before, prompt], []))
            before = [SequenceState(seq_id, [PREVIOUS_SAMPLE], length, [], True)]
        alone = SequenceState(-3, [PREVIOUS_SAMPLE], _MANY_KEYS + 1, [], True)
        self.execute(StepInput(_PROBE_EPOCH, 7, [], [alone], []))
        self.execute(StepInput(_PROBE_EPOCH, 8, [], [], list(lengths)))

    @torch.inference_mode()
    def capture_graphs(self, record: Recorder | None = None) -> None:
        """Capture the forward passes of decode batches, for the cache as it is. Every rank must call it together.

        Args:
            record: how; by default as CUDA graphs.
        """
        graphs = DecodeGraphs(
            self._compute_hidden,
            self._config.scheduler.max_num_seqs,
            self._config.max_model_len,
            self._config.cache.block_size,
            self._device,
            record,
        )
        graphs.capture()
        self._graphs = graphs

    def execute(self, step: StepInput) -> StepOutput | None:
        """Compute a step and, on rank 0, sample.

        Returns:
            Rank 0: for each row the ids it sampled, in order. None on the other ranks.

        Raises:
            EngineError: the step does not continue what this rank knows.
        """
        return self.launch(step).finish()

    def launch(self, step: StepInput) -> LaunchedStep:
        """Like `execute`, but on a GPU the ids may be under way still: the next step can be launched before `finish`.

        The ids of its rows that go on from this step are taken on the device.
        """
        began = time.perf_counter()
        batch, logits = self.compute_logits(step)
        if self._communicator.rank != 0:
            return LaunchedStep(step, began)
        self._previous = {}
        if batch is None:
            return LaunchedStep(step, began, SampledIds.none())
        ids, logprobs, errors = _sample(logits, batch, self._constrain, self._use_kernel)
        # The next step may hold a row behind one that failed; it goes on with any token, to no avail.
        self._previous = {batch.seq_ids[row]: at for at, row in enumerate(batch.sampled)}
        self._previous_ids = SampledIds(ids)
        return LaunchedStep(step, began, self._previous_ids, batch, logprobs, errors)

    @torch.inference_mode()
    def compute_logits(self, step: StepInput) -> tuple[Batch | None, torch.Tensor | None]:
        """The first half of `execute`: everything but sampling.

        Returns:
            The batch, None when no row is scheduled, and on rank 0 the (batch.num_logits, vocab_size) float32 logits
            of the rows that need them, None when there are none.
        """
        assert self._batch is not None, "allocate() comes first"
        if step.copies:
            copy_blocks(self._kv_caches, step.copies, self._host_cache)
        batch = self._batch.apply(step, self.all_logits)
        if batch is None:
            return None, None
        if batch.previous:
            self._fill_previous(batch, self._batch)
        if self._grammars is not None and batch.processors:
            rows = [each.matcher for _, _, each in batch.processors if each.matcher is not None]
            self._masks = self._grammars.start_masks(rows)
        return batch, self._forward(batch, self._kv_caches)

    def _forward(self, batch: Batch, kv_caches: list[torch.Tensor]) -> torch.Tensor | None:
        hidden = None if self._graphs is None else self._graphs.run(batch)
        if hidden is None:
            hidden = self._compute_hidden(batch.input_ids, batch.positions, batch.metadata, kv_caches)
        if batch.prompt_spans:
            vocab_size = self._config.resolved_checkpoint.vocab_size
            batch.prompt_logprobs = tell_prompts(self.model.compute_logits, hidden, batch.prompt_spans, vocab_size)
        if not batch.sampled:
            return None
        rows = hidden.index_select(0, batch.logits_rows)
        logits: torch.Tensor | None
        logits, batch.argmax_ids = self.model.compute_logits_and_argmax(rows, batch.num_logits)
        return logits

    def _compute_hidden(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_caches: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(num_tokens, hidden_size); on the cache, unless another one is given."""
        with forward_context(ForwardContext(metadata, self._kv_caches if kv_caches is None else kv_caches)):
            hidden: torch.Tensor = self.model(input_ids, positions)
        return hidden

    def _fill_previous(self, batch: Batch, rows: InputBatch) -> None:
        """Put in the ids that the step before sampled. Every rank sees from the step that rank 0 will send them."""
        places = np.array([token for token, _ in batch.previous], dtype=np.int64)
        if self._communicator.rank == 0:
            unknown = [seq_id for _, seq_id in batch.previous if seq_id not in self._previous]
            if unknown:
                raise EngineError(f"sequence {unknown[0]} continues a sample that the step before did not make")
            sources = np.array([self._previous[seq_id] for _, seq_id in batch.previous], dtype=np.int64)
            to, taken = self._staging.send((places, sources))
            sampled = self._previous_ids.on_device.index_select(0, taken)
            for (_, seq_id), at in zip(batch.previous, sources.tolist(), strict=True):
                if rows.observes(seq_id):  # only these wait for the device
                    rows.observe_previous(seq_id, self._previous_ids.on_host[at])
        else:
            (to,) = self._staging.send((places,))
            sampled = torch.zeros_like(to)
        batch.input_ids.index_copy_(0, to, self._communicator.broadcast(sampled, source=0))

    def _constrain(self, logits: torch.Tensor, batch: Batch) -> dict[int, dict[str, Any]]:
        """Keep the rows that have a grammar to it; returns the errors of those that failed, by row of the logits."""
        masks, self._masks = self._masks, None
        if masks is None:
            return {}
        rows = [row for row in batch.processors if row[2].matcher is not None]
        return constrain(logits, rows, masks.result(), self._config.resolved_checkpoint.eos_token_ids)

    def _spec(self) -> KVCacheSpec:
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        return KVCacheSpec(
            backend=layers[0].backend,
            num_layers=len(layers),
            block_size=self._config.cache.block_size,
            num_kv_heads=layers[0].num_kv_heads,
            head_dim=layers[0].head_dim,
            dtype=self._dtype,
        )

    def _make_batch(self, num_blocks: int) -> InputBatch:
        config = self._config
        vocab_size = config.resolved_checkpoint.vocab_size
        return InputBatch(
            num_blocks,
            config.cache.block_size,
            config.max_model_len,
            vocab_size,
            self._device,
            samples=self._communicator.rank == 0,
            grammars=self._grammars,
        )

    @torch.inference_mode()
    def _run_largest_step(self) -> None:
        """As many tokens and sampling rows as a step may hold, all of them in one block, so that no cache is needed."""
        scheduler, block_size = self._config.scheduler, self._config.cache.block_size
        left = scheduler.max_num_batched_tokens
        num_rows = min(scheduler.max_num_seqs, left)
        rows = []
        for i in range(num_rows):
            length = min(self._config.max_model_len, left - (num_rows - 1 - i))
            blocks = [0] * -(-length // block_size)
            rows.append(SequenceState(i, [0] * length, 0, blocks, True, length, _PROBE_PARAMS))
            left -= length
        batch = self._make_batch(1).apply(StepInput(_PROBE_EPOCH, 1, [], rows, []))
        assert batch is not None
        logits = self._forward(batch, self._spec().allocate(1, self._device))
        if logits is not None:
            launch_sample(logits, batch.sampling, self._use_kernel)


@torch.inference_mode()
def _sample(
    logits: torch.Tensor | None,
    batch: Batch,
    keep_to_grammars: Callable[[torch.Tensor, Batch], dict[int, dict[str, Any]]],
    use_kernel: bool,
) -> tuple[torch.Tensor, dict[int, list[TokenLogprobs]], dict[int, dict[str, Any]]]:
    """A token for each of `batch.sampled`; log-probabilities, of the untouched logits, and errors by row of the step.

    The token of a row that has an error is any.
    """
    argmax_ids = batch.argmax_ids
    if logits is None:
        return torch.zeros(0, dtype=torch.int64) if argmax_ids is None else argmax_ids, {}, {}
    if not batch.processors:
        return _joined(launch_sample(logits, batch.sampling, use_kernel), argmax_ids), {}, {}
    asked = [(row, each.extras.num_logprobs) for row, _, each in batch.processors if each.extras.num_logprobs >= 0]
    raw = log_probabilities(logits, [row for row, _ in asked]) if asked else None
    process(logits, batch.processors)
    failed = keep_to_grammars(logits, batch)
    ids = _joined(launch_sample(logits, batch.sampling, use_kernel), argmax_ids)
    errors = {batch.sampled[row]: error for row, error in failed.items()}
    if raw is None:
        return ids, {}, errors
    on_host = ids.tolist()
    told = token_logprobs(raw, [on_host[row] for row, _ in asked], [number for _, number in asked])
    entries = {batch.sampled[row]: [entry] for (row, _), entry in zip(asked, told, strict=True) if row not in failed}
    return ids, entries, errors


def _joined(ids: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
    return ids if more is None else torch.cat((ids, more))
