"""Random JSON schemas of everything that structured outputs promise, bounded so that most documents come to an end."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ["id", "name", "größe", "名前", "a b", 'quo"te', "tags", "x", "value", "next"]
_PATTERNS = ["^[a-z]{1,6}$", "^(foo|bar)-[0-9]{2}$", "^[A-Z][a-z]*[!?]?$", "^\\d{4}-\\d{2}$", "^[αβγ]{2,4}$"]


def random_schema(seed: int) -> dict[str, Any]:
    """A schema whose top is an object; the same for the same seed."""
    return _object(random.Random(seed), depth=3)


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _number, _enum, _literal]
    if depth > 0:
        kinds += [_object, _array, _any_of]
    return rng.choice(kinds)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _any(rng, depth) for name in names}}
    required = [name for name in names if rng.random() < 0.6]
    if required:
        schema["required"] = required
    if rng.random() < 0.8:  # others have no bound
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_any(rng, depth)]
    return schema | {"items": _any(rng, depth)}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "time"])}
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-1000, 1000)
    if rng.random() < 0.6:
        schema: dict[str, Any] = {"type": "integer", "minimum": least, "maximum": least + rng.randint(10, 5000)}
        return schema | ({"multipleOf": rng.randint(2, 9)} if rng.random() < 0.2 else {})
    low = rng.choice(["minimum", "exclusiveMinimum"])
    return {"type": "number", low: least, "exclusiveMaximum": least + rng.randint(1, 50) / 4}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values = ["red", "grün", "青", 7, -1.5, True, None, [1, "x"], {"k": None}]
    return {"enum": rng.sample(values, rng.randint(1, 4))}


def _literal(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"const": "fest"}, {"type": ["integer", "null"]}])
