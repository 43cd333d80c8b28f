"""Keeps outputs to their grammars: rank 0's matchers, and the masks that they put on logits; knows no model.

A row that has a grammar has a matcher. It advances on the row's own tokens and finds out which may come next in a
thread, beside the forward pass, so that a step waits for whichever takes longer. What a matcher knows is a function
of the grammar and the output so far: a row that comes (again) with its tokens gets the same matcher by replaying
them. A matcher that fails ends its own row.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np
import numpy.typing as npt
import torch

from configs.engine import EngineConfig
from configs.errors import NanoEngineError, RequestError, TokenizerError, to_wire
from nanoengine.grammar import error_of, load_tokenizer, new_matcher
from workers.logits_processors import RowProcessor

logger = logging.getLogger(__name__)

BoolArray = npt.NDArray[np.bool_]

# Compiled grammars that are kept for the next row that has the same one.
MAX_COMPILED = 32
# Copies of a matcher share what its lexer has found out, which only grows: so many rows share at most.
MAX_COPIES = 64
_FIELD = "structured_outputs"


class RowMatcher:
    """One row's place in its grammar. `observe` is called by the runner, the rest happens in the mask thread."""

    def __init__(self, grammar: str, output: Sequence[int], matcher: Future[llguidance.LLMatcher]) -> None:
        """`output` is what the row has generated so far; `matcher`, at the grammar's start, is compiled meanwhile."""
        self.grammar = grammar
        self.error: str | None = None
        self._compiled: Future[llguidance.LLMatcher] | None = matcher
        self._matcher: llguidance.LLMatcher | None = None
        self._output = list(output)
        self._num_consumed = 0

    def observe(self, token_id: int) -> None:
        """The next token of the output."""
        self._output.append(token_id)

    def advance(self) -> llguidance.LLMatcher | None:
        """The matcher behind the whole output; None once it has failed."""
        try:
            if self._compiled is not None:
                self._matcher, self._compiled = self._compiled.result(), None
            if self._matcher is not None:
                for token_id in self._output[self._num_consumed :]:
                    self._matcher.consume_token(token_id)
                self._num_consumed = len(self._output)
        except MemoryError:
            raise  # which is not the request's fault
        except Exception as error:  # whatever it is: a request that fails, fails alone
            logger.exception("a matcher failed")
            self.fail(f"{type(error).__name__}: {error}")
        return self._matcher

    def restart(self, matcher: llguidance.LLMatcher) -> llguidance.LLMatcher | None:
        """Replay the output with a matcher that shares nothing with others, for theirs may be what failed."""
        self._matcher, self._num_consumed = matcher, 0
        return self.advance()

    def fail(self, error: str) -> None:
        """No token of this row is constrained any more, nor told."""
        self.error, self._matcher = error, None


@dataclasses.dataclass(slots=True)
class _Compiled:
    matcher: Future[llguidance.LLMatcher]
    num_copies: int = 0


class GrammarMatchers:
    """Every grammar of rank 0, compiled; and the threads in which that, and the masks, are computed.

    The threads end when this is forgotten.
    """

    def __init__(self, config: EngineConfig, num_threads: int = 1) -> None:
        """`num_threads` may compute masks at a time."""
        self._config = config
        self._vocab_size = config.resolved_checkpoint.vocab_size
        self._tokenizer: Future[llguidance.LLTokenizer] | None = None
        self._compiled: collections.OrderedDict[str, _Compiled] = collections.OrderedDict()
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self._masking = ThreadPoolExecutor(1, "masks")
        self._num_threads = num_threads
        self._executor: llguidance.LLExecutor | None = None

    def load(self) -> None:
        """Begin to read the tokenizer, which holds the GIL: it should be over before the first request comes."""
        if self._tokenizer is None:
            self._tokenizer = self._compiling.submit(self._load)

    def _load(self) -> llguidance.LLTokenizer:
        path = self._config.tokenizer_file
        eos_token_ids = self._config.resolved_checkpoint.eos_token_ids
        if path is None or not eos_token_ids:
            raise TokenizerError("grammars need a tokenizer.json and an end-of-sequence token")
        return load_tokenizer(path, eos_token_ids)

    def row(self, grammar: str, output: Sequence[int]) -> RowMatcher:
        """A matcher for a new row; compiling it, where it must be, happens in a thread."""
        self.load()
        known = self._compiled.get(grammar)
        if known is None or known.num_copies >= MAX_COPIES:
            known = self._compiled[grammar] = _Compiled(self._compiling.submit(self._new, grammar))
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        known.num_copies += 1
        # In the thread that compiles, hence after it.
        return RowMatcher(grammar, output, self._compiling.submit(lambda: known.matcher.result().deep_copy()))

    def forget_failures(self) -> None:
        """Compile again what could not be compiled; whoever waits for it is gone."""
        for grammar, known in list(self._compiled.items()):
            if _has_failed(known.matcher):
                del self._compiled[grammar]
        if self._tokenizer is not None and _has_failed(self._tokenizer):
            self._tokenizer = None

    def _new(self, grammar: str) -> llguidance.LLMatcher:
        assert self._tokenizer is not None, "load() comes first"
        return new_matcher(self._tokenizer.result(), grammar)

    def start_masks(self, rows: list[RowMatcher]) -> Future[BoolArray] | None:
        """Begin to find out which tokens may follow; to be called just before the forward pass.

        Returns:
            (num_rows, vocab_size), in a while; None when there are no rows. A row that failed allows all.
        """
        return self._masking.submit(self._masks, rows) if rows else None

    def _masks(self, rows: list[RowMatcher]) -> BoolArray:
        try:
            assert self._tokenizer is not None, "load() comes first"
            num_tokens = self._tokenizer.result().vocab_size
        except NanoEngineError as error:  # the front end could, a moment ago
            for row in rows:
                row.fail(error.message)
            return np.ones((len(rows), self._vocab_size), dtype=np.bool_)
        bits = llguidance.numpy.allocate_token_bitmask(len(rows), num_tokens)
        matchers = [row.advance() for row in rows]
        self._fill(bits, [(matcher, i) for i, matcher in enumerate(matchers)])
        for i, (row, matcher) in enumerate(zip(rows, matchers, strict=True)):
            if matcher is not None and matcher.is_error():
                self._compiled.pop(row.grammar, None)
                alone = row.restart(self._new(row.grammar))
                self._fill(bits, [(alone, i)])
                if alone is not None and alone.is_error():
                    row.fail(error_of(alone) or "it allows nothing more")
        packed = np.zeros((len(rows), -(-max(num_tokens, self._vocab_size) // 32) * 4), dtype=np.uint8)
        packed[:, : 4 * bits.shape[1]] = bits.view(np.uint8)
        allowed = np.unpackbits(packed, axis=1, count=self._vocab_size, bitorder="little").view(np.bool_)
        allowed[:, num_tokens:] = False  # what pads the vocabulary is no token
        allowed[[row.error is not None for row in rows]] = True
        return allowed

    def _fill(self, bits: npt.NDArray[np.int32], matchers: list[tuple[llguidance.LLMatcher | None, int]]) -> None:
        usable = [(matcher, i) for matcher, i in matchers if matcher is not None]
        if usable:
            if self._executor is None:
                self._executor = llguidance.LLExecutor(self._num_threads)
            llguidance.numpy.fill_next_token_bitmask_par(self._executor, usable, bits)


def _has_failed(future: Future[Any]) -> bool:
    return future.done() and future.exception() is not None


def constrain(
    logits: torch.Tensor,
    rows: Sequence[tuple[int, int, RowProcessor]],
    masks: BoolArray,
    eos_token_ids: Sequence[int],
) -> dict[int, dict[str, Any]]:
    """Mask what may not come next, in place, in rows that have a grammar.

    What the grammar allows is narrowed by allowed_token_ids and bad words; then eos and stop ids wait for min_tokens,
    and eos under ignore_eos, as long as something else is left. Where nothing is left of what the grammar allows, its
    eos is, if it may end here; else the row has failed.

    Args:
        logits: (num_rows, vocab_size) float32.
        rows: (row of logits, position that the sampled token will have, processor), only rows that have a grammar.
        masks: (len(rows), vocab_size), what each one's grammar allows.
        eos_token_ids: all of the checkpoint's.

    Returns:
        The error of each row that failed, as data, by row of logits; its logits are left as they were.
    """
    errors: dict[int, dict[str, Any]] = {}
    for (row, position, each), grammar_mask in zip(rows, masks, strict=True):
        assert each.matcher is not None, "only rows that have a grammar"
        if each.matcher.error is not None:
            errors[row] = to_wire(RequestError(f"{_FIELD} failed: {each.matcher.error}", _FIELD))
            continue
        allowed = _narrow(grammar_mask, each, position - each.num_prompt_tokens, list(eos_token_ids))
        if allowed is None:
            message = f"nothing that {_FIELD} allows is left by allowed_token_ids and bad_words"
            errors[row] = to_wire(RequestError(message, _FIELD))
            continue
        logits[row].masked_fill_(torch.from_numpy(~allowed).to(logits.device), -torch.inf)
    return errors


def _narrow(mask: BoolArray, row: RowProcessor, num_generated: int, eos: list[int]) -> BoolArray | None:
    extras = row.extras
    narrowed = mask
    banned = row.bad_token_ids()
    if extras.allowed_token_ids or banned:
        narrowed = mask.copy()
        if extras.allowed_token_ids:
            narrowed[:] = False
            narrowed[row.allowed_ids] = mask[row.allowed_ids]
        narrowed[list(banned)] = False
        if not narrowed.any():
            narrowed[eos] = mask[eos]
            return narrowed if narrowed.any() else None
    waiting = set(eos) if extras.ignore_eos else set()
    if num_generated < extras.min_tokens:
        waiting.update(extras.stop_token_ids)
    if waiting:
        patient = narrowed.copy()
        patient[list(waiting)] = False
        if patient.any():
            return patient
    return narrowed
