"""Temperature, top-k, top-p, min-p and the draw, one program a row and without a sort; the twin is `workers.sampler`.

A threshold is found by bisection over the bits of what it bounds, which order as the numbers do. Each look over the
row also finds the nearest numbers on both sides of the middle, so that the search ends as soon as nothing lies between
its bounds: after some ten to twenty looks, whatever k and p are. Weights are integers, as in the twin, so that their
sums are exact in any order. A row's token depends on that row alone.

Where this chooses another token than the twin, the exponential functions of the two differ in a last bit; then the
uniform must fall between two sums that are equal but for that bit, which is a matter of 1e-6 of draws.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from workers.cpu_sampler import weight_scale
from workers.kernels import next_power_of_2
from workers.sampler import SamplingRows, uniforms

_BLOCK = 4096


@triton.jit
def _ordered_bits(x):
    """int32 numbers that order as float32 numbers do: both zeros are one, every NaN is above all."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, bits)


@triton.jit
def _logits(row, chunk, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    return tl.load(row + at, mask=at < VOCAB_SIZE, other=-float("inf")).to(tl.float32)


@triton.jit
def _scaled(x, highest, temperature, SCALE: tl.constexpr):
    """Unnormalised probabilities, the largest one being SCALE; padding and -inf have 0."""
    return tl.exp(tl.div_rn(x - highest, temperature)) * SCALE


@triton.jit
def _largest(row, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """The ordered bits of the largest logit, and the first place where it stands."""
    at = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -0x80000000, dtype=tl.int32)
    where = tl.zeros((BLOCK,), dtype=tl.int32)
    for chunk in range(CHUNKS):
        bits = _ordered_bits(_logits(row, chunk, VOCAB_SIZE, BLOCK))
        better = (bits > best) & (chunk * BLOCK + at < VOCAB_SIZE)
        best = tl.where(better, bits, best)
        where = tl.where(better, chunk * BLOCK + at, where)
    top = tl.max(best, axis=0)
    return top, tl.min(tl.where(best == top, where, 0x7FFFFFFF), axis=0)


@triton.jit
def _kth_largest(row, top, top_k, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """The ordered bits of the largest number that `top_k` logits reach; the least of all where all may stay."""
    # Bounds are int64 so that their sum cannot overflow.
    kth = tl.full((), -0x80000000, dtype=tl.int64)
    above = top.to(tl.int64) + 1
    if (top_k <= 0) | (top_k >= VOCAB_SIZE):
        above = kth + 1
    while above - kth > 1:
        middle = (kth + above) >> 1
        count = tl.zeros((BLOCK,), dtype=tl.int32)
        next_up = tl.full((BLOCK,), 0x7FFFFFFF, dtype=tl.int32)
        next_down = tl.full((BLOCK,), -0x80000000, dtype=tl.int32)
        for chunk in range(CHUNKS):
            bits = _ordered_bits(_logits(row, chunk, VOCAB_SIZE, BLOCK))
            reaches = bits >= middle.to(tl.int32)
            count += reaches.to(tl.int32)
            next_up = tl.minimum(next_up, tl.where(reaches, bits, 0x7FFFFFFF))
            next_down = tl.maximum(next_down, tl.where(reaches, -0x80000000, bits))
        if tl.sum(count, axis=0) >= top_k:
            kth = tl.min(next_up, axis=0).to(tl.int64)
        else:
            above = tl.max(next_down, axis=0).to(tl.int64) + 1
    return kth.to(tl.int32)


@triton.jit
def _least_in_top_p(
    row, highest, kth, temperature, top_p,
    VOCAB_SIZE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The largest weight such that those from it on up make a share `top_p` of what reaches `kth`, or 0."""
    low = tl.zeros((), dtype=tl.int32)  # positive floats order as their bits do
    if top_p < 1:
        sums = tl.zeros((BLOCK,), dtype=tl.int64)
        for chunk in range(CHUNKS):
            x = _logits(row, chunk, VOCAB_SIZE, BLOCK)
            weights = _scaled(x, highest, temperature, SCALE).to(tl.int64)
            sums += tl.where(_ordered_bits(x) >= kth, weights, 0)
        goal = top_p * tl.sum(sums, axis=0).to(tl.float64)
        high = tl.full((), SCALE, dtype=tl.float32).to(tl.int32, bitcast=True) + 1
        while high - low > 1:
            middle = low + ((high - low) >> 1)
            sums = tl.zeros((BLOCK,), dtype=tl.int64)
            next_up = tl.full((BLOCK,), 0x7FFFFFFF, dtype=tl.int32)
            next_down = tl.zeros((BLOCK,), dtype=tl.int32)
            for chunk in range(CHUNKS):
                x = _logits(row, chunk, VOCAB_SIZE, BLOCK)
                scaled = _scaled(x, highest, temperature, SCALE)
                scaled = tl.where(_ordered_bits(x) >= kth, scaled, 0.0)
                bits = scaled.to(tl.int32, bitcast=True)
                reaches = bits >= middle
                sums += tl.where(reaches, scaled, 0.0).to(tl.int64)
                next_up = tl.minimum(next_up, tl.where(reaches, bits, 0x7FFFFFFF))
                next_down = tl.maximum(next_down, tl.where(reaches, 0, bits))
            if tl.sum(sums, axis=0).to(tl.float64) >= goal:
                low = tl.min(next_up, axis=0)
            else:
                high = tl.max(next_down, axis=0) + 1
    return low.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def _kept_weights(
    row, chunk, highest, kth, threshold, least, temperature,
    VOCAB_SIZE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What may be drawn of a chunk, as integer weights; all else is 0."""
    x = _logits(row, chunk, VOCAB_SIZE, BLOCK)
    weights = _scaled(x, highest, temperature, SCALE).to(tl.int64)
    kept = (_ordered_bits(x) >= kth) & (weights >= threshold)
    return tl.where(kept & (tl.div_rn(x - highest, temperature) >= least), weights, 0)


@triton.jit
def _sample(
    logits, ids, temperatures, top_ks, top_ps, leasts, uniforms, row_stride,
    VOCAB_SIZE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS_BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    CHUNKS: tl.constexpr = (VOCAB_SIZE + BLOCK - 1) // BLOCK

    top, chosen = _largest(row, VOCAB_SIZE, BLOCK, CHUNKS)
    highest = tl.where(top < 0, top ^ 0x7FFFFFFF, top).to(tl.float32, bitcast=True)
    temperature = tl.load(temperatures + number)
    # A row without a finite maximum is a broken model's; it gets an id all the same.
    if (temperature > 0) & (tl.abs(highest) < float("inf")):
        kth = _kth_largest(row, top, tl.load(top_ks + number), VOCAB_SIZE, BLOCK, CHUNKS)
        top_p = tl.load(top_ps + number)
        threshold = _least_in_top_p(row, highest, kth, temperature, top_p, VOCAB_SIZE, SCALE, BLOCK, CHUNKS)
        least = tl.load(leasts + number)  # of the scaled distance from the largest logit: log(min_p)

        # What is left, summed up chunk by chunk, tells in which chunk the uniform falls.
        nth = tl.arange(0, CHUNKS_BLOCK)
        sums = tl.zeros((CHUNKS_BLOCK,), dtype=tl.int64)
        for chunk in range(CHUNKS):
            kept = _kept_weights(row, chunk, highest, kth, threshold, least, temperature, VOCAB_SIZE, SCALE, BLOCK)
            sums = tl.where(nth == chunk, tl.sum(kept, axis=0), sums)
        total = tl.sum(sums, axis=0)
        # Rounding may lift the product to the total itself, which no running sum passes.
        target = tl.minimum((tl.load(uniforms + number) * total.to(tl.float64)).to(tl.int64), total - 1)
        chunk = tl.sum((tl.cumsum(sums, axis=0) <= target).to(tl.int32), axis=0)
        before = tl.sum(tl.where(nth < chunk, sums, 0), axis=0)
        kept = _kept_weights(row, chunk, highest, kth, threshold, least, temperature, VOCAB_SIZE, SCALE, BLOCK)
        chosen = chunk * BLOCK + tl.sum((tl.cumsum(kept, axis=0) <= target - before).to(tl.int32), axis=0)
    tl.store(ids + number, chosen.to(tl.int64))


@dataclasses.dataclass(slots=True)
class DeviceRows:
    """What `workers.sampler.SamplingRows` says, where the logits are; each (num_rows,).

    Attributes:
        temperature, least: float32; `least` is log(min_p).
        top_k: int32.
        top_p, uniform: float64.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    least: torch.Tensor
    uniform: torch.Tensor

    @classmethod
    def make(cls, rows: SamplingRows, device: torch.device) -> DeviceRows:
        """Put a step's parameters on the device, in one transfer that the host does not wait for."""
        with np.errstate(divide="ignore"):  # log(0) is -inf, which nothing falls below
            least = np.log(rows.min_p)
        uniform = uniforms(rows.seed, rows.index, rows.position)
        number = len(uniform)
        room = -(-number // 4) * 4  # each column begins at a multiple of 16 bytes, or the kernel is compiled anew
        host = np.zeros(28 * room, dtype=np.uint8)
        columns: list[npt.NDArray[Any]] = [*host[: 16 * room].view(np.float64).reshape(2, room)]
        columns += [*host[16 * room : 24 * room].view(np.float32).reshape(2, room), host[24 * room :].view(np.int32)]
        for column, values in zip(columns, (rows.top_p, uniform, rows.temperature, least, rows.top_k), strict=True):
            column[:number] = values
        sent = torch.from_numpy(host)
        sent = (sent.pin_memory() if device.type == "cuda" else sent).to(device, non_blocking=True)
        top_p, drawn = sent[: 16 * room].view(torch.float64).view(2, room)[:, :number]
        temperature, log_min_p = sent[16 * room : 24 * room].view(torch.float32).view(2, room)[:, :number]
        return cls(temperature, sent[24 * room :].view(torch.int32)[:number], top_p, log_min_p, drawn)


def sample(logits: torch.Tensor, rows: DeviceRows) -> torch.Tensor:
    """Choose a token for each row.

    Args:
        logits: (num_rows, vocab_size), rows contiguous, of any float type; -inf is never drawn.

    Returns:
        (num_rows,) int64 ids, where the logits are. Greedy rows (temperature 0) take the lowest id among the largest
        logits, NaN being the largest.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, "rows must be contiguous"
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        block = min(_BLOCK, next_power_of_2(vocab_size))
        _sample[(num_rows,)](
            logits, ids, rows.temperature, rows.top_k, rows.top_p, rows.least, rows.uniform, logits.stride(0),
            VOCAB_SIZE=vocab_size, SCALE=weight_scale(vocab_size), BLOCK=block,
            CHUNKS_BLOCK=next_power_of_2(-(-vocab_size // block)), num_warps=8,
        )  # fmt: skip
    return ids
