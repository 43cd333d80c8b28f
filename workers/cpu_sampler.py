"""Draws a token from one row of logits, on the CPU and without a pass more than it needs; knows no batch.

It computes what `sampler.keep_weights` and the draw from it say, number by number, and chooses the same token: top-k
and top-p first find the few tokens that can be in, and whatever follows is done with those. One row at a time, a
vocabulary stays in the processor's cache, and numpy selects and sorts several times faster than torch does here.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float32Row = npt.NDArray[np.float32]
Int64Row = npt.NDArray[np.int64]

_BLOCK = 1024
"""Places whose weights are added up first to find where a running sum passes a value."""


def weight_scale(vocab_size: int) -> float:
    """The integer weight of the likeliest token: as large as lets the sum of a row's weights stay below 2**63."""
    return 2.0 ** (62 - vocab_size.bit_length())


def scaled_exp(relative: npt.NDArray[np.float32], vocab_size: int) -> npt.NDArray[np.float32]:
    """exp(relative) * weight_scale(vocab_size); an element's result depends on nothing but the element.

    By numpy in the calling thread: torch wakes all its threads for so little, which costs more than it saves, and
    many times as much while they have to wait for a core.
    """
    scaled: npt.NDArray[np.float32] = np.exp(relative)
    scaled *= np.float32(weight_scale(vocab_size))
    return scaled


def draw(row: Float32Row, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """The id that `uniform` falls on.

    Args:
        row: (vocab_size,) logits.
        temperature: above 0.
        top_k, top_p, min_p: see `sampler.SamplingRows`.
        uniform: in [0, 1).
    """
    highest = row.max()
    if not math.isfinite(highest):
        return int(row.argmax())  # a broken model's row; an id all the same
    ids = likeliest(row, top_k) if 0 < top_k < len(row) else None
    relative = (row if ids is None else row[ids]) - highest
    relative /= np.float32(temperature)
    kept = relative >= np.float32(np.log(min_p)) if min_p > 0 else None
    scaled = scaled_exp(relative, len(row))
    weights = scaled.astype(np.int64)
    if top_p < 1:
        likely = weights >= _top_p_threshold(scaled, weights, top_p)
        kept = likely if kept is None else kept & likely
    if kept is not None:
        weights *= kept  # a mask in which every other entry is set costs five times as much in an assignment
    total = int(weights.sum())
    # Rounding may lift the product to the total itself, which no running sum passes.
    at = _first_reaching(weights, min(int(uniform * float(total)), total - 1) + 1)
    return at if ids is None else int(ids[at])


def likeliest(row: Float32Row, k: int) -> Int64Row:
    """Ids, ascending, of the `k` largest of a row and of all that equal the least of them; 1 <= k <= len(row).

    A row is read as a grid of `height` lines. The k-th largest of its columns' maxima is a bound from below for the
    k-th largest of all, so that only columns that reach it, about k of them, are looked at closely.
    """
    height = math.isqrt(len(row) // k)
    if height < 2:
        return np.flatnonzero(row >= _kth_largest(row, k))
    width = len(row) // height  # at least k
    tops = row[: height * width].reshape(height, width).max(axis=0)
    columns = np.flatnonzero(tops >= _kth_largest(tops, k))
    inside = (np.arange(0, height * width, width)[:, None] + columns).ravel()  # ascending
    ids = np.concatenate((inside, np.arange(height * width, len(row))))
    candidates = row[ids]
    return ids[candidates >= _kth_largest(candidates, k)]


def _kth_largest(values: Float32Row, k: int) -> np.float32:
    at = len(values) - k
    kth: np.float32 = np.partition(values, at)[at]
    return kth


def _top_p_threshold(scaled: Float32Row, weights: Int64Row, top_p: float) -> int:
    """Weight of the last token of the shortest prefix, likeliest first, that reaches `top_p` in sum.

    `weights` are `scaled` cut to integers; floats of 4 bytes sort twice as fast.
    """
    total = int(weights.sum())
    goal = top_p * float(total)
    # All tokens below this weight together hold at most 1 - top_p of the sum, hence none of them is needed ...
    enough = scaled >= int((1 - top_p) * total / len(weights))
    # ... which saves time as long as they are most of the vocabulary.
    few = np.count_nonzero(enough) < len(weights) // 8
    likely = _sorted_weights(scaled[enough] if few else scaled.copy())
    if few and int(likely.sum()) < goal:  # for rounding alone
        likely = _sorted_weights(scaled.copy())
    return int(likely[_first_reaching(likely, goal)])


def _sorted_weights(scaled: Float32Row) -> Int64Row:
    """Integer weights, the largest first; sorts `scaled` in place."""
    scaled.sort()
    return scaled[::-1].astype(np.int64)


def _first_reaching(weights: Int64Row, goal: float) -> int:
    """The first place at which the running sum is at least `goal`, the last place when it never is.

    A running sum over all places takes several times as long as one over blocks of them and then within one block.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).cumsum()
    block = min(int(sums.searchsorted(goal)), len(sums) - 1)
    start = block * _BLOCK
    running = weights[start : start + _BLOCK].cumsum()
    if block:
        running += sums[block - 1]
    return start + min(int(running.searchsorted(goal)), len(running) - 1)
