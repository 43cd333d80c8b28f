"""Turns logits into token ids: temperature, top-k, top-p, min-p, draw; knows no sequence, cache or model.

What is written here runs on any device, all rows of a batch together; on the CPU `cpu_sampler.py` chooses the same
tokens faster, row by row, and on a GPU `kernels/sampling.py` does, without a sort.

A token is a function of (its row of logits, its parameters, seed, sequence index, position) and of nothing else
(DESIGN.md, 3.5): no generator state lives anywhere. The draw is an inverse CDF in token-id order under one
counter-based uniform. Weights are integers, so their sums are exact in any order, on any device and in any batch.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from workers import cpu_sampler
from workers.cpu_sampler import scaled_exp, weight_scale

Int64Array = npt.NDArray[np.int64]

# Elements of logits that are transformed at a time; bounds the int64 copies of a large vocabulary to 32 MiB each.
CHUNK_ELEMENTS = 1 << 22
# Top-p looks at so many of the likeliest tokens, one after the other, before it sorts a whole vocabulary.
TOP_P_PREFIXES = (1024, 16384)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(slots=True)
class SamplingRows:
    """Parameters of the rows that sample, one array entry a row of logits.

    Attributes:
        temperature: float64; 0 is greedy.
        top_k: int64; 0 or less keeps all.
        top_p: float64 in (0, 1]; 1 keeps all.
        min_p: float64 in [0, 1]; 0 keeps all.
        seed: uint64.
        index: uint64, the sequence's index within its request.
        position: uint64, the absolute position that the sampled token will have.
    """

    temperature: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]
    seed: npt.NDArray[np.uint64]
    index: npt.NDArray[np.uint64]
    position: npt.NDArray[np.uint64]

    def take(self, rows: npt.NDArray[np.int64]) -> SamplingRows:
        """The parameters of these rows."""
        return SamplingRows(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def sample(logits: torch.Tensor, rows: SamplingRows) -> Int64Array:
    """Choose a token for each row.

    Args:
        logits: (num_rows, vocab_size) float32; -inf is never drawn.
        rows: parameters of `num_rows` rows.

    Returns:
        (num_rows,) int64 ids on the host. Greedy rows take the lowest id among the largest logits (NaN is the largest).
    """
    ids: Int64Array = launch_sample(logits, rows).cpu().numpy()
    return ids


def launch_sample(logits: torch.Tensor, rows: SamplingRows, use_kernel: bool = False) -> torch.Tensor:
    """Like `sample`, but the ids stay where the logits are, and the host does not wait for them.

    Args:
        use_kernel: choose by the Triton kernel.
    """
    if use_kernel:
        from workers.kernels import sampling  # Triton need not be installed where nobody asks for it

        return sampling.sample(logits, sampling.DeviceRows.make(rows, logits.device))
    uniform = uniforms(rows.seed, rows.index, rows.position)
    if logits.device.type == "cpu":
        return torch.from_numpy(_sample_on_cpu(logits.numpy(), rows, uniform))
    return _sample_on_device(logits, rows, uniform)


def _sample_on_cpu(logits: npt.NDArray[np.float32], rows: SamplingRows, uniform: npt.NDArray[np.float64]) -> Int64Array:
    if not (rows.temperature > 0).any():
        largest: Int64Array = logits.argmax(axis=-1)
        return largest
    columns = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, uniform)
    each = zip(logits, *(column.tolist() for column in columns), strict=True)
    with np.errstate(over="ignore"):  # by a temperature near 0
        ids = [
            cpu_sampler.draw(row, temperature, *others) if temperature > 0 else int(row.argmax())
            for row, temperature, *others in each
        ]
    return np.array(ids, dtype=np.int64)


def _sample_on_device(logits: torch.Tensor, rows: SamplingRows, uniform: npt.NDArray[np.float64]) -> torch.Tensor:
    """The twin that runs anywhere, many rows at a time."""
    ids = torch.argmax(logits, dim=-1)  # (num_rows,), the first of equal ones
    drawn = np.flatnonzero(rows.temperature > 0)
    at_once = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for first in range(0, len(drawn), at_once):
        some = drawn[first : first + at_once]
        where = torch.from_numpy(some).to(logits.device)
        ids.index_copy_(0, where, _draw(logits.index_select(0, where), rows.take(some), uniform[some]))
    return ids


def uniforms(
    seed: npt.NDArray[np.uint64], index: npt.NDArray[np.uint64], position: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """One uniform in [0, 1) a row, with 53 bits: splitmix64's finaliser chained over (seed, index, position).

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; each link of the chain is a
    bijection of its word, so equal seeds never meet at different positions of one sequence.
    """
    state = _mix(seed + _GOLDEN)
    state = _mix((state ^ index) + _GOLDEN)
    state = _mix((state ^ position) + _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def keep_weights(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Integer weights in proportion to the probabilities that are left after temperature, top-k, top-p and min-p.

    Ties at a threshold are all kept: what is equally likely is not told apart by its place in a sort. Otherwise the
    kept sets are those of transformers' logits warpers, each of which sees the probabilities that the one before it
    left. The likeliest token is always kept.

    Args:
        logits: (num_rows, vocab_size) float32.
        rows: every temperature above 0.

    Returns:
        (num_rows, vocab_size) int64; what is less likely than about 2**-37 of the likeliest may be 0 as well.
    """
    vocab_size = logits.shape[-1]
    # Relative to the largest, so that no temperature overflows.
    relative = logits - logits.amax(dim=-1, keepdim=True)
    relative /= _column(rows.temperature, logits)
    if logits.device.type == "cpu":
        scaled = torch.from_numpy(scaled_exp(relative.numpy(), vocab_size))
    else:
        scaled = relative.exp().mul_(weight_scale(vocab_size))
    weights = scaled.to(torch.int64)  # (num_rows, vocab_size)

    some = np.flatnonzero((rows.top_k > 0) & (rows.top_k < vocab_size))
    if len(some):
        where = torch.from_numpy(some).to(logits.device)
        left = logits.index_select(0, where)
        weights[where] = weights[where].masked_fill_(left < _kth_largest(left, rows.top_k[some]), 0)
    some = np.flatnonzero(rows.top_p < 1)
    if len(some):
        where = torch.from_numpy(some).to(logits.device)
        left = weights.index_select(0, where)
        weights[where] = left.masked_fill_(left < _top_p_threshold(left, rows.top_p[some]), 0)
    some = np.flatnonzero(rows.min_p > 0)
    if len(some):
        where = torch.from_numpy(some).to(logits.device)
        least = _column(np.log(rows.min_p[some]), logits)
        weights[where] = weights[where].masked_fill_(relative[where] < least, 0)
    return weights


def _draw(logits: torch.Tensor, rows: SamplingRows, uniform: npt.NDArray[np.float64]) -> torch.Tensor:
    """(num_rows,) int64 ids: the first token, in id order, at which the running weight passes uniform * total."""
    running = keep_weights(logits, rows).cumsum(dim=-1)
    total = running[:, -1:]
    share = torch.from_numpy(uniform).to(logits.device)[:, None]
    # Rounding may lift the product to the total itself, which no running weight passes.
    target = torch.minimum((share * total.double()).to(torch.int64), total - 1)
    # A token of weight 0 passes nothing that the token before it has not passed, hence is never drawn. The clamp
    # keeps an id an id when a broken model's logits are NaN.
    return torch.searchsorted(running, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _kth_largest(values: torch.Tensor, k: npt.NDArray[np.int64]) -> torch.Tensor:
    """(num_rows, 1): the k-th largest value of each row."""
    largest = values.topk(int(k.max()), dim=-1).values
    return largest.gather(1, torch.from_numpy(k - 1).to(values.device)[:, None])


def _top_p_threshold(weights: torch.Tensor, top_p: npt.NDArray[np.float64]) -> torch.Tensor:
    """(num_rows, 1): weight of the last token of the shortest prefix, likeliest first, that reaches top_p in sum."""
    vocab_size = weights.shape[-1]
    goal = torch.from_numpy(top_p).to(weights.device)[:, None] * weights.sum(dim=-1, keepdim=True).double()
    thresholds = torch.zeros_like(weights[:, :1])
    open_rows = torch.arange(len(weights), device=weights.device)
    for size in dict.fromkeys(min(size, vocab_size) for size in (*TOP_P_PREFIXES, vocab_size)):
        likeliest = weights.index_select(0, open_rows).topk(size, dim=-1).values
        running = likeliest.cumsum(dim=-1)
        open_goal = goal.index_select(0, open_rows)
        before = (running - likeliest).double()  # what stands before each token
        last = (before < open_goal).sum(dim=-1, keepdim=True).sub_(1).clamp_(min=0)
        thresholds.index_copy_(0, open_rows, likeliest.gather(1, last))
        open_rows = open_rows[running[:, -1].double() < open_goal[:, 0]]
        if not len(open_rows):
            break
    return thresholds


def _column(values: npt.NDArray[np.float64], like: torch.Tensor) -> torch.Tensor:
    """(num_rows, 1), dtype and device of `like`."""
    return torch.from_numpy(values).to(like.device, like.dtype)[:, None]
