"""Decides which beams of a search run on and when it is over; knows no sequence, no queue and no tensor.

The semantics are those of transformers' beam search (`generate(num_beams=…)`, without sampling or groups), for one
prompt:
* Of all continuations of all beams the best are the candidates, ranked by the sum of their tokens' log-probabilities.
  There are so many that enough are left to run on where each beam could end with each end token.
* A candidate that ends (with an end token, or because it is max_tokens long) is kept as a hypothesis if it stands
  among the first `beam_width` candidates. The best candidates that do not end are the next beams.
* A hypothesis is ranked by score: sum of log-probabilities / length ** length_penalty, where the length counts the
  generated tokens, the end token among them. The best `beam_width` hypotheses are kept.
* The search is over at max_tokens; or, with `beam_width` hypotheses there, at once (early_stopping True), or when the
  best beam is no better than the worst hypothesis if it is scored at its present length (False), or at the length that
  favours it most ("never": max_tokens under a positive length_penalty).

Sums are kept in double precision. What is equally good is ranked by beam, then by likelihood, so nothing is left to
chance.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from configs.checkpoint import CheckpointConfig
from configs.errors import RequestError
from nanoengine.beam_params import BeamSearchParams
from nanoengine.step import TokenLogprobs


class Beam:
    """A beam: its last token, and what it was before that. Beams that part share their past.

    `length` counts generated tokens; the root, with none, stands for the prompt. `logprobs` is told of the last token.
    """

    __slots__ = ("cumulative_logprob", "length", "logprobs", "parent", "token_id")

    def __init__(self, parent: Beam | None, token_id: int, cumulative_logprob: float, logprobs: TokenLogprobs) -> None:
        self.parent = parent
        self.token_id = token_id
        self.cumulative_logprob = cumulative_logprob
        self.length: int = 0 if parent is None else parent.length + 1
        self.logprobs = logprobs

    def path(self) -> list[Beam]:
        """The beam after each of its tokens, the first one first."""
        beams = []
        beam = self
        while beam.parent is not None:
            beams.append(beam)
            beam = beam.parent
        return beams[::-1]


class Hypothesis(NamedTuple):
    """A beam that ended. `stopped`: with an end token, not for its length."""

    beam: Beam
    score: float
    stopped: bool


class Continuation(NamedTuple):
    """A beam that runs on: the number of its parent among the beams before, and the token behind it."""

    parent: int
    token_id: int


class _Candidate(NamedTuple):
    """What may become a beam: the number of its parent, and the place of its token in what was told of that."""

    cumulative_logprob: float
    parent: int
    place: int


class BeamSearch:
    """The search over one prompt.

    Args:
        params: what was asked for.
        max_tokens: the length at which every beam ends; what fits within max_model_len.
        eos_token_ids: the end tokens; none under ignore_eos.
    """

    def __init__(self, params: BeamSearchParams, max_tokens: int, eos_token_ids: frozenset[int]) -> None:
        self.params = params
        self.max_tokens = max_tokens
        self.end_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.beams = [Beam(None, -1, 0.0, ([], [], 0))]  # the running ones, best first
        self.hypotheses: list[Hypothesis] = []  # best first
        self.is_over = False

    @property
    def num_candidates(self) -> int:
        """How many candidates there are of all beams together, hence how many of each may be wanted."""
        return num_candidates(self.params.beam_width, len(self.end_token_ids))

    @property
    def num_likeliest(self) -> int:
        """How many of the likeliest tokens the workers have to tell of each beam."""
        return max(self.num_candidates, self.params.logprobs or 0)

    def advance(self, told: Sequence[TokenLogprobs]) -> list[Continuation]:
        """Take what the workers told of each beam, in the order of `beams`; returns the next ones, none if it is over.

        An entry's first token, which the sampler chose, counts for nothing; the likeliest behind it do.
        """
        assert not self.is_over
        assert len(told) == len(self.beams)
        candidates = self._candidates(told)
        if not candidates:  # not a single probability is a number: what there is must do
            self.stop()
            return []
        width, is_last = self.params.beam_width, self.beams[0].length + 1 >= self.max_tokens
        ended: list[Hypothesis] = []
        running: list[tuple[int, Beam]] = []
        for place, candidate in enumerate(candidates):
            token_id = told[candidate.parent][0][candidate.place]
            stops = token_id in self.end_token_ids
            if (stops or is_last) and place < width:
                beam = self._beam(candidate, told)
                ended.append(Hypothesis(beam, self._score(beam, beam.length), stops))
            elif not (stops or is_last) and len(running) < width:
                running.append((candidate.parent, self._beam(candidate, told)))
        self._keep(ended)
        self.beams = [beam for _, beam in running]
        if not running or not self._may_improve():
            self.beams, self.is_over = [], True
            return []
        return [Continuation(parent, beam.token_id) for parent, beam in running]

    def stop(self) -> None:
        """End the search where it stands: its beams are hypotheses of the length that they have."""
        self._keep([Hypothesis(beam, self._score(beam, beam.length), False) for beam in self.beams if beam.length])
        self.beams = []
        self.is_over = True

    def _candidates(self, told: Sequence[TokenLogprobs]) -> list[_Candidate]:
        """The best continuations of all beams, best first."""
        found = (
            _Candidate(beam.cumulative_logprob + value, number, place)
            for number, (beam, entry) in enumerate(zip(self.beams, told, strict=True))
            for place, value in enumerate(entry[1][1 : 1 + self.num_candidates], start=1)
            if math.isfinite(value)
        )
        # Like a stable sort: of equal ones the first.
        return heapq.nlargest(self.num_candidates, found, key=lambda candidate: candidate.cumulative_logprob)

    def _beam(self, candidate: _Candidate, told: Sequence[TokenLogprobs]) -> Beam:
        """Make a beam of a candidate. It keeps what its client wants to know, and not all that was told."""
        ids, values, _ = told[candidate.parent]
        place, end = candidate.place, 1 + (self.params.logprobs or 0)
        rank = 1 + sum(value > values[place] for value in values[1:place])
        logprobs = [ids[place], *ids[1:end]], [values[place], *values[1:end]], rank
        return Beam(self.beams[candidate.parent], ids[place], candidate.cumulative_logprob, logprobs)

    def _score(self, beam: Beam, length: int) -> float:
        return beam.cumulative_logprob / math.pow(length, self.params.length_penalty)

    def _keep(self, ended: list[Hypothesis]) -> None:
        ranked = sorted([*self.hypotheses, *ended], key=lambda hypothesis: hypothesis.score, reverse=True)
        self.hypotheses = ranked[: self.params.beam_width]

    def _may_improve(self) -> bool:
        """Whether the search goes on: not every place is taken, or a beam may still win one."""
        params, best = self.params, self.beams[0]
        if len(self.hypotheses) < params.beam_width:
            return True
        if params.early_stopping is True:
            return False
        length = self.max_tokens if params.early_stopping == "never" and params.length_penalty > 0 else best.length
        return self._score(best, length) > self.hypotheses[-1].score


def num_candidates(beam_width: int, num_end_tokens: int) -> int:
    """How many candidates a step ranks, so that `beam_width` are left where every beam could end in every way."""
    return max(2, 1 + num_end_tokens) * beam_width


def beams_of(params: object, checkpoint: CheckpointConfig) -> BeamSearchParams | None:
    """The parameters if they are those of a beam search, which the model can serve. Raises RequestError if not."""
    if not isinstance(params, BeamSearchParams):
        return None
    check_width(params, frozenset(checkpoint.eos_token_ids), checkpoint.vocab_size)
    return params


def check_width(params: BeamSearchParams, eos_token_ids: frozenset[int], vocab_size: int) -> None:
    """Raise RequestError for a search so wide that the tokens to choose from might not suffice."""
    per_beam = num_candidates(1, 0 if params.ignore_eos else len(eos_token_ids))
    if params.beam_width * per_beam > vocab_size:
        raise RequestError(
            f"beam_width must be at most {vocab_size // per_beam} for a vocabulary of {vocab_size} tokens, got "
            f"{params.beam_width}", "beam_width",
        )  # fmt: skip
