"""The steps that `sampling` times: a ModelRunner with invented logits or random weights, and the kinds of sampling.

Apart from the command because torch takes a second to import; knows nothing of how times are taken or shown.
"""

from __future__ import annotations

import dataclasses
import time

import torch

from configs.engine import EngineConfig
from nanoengine.step import Epoch, RowExtras, RowParams, SequenceState, StepInput, StepOutput
from workers.attention import get_backend
from workers.input_batch import Batch
from workers.model_loader import native_kernels
from workers.model_runner import ModelRunner
from workers.models.decoder import DecoderSpec
from workers.models.registry import get_model_class
from workers.parallel import SingleCommunicator

BLOCK_SIZE, CONTEXT = 16, 64
HISTORY = 1000
"""Distinct tokens that each row's penalties look at, half of them in its prompt."""

_PENALTIES = RowExtras(presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1)
_EPOCH = Epoch(1, 1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What every row of a step asks for."""

    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    extras: RowExtras | None = None


KINDS = (
    Kind("greedy", temperature=0.0),
    Kind("temperature"),
    Kind("top-k 50", top_k=50),
    Kind("top-p 0.9", top_p=0.9),
    Kind("top-k + top-p", top_k=50, top_p=0.9),
    Kind("top-k + top-p + min-p", top_k=50, top_p=0.9, min_p=0.05),
    Kind("penalties", temperature=0.0, extras=_PENALTIES),
    Kind("top-k + top-p + penalties", top_k=50, top_p=0.9, extras=_PENALTIES),
    Kind("logprobs 5", temperature=0.0, extras=RowExtras(num_logprobs=5)),
)


def set_num_threads(number: int | None) -> None:
    """Let torch compute with so many threads; None leaves it its own choice."""
    if number is not None:
        torch.set_num_threads(number)


class _Runner(ModelRunner):
    """A runner of `num_rows` sequences of every kind, each with `CONTEXT` tokens in the cache."""

    def __init__(self, config: EngineConfig, num_rows: int, num_steps: int) -> None:
        super().__init__(config, torch.device("cpu"), SingleCommunicator())
        self.num_rows = num_rows
        self.blocks_per_row = -(-(CONTEXT + num_steps) // BLOCK_SIZE)
        self._step_ids, self._lengths = 0, [CONTEXT] * len(KINDS)

    def prepare(self) -> None:
        """Whatever a step needs before its time is taken."""

    def step(self, number: int) -> tuple[float, float]:
        """One decode step of the rows of KINDS[number]; returns its seconds and its CPU seconds."""
        length = self._lengths[number]
        rows = [self._row(number, row, length) for row in range(self.num_rows)]
        self._lengths[number] += 1
        self._step_ids += 1
        step = StepInput(_EPOCH, self._step_ids, [], rows, [])
        self.prepare()
        began, began_cpu = time.perf_counter(), time.process_time()
        output = self.execute(step)
        seconds = time.perf_counter() - began, time.process_time() - began_cpu
        assert isinstance(output, StepOutput)
        assert all(len(ids) == 1 for ids in output.token_ids)
        return seconds

    def _row(self, number: int, row: int, length: int) -> SequenceState:
        seq_id = number * self.num_rows + row
        if length > CONTEXT:
            return SequenceState(seq_id, [1], length, [], True)
        kind, vocab_size = KINDS[number], self._config.resolved_checkpoint.vocab_size
        params = RowParams(kind.temperature, kind.top_k, kind.top_p, kind.min_p, row, 0)
        # All kinds write into the same blocks: what they hold makes no difference to the time that a step takes.
        blocks = [row * self.blocks_per_row + i for i in range(self.blocks_per_row)]
        past = [(row * 7919 + 31 * i) % vocab_size for i in range(HISTORY)]
        return SequenceState(seq_id, [1], CONTEXT, blocks, True, HISTORY // 2, params, kind.extras, past)


class InventedLogits(_Runner):
    """Gives every step the same logits in place of a model's."""

    def __init__(self, config: EngineConfig, num_rows: int, num_steps: int) -> None:
        super().__init__(config, num_rows, num_steps)
        shape = num_rows, config.resolved_checkpoint.vocab_size
        self._invented = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._invented = self._invented.bfloat16().float()
        self._logits = torch.empty_like(self._invented)
        self._batch = self._make_batch(num_rows * self.blocks_per_row)

    def prepare(self) -> None:
        """Undo what processors did to the logits."""
        self._logits.copy_(self._invented)

    def compute_logits(self, step: StepInput) -> tuple[Batch | None, torch.Tensor | None]:
        """See `ModelRunner.compute_logits`."""
        assert self._batch is not None
        return self._batch.apply(step), self._logits


class _Random:
    """A tensor of a checkpoint that does not exist."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator) -> None:
        self.shape, self._generator = shape, generator

    def read(self, dim: int, start: int, size: int) -> torch.Tensor:
        """See `TensorSource`; every reading gives other numbers."""
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        if len(shape) == 1:
            return torch.ones(shape)
        bound = (3 / self.shape[1]) ** 0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=self._generator)


class RandomModel(_Runner):
    """Computes with random weights, made in memory."""

    def __init__(self, config: EngineConfig, num_rows: int, num_steps: int) -> None:
        super().__init__(config, num_rows, num_steps)
        self.load_model()
        self.allocate(num_rows * self.blocks_per_row)

    def load_model(self) -> None:
        """Uniform weights, scaled by fan-in; norms are 1."""
        checkpoint = self._config.resolved_checkpoint
        native = native_kernels(self._config, self._device, self._dtype)
        spec = DecoderSpec(
            config=checkpoint,
            communicator=self._communicator,
            backend=get_backend(self._config.model.attention_backend, self._device, native),
            dtype=self._dtype,
            device=self._device,
            max_positions=self._config.max_model_len,
            native=native,
        )
        model = get_model_class(checkpoint.architecture)(spec)
        generator = torch.Generator().manual_seed(0)
        for parameter, name in model.checkpoint_parameters().values():
            parameter.load(name, _Random(parameter.shards[name].shape, generator))
        model.finish_loading()
        self._model = model.eval()
