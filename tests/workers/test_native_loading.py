"""Weights that are packed as they are loaded, against the same ones loaded plain and packed whole: bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from tests.workers.ranks import run_ranks
from workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from workers.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from workers.layers.parameter import ShardedParameter
from workers.native import NativeKernels, NativeLinear
from workers.native.kernels import LinearKind
from workers.parallel import Communicator

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16
Maker = Callable[[Communicator, NativeKernels | None], LinearBase]


class Source:
    """A tensor that is read in views of it, as from a mapped file, and in any dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self._tensor = (
            shape,
            torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype),
        )

    def read(self, dim: int, start: int, size: int) -> torch.Tensor:
        return self._tensor.narrow(dim, start, size)


def fill(parameter: ShardedParameter | None, dtype: torch.dtype) -> ShardedParameter:
    assert parameter is not None
    for name, shard in parameter.shards.items():
        parameter.load(name, Source(shard.shape, dtype))
    return parameter


def whole(native: NativeKernels, weight: torch.Tensor, kind: LinearKind) -> NativeLinear:
    linear = NativeLinear(native, *weight.shape, kind)
    linear.put(weight, 0)
    return linear


def qkv(num_kv_heads: int, head_dim: int) -> Maker:
    return lambda group, native: QKVParallelLinear(64, 8, num_kv_heads, head_dim, False, group, BFLOAT16, CPU, native)


def gate_up(size: int) -> Maker:
    return lambda group, native: MergedColumnParallelLinear(
        96, size, ("gate", "up"), False, group, BFLOAT16, CPU, native, "swiglu"
    )


def head(vocab_size: int) -> Maker:
    return lambda group, native: ParallelLMHead(vocab_size, 64, group, BFLOAT16, CPU, native=native)


def down(group: Communicator, native: NativeKernels | None) -> LinearBase:
    return RowParallelLinear(256, 50, False, group, BFLOAT16, CPU, native)


MAKERS: dict[str, tuple[Maker, LinearKind]] = {
    "qkv": (qkv(8, 32), "narrow"),
    "qkv of odd heads, replicated": (qkv(2, 13), "narrow"),
    "gate and up": (gate_up(64), "swiglu"),
    "gate and up of odd sizes": (gate_up(132), "swiglu"),
    "rows": (down, "narrow"),
    "a head": (head(263), "wide"),
    "a head of padding": (head(3), "wide"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", MAKERS)
def test_a_weight_differs_that_was_never_plain(
    native: NativeKernels, name: str, world_size: int, dtype: torch.dtype
) -> None:
    make, kind = MAKERS[name]

    def compare(group: Communicator) -> bool:
        layer, plain = make(group, native), make(group, None)
        fill(layer.weight, dtype)
        kernel, wanted = layer.kernel, whole(native, fill(plain.weight, dtype).data, kind)
        assert isinstance(kernel, NativeLinear)
        layer.finish_loading()
        assert layer.kernel is kernel
        assert not list(layer.parameters())
        return torch.equal(kernel._packed.view(torch.int16), wanted._packed.view(torch.int16))

    assert all(run_ranks(world_size, compare))


@pytest.mark.parametrize("pieces", [(50,), (1, 15, 17, 17), (32, 18), (49, 1)], ids=str)
@pytest.mark.parametrize("kind", ["narrow", "wide", "swiglu"])
def test_the_pieces_in_which_a_weight_comes_show(
    native: NativeKernels, kind: LinearKind, pieces: Sequence[int]
) -> None:
    weight = torch.randn(50, 160).to(BFLOAT16)
    wanted = whole(native, weight, kind)
    for wide in (weight, weight.repeat(1, 3)[:, 160:320], weight.T.contiguous().T, weight.float()):
        linear, start = NativeLinear(native, 50, 160, kind), 0
        linear._packed[: -32 * 160].fill_(torch.nan)
        for piece in reversed(torch.split(wide, list(pieces))):
            start += len(piece)
            linear.put(piece, 50 - start)
        assert torch.equal(linear._packed, wanted._packed)


def test_a_row_that_is_looked_up_is_another(native: NativeKernels) -> None:
    weight = torch.randn(263, 96).to(BFLOAT16)
    linear = whole(native, weight, "wide")
    ids = torch.cat((torch.arange(263).flip(0), torch.tensor([0, 262, 5, 5])))
    assert torch.equal(linear.rows(ids), weight[ids])
    assert torch.equal(linear.rows(ids[::7]), weight[ids[::7]])
    assert linear.rows(ids[:0]).shape == (0, 96)
    for wrong in (-1, 263):
        with pytest.raises(IndexError, match=r"not in \[0, 263\)"):
            linear.rows(torch.tensor([0, wrong]))


@pytest.mark.parametrize(("vocab_size", "world_size"), [(263, 1), (263, 2), (263, 4), (3, 4)])
def test_a_tied_table_lies_in_memory_twice_or_is_misread(
    native: NativeKernels, vocab_size: int, world_size: int
) -> None:
    source, other = Source((vocab_size, 64), torch.float32), Source((vocab_size, 64), torch.float32)
    other._tensor[-1, 63] += 1
    ids, hidden = torch.arange(vocab_size), torch.randn(5, 64).to(BFLOAT16)

    def compute(group: Communicator) -> tuple[torch.Tensor, torch.Tensor | None, bool, bool]:
        embedding = VocabParallelEmbedding(vocab_size, 64, group, BFLOAT16, CPU, native)
        tied = ParallelLMHead(vocab_size, 64, group, BFLOAT16, CPU, embedding, native)
        own = ParallelLMHead(vocab_size, 64, group, BFLOAT16, CPU, native=native)
        assert embedding.weight.device.type == "meta"
        embedding.weight.load("", source)
        assert own.weight is not None
        own.weight.load("", source)
        equal, unequal = (embedding.weight.holds("", tensor) for tensor in (source, other))
        for layer in (tied, own):
            layer.finish_loading()
        assert tied.kernel is embedding.packed
        logits, wanted = tied.compute_logits(hidden), own.compute_logits(hidden)
        assert (logits is None and wanted is None) or torch.equal(logits, wanted)  # type: ignore[arg-type]
        return embedding(ids), logits, equal, unequal

    results = run_ranks(world_size, compute)
    assert all(equal for *_, equal, _ in results)
    assert not all(unequal for *_, unequal in results)
    for embedded, _, _, _ in results:
        assert torch.equal(embedded, source._tensor.to(BFLOAT16))
