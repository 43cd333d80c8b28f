"""What clients ask: requests of every kind, whose answers depend on nothing but the request; sends nothing.

Each has a seed or is greedy, so that an undisturbed server gives the only right answer to it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
# In front of a client's own id in those of answers.
ID_PREFIXES = {COMPLETIONS: "cmpl-", CHAT: "chatcmpl-", GENERATE: "gen-"}
_STORY = "Tell me a story about Lily the bear, the garden and the flute."
_PROMPTS = (_STORY, "中国的首都是", "What is 17 + 25? Answer:", "Once upon a time", "The opposite of hot is")
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 6, "maxItems": 12},
    },
    "required": ["name", "numbers"],
    "additionalProperties": False,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One request, less `stream`. `can_stream`: it may be asked for as a stream."""

    kind: str
    path: str
    body: dict[str, Any]
    can_stream: bool = True

    @property
    def num_requests(self) -> int:
        """How many the engine counts it as: each prompt is one."""
        prompt = self.body.get("prompt")
        return len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str) else 1


def cases(seed: int, variants: int, length: int) -> list[Case]:
    """`variants` requests of each kind, of about `length` tokens each. The same arguments give the same requests."""
    dice = random.Random(f"traffic {seed}")
    return [_make(kind, make, dice, length) for kind, make in _KINDS.items() for _ in range(variants)]


def _make(kind: str, make: Callable[[random.Random, int], dict[str, Any]], dice: random.Random, length: int) -> Case:
    asked = make(dice, max(1, int(length * dice.uniform(0.5, 1.5))))
    path = CHAT if "messages" in asked else GENERATE if "prompt_token_ids" in asked else COMPLETIONS
    if path != GENERATE:
        asked["return_token_ids"] = True
    return Case(kind, path, asked, can_stream=not asked.keys() & {"use_beam_search", "best_of"})


def _completion(dice: random.Random, length: int, **fields: Any) -> dict[str, Any]:
    # A tail of its own, so that the variants of a kind share no more than the beginning of their prompts.
    prompt = f"{dice.choice(_PROMPTS)}{' Again.' * dice.randrange(3)}"
    return {"prompt": prompt, "max_tokens": length, "ignore_eos": True, "temperature": 0} | fields


def _sampled(dice: random.Random, length: int, **fields: Any) -> dict[str, Any]:
    return _completion(dice, length, temperature=0.9, seed=dice.randrange(2**31), **fields)


def _chat(dice: random.Random, length: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": dice.choice(_PROMPTS)}]
    asked = {"messages": messages, "max_tokens": length, "temperature": 0.8, "seed": dice.randrange(2**31)}
    return asked | {"ignore_eos": True} | fields


def _schema(dice: random.Random, length: int) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA, "strict": True}}
    return _chat(dice, 4 * length, response_format=form, ignore_eos=False)


def _prefix(dice: random.Random, length: int) -> dict[str, Any]:
    """A long prompt whose beginning is that of all others of its kind."""
    shared = " ".join(f"Line {number}: the {['cat', 'dog', 'owl', 'fox'][number % 4]} is here." for number in range(60))
    return _completion(dice, length // 2, prompt=f"{shared} Tell part {dice.randrange(1000)} of the story.")


def _ids(dice: random.Random, length: int) -> dict[str, Any]:
    sampling = {"max_tokens": length, "ignore_eos": True, "temperature": 0.7, "seed": dice.randrange(2**31)}
    return {"prompt_token_ids": [dice.randrange(100, 200) for _ in range(40)], "sampling_params": sampling}


_KINDS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "greedy": _completion,
    "sampled": _sampled,
    "top-k, top-p, min-p": lambda dice, length: _sampled(dice, length, top_k=40, top_p=0.9, min_p=0.02),
    "penalties": lambda dice, length: _completion(
        dice, length, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3
    ),
    "bias": lambda dice, length: _sampled(dice, length, logit_bias={"120": -5, "130": 2.5}, bad_words=["the", "一"]),
    "logprobs": lambda dice, length: _sampled(dice, length, logprobs=3),
    "chat": _chat,
    "chat logprobs": lambda dice, length: _chat(dice, length, logprobs=True, top_logprobs=2),
    "schema": _schema,
    "regex": lambda dice, length: _sampled(dice, length, guided_regex=r"([a-z]{3,8} ){6,12}[a-z]+\.", ignore_eos=False),
    "n": lambda dice, length: _sampled(dice, length // 2, n=2),
    "best_of": lambda dice, length: _sampled(dice, length // 2, best_of=2),
    "beams": lambda dice, length: _beams(dice, length),
    "stop": lambda dice, length: _sampled(dice, 2 * length, stop=["and", "。", "the g"]),
    "echo": lambda dice, length: _completion(dice, length // 2, echo=True, logprobs=2),
    "prompt logprobs": lambda dice, length: _completion(dice, length // 2, prompt_logprobs=1),
    "shared prefix": _prefix,
    "two prompts": lambda dice, length: _sampled(dice, length // 2, prompt=[_STORY, dice.choice(_PROMPTS)]),
    "token ids": _ids,
}


def _beams(dice: random.Random, length: int) -> dict[str, Any]:
    prompt = dice.choice(_PROMPTS)
    return {"prompt": prompt, "max_tokens": max(1, length // 4), "use_beam_search": True, "n": 3, "length_penalty": 0.8}


def hostile_requests(dice: random.Random) -> Iterator[tuple[str, bytes]]:
    """Paths and bodies that nobody means well with, in random order; each is to be answered with a 4xx."""
    deep: Any = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    asked: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": "x", "n": 10**6}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": -1}),
        (COMPLETIONS, {"prompt": [10**9]}),
        (COMPLETIONS, {"prompt": [[]]}),
        (COMPLETIONS, {"prompt": "a b " * 100_000}),
        (COMPLETIONS, {"prompt": "x", "guided_regex": "(a{1000}){1000}"}),
        (COMPLETIONS, {"prompt": "x", "structured_outputs": {"json": {"$ref": "#"}}}),
        (COMPLETIONS, {"prompt": "x", "structured_outputs": {"json": deep}}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"x": 1}}),
        (COMPLETIONS, {"prompt": "x", "model": "../../etc/passwd"}),
        (CHAT, {"messages": [{"role": "root", "content": "x"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ ''.__class__ }}"}),
        (GENERATE, {"prompt_token_ids": [2**63], "sampling_params": {"max_tokens": 4}}),
        (GENERATE, {"prompt_token_ids": [1], "sampling_params": {"temperature": -1}}),
        ("/abort", {"request_id": []}),
    ]
    raw = [
        (COMPLETIONS, b"[" * 100_000),
        (COMPLETIONS, b'{"prompt": "\\ud800", "max_tokens": 2}'),
        (COMPLETIONS, b'{"prompt": "x'),
        (CHAT, b"\x80\x05\x95."),
        (CHAT, b"\x00" * 99),
    ]
    everything = [*((path, json.dumps(body).encode()) for path, body in asked), *raw]
    dice.shuffle(everything)
    return iter(everything)
