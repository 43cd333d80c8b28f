"""Batches of decodes through captured forward passes, on a GPU if there is one; else a capture is called again instead.

Everything but the capture itself is as on a GPU then: buffers that stay, rows that fill up, tables of any width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanoengine.step import PREVIOUS_SAMPLE, RowParams, SequenceState
from tests.workers.kernels.inputs import DEVICE
from tests.workers.test_model_runner import Steps, make_config, tokens
from tests.workers.tiny_models import make_tiny_checkpoint
from workers.cuda_graph import DecodeGraphs, sizes_to_capture
from workers.model_runner import ModelRunner
from workers.parallel import SingleCommunicator

CPU = torch.device("cpu")
GREEDY = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
BLOCK_SIZE, NUM_BLOCKS, MAX_SEQS = 16, 40, 4


def call_again(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """A recorder that replays by computing, into the tensor that the capture gave."""
    result = compute().clone()
    return lambda: result.copy_(compute()), result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 200}
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3", **small)


def make_runner(path: Path, capture: bool) -> ModelRunner:
    """Computes by Triton's kernels, on a cache full of NaN."""
    settings = {"attention_backend": "triton", "max_num_seqs": MAX_SEQS, "max_model_len": 120}
    config = make_config(path, num_kv_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, **settings)
    runner = ModelRunner(config, DEVICE, SingleCommunicator())
    runner.load_model()
    runner.allocate(NUM_BLOCKS)
    if capture:
        runner.capture_graphs(call_again if DEVICE == CPU else None)
    for cache in runner._kv_caches:
        cache.fill_(torch.nan)
    return runner


def prefill(seq_id: int, length: int, num_blocks: int) -> SequenceState:
    """A prompt whose blocks are its own, not in order, and enough for what follows."""
    blocks = [(7 * (seq_id + 4 * i) + 3) % NUM_BLOCKS for i in range(num_blocks)]
    return SequenceState(seq_id, tokens(length, seq_id), 0, blocks, True, params=GREEDY)


def decode(seq_id: int, computed: int) -> SequenceState:
    return SequenceState(seq_id, [PREVIOUS_SAMPLE], computed, [], True)


def test_sizes_rise_to_the_largest_batch() -> None:
    """Whatever max_num_seqs is, it is a size itself, and none is above it."""
    assert sizes_to_capture(1) == [1]
    assert sizes_to_capture(5) == [1, 2, 4, 5]
    assert sizes_to_capture(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert sizes_to_capture(256)[-3:] == [224, 240, 256]
    assert sizes_to_capture(65536)[-1] == 512


def test_captured_batches_compute_what_the_others_do(checkpoint: Path) -> None:
    """Batches that grow and shrink between sizes, with tables of other widths, on the same cache contents.

    Guards against stale rows and columns of a larger replay before (traps 41 and 42): a row that only fills up a
    batch must write nowhere, and the K/V of a sequence that paused meanwhile must stay as it was.
    """
    plain, captured = (Steps(make_runner(checkpoint, capture)) for capture in (False, True))
    lengths = {0: 15, 1: 16, 2: 33, 3: 3}
    rows = [prefill(seq_id, length, -(-(length + 8) // BLOCK_SIZE)) for seq_id, length in lengths.items()]
    assert plain.run(*rows) == captured.run(*rows)
    graphs = captured.runner._graphs
    assert graphs is not None
    assert graphs.sizes == [1, 2, 4]
    for together in ([2, 1, 0, 3], [3], [3, 1, 0], [1, 2]):
        outputs = []
        for steps in (plain, captured):
            # The token is given: a sequence that pauses is no sample of the step before.
            states = [SequenceState(i, [7 + i], lengths[i], [], True) for i in together]
            outputs.append(steps.logits(*states))
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
        for seq_id in together:
            lengths[seq_id] += 1
    for one, other in zip(plain.runner._kv_caches, captured.runner._kv_caches, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        torch.testing.assert_close(other.nan_to_num(), one.nan_to_num(), atol=1e-5, rtol=1e-5)


def test_ids_go_on_from_a_step_that_is_not_finished(checkpoint: Path) -> None:
    """The next step takes them where they were sampled, in the order of its own rows; the host asks later."""
    steps = Steps(make_runner(checkpoint, capture=True))
    wanted = Steps(make_runner(checkpoint, capture=False))
    prompts = [prefill(0, 9, 2), prefill(1, 20, 2)]
    first = steps.runner.launch(steps.step(*prompts))
    second = steps.runner.launch(steps.step(decode(1, 20), decode(0, 9)))
    third = steps.runner.launch(steps.step(decode(0, 10)))
    outputs = [launched.finish() for launched in (first, second, third)]
    assert [output.token_ids for output in outputs if output is not None] == [
        wanted.run(*prompts),
        wanted.run(decode(1, 20), decode(0, 9)),
        wanted.run(decode(0, 10)),
    ]


def test_prompts_and_mixed_batches_run_without_a_graph(checkpoint: Path) -> None:
    """Only batches of one token a row are captured; a chunk beside a decode must not be taken for two rows."""
    runner = make_runner(checkpoint, capture=True)
    steps = Steps(runner)
    steps.run(prefill(0, 9, 2))
    replayed = []
    assert runner._graphs is not None
    runner._graphs._graphs = {
        size: (lambda size=size: replayed.append(size), hidden) for size, (_, hidden) in runner._graphs._graphs.items()
    }
    steps.run(decode(0, 9), prefill(1, 3, 1))
    assert replayed == []
    steps.run(decode(0, 10), decode(1, 3), prefill(2, 1, 1))
    assert replayed == [4]


def test_memory_that_ends_leaves_what_is_captured(checkpoint: Path) -> None:
    """Graphs are for speed: a device without room for all of them serves all the same."""
    left = [2]

    def record(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("none left")
        return call_again(compute)

    graphs = DecodeGraphs(lambda ids, positions, metadata: ids[:, None].float(), 8, 64, 16, CPU, record)
    graphs.capture()
    assert graphs.sizes == [4, 8]
