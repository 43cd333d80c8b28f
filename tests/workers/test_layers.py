"""Norm, rotation, SwiGLU, embedding and head: numbers, bits across batch shapes, and what each rank holds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from configs.checkpoint import RopeConfig
from configs.errors import ConfigError
from tests.workers.ranks import run_ranks
from workers.layers.activation import silu_and_mul
from workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from workers.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from workers.layers.norm import rms_norm
from workers.layers.parameter import ShardedParameter
from workers.layers.rotary import RotaryEmbedding, rotate
from workers.parallel import Communicator, SingleCommunicator, divide, divide_kv_heads

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_ROWS = (1, 2, 3, 5, 8, 31, 33, 100, 257)
LLAMA3 = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)


class Whole:
    """A checkpoint tensor in memory; remembers the largest part that was read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.largest_read = tensor, tuple(tensor.shape), 0

    def read(self, dim: int, start: int, size: int) -> torch.Tensor:
        part = self.tensor.narrow(dim, start, size)
        self.largest_read = max(self.largest_read, part.numel())
        return part


def load(parameter: ShardedParameter | None, **tensors: torch.Tensor) -> None:
    assert parameter is not None
    for name, tensor in tensors.items():
        parameter.load("" if name == "own" else name, Whole(tensor))


# Rotary embedding


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (RopeConfig(1e6), {"rope_type": "default", "rope_theta": 1e6}),
        (RopeConfig(1e4, "linear", 4.0), {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        (
            LLAMA3,
            {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
    ids=["default", "linear", "llama3"],
)
def test_rope_is_right_at_16_tokens_and_wrong_at_100000(rope: RopeConfig, parameters: dict[str, object]) -> None:
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    positions = torch.tensor([0, 1, 15, 1000, 8191, 8192, 50000, 100000, 131071])
    q, k = torch.randn(1, 3, len(positions), 128), torch.randn(1, 2, len(positions), 128)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    wanted_q, wanted_k = apply_rotary_pos_emb(q, k, cos, sin)

    own_cos, own_sin = RotaryEmbedding(128, 131072, rope, CPU)(positions)
    assert own_cos.shape == own_sin.shape == (len(positions), 1, 64)
    torch.testing.assert_close(rotate(q[0].transpose(0, 1), own_cos, own_sin), wanted_q[0].transpose(0, 1))
    torch.testing.assert_close(rotate(k[0].transpose(0, 1), own_cos, own_sin), wanted_k[0].transpose(0, 1))


def test_rotation_in_bfloat16_loses_the_position() -> None:
    rotary = RotaryEmbedding(64, 4096, RopeConfig(1e4), CPU)
    cos, sin = rotary(torch.tensor([4001]))
    x = torch.randn(1, 1, 64).bfloat16()
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


# Bits across batch shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 72, 101, 512])
def test_a_tokens_bits_depend_on_its_place_in_the_batch(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(1000, 2 * width, generator=generator) * 3).to(dtype)
    weight = torch.randn(2 * width, generator=generator).to(dtype)
    cos, sin = RotaryEmbedding(2 * width, 1000, LLAMA3, CPU)(torch.arange(1000))
    functions = {
        "swiglu": lambda rows: silu_and_mul(x[rows]),
        "norm": lambda rows: rms_norm(x[rows], weight, 1e-6),
        "rotate": lambda rows: rotate(x[rows, None], cos[rows], sin[rows]),
    }
    for name, function in functions.items():
        whole = function(slice(0, 1000))
        for count in NUM_ROWS:
            for start in (0, (1000 - count) // 3, 1000 - count):
                rows = slice(start, start + count)
                assert torch.equal(function(rows), whole[rows]), f"{name}: {count} rows from {start}"


# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_rounds_elsewhere_than_the_original(dtype: torch.dtype) -> None:
    original = LlamaRMSNorm(96, 1e-5).to(dtype)
    torch.nn.init.normal_(original.weight)
    x = (torch.randn(5, 96) * 100).to(dtype)
    assert torch.equal(rms_norm(x, original.weight, 1e-5), original(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_is_wrong_or_overflows_at_the_ends(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 1e4]).to(dtype)
    up = torch.full_like(gate, 2.0)
    out = silu_and_mul(torch.cat((gate, up))[None])[0]
    torch.testing.assert_close(out, F.silu(gate.float()).to(dtype) * 2)


def test_swiglu_writes_to_its_input() -> None:
    gate_up = torch.randn(3, 8)
    before = gate_up.clone()
    silu_and_mul(gate_up)
    assert torch.equal(gate_up, before)


# Shares of the ranks


def test_a_dimension_that_cannot_be_split_is_split() -> None:
    assert divide(12, 4, "heads") == 3
    with pytest.raises(ConfigError, match=r"num_attention_heads \(6\) cannot be split over 4 ranks"):
        divide(6, 4, "num_attention_heads")
    with pytest.raises(ConfigError, match=r"num_key_value_heads \(3\) can neither be split nor replicated over 4"):
        divide_kv_heads(3, 0, 4)
    with pytest.raises(ConfigError, match=r"num_key_value_heads \(6\)"):
        divide_kv_heads(6, 0, 4)


@pytest.mark.parametrize(
    ("num_kv_heads", "world_size", "wanted"),
    [(8, 4, [(0, 2), (2, 2), (4, 2), (6, 2)]), (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]), (1, 2, [(0, 1), (0, 1)])],
)
def test_replicated_kv_heads_serve_the_wrong_query_heads(
    num_kv_heads: int, world_size: int, wanted: list[tuple[int, int]]
) -> None:
    assert [divide_kv_heads(num_kv_heads, rank, world_size) for rank in range(world_size)] == wanted

    num_heads, head_dim = 8, 4
    weights = {
        "q_proj": torch.arange(num_heads).repeat_interleave(head_dim)[:, None].float(),
        "k_proj": torch.arange(num_kv_heads).repeat_interleave(head_dim)[:, None].float(),
        "v_proj": 100 + torch.arange(num_kv_heads).repeat_interleave(head_dim)[:, None].float(),
    }

    def project(communicator: Communicator) -> list[tuple[int, int, int]]:
        layer = QKVParallelLinear(1, num_heads, num_kv_heads, head_dim, False, communicator, torch.float32, CPU)
        load(layer.weight, **weights)
        layer.finish_loading()
        heads, kv_heads = layer.num_heads, layer.num_kv_heads
        out = layer(torch.ones(1, 1)).view(heads + 2 * kv_heads, head_dim)[:, 0].int().tolist()
        # Query head i of the rank attends to its K/V head i // (heads / kv_heads).
        return [
            (out[i], out[heads + i * kv_heads // heads], out[heads + kv_heads + i * kv_heads // heads])
            for i in range(heads)
        ]

    triples = [triple for rank in run_ranks(world_size, project) for triple in rank]
    group = num_heads // num_kv_heads
    assert triples == [(head, head // group, 100 + head // group) for head in range(num_heads)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_row_parallel_bias_is_added_by_every_rank(world_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(24, 20, generator=generator), torch.randn(24, 20, generator=generator)
    down, bias = torch.randn(20, 24, generator=generator), torch.randn(20, generator=generator)
    x = torch.randn(9, 20, generator=generator)

    def compute(communicator: Communicator) -> torch.Tensor:
        up_layer = MergedColumnParallelLinear(20, 24, ("a", "b"), False, communicator, torch.float32, CPU)
        load(up_layer.weight, a=first, b=second)
        down_layer = RowParallelLinear(24, 20, True, communicator, torch.float32, CPU)
        load(down_layer.weight, own=down)
        load(down_layer.bias, own=bias)
        up_layer.finish_loading()
        down_layer.finish_loading()
        a, b = up_layer(x).chunk(2, -1)
        result: torch.Tensor = down_layer(a * b)
        return result

    wanted = F.linear(F.linear(x, first) * F.linear(x, second), down, bias)
    for result in run_ranks(world_size, compute):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("vocab_size", "world_size"), [(10, 1), (10, 4), (9, 4), (8, 4), (3, 4), (263, 2)])
def test_a_padded_id_can_be_looked_up_or_sampled(vocab_size: int, world_size: int, tied: bool) -> None:
    # All logits are negative but the padding's, which would be 0 and win.
    table, head = torch.rand(vocab_size, 6) + 0.5, -torch.rand(vocab_size, 6) - 0.5
    head = table if tied else head
    hidden = torch.rand(4, 6) * (-1 if tied else 1)
    ids = torch.arange(vocab_size)

    def compute(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor | None]:
        embedding = VocabParallelEmbedding(vocab_size, 6, communicator, torch.float32, CPU)
        lm_head = ParallelLMHead(vocab_size, 6, communicator, torch.float32, CPU, embedding if tied else None)
        load(embedding.weight, own=table)
        if not tied:
            assert lm_head.weight is not None
            load(lm_head.weight, own=head)
        lm_head.finish_loading()
        return embedding(ids), lm_head.compute_logits(hidden)

    for rank, (embedded, logits) in enumerate(run_ranks(world_size, compute)):
        assert torch.equal(embedded, table)
        assert (logits is None) == (rank > 0)
        if logits is not None:
            assert logits.shape == (4, vocab_size)
            assert logits.max() < 0
            torch.testing.assert_close(logits, hidden @ head.T)


class Counting:
    """A communicator that notes the elements of each tensor that goes into `gather`."""

    def __init__(self, communicator: Communicator) -> None:
        self.gathered: list[int] = []
        self._communicator = communicator

    def __getattr__(self, name: str) -> object:
        return getattr(self._communicator, name)

    def gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor | None:
        self.gathered.append(tensor.numel())
        return self._communicator.gather(tensor, dim)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [3, 9, 40, 263])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exchanged_pairs_choose_another_id_than_gathered_logits(
    dtype: torch.dtype, vocab_size: int, world_size: int
) -> None:
    """Small integers tie within a shard and across shards; all are negative, so that padding would win."""
    generator = torch.Generator().manual_seed(vocab_size)
    head = torch.randint(1, 4, (vocab_size, 6), generator=generator).to(dtype)
    hidden = -torch.randint(1, 3, (12, 6), generator=generator).to(dtype)
    hidden[3, 2] = torch.nan
    hidden[4] = -torch.inf

    def compute(communicator: Communicator) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        counting = Counting(communicator)
        lm_head = ParallelLMHead(vocab_size, 6, counting, dtype, CPU)  # type: ignore[arg-type]
        load(lm_head.weight, own=head)
        lm_head.finish_loading()
        found = [lm_head.compute_logits_and_argmax(hidden, number) for number in (12, 5, 0)]
        size = -(-vocab_size // world_size)
        assert counting.gathered == [12 * size, 5 * size, 7 * 2, 12 * 2]
        return found

    (all_logits, mixed, all_pairs), *others = run_ranks(world_size, compute)
    assert all(part == (None, None) for other in others for part in other)
    logits = all_logits[0]
    assert logits is not None
    expected = logits.argmax(-1)
    assert all_logits[1] is all_pairs[0] is None
    assert mixed[0] is not None
    assert torch.equal(mixed[0].nan_to_num(7), logits[:5].nan_to_num(7))
    assert mixed[1] is not None
    assert torch.equal(mixed[1], expected[5:])
    assert all_pairs[1] is not None
    assert torch.equal(all_pairs[1], expected)
    if vocab_size > 9:
        assert (logits == logits.amax(-1, keepdim=True)).sum(-1).max() > world_size, "nothing ties"


def test_a_tied_head_holds_a_second_table() -> None:
    embedding = VocabParallelEmbedding(12, 8, SingleCommunicator(), torch.float32, CPU)
    lm_head = ParallelLMHead(12, 8, SingleCommunicator(), torch.float32, CPU, embedding)
    assert lm_head.weight is embedding.weight
    load(embedding.weight, own=torch.randn(12, 8))
    lm_head.finish_loading()
    assert list(lm_head.parameters()) == []  # what is left is the packed form
    assert len(list(embedding.parameters())) == 1


def test_a_rank_reads_more_than_its_share() -> None:
    source = Whole(torch.randn(40, 12))

    def read(communicator: Communicator) -> None:
        column = MergedColumnParallelLinear(12, 40, ("w",), False, communicator, torch.float32, CPU)
        row = RowParallelLinear(12, 40, False, communicator, torch.float32, CPU)
        embedding = VocabParallelEmbedding(40, 12, communicator, torch.float32, CPU)
        assert column.weight is not None
        assert row.weight is not None
        column.weight.load("w", source)
        row.weight.load("", source)
        embedding.weight.load("", source)

    run_ranks(4, read)
    assert source.largest_read == 40 * 12 // 4
