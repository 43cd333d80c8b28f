"""The command line: options read from the declarations in `configs.engine`, errors in one line; knows no server.

Exit codes: 0 after a stop that was asked for, 1 for a failure, 2 for settings that cannot be.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from configs.engine import LAYERS, EngineConfig, setting_owners
from configs.errors import ConfigError, NanoEngineError, UnknownModelError
from configs.fields import allowed
from launch.options import OneLineParser
from nanoengine.version import __version__

PROGRAM = "nanoengine"
_DESCRIPTION = "Serve a language model over OpenAI's HTTP API."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m launch` and of the command `nanoengine`; returns the exit code."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv).resolve()
        # Only now: what is wrong with the settings is said without waiting for the web framework.
        from launch.supervisor import serve

        return serve(config)
    except NanoEngineError as error:
        print(f"{PROGRAM}: error: {' '.join(error.message.split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | UnknownModelError) else 1
    except KeyboardInterrupt:  # before the server has taken over the signals; nothing runs yet
        return 130


def parse(argv: Sequence[str]) -> EngineConfig:
    """The settings that a command line asks for. `--help` and `--version` print and exit.

    Raises:
        ConfigError: an unknown option, or an impossible value.
    """
    parser = make_parser()
    given, unknown = parser.parse_known_args([_dashed(argument) for argument in argv])
    if unknown:
        if "api_key" in given and not unknown[0].startswith("-"):  # it may be a key, and this line is logged somewhere
            raise ConfigError("unexpected argument; every option has a name, and each key its own --api-key", "api_key")
        raise ConfigError(_unknown(unknown[0], parser))
    kinds = {field.name: _kind(hint) for field, hint in _settings()}
    return EngineConfig.create(**{name: _read(name, value, kinds[name]) for name, value in vars(given).items()})


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; every option has a name (--model {argument}?)"
    name = argument.partition("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else "; --help lists them all")


def make_parser() -> argparse.ArgumentParser:
    """One option for each declared setting, grouped by layer; those not given are absent from the result."""
    parser = OneLineParser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    owners = setting_owners()
    groups = {layer: parser.add_argument_group(kind.__doc__.rstrip(".")) for layer, kind in LAYERS.items()}
    for field, hint in _settings():
        _add_setting(groups[owners[field.name]], field, hint)
    return parser


def _dashed(argument: str) -> str:
    """`--max_model_len=8` as `--max-model-len=8`, as vLLM reads it."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _settings() -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Every declared setting, with its type hint."""
    for kind in LAYERS.values():
        hints = typing.get_type_hints(kind)
        yield from ((field, hints[field.name]) for field in dataclasses.fields(kind) if "help" in field.metadata)


def _kind(hint: Any) -> type:
    """The scalar type of a hint that may allow None."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    kind: type = kinds[0]
    return kind


def _read(name: str, value: str | bool | list[str], kind: type) -> Any:
    """A value as its type, with an error that names the setting, as those of its range do."""
    if isinstance(value, list):
        return tuple(_read(name, each, kind) for each in value)
    try:
        return value if isinstance(value, bool) else kind(value)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise ConfigError(f"{name} must be {wanted}, got {value!r}", name) from None


def _add_setting(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    if _kind(hint) is bool:
        _add_switch(group, field, flag)
        return
    group.add_argument(
        flag,
        *field.metadata["flags"],
        dest=field.name,
        action="append" if typing.get_origin(hint) is tuple else "store",
        metavar=_metavar(field, _kind(hint)),
        help=_help(field, isinstance(hint, types.UnionType)),
    )


def _add_switch(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], flag: str) -> None:
    on = [flag, *field.metadata["flags"]]
    off = [flag.replace("--", "--no-", 1)]
    if flag.startswith("--enable-"):
        off.insert(0, flag.replace("--enable-", "--no-", 1))  # vLLM spells --no-enable-…
    # Help shows the spelling that changes something.
    text, hidden = field.metadata["help"].replace("%", "%%"), argparse.SUPPRESS
    shown_off = f"do not {text}" if field.default else hidden
    group.add_argument(
        *on, dest=field.name, action="store_true", default=argparse.SUPPRESS, help=hidden if field.default else text
    )
    group.add_argument(*off, dest=field.name, action="store_false", default=argparse.SUPPRESS, help=shown_off)


def _metavar(field: dataclasses.Field[Any], kind: type) -> str:
    choices = field.metadata["choices"]
    return "|".join(choices) if choices else {int: "N", float: "X"}.get(kind, "TEXT")


def _help(field: dataclasses.Field[Any], optional: bool) -> str:
    text = str(field.metadata["help"])
    if field.default != () and (field.default is not None or not optional):
        text += f" (default: {field.default})"
    limits = "" if field.metadata["choices"] else allowed(field.metadata)
    return (text + (f"; {limits}" if limits else "")).replace("%", "%%")
