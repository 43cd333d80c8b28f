"""Log-probabilities of sampled tokens and of the likeliest ones beside them; knows no sampling and no request."""

from __future__ import annotations

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
    chosen = torch.tensor(token_ids, device=logprobs.device)[:, None]  # (num_rows, 1)
    values = logprobs.gather(1, chosen)
    ranks = (logprobs > values).sum(dim=-1) + 1  # (num_rows,)
    top = logprobs.topk(min(max(numbers), logprobs.shape[-1]), dim=-1)
    ids = torch.cat((chosen, top.indices), dim=1).tolist()
    told = torch.cat((values, top.values), dim=1).tolist()
    return [
        (ids[row][: 1 + number], told[row][: 1 + number], rank)
        for row, (number, rank) in enumerate(zip(numbers, ranks.tolist(), strict=True))
    ]
