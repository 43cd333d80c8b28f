"""Penalties, bias and masks against transformers' logits processors and vLLM's formulas."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from nanoengine.step import RowExtras
from workers.logits_processors import RowProcessor, process

VOCAB = 97
PROMPT = [5, 9, 5, 11, 80]
OUTPUT = [9, 3, 3, 3, 60, 11]
PAST = PROMPT + OUTPUT


def random_logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 4


def processed(extras: RowExtras, past: list[int] = PAST, num_prompt_tokens: int = len(PROMPT)) -> torch.Tensor:
    """What becomes of random logits, (1, VOCAB), after `past`; a part of the past arrives token by token."""
    known = num_prompt_tokens + (len(past) - num_prompt_tokens) // 2
    row = RowProcessor(extras, num_prompt_tokens, past[:known])
    row.observe(0, past[:known])  # chunks of what was sent already count once
    for position in range(known, len(past)):
        row.observe(position, [past[position]])
    logits = random_logits()
    process(logits, [(0, len(past), row)])
    return logits


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PAST]), random_logits())
    assert torch.equal(processed(RowExtras(repetition_penalty=penalty)), expected)


def test_frequency_and_presence_penalties_equal_vllms_formula_over_the_output() -> None:
    counts = torch.bincount(torch.tensor(OUTPUT), minlength=VOCAB)
    expected = random_logits() - 0.7 * counts - -1.1 * (counts > 0)
    actual = processed(RowExtras(frequency_penalty=0.7, presence_penalty=-1.1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert torch.equal(actual[0, [5, 80]], random_logits()[0, [5, 80]]), "the prompt is not penalised"


def test_bias_comes_before_the_penalties_and_equals_transformers() -> None:
    bias = {3: 5.5, 96: -100.0, 0: 0.25}
    expected = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(
        torch.tensor([PAST]), random_logits()
    )
    assert torch.equal(processed(RowExtras(logit_bias=tuple(bias.items()))), expected)
    both = processed(RowExtras(logit_bias=tuple(bias.items()), repetition_penalty=1.5))
    assert torch.equal(both, RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([PAST]), expected))


@pytest.mark.parametrize("words", [[[7]], [[60, 11, 4], [11, 6]], [[3, 3, 8]], [[3, 60, 11, 2], [9, 9]]])
def test_bad_words_equal_transformers(words: list[list[int]]) -> None:
    expected = NoBadWordsLogitsProcessor(words)(torch.tensor([PAST]), random_logits())
    assert torch.equal(processed(RowExtras(bad_words=tuple(map(tuple, words)))), expected)


def test_a_bad_word_that_begins_in_the_prompt_is_not_one() -> None:
    """As in vLLM: what the client wrote itself may be completed."""
    row = RowExtras(bad_words=((11, 80, 4),))
    assert torch.equal(processed(row, PROMPT), random_logits())


@pytest.mark.parametrize("num_generated", [0, 2, 3])
def test_min_tokens_equals_transformers(num_generated: int) -> None:
    past = PROMPT + OUTPUT[:num_generated]
    expected = MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [2, 40])(torch.tensor([past]), random_logits())
    assert torch.equal(processed(RowExtras(min_tokens=3, stop_token_ids=(2, 40)), past), expected)


def test_only_allowed_tokens_are_left() -> None:
    actual = processed(RowExtras(allowed_token_ids=(4, 90)))
    assert torch.equal(actual.isfinite().nonzero()[:, 1], torch.tensor([4, 90]))
    assert torch.equal(actual[0, [4, 90]], random_logits()[0, [4, 90]])


def test_masks_that_would_leave_nothing_are_not_applied() -> None:
    """Every logit -inf would make the draw choose any token, one that is not allowed among them."""
    actual = processed(RowExtras(allowed_token_ids=(4,), bad_words=((11, 4),)))
    assert actual.isfinite().nonzero()[:, 1].tolist() == [4]


def test_a_row_has_the_same_bits_alone_and_in_a_batch_and_others_are_left_alone() -> None:
    extras = RowExtras(0.3, 0.9, 1.2, ((3, 1.5),), (), ((3, 3, 8), (7,)), 20, (2,))
    logits = random_logits().repeat(4, 1)
    other = RowProcessor(RowExtras(frequency_penalty=1.0), 1, [1, 3, 3])
    process(logits, [(2, 3, other), (3, len(PAST), RowProcessor(extras, len(PROMPT), PAST))])
    assert torch.equal(logits[3:], processed(extras))
    assert torch.equal(logits[:2], random_logits().repeat(2, 1))
    assert not torch.equal(logits[2], logits[0])


def test_counts_grow_past_their_first_room() -> None:
    """Hundreds of distinct ids arrive one by one."""
    row = RowProcessor(RowExtras(frequency_penalty=1.0), 0, [])
    for position in range(3 * VOCAB):
        row.observe(position, [position % VOCAB])
    logits = random_logits()
    process(logits, [(0, 3 * VOCAB, row)])
    torch.testing.assert_close(logits, random_logits() - 3)
