"""Which tokens are told as the likeliest: of equals the lower ids, whatever the rest of the batch asks for."""

from __future__ import annotations

import torch

from workers.logprobs import pick, token_logprobs


def test_of_equals_the_lower_ids_are_told_whatever_other_rows_ask_for() -> None:
    """bfloat16 logits are often equal; topk's choice among equals depends on how many it is asked for."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-40, 0, (6, 500), generator=generator) / 8.0
    for row, logprobs in enumerate(rows.tolist()):
        order = sorted(range(500), key=lambda token: (-logprobs[token], token))
        for number in (1, 2, 5, 64, 500, 600):
            ids, values, _ = pick(rows, torch.zeros(6, dtype=torch.int64), number)
            assert ids[row, 1:].tolist() == order[:number]
            assert values[row, 1:].tolist() == [logprobs[token] for token in order[:number]]
    alone = token_logprobs(rows[:1], [3], [3])
    assert token_logprobs(rows, [3] * 6, [3, 20, 0, 5, 500, 1])[0] == alone[0]


def test_rows_that_are_not_numbers_fail_nobody() -> None:
    rows = torch.tensor([[float("nan"), 1.0, 1.0, 0.0], [2.0, 3.0, 3.0, 1.0]])
    ids, _, _ = pick(rows, torch.tensor([0, 0]), 3)
    assert ids[1].tolist() == [0, 1, 2, 0]
