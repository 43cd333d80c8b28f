"""The compiled kernels against their plain twins, and row by row against themselves (DESIGN 3.6)."""

from __future__ import annotations

import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.workers.attention_batches import Sequences, random_chunks
from tests.workers.ranks import cancelling_pair
from workers.attention.native_backend import NativeBackend
from workers.layers.activation import silu_and_mul
from workers.layers.norm import rms_norm
from workers.layers.rotary import rotate
from workers.native import NativeKernels, NativeLinear
from workers.native.build import BuildError, build, default_cache, find_compiler
from workers.native.kernels import LinearKind

COUNTS = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 100, 257)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the order of additions: mostly to the last bit of bfloat16, and never by more than a few."""
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0.02, atol=0.02)
    assert ((found - wanted).float().abs().mean() / wanted.float().abs().mean()) < 2e-3


def packed(native: NativeKernels, weight: torch.Tensor, kind: LinearKind = "narrow") -> NativeLinear:
    linear = NativeLinear(native, *weight.shape, kind)
    linear.put(weight, 0)
    return linear


@pytest.mark.parametrize("kind", ["narrow", "wide", "swiglu"])
@pytest.mark.parametrize(("in_features", "out_features"), [(32, 2), (64, 34), (1024, 96), (3072, 130)])
def test_a_linear_maps_to_other_numbers(
    native: NativeKernels, in_features: int, out_features: int, kind: LinearKind
) -> None:
    generator = torch.Generator().manual_seed(in_features)
    x = torch.randn(49, in_features, generator=generator).bfloat16()
    weight = (torch.randn(out_features, in_features, generator=generator) / in_features**0.5).bfloat16()
    for bias in (None, torch.randn(out_features, generator=generator).bfloat16()):
        out = packed(native, weight, kind)(x, bias)
        wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        if kind == "swiglu":
            assert_close(out, silu_and_mul(wanted.float()))
        else:
            assert out.dtype == (torch.float32 if kind == "wide" else torch.bfloat16)
            assert_close(out, wanted.to(out.dtype))


@pytest.mark.parametrize("kind", ["narrow", "wide", "swiglu"])
@pytest.mark.parametrize("shape", [(256, 264), (768, 40), (4096, 64)], ids=str)
def test_a_rows_bits_depend_on_the_rows_beside_it(
    native: NativeKernels, shape: tuple[int, int], kind: LinearKind
) -> None:
    x, weight = cancelling_pair(*shape, max(COUNTS), torch.bfloat16)
    linear = packed(native, weight, kind)
    torch.set_num_threads(1)
    whole = linear(x, None)
    for count in COUNTS:
        torch.set_num_threads(1 + count % 3)
        for start in {0, (len(x) - count) // 3, len(x) - count}:
            assert torch.equal(linear(x[start : start + count], None), whole[start : start + count]), (count, start)


def test_a_rows_bits_depend_on_its_block(native: NativeKernels) -> None:
    """Rows that take more than one block, whose sums wait between parts of in_features, and go past the caches."""
    x, weight = cancelling_pair(768, 1024, 1100, torch.bfloat16)
    linear = packed(native, weight)
    torch.set_num_threads(1)
    whole = linear(x, None)
    torch.set_num_threads(2)
    assert torch.equal(linear(x, None), whole)
    for start, end in ((0, 1), (500, 533), (511, 513), (600, 700), (1090, 1100)):
        assert torch.equal(linear(x[start:end], None), whole[start:end]), (start, end)


@pytest.mark.parametrize("rows", [1, 16, 17, 40, 100, 700])
@pytest.mark.parametrize("kind", ["narrow", "swiglu"])
def test_rows_in_tiles_are_multiplied_otherwise(native: NativeKernels, kind: LinearKind, rows: int) -> None:
    """The layout in which kernels hand rows to a linear, and swiglu its results on; see IN_TILES in common.h."""
    x, weight = cancelling_pair(288, 192, rows, torch.bfloat16)
    linear = packed(native, weight, kind)
    wanted, padded = linear(x, None), -(-rows // 32) * 32
    tiles = torch.full((padded, 288), torch.nan, dtype=torch.bfloat16)  # rows beyond the last may hold anything
    tiles[:rows] = x
    tiles = tiles.view(padded // 16, 16, 288 // 32, 32).transpose(1, 2).contiguous()
    out = torch.full((padded, wanted.shape[1]), 7.0, dtype=torch.bfloat16)
    native.library.nano_linear(
        tiles.data_ptr(), linear.address, None, out.data_ptr(), rows, 192, 288, 0, wanted.shape[1],
        {"narrow": 0, "swiglu": 2}[kind], 1, 2,
    )  # fmt: skip
    if kind == "swiglu":
        out = out.view(padded // 16, 96 // 32, 16, 32).transpose(1, 2).reshape(padded, 96)
    assert torch.equal(out[:rows], wanted)
    assert bool((out[rows:] == 7.0).all())


def test_a_linear_reads_past_rows_that_are_strided(native: NativeKernels) -> None:
    wide, weight = torch.randn(40, 128).bfloat16(), torch.randn(48, 64).bfloat16()
    linear = packed(native, weight)
    assert torch.equal(linear(wide[:, 64:], None), linear(wide[:, 64:].contiguous(), None))
    assert torch.equal(linear(wide[:, ::2], None), linear(wide[:, ::2].contiguous(), None))
    assert linear(wide[:0, 64:], None).shape == (0, 48)


@pytest.mark.parametrize("size", [32, 100, 1024])
@pytest.mark.parametrize("rows", [1, 7, 600])
def test_a_norm_differs_from_its_twin(native: NativeKernels, rows: int, size: int) -> None:
    x, residual, weight = (torch.randn(shape).bfloat16() for shape in ((rows, size), (rows, size), (size,)))
    added = x + residual
    out, total = native.add_rms_norm(x.clone(), residual, weight, 1e-6)
    assert torch.equal(total, added)
    assert_close(out, rms_norm(added, weight, 1e-6))
    alone, same = native.add_rms_norm(x, None, weight, 1e-6)
    assert_close(alone, rms_norm(x, weight, 1e-6))
    assert same is x
    assert all(
        torch.equal(native.add_rms_norm(x[i : i + 1], None, weight, 1e-6)[0][0], alone[i]) for i in (0, rows - 1)
    )


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_heads_are_rotated_unlike_by_the_twin(native: NativeKernels, head_dim: int, with_norm: bool) -> None:
    num_tokens, num_heads = 150, 6
    qkv = torch.randn(num_tokens, num_heads + 2, head_dim).bfloat16()
    weight = torch.randn(num_heads, head_dim).bfloat16() if with_norm else None
    angles = torch.randn(num_tokens, 2, head_dim // 2)
    cos, sin = angles.cos().unbind(1)[0][:, None], angles.sin().unbind(1)[1][:, None]
    heads = qkv[:, :num_heads]
    wanted = rotate(heads if weight is None else rms_norm(heads, weight, 1e-6), cos, sin)
    found = qkv.clone()
    native.norm_rotate(found[:, :num_heads], weight, 1e-6, cos, sin)
    assert_close(found[:, :num_heads], wanted)
    assert torch.equal(found[:, num_heads:], qkv[:, num_heads:])
    alone = qkv[70:71].clone()
    native.norm_rotate(alone[:, :num_heads], weight, 1e-6, cos[70:71], sin[70:71])
    assert torch.equal(alone, found[70:71])


LENGTHS = [1, 7, 64, 65, 130, 300, 577, 1100]


@pytest.mark.parametrize(
    ("head_dim", "group", "block_size", "threads"),
    [
        (32, 1, 16, 1),
        (64, 2, 16, 2),
        (96, 7, 5, 1),
        (128, 4, 16, 3),
        (64, 40, 1, 1),
        (64, 16, 16, 2),
        (160, 3, 32, 2),
        (96, 6, 24, 1),
    ],
)
def test_attention_depends_on_batch_or_chunk(
    native: NativeKernels, head_dim: int, group: int, block_size: int, threads: int
) -> None:
    """Near the reference, and with the same bits alone token by token, in chunks, and mixed with other sequences."""
    torch.set_num_threads(threads)
    rng = random.Random(f"{head_dim} {group}")
    backend = NativeBackend(native)
    made = Sequences.make(LENGTHS, 2, group, head_dim, block_size, torch.bfloat16, backend=backend)
    for seq in (2, 5, 7) if group < 40 else (4,):
        length = LENGTHS[seq]
        (whole,) = made.attend([(seq, 0, length)])
        torch.testing.assert_close(whole.double(), made.reference(seq, 0, length), rtol=0.02, atol=0.02)
        for p in {0, length - 1, *(rng.randrange(length) for _ in range(10))}:
            assert torch.equal(made.attend([(seq, p, p + 1)])[0], whole[p : p + 1]), (seq, p)
        for size in (7, 100) if length < 500 else (150,):
            chunks = [(seq, first, min(first + size, length)) for first in range(0, length, size)]
            assert torch.equal(torch.cat([made.attend([chunk])[0] for chunk in chunks]), whole), (seq, size)
        for _ in range(2):
            chunks = random_chunks(LENGTHS, rng)
            for (which, first, end), out in zip(chunks, made.attend(chunks), strict=True):
                assert which != seq or torch.equal(out, whole[first:end]), chunks
    torch.set_num_threads(threads % 2 + 1)
    chunks = [(seq, max(0, length - 50), length) for seq, length in enumerate(LENGTHS)]
    outs = made.attend(chunks)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(outs, made.attend(chunks), strict=True))


def test_what_the_kernel_does_not_compute_is_computed_wrongly(native: NativeKernels) -> None:
    for head_dim, dtype in ((40, torch.bfloat16), (64, torch.float32)):
        backend = NativeBackend(native)
        backend.check(16, head_dim, dtype)
        made = Sequences.make([70, 9], 2, 2, head_dim, 16, dtype, backend=backend)
        for seq, out in enumerate(made.attend([(0, 60, 70), (1, 8, 9)])):
            end = len(made.q[seq])
            torch.testing.assert_close(out.double(), made.reference(seq, end - len(out), end), rtol=0.02, atol=0.02)


# -- building -------------------------------------------------------------------------------------------------------


def test_a_library_is_compiled_twice(native: NativeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build(tmp_path / "new" / "cache")
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert [*library.parent.iterdir()] == [library]
    before = library.stat().st_mtime_ns
    assert build(tmp_path / "new" / "cache") == library
    assert library.stat().st_mtime_ns == before


def test_code_that_others_may_have_written_is_loaded(native: NativeKernels, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(BuildError, match="can be written by, somebody else"):
        build(tmp_path)


def test_a_failing_or_missing_compiler_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "failing-cc"
    failing.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    failing.chmod(0o700)
    monkeypatch.setenv("CC", f"{failing} -O3")
    assert find_compiler() == [str(failing), "-O3"]
    with pytest.raises(BuildError, match="failed: no such header"):
        build(tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildError, match="there is no C compiler"):
        build(tmp_path / "cache")


def test_the_cache_ignores_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "nanoengine" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    assert default_cache() == Path.home() / ".cache" / "nanoengine" / "native"
