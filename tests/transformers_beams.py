"""The beam search of transformers, which ours must equal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nanoengine.beam_params import BeamSearchParams


def transformers_search(
    model: torch.nn.Module, prompt: list[int], params: BeamSearchParams, end: Iterable[int], pad: int
) -> Any:
    """What `generate` returns for a beam search: all hypotheses, best first, with scores and logits.

    Args:
        model: a causal language model of transformers.
        prompt: token ids.
        params: width, length, penalty and when to stop.
        end: ids that end a hypothesis.
        pad: what shorter outputs are filled up with.
    """
    with torch.inference_mode():
        return model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=sorted(end) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )


def hypotheses(result: Any, num_prompt_tokens: int) -> list[list[int]]:
    """The ids of each output, without prompt and padding."""
    lengths = (result.beam_indices >= 0).sum(1).tolist()
    return [row[num_prompt_tokens:][:length].tolist() for row, length in zip(result.sequences, lengths, strict=True)]
