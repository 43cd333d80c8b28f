"""Attention by other libraries, through plain twins of their functions (tests/workers/fake_libraries.py).

What is compared is ours: what they are handed, of whatever batch. That they compute what their twins do, a GPU shows.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from nanoengine.step import RowParams, SequenceState
from tests.workers.attention_batches import Sequences, random_chunks, slots
from tests.workers.fake_libraries import install_flash_attn, install_flashinfer, pretend_gpu, torch_varlen_on_cpu
from tests.workers.kernels.inputs import DEVICE, TOLERANCE
from tests.workers.test_cuda_graph import call_again
from tests.workers.test_model_runner import Steps, make_config, tokens
from tests.workers.tiny_models import make_tiny_checkpoint
from workers.attention import get_backend
from workers.attention.flashinfer_backend import FlashInferBackend
from workers.attention.library_backend import LibraryBackend
from workers.model_runner import ModelRunner
from workers.parallel import SingleCommunicator

CPU = torch.device("cpu")
GREEDY = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
LIBRARIES = ("flash_attn", "flashinfer", "torch_varlen")
BLOCK_SIZE, NUM_BLOCKS = 256, 12

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda",
    reason="there the libraries themselves are tested (tests/gpu)",
)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All three there, on a device that counts as a GPU."""
    pretend_gpu(monkeypatch)
    install_flash_attn(monkeypatch)
    install_flashinfer(monkeypatch)
    with torch_varlen_on_cpu():
        yield


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", LIBRARIES)
def test_mixed_batches_equal_the_plain_twin(name: str, seed: int) -> None:
    """Decodes and chunks in any mixture, then decodes alone; slots that hold no token are NaN."""
    rng = random.Random(f"{name} {seed}")
    backend = get_backend(name, CPU)
    assert isinstance(backend, LibraryBackend)
    num_kv_heads, group = rng.choice([(1, 1), (2, 1), (2, 2), (1, 7), (2, 4), (1, 20)])
    lengths = [rng.choice([1, 2, 255, 256, 257, rng.randint(1, 600)]) for _ in range(rng.randint(1, 5))]
    head_dim = rng.choice([size for size in (8, 64, 80, 128, 256) if size in backend.head_dims])
    block_size = rng.choice([256, 512] if backend.block_multiple == 256 else [1, 16, 17, 64, 256])
    dtype = rng.choice([torch.float16, torch.bfloat16])
    backend.check(block_size, head_dim, dtype)
    shape = lengths, num_kv_heads, group, head_dim, block_size, dtype, seed
    made, twin = Sequences.make(*shape, backend=backend), Sequences.make(*shape)
    decodes = [(seq, length - 1, length) for seq, length in enumerate(lengths)]
    for chunks in (random_chunks(lengths, rng), decodes, random_chunks(lengths, rng)):
        for out, wanted in zip(made.attend(chunks), twin.attend(chunks), strict=True):
            assert out.dtype == dtype
            torch.testing.assert_close(out, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def make_runner(path: Path, name: str) -> ModelRunner:
    """Decodes are captured where the backend can be, and replayed by computing them again."""
    settings = {"attention_backend": name, "block_size": BLOCK_SIZE, "num_kv_blocks": NUM_BLOCKS, "max_num_seqs": 2}
    runner = ModelRunner(make_config(path, "float16", **settings), CPU, SingleCommunicator())
    runner.load_model()
    runner.allocate(NUM_BLOCKS)
    if runner._spec().backend.capturable:
        runner.capture_graphs(call_again)
    return runner


def logits_of_steps(runner: ModelRunner) -> list[torch.Tensor]:
    """A sequence of which 245 tokens are cached, one that is new; decodes that cross from a block to the next."""
    backend, generator = runner._spec().backend, torch.Generator().manual_seed(0)
    for cache in runner._kv_caches:
        k, v = (torch.randn(245, 2, 64, generator=generator).half() for _ in range(2))
        backend.store(cache, k, v, slots([7, 2], 0, 245, BLOCK_SIZE))
    ids, blocks, computed = {0: tokens(260), 1: tokens(30, 1)}, {0: [7, 2], 1: [5]}, {0: 245, 1: 0}
    steps, told, known = Steps(runner), [], set()
    for rows in ({0: 253}, {0: 254, 1: 6}, {1: 7, 0: 255}, {0: 256}, {1: 8, 0: 257}, {0: 258, 1: 9}, {1: 10}):
        states = []
        for seq_id, end in rows.items():
            first, computed[seq_id] = computed[seq_id], end
            table, params = ([], None) if seq_id in known else (blocks[seq_id], GREEDY)
            known.add(seq_id)
            states.append(SequenceState(seq_id, ids[seq_id][first:end], first, table, True, params=params))
        logits = steps.logits(*states)
        assert logits is not None
        told.append(logits)
    return told


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer would not show a plan that serves several."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3", **small)


@pytest.fixture(scope="module")
def plain_logits(checkpoint: Path) -> list[torch.Tensor]:
    return logits_of_steps(make_runner(checkpoint, "torch"))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", LIBRARIES)
def test_whole_models_equal_the_plain_backend(name: str, checkpoint: Path, plain_logits: list[torch.Tensor]) -> None:
    """Their attention between Triton's kernels: norms, rotation with the store into the same cache, SwiGLU.

    Captured decodes must see each step's numbers: a plan left over from the capture would have its lengths and blocks.
    """
    for logits, wanted in zip(logits_of_steps(make_runner(checkpoint, name)), plain_logits, strict=True):
        torch.testing.assert_close(logits, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("libraries")
def test_only_what_plans_on_the_host_is_not_captured() -> None:
    capturable = {name: get_backend(name, CPU).capturable for name in ("torch", "triton", *LIBRARIES)}
    assert [name for name, can in capturable.items() if not can] == ["torch", "flashinfer"]


@pytest.mark.usefixtures("libraries")
def test_flashinfer_plans_once_a_step_and_takes_turns() -> None:
    """A wrapper's plan may be on its way while the next step is planned, so that must not be the same wrapper's."""
    backend = FlashInferBackend(CPU)
    made = Sequences.make([40, 20], head_dim=64, dtype=torch.float16, backend=backend)
    waited: list[int] = []
    decodes, mixed = [(0, 39, 40), (1, 19, 20)], [(0, 3, 40), (1, 19, 20)]
    for step, chunks in enumerate((decodes, mixed, decodes, mixed, decodes)):
        if step == 1:
            for number, turn in enumerate(backend._turns):
                turn.planned = FakeEvent(number, waited)  # type: ignore[assignment]
        metadata = made.metadata(chunks)
        q = torch.cat([made.q[seq][first:end] for seq, first, end in chunks])
        for _ in range(3):  # layers
            backend.forward(q, made.cache, metadata, made.scale)
    assert waited == [0, 1, 0, 1]  # the turn before began with 1
    plans = [(turn.decode.plans, turn.prefill.plans) for turn in backend._turns]
    assert plans == [(0, 2), (3, 0)]
    assert [(turn.decode.runs, turn.prefill.runs) for turn in backend._turns] == [(0, 6), (9, 0)]


class FakeEvent:
    """Notes who waited for it; recorded once more before each further wait."""

    def __init__(self, number: int, waited: list[int]) -> None:
        self._number, self._waited, self._recorded = number, waited, True

    def record(self) -> None:
        self._recorded = True

    def synchronize(self) -> None:
        assert self._recorded, "nothing was planned since"
        self._waited.append(self._number)
        self._recorded = False


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("flash_attn", (16, 64, torch.float16), "block_size must be a multiple of 256 .* flash_attn, got 16"),
        ("torch_varlen", (384, 64, torch.float16), "block_size must be a multiple of 256 .* torch_varlen, got 384"),
        ("flash_attn", (256, 64, torch.float32), "dtype must be float16 or bfloat16 .* flash_attn, got float32"),
        ("flashinfer", (16, 64, torch.float32), "dtype must be float16 or bfloat16 .* flashinfer, got float32"),
        ("torch_varlen", (256, 12, torch.float16), "heads of 8 to 256 in steps of 8, the model's have 12"),
        ("flash_attn", (256, 264, torch.float16), "heads of 8 to 256 in steps of 8, the model's have 264"),
        ("flashinfer", (16, 80, torch.bfloat16), "heads of 64, 128, 256, the model's have 80"),
    ],
)
def test_what_a_library_cannot_serve_is_refused(name: str, asked: tuple[int, int, torch.dtype], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_backend(name, CPU).check(*asked)


def test_a_model_is_refused_before_its_weights_are_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    install_flash_attn(monkeypatch)
    monkeypatch.setattr("workers.model_loader.open_weights", lambda path: pytest.fail("weights were opened"))
    settings = {"attention_backend": "flash_attn", "block_size": 16}
    runner = ModelRunner(make_config(checkpoint, "float16", **settings), CPU, SingleCommunicator())
    with pytest.raises(ConfigError, match="block_size must be a multiple of 256") as caught:
        runner.load_model()
    assert caught.value.field == "block_size"


@pytest.mark.parametrize("name", LIBRARIES)
def test_devices_without_kernels_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names what is needed, on a CPU and on a GPU that is too old."""
    with pytest.raises(ConfigError, match=f"{name} needs a GPU of compute capability 8.0 .* device is cpu; use"):
        get_backend(name, CPU)
    pretend_gpu(monkeypatch, (7, 5))
    with pytest.raises(ConfigError, match=r"device is cuda:0 of compute capability 7\.5; use"):
        get_backend(name, torch.device("cuda:0"))


def test_missing_and_old_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    for package in ("flash_attn", "flashinfer"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=f"attention_backend '{package}' is not available"):
            get_backend(package, CPU)
    install_flash_attn(monkeypatch, "2.5.9")
    with pytest.raises(ConfigError, match=r"flash_attn needs flash_attn 2\.6 or newer, installed is 2\.5\.9"):
        get_backend("flash_attn", CPU)
    install_flashinfer(monkeypatch, "0.0.0+unknown")
    with pytest.raises(ConfigError, match=r"flashinfer needs flashinfer 0.3 or newer, installed is 0.0.0\+unknown"):
        get_backend("flashinfer", CPU)
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    with pytest.raises(ConfigError, match=r"torch_varlen needs torch 2.13 or newer, installed is 2.12.1\+cu130"):
        get_backend("torch_varlen", CPU)


def test_a_library_that_fails_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a build without kernels for the device: known from the first two steps, before a model is loaded."""
    pretend_gpu(monkeypatch)
    install_flash_attn(monkeypatch)

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", fail)
    with pytest.raises(ConfigError, match=r"2\.8\.3\.post1.* fails on cpu: no kernel image is available"):
        get_backend("flash_attn", CPU).check(256, 64, torch.float16)
