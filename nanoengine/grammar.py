"""How a grammar becomes a matcher, the same where a request is checked and where its output is made.

The front end's side compiles a grammar to see whether it can (`nanoengine.grammar_process`), the worker to use it
(`workers.structured`); what the first let pass must not surprise the second, so both go through here. Knows neither.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import llguidance

from configs.errors import TokenizerError

# llguidance's budgets. Those of a step bound the time of one mask to tens of milliseconds (20 us is usual), the
# lexer's states bound the memory of one grammar to about 200 MB (1 MB is usual). Out of budget is an error of the
# matcher, which ends one request. Errors quote no state: it holds what other layers must not log.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=100_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
_NOT_CUT = (re.compile(r'"truncation"\s*:\s*null'), re.compile(r'"padding"\s*:\s*null'))


def load_tokenizer(path: Path, eos_token_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
    """The tokens' bytes, as a trie. Holds the GIL all along: 0.7 s for a vocabulary of 120,000.

    Its `vocab_size` is the tokenizer's own: the ids that pad a model's vocabulary lie behind it.

    Raises:
        TokenizerError: llguidance cannot read it (it wants byte-level or byte-fallback tokens), or it lacks the eos.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if not all(pattern.search(text, 0, 4096) for pattern in _NOT_CUT):
            # Left over from training; it would cut what a grammar forces.
            text = json.dumps(json.loads(text) | {"truncation": None, "padding": None})
        return _with_eos(text, eos_token_ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise TokenizerError(f"grammars cannot be matched with {path}: {str(error).strip()[:300]}") from None


def _with_eos(text: str, eos_token_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
    try:
        return llguidance.LLTokenizer(text, eos_token=list(eos_token_ids))
    except ValueError:
        # A checkpoint may name an eos that its tokenizer lacks, beside one that it has.
        size = llguidance.LLTokenizer(text, slices=[]).vocab_size
        known = [token for token in eos_token_ids if token < size]
        if not 0 < len(known) < len(eos_token_ids):
            raise
        return llguidance.LLTokenizer(text, eos_token=known)


def new_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher at the grammar's start; it never raises, but may be in error (`error_of`)."""
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


def error_of(matcher: llguidance.LLMatcher) -> str:
    """What is wrong, in a line or two, or an empty string."""
    return matcher.get_error().partition("\n<")[0].strip()[:500]
