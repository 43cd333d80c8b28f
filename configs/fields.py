"""Declared settings: a default, a help text and an allowed range in one place; it knows no setting by name.

The dataclasses of `configs.engine` validate themselves with `validate`, and the command line reads its
options, defaults and help texts from the same declarations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from configs.errors import ConfigError


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    flags: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """Declare a dataclass field: its default, its help text, its range, and further spellings of its CLI flag.

    `minimum` and `maximum` are inclusive, `above` is exclusive. None is allowed where the annotation allows it. A
    field of type `tuple[…, …]` may be given several times. The value of a `secret` is shown by no repr and no message.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "choices": choices,
        "flags": flags,
        "secret": secret,
    }
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def allowed(metadata: Mapping[str, Any]) -> str:
    """The allowed range in words, for messages and help texts; empty when anything of the type goes."""
    if metadata.get("choices"):
        return "one of " + ", ".join(metadata["choices"])
    low, high, above = metadata.get("minimum"), metadata.get("maximum"), metadata.get("above")
    parts = []
    if above is not None:
        parts.append(f"greater than {above}")
    if low is not None:
        parts.append(f"at least {low}")
    if high is not None:
        parts.append(f"at most {high}")
    return " and ".join(parts)


@functools.cache
def _type_hints(kind: type) -> dict[str, Any]:
    """Hints with their names resolved, which takes ten times as long as checking values against them."""
    return typing.get_type_hints(kind)


def validate(config: Any) -> None:
    """Check every declared field of a dataclass instance against its type and range.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    hints = _type_hints(config.__class__)
    for field in dataclasses.fields(config):
        if "help" not in field.metadata:
            continue
        check_value(field.name, getattr(config, field.name), hints[field.name], field.metadata)


def check_value(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    """Check one value against a type hint (a scalar type, optionally `| None`, or a tuple) and its declared range."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            raise ConfigError(f"{name} must be a list, got {_shown(value, metadata)}", name)
        for each in value:
            check_value(name, each, typing.get_args(hint)[0], metadata)
        return
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return
    scalars = tuple(kind for kind in kinds if kind is not type(None))
    # An int is a fine float; a bool is an int to Python but never a number a user meant.
    accepted = (*scalars, int) if float in scalars else scalars
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in scalars):
        wanted = " or ".join(kind.__name__ for kind in scalars)
        got = f"{_shown(value, metadata)} ({type(value).__name__})"
        raise ConfigError(f"{name} must be of type {wanted}, got {got}", name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}", name)
    if _out_of_range(value, metadata):
        raise ConfigError(f"{name} must be {allowed(metadata)}, got {_shown(value, metadata)}", name)


def _shown(value: Any, metadata: Mapping[str, Any]) -> str:
    return "a secret" if metadata.get("secret") else repr(value)


def _out_of_range(value: Any, metadata: Mapping[str, Any]) -> bool:
    low, high, above = metadata.get("minimum"), metadata.get("maximum"), metadata.get("above")
    choices = metadata.get("choices")
    return bool(
        (choices is not None and value not in choices)
        or (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
    )
