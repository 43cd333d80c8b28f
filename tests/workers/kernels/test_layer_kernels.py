"""The kernels around attention against their plain twins: norms, SwiGLU, and rotation with the store of K and V."""

from __future__ import annotations

import random

import pytest
import torch

from tests.workers.kernels.inputs import DEVICE, DTYPES, assert_near
from workers.attention.base import AttentionBackend
from workers.attention.triton_backend import TritonBackend
from workers.kernels import activation, norm
from workers.layers import activation as plain_activation
from workers.layers import norm as plain_norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_residual_and_norm_equal_the_twin(dtype: torch.dtype, seed: int) -> None:
    """Sizes that are no power of two, rows that lie apart in a larger tensor, with and without a residual."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    num_rows, size = rng.randint(1, 9), rng.choice([1, 16, 100, 576, 1024, 1500])
    x = torch.randn(num_rows, size + 8, device=DEVICE).to(dtype)[:, :size]
    residual, weight = torch.randn(num_rows, size, device=DEVICE).to(dtype), torch.rand(size, device=DEVICE).to(dtype)
    for before in (None, residual):
        normalised, total = norm.add_rms_norm(x, before, weight, 1e-5)
        wanted, wanted_total = plain_norm.add_rms_norm(x, before, weight, 1e-5)
        assert_near(total, wanted_total)
        assert_near(normalised, plain_norm.rms_norm(total, weight, 1e-5))
        if dtype != torch.bfloat16:
            assert_near(normalised, wanted)


def test_norm_of_large_and_tiny_rows_does_not_overflow() -> None:
    """The mean of squares is taken in float32: 16-bit squares of 300 would be infinite, and those of 1e-4 zero."""
    weight = torch.ones(64, device=DEVICE, dtype=torch.float16)
    for value in (3e2, 3e-4):
        normalised, _ = norm.add_rms_norm(torch.full((1, 64), value, device=DEVICE).half(), None, weight, 1e-12)
        assert_near(normalised, torch.ones(1, 64).half())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 48, 1024, 1500])
def test_swiglu_equals_the_twin(dtype: torch.dtype, size: int) -> None:
    """Widths below, at and above the block; gates so large that exp overflows give what silu is there."""
    torch.manual_seed(size)
    gate_up = torch.randn(3, 2 * size, device=DEVICE).to(dtype)
    gate_up[0, 0], gate_up[1, 0] = 200.0, -200.0
    assert_near(activation.silu_and_mul(gate_up), plain_activation.silu_and_mul(gate_up.cpu()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (7, 1, 80), (3, 3, 96), (12, 2, 128)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotation_and_store_equal_the_twin(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, has_norm: bool
) -> None:
    """Also heads that are no power of two; K and V land in their slots, and those of slot -1 nowhere."""
    rng = random.Random(f"{dtype} {num_heads} {has_norm}")
    torch.manual_seed(rng.randrange(1000))
    backend = TritonBackend(DEVICE)
    num_tokens, num_blocks, block_size = rng.randint(3, 9), 5, rng.choice([16, 17, 32])
    heads = num_heads + 2 * num_kv_heads
    flat = torch.randn(num_tokens, heads * head_dim + 16, device=DEVICE).to(dtype)
    qkv = flat[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    angles = torch.randn(num_tokens, 2, head_dim // 2, device=DEVICE)
    cos, sin = angles.cos().unbind(1)
    weights = torch.rand(num_heads + num_kv_heads, head_dim, device=DEVICE).to(dtype)
    slots = torch.tensor(rng.sample(range(num_blocks * block_size), num_tokens), device=DEVICE)
    slots[1] = -1
    shape = backend.kv_cache_shape(num_blocks, block_size, num_kv_heads, head_dim)
    cache, wanted_cache = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    arguments = (qkv, num_heads, (cos[:, None], sin[:, None]), (weights, 1e-6) if has_norm else None, slots)
    q = backend.rotate_and_store(cache, *arguments)
    wanted = AttentionBackend.rotate_and_store(backend, wanted_cache, *arguments)
    # Products of two roundings: q and k are held to a bit of the head's largest element.
    scale = 1 / wanted.abs().amax()
    assert_near(q * scale, wanted * scale)
    assert torch.equal(cache.isnan(), wanted_cache.isnan())
    assert_near(cache[:, 0].nan_to_num() * scale, wanted_cache[:, 0].nan_to_num() * scale)
    assert torch.equal(cache[:, 1].nan_to_num(), wanted_cache[:, 1].nan_to_num())


def test_no_rows_are_no_launch() -> None:
    """A grid of size zero is an error of the driver."""
    assert norm.add_rms_norm(torch.zeros(0, 8, device=DEVICE), None, torch.ones(8, device=DEVICE), 1e-6)[0].numel() == 0
    assert activation.silu_and_mul(torch.zeros(0, 8, device=DEVICE)).shape == (0, 4)
