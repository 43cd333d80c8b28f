"""The prompts of a load: random ones, ones that share prefixes, or those of a file; knows neither server nor clock.

The same options and seed give the same prompts.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from configs.errors import ConfigError

FIRST_TOKEN_ID = 100
"""Random ids start here: below lie, in many vocabularies, the special tokens."""

# About one token each in most vocabularies; what a prompt of them really comes to, the server's usage says.
_WORDS = [
    *("time", "people", "way", "water", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("question", "work", "number", "night", "point", "home", "room", "mother", "area", "money", "story", "fact"),
    *("month", "lot", "right", "study", "book", "eye", "job", "word", "business", "side", "kind", "head", "house"),
]


@dataclasses.dataclass(frozen=True, slots=True)
class LoadRequest:
    """What is asked: a text, token ids, or a conversation, and how many tokens at most in answer."""

    prompt: str | list[int] | list[dict[str, Any]]
    output_len: int

    @property
    def is_conversation(self) -> bool:
        """Whether the prompt is a list of messages."""
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Which prompts. Lengths are in tokens; `range_ratio` r draws each from length x (1 - r) to length x (1 + r).

    Raises:
        ConfigError: a value outside its range.
    """

    name: str = "random"
    input_len: int = 128
    output_len: int = 64
    range_ratio: float = 0.0
    prefix_len: int = 256
    num_prefixes: int = 4
    endpoint: str = "completions"
    as_text: bool = False
    vocab_size: int = 2000
    path: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "prefix_len", "num_prefixes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} must be at least 1, got {getattr(self, name)}", name)
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(
                f"--range-ratio must be at least 0 and less than 1, got {self.range_ratio}", "range_ratio"
            )
        if self.vocab_size <= FIRST_TOKEN_ID:
            raise ConfigError(
                f"--vocab-size must be greater than {FIRST_TOKEN_ID}, got {self.vocab_size}", "vocab_size"
            )
        if (self.path is not None) != (self.name == "jsonl"):
            raise ConfigError("--dataset-path FILE and --dataset jsonl belong together", "path")
        if self.endpoint == "chat" and not self.as_text:
            raise ConfigError("--prompts ids goes with --endpoint completions alone: a chat takes text", "prompts")


def load(spec: DatasetSpec, num_requests: int | None) -> list[LoadRequest]:
    """So many requests; None stands for all that a file has.

    Raises:
        ConfigError: the file cannot be read or holds too few; the message names the line at fault.
    """
    if spec.name == "jsonl":
        return _from_file(spec, num_requests)
    assert num_requests is not None, "invented prompts have no number of their own"
    rng = random.Random(spec.seed)
    if spec.name == "random":
        return [
            LoadRequest(_prompt(rng, spec, _length(rng, spec.input_len, spec)), _length(rng, spec.output_len, spec))
            for _ in range(num_requests)
        ]
    prefixes = [_prompt(rng, spec, spec.prefix_len) for _ in range(spec.num_prefixes)]
    requests: list[LoadRequest] = []
    for _ in range(num_requests):
        prefix, suffix = rng.choice(prefixes), _prompt(rng, spec, _length(rng, spec.input_len, spec))
        joined = f"{prefix} {suffix}" if spec.as_text else [*prefix, *suffix]
        requests.append(LoadRequest(joined, _length(rng, spec.output_len, spec)))
    return requests


def _length(rng: random.Random, length: int, spec: DatasetSpec) -> int:
    shortest = max(1, round(length * (1 - spec.range_ratio)))
    return rng.randint(shortest, max(shortest, round(length * (1 + spec.range_ratio))))


def _prompt(rng: random.Random, spec: DatasetSpec, length: int) -> Any:  # text or token ids
    if spec.as_text:
        return " ".join(rng.choices(_WORDS, k=length))
    return [rng.randrange(FIRST_TOKEN_ID, spec.vocab_size) for _ in range(length)]


def _from_file(spec: DatasetSpec, num_requests: int | None) -> list[LoadRequest]:
    assert spec.path is not None
    requests: list[LoadRequest] = []
    try:
        with spec.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if len(requests) == num_requests:
                    break
                if line.strip():
                    requests.append(_from_line(line, f"{spec.path}, line {number}", spec))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {spec.path}: {error}", "path") from error
    if not requests or (num_requests is not None and len(requests) < num_requests):
        raise ConfigError(f"{spec.path} holds {len(requests)} requests, fewer than {num_requests or 1}", "path")
    return requests


def _from_line(line: str, where: str, spec: DatasetSpec) -> LoadRequest:
    """One object: `prompt` (text or token ids) or `messages`; `output_len` or `max_tokens` where it differs."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {error}", "path") from error
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise ConfigError(f"{where} must be an object with either prompt or messages", "path")
    prompt = entry.get("prompt", entry.get("messages"))
    if "prompt" in entry:
        is_good = isinstance(prompt, str) or (isinstance(prompt, list) and all(type(each) is int for each in prompt))
        wanted = "prompt must be text or a list of token ids"
    else:
        is_good = isinstance(prompt, list) and all(isinstance(each, dict) and "role" in each for each in prompt)
        wanted = "messages must be a list of objects with a role"
    if not is_good or not prompt:
        raise ConfigError(f"{where}: {wanted}, and not empty; got {prompt!r:.100}", "path")
    if spec.endpoint == "completions" and "messages" in entry:
        raise ConfigError(f"{where}: messages need --endpoint chat", "path")
    if spec.endpoint == "chat" and "prompt" in entry and not isinstance(prompt, str):
        raise ConfigError(f"{where}: a prompt of token ids needs --endpoint completions", "path")
    asked = entry.get("output_len", entry.get("max_tokens", spec.output_len))
    if type(asked) is not int or asked < 1:
        raise ConfigError(f"{where}: output_len must be a whole number of at least 1, got {asked!r:.100}", "path")
    return LoadRequest(prompt, asked)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
