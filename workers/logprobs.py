"""Log-probabilities of sampled tokens and of the likeliest ones beside them; knows no sampling and no request."""

from __future__ import annotations

import numpy as np
import torch

from nanoengine.step import TokenLogprobs


def log_probabilities(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Normalise some rows of (num_rows, vocab_size) logits: (len(rows), vocab_size) float32, a copy."""
    where = torch.tensor(rows, device=logits.device)
    return logits.index_select(0, where).float().log_softmax(dim=-1)


def token_logprobs(logprobs: torch.Tensor, token_ids: list[int], numbers: list[int]) -> list[TokenLogprobs]:
    """What is told of each row's token.

    Args:
        logprobs: (num_rows, vocab_size) float32.
        token_ids: the token that was sampled from each row.
        numbers: how many of the likeliest tokens are told of each row, 0 or more.
    """
    found = pick(logprobs, torch.tensor(token_ids, device=logprobs.device), max(numbers))
    return [
        (ids[: 1 + number], values[: 1 + number], rank)
        for number, ids, values, rank in zip(numbers, *(column.tolist() for column in found), strict=True)
    ]


def pick(logprobs: torch.Tensor, chosen: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chosen token of each row, and `number` of the likeliest (all, if there are fewer).

    Args:
        logprobs: (num_rows, vocab_size) float32.
        chosen: (num_rows,) int64 token ids.

    Returns:
        (num_rows, 1 + number) int64 ids, their float32 values, and the (num_rows,) int64 ranks of the chosen ones.
    """
    values = logprobs.gather(1, chosen[:, None])
    ranks = _num_above(logprobs, values) + 1
    if number == 0:
        return chosen[:, None], values, ranks
    top_ids, top_values = _likeliest(logprobs, min(number, logprobs.shape[-1]))
    return torch.cat((chosen[:, None], top_ids), dim=1), torch.cat((values, top_values), dim=1), ranks


def _likeliest(logprobs: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_rows, number) ids and values of the likeliest tokens, the likeliest first, and of equals the lower id.

    Of equals topk takes any, and which depends on `number`, that is on what other rows of the batch ask for.
    """
    top = logprobs.topk(min(number + 1, logprobs.shape[-1]), dim=-1)
    ids, values = top.indices[:, :number].clone(), top.values[:, :number]
    tied = (top.values[:, 1:] == top.values[:, :-1]).any(dim=-1) & ~top.values.isnan().any(dim=-1)
    for row in tied.nonzero()[:, 0].tolist():
        candidates = (logprobs[row] >= values[row, -1]).nonzero()[:, 0]  # by id
        order = logprobs[row, candidates].argsort(descending=True, stable=True)
        ids[row] = candidates[order[:number]]
    return ids, values


def _num_above(logprobs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(num_rows,) int64: how many of (num_rows, vocab_size) are larger than their row's of (num_rows, 1).

    Row by row on the CPU: there torch's sum makes an int64 copy of the whole comparison, and takes 15 times as long.
    """
    if logprobs.device.type != "cpu":
        return (logprobs > values).sum(dim=-1)
    rows = zip(logprobs.numpy(), values[:, 0].tolist(), strict=True)
    return torch.tensor([int(np.count_nonzero(row > np.float32(value))) for row, value in rows], dtype=torch.int64)
