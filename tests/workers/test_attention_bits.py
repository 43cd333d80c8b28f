"""Row-invariance of attention on CPU (DESIGN.md, 3.6): a token's bits depend on its own query and keys alone."""

from __future__ import annotations

import random

import pytest
import torch

from tests.workers.attention_batches import Sequences, random_chunks

LENGTHS = [1, 7, 64, 65, 130, 300, 577, 700]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "group", "threads"),
    [(16, 1, 1), (40, 3, 1), (64, 2, 2), (80, 7, 1), (128, 4, 1), (64, 40, 1), (192, 3, 1)],
)
def test_bits_do_not_depend_on_batch_or_chunk(dtype: torch.dtype, head_dim: int, group: int, threads: int) -> None:
    """Alone token by token, in chunks of every size, and mixed with other sequences: the same bits."""
    torch.set_num_threads(threads)
    rng = random.Random(f"{dtype} {head_dim} {group}")
    made = Sequences.make(LENGTHS, 2, group, head_dim, 16, dtype)
    for seq in (2, 5, 7) if group < 40 else (4,):
        length = LENGTHS[seq]
        (whole,) = made.attend([(seq, 0, length)])
        for p in {0, length - 1, *(rng.randrange(length) for _ in range(10))}:
            assert torch.equal(made.attend([(seq, p, p + 1)])[0], whole[p : p + 1]), (seq, p)
        for size in (7, 64, 100) if length < 500 else (150,):
            chunks = [(seq, first, min(first + size, length)) for first in range(0, length, size)]
            assert torch.equal(torch.cat([made.attend([chunk])[0] for chunk in chunks]), whole), (seq, size)
        for _ in range(2):
            chunks = random_chunks(LENGTHS, rng)
            for (which, first, end), out in zip(chunks, made.attend(chunks), strict=True):
                assert which != seq or torch.equal(out, whole[first:end]), chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_where_blocks_lie(dtype: torch.dtype) -> None:
    """Another block size or another table (a prefix hit, a resumed sequence): the same bits."""
    outs = []
    for block_size, lengths in ((16, [300]), (4, [300]), (5, [300, 90])):
        made = Sequences.make([300], 2, 2, 64, block_size, dtype)
        other = Sequences.make(lengths, 2, 2, 64, block_size, dtype, seed=1)
        other.q[0], table = made.q[0], other.tables[0]
        for p, (k, v) in enumerate(zip(made.k[0], made.v[0], strict=True)):
            slot = torch.tensor([table[p // block_size] * block_size + p % block_size])
            other.backend.store(other.cache, k[None], v[None], slot)
        outs.append(other.attend([(0, 250, 300)])[0])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """Ranks may be given fewer threads after a restart on a smaller machine."""
    made = Sequences.make(LENGTHS, 2, 2, 64, 16, dtype)
    chunks = [(seq, max(0, length - 40 * (seq % 2) - 1), length) for seq, length in enumerate(LENGTHS)]
    outs = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        outs.append(torch.cat(made.attend(chunks)))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(("head_dim", "group"), [(128, 32), (64, 2)])
def test_bits_of_a_lone_block_do_not_depend_on_threads(head_dim: int, group: int) -> None:
    """One decode with one K/V head is one matrix product, which the library would split over its threads."""
    made = Sequences.make([593], 1, group, head_dim)
    torch.set_num_threads(2)
    (whole,) = made.attend([(0, 0, 593)])
    for p in (0, 100, 592):
        assert torch.equal(made.attend([(0, p, p + 1)])[0], whole[p : p + 1])
