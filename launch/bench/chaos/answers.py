"""What a client may see of an answer, whole or put together from a stream, and how two of them differ; sends nothing.

Two answers to the same request are equal when texts, token ids, log-probabilities, reasons and counts are. Ids, times
and what was cached may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The latest value of these counts; any other text or list is added to what came before it.
_REPLACED = frozenset({"finish_reason", "stop_reason", "role", "prompt_token_ids", "prompt_logprobs"})
# What a character that is not complete yet may be shown as where an answer is broken off.
_INCOMPLETE = "\ufffd"


class Answer:
    """The choices of one answer by their index, and its counts. Feed it the whole answer, or each chunk of a stream."""

    def __init__(self) -> None:
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, int] = {}

    def add(self, told: Mapping[str, Any]) -> None:
        """Take in a whole answer or a chunk, of any of the three generating routes."""
        for choice in told.get("choices") or told.get("outputs") or ():
            _fold(self._choices.setdefault(choice["index"], {}), choice)
        counts = (told.get("usage") or {}).items()
        self._usage |= {name: count for name, count in counts if isinstance(count, int)}

    @property
    def choices(self) -> dict[int, dict[str, Any]]:
        """What was told of each choice; empty values, which some shapes leave out, are not there."""
        return {index: _without_empty(told) for index, told in sorted(self._choices.items())}

    @property
    def finish_reasons(self) -> set[str]:
        """Of the choices that have ended."""
        return {told["finish_reason"] for told in self._choices.values() if told.get("finish_reason")}

    @property
    def num_tokens(self) -> int:
        """How many were told of, over all choices."""
        return sum(len(told.get("token_ids", ())) for told in self._choices.values())

    def difference(self, expected: Answer) -> str | None:
        """The first thing in which this differs from the answer that was expected, in words; None when nothing does."""
        found = _differ("", self.choices, expected.choices)
        # A stream of /generate, or one that was not asked for counts, has none.
        if found is None and self._usage and expected._usage:
            found = _differ("usage", self._usage, expected._usage)
        return found

    def difference_so_far(self, expected: Answer) -> str | None:
        """The same for an answer that was broken off: what there is of it must be a beginning of the expected one."""
        expected_choices = expected.choices
        for index, told in self.choices.items():
            whole = expected_choices.get(index)
            if whole is None:
                return f"choice {index} is not in the expected answer"
            for name in ("token_ids", "output_logprobs"):
                got = told.get(name, [])
                if (found := _differ(f"choice {index}.{name}", got, whole.get(name, [])[: len(got)])) is not None:
                    return found
            for name in ("text", "content"):
                # Breaking off shows what was held back as the possible beginning of a stop string, which may be none.
                got, all_of_it = told.get(name, "").rstrip(_INCOMPLETE), whole.get(name, "")
                if not (all_of_it.startswith(got) or got.startswith(all_of_it)):
                    return f"choice {index}.{name}: expected a beginning of {all_of_it!r:.300}, got {got!r:.300}"
        return None


def _fold(told: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if value is None or name == "index":
            continue
        if name in ("delta", "message"):
            _fold(told, value)
        elif name not in _REPLACED and isinstance(value, dict):
            _fold(told.setdefault(name, {}), value)  # log-probabilities: lists side by side
        elif name not in _REPLACED and isinstance(value, str):
            told[name] = told.get(name, "") + value
        elif name not in _REPLACED and isinstance(value, list):
            told.setdefault(name, []).extend(value)
        else:
            told[name] = value


def _without_empty(told: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _without_empty(value) if isinstance(value, dict) else value for name, value in told.items()}
    return {name: value for name, value in kept.items() if value not in ("", [], {})}


def _differ(where: str, got: Any, expected: Any) -> str | None:
    """Where two values of JSON first differ."""
    if got == expected:
        return None
    if isinstance(got, dict) and isinstance(expected, dict) and got.keys() == expected.keys():
        for name, value in got.items():
            if (found := _differ(f"{where}.{name}".lstrip("."), value, expected[name])) is not None:
                return found
    if isinstance(got, list) and isinstance(expected, list):
        pairs = zip(got, expected, strict=False)
        place = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
        if place is not None:
            return _differ(f"{where}[{place}]", got[place], expected[place])
        return f"{where}: expected {len(expected)} entries, got {len(got)}"
    return f"{where or 'choices'}: expected {expected!r:.300}, got {got!r:.300}"
