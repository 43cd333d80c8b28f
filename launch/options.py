"""Parts of a command line that says in one line what is wrong with it; knows no command."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from configs.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print a page of usage, which hides what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise it, in the words of this project's other settings."""
        raise ConfigError(re.sub(r"^argument (\S+): must ", r"\1 must ", message))


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes whole numbers of this range, both ends included."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r:.100}") from None
        if value < least or (most is not None and value > most):
            upper = "" if most is None else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"must be at least {least}{upper}, got {value}")
        return value

    return read


def real(least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """The type of an option that takes finite numbers of this range: both ends included, and greater than `above`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r:.100}")
        bounds = ((value > above, f"greater than {above:g}"), (value >= least, f"at least {least:g}"))
        for is_kept, bound in (*bounds, (value <= most, f"at most {most:g}")):
            if not is_kept:
                raise argparse.ArgumentTypeError(f"must be {bound}, got {text:.100}")
        return value

    return read


def new_file(text: str) -> Path:
    """The type of an option that names a file to write, so that it cannot be written is said before the work."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        wrong = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise argparse.ArgumentTypeError(f"must be a file to write, got {text!r:.200}: {wrong}")
    return path
