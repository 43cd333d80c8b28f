"""What ranks tell of prompts: which rows of a step, in slices of bounded size, and nothing for those who do not ask."""

from __future__ import annotations

import pytest
import torch

from configs.errors import EngineError
from nanoengine.step import RowExtras, RowParams, SequenceState
from workers import prompt_logprobs
from workers.prompt_logprobs import PromptRows, PromptSpan, tell_prompts

GREEDY = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
VOCAB = 50


def state(
    seq_id: int, prompt: list[int], start: int, end: int, number: int = 2, first: int = 0, fresh: bool = False
) -> SequenceState:
    row = SequenceState(seq_id, (prompt + [7] * 9)[start:end], start, [], end >= len(prompt))
    if fresh:
        row.params, row.num_prompt_tokens, row.past_token_ids = GREEDY, len(prompt), prompt
        row.extras = RowExtras(num_prompt_logprobs=number, first_prompt_logprob=first)
    return row


def test_each_chunk_tells_of_the_tokens_that_follow_its_own() -> None:
    rows, prompt = PromptRows(), list(range(10, 20))
    rows.begin(state(1, prompt, 0, 4, fresh=True))
    other = SequenceState(2, [5], 3, [], True)
    assert rows.spans([other, state(1, prompt, 0, 4)]) == [PromptSpan(1, 1, 0, [11, 12, 13, 14], 2)]
    assert rows.spans([other]) == []
    assert rows.spans([state(1, prompt, 4, 5), other], num_decodes=3) == [PromptSpan(3, 3, 4, [15], 2)]
    # The last position predicts the first output token, which is not of the prompt.
    assert rows.spans([state(1, prompt, 5, 10)]) == [PromptSpan(0, 0, 5, [16, 17, 18, 19], 2)]
    assert rows.spans([state(1, prompt, 10, 11)]) == []


def test_a_resumed_row_tells_only_what_is_missing() -> None:
    rows, prompt = PromptRows(), list(range(10, 20))
    rows.begin(state(1, prompt, 4, 12, first=6, fresh=True))
    assert rows.spans([state(1, prompt, 4, 12)]) == [PromptSpan(0, 2, 6, [17, 18, 19], 2)]
    rows.begin(state(1, prompt, 0, 4, first=0, fresh=True))
    rows.drop(1)
    assert rows.spans([state(1, prompt, 0, 4)]) == []
    with pytest.raises(EngineError, match="position 2 on, but begins at 4"):
        rows.begin(state(1, prompt, 4, 12, first=2, fresh=True))
    short = state(1, prompt, 0, 4, fresh=True)
    short.past_token_ids = prompt[:3]
    with pytest.raises(EngineError, match="came with 3 tokens"):
        rows.begin(short)


def test_the_head_sees_slices_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of 2,048 positions and a vocabulary of 151,936 would need 1.2 GB of logits at once."""
    assert prompt_logprobs.SLICE_BYTES // (4 * 151_936) == 110
    monkeypatch.setattr(prompt_logprobs, "SLICE_BYTES", 4 * VOCAB * 3 + 7)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=draw)
    head = torch.randn(8, VOCAB, generator=draw)
    calls: list[int] = []

    def compute_logits(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return rows @ head

    spans = [PromptSpan(0, 1, 5, [3, 4, 5, 6, 7], 0), PromptSpan(3, 12, 0, [49, 0], 4)]
    told = tell_prompts(compute_logits, hidden, spans, VOCAB)
    assert calls == [3, 3, 1]
    assert sorted(told) == [0, 3]
    assert (told[0].start, told[0].end, told[0].width) == (5, 10, 1)
    assert (told[3].start, told[3].end, told[3].width) == (0, 2, 5)
    for span in spans:
        for at, (ids, values, rank) in enumerate(told[span.row].entries()):
            expected = (hidden[span.first_token + at] @ head).log_softmax(-1)
            assert ids == [span.token_ids[at], *expected.topk(span.number).indices.tolist()]
            assert values == pytest.approx(expected[ids].tolist(), abs=1e-5)
            assert rank == (expected > expected[ids[0]]).sum() + 1


def test_more_than_the_vocabulary_is_all_of_it_and_other_ranks_tell_nothing() -> None:
    hidden = torch.eye(3)
    told = tell_prompts(lambda rows: rows, hidden, [PromptSpan(0, 0, 0, [2, 1], 20)], 3)
    assert told[0].width == 4
    calls: list[int] = []

    def on_another_rank(rows: torch.Tensor) -> None:
        calls.append(len(rows))

    assert tell_prompts(on_another_rank, hidden, [PromptSpan(0, 0, 0, [2, 1], 20)], 3) == {}
    assert calls == [2]


def test_only_the_prompt_asked_for_leaves_the_samples_path_alone() -> None:
    assert not RowExtras(num_prompt_logprobs=3, first_prompt_logprob=5).concerns_sampling
    assert RowExtras(num_prompt_logprobs=3, num_logprobs=0).concerns_sampling
    assert RowExtras(num_prompt_logprobs=0).needs_past
    assert not RowExtras(num_prompt_logprobs=0).looks_back
    assert not RowExtras().needs_past
