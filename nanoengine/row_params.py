"""What the workers are told of a sequence's sampling parameters, once with its full state; knows no queue."""

from __future__ import annotations

from nanoengine.sequence import Sequence
from nanoengine.step import RowExtras, RowParams

_NO_EXTRAS = RowExtras()


def row_params(seq: Sequence) -> RowParams:
    """What every row's draw needs."""
    params = seq.request.sampling_params
    return RowParams(
        temperature=float(params.temperature),
        top_k=max(0, params.top_k),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        seed=seq.request.seed,
        sequence_index=seq.index,
    )


def row_extras(seq: Sequence, eos_token_ids: frozenset[int]) -> RowExtras | None:
    """What else changes its logits; None, which costs nothing, for a sequence that asks for none of it."""
    params, log = seq.request.sampling_params, seq.prompt_log
    stops: tuple[int, ...] = ()
    if params.min_tokens:
        stops = tuple(sorted({*eos_token_ids, *(params.stop_token_ids or ())}))
    extras = RowExtras(
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        logit_bias=tuple((params.logit_bias or {}).items()),
        allowed_token_ids=tuple(params.allowed_token_ids or ()),
        bad_words=tuple(tuple(ids) for ids in params.bad_words_token_ids or ()),
        min_tokens=params.min_tokens,
        stop_token_ids=stops,
        num_logprobs=_num_logprobs(seq),
        grammar=seq.request.grammar,
        ignore_eos=params.ignore_eos and bool(seq.request.grammar),
    )
    if log is not None:
        # What is computed already was told, or a step in flight tells it.
        first = max(log.end, seq.num_computed_tokens)
        if first < log.total:
            extras = extras._replace(num_prompt_logprobs=params.prompt_logprobs or 0, first_prompt_logprob=first)
    return None if extras == _NO_EXTRAS else extras


def _num_logprobs(seq: Sequence) -> int:
    """How many of the likeliest tokens are told; a beam search chooses among them."""
    params, beams = seq.request.sampling_params, seq.request.beams
    if beams is not None:
        return beams.search.num_likeliest
    return -1 if params.logprobs is None else params.logprobs
