"""The table of folders and what each may import (DESIGN.md, section 4), enforced by reading every import statement.

It reads text only: what is imported by a name in a string (the worker's entry point) is not seen, and is meant so.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.setup.repository import PACKAGES, ROOT

OURS = {"configs", "nanoengine", "workers", "launch", "examples", "tests"}
WEB = {"fastapi", "starlette", "uvicorn"}
STEP_SIDE = {"nanoengine." + name for name in ("step", "channel", "sampling_params", "errors", "grammar")}


def imported_modules(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything `module` imports: `from a import b` is read as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def is_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def configs_may(module: str, name: str) -> bool:
    top = name.split(".")[0]
    return top in sys.stdlib_module_names or top in {"configs", "yaml"}


def nanoengine_may(module: str, name: str) -> bool:
    top = name.split(".")[0]
    if top in OURS:
        return top in {"nanoengine", "configs"}
    if top == "transformers":
        return module == "nanoengine.tokenizer"
    return top not in WEB | {"torch"}


def workers_may(module: str, name: str) -> bool:
    top = name.split(".")[0]
    if top == "nanoengine":
        return is_within(name, STEP_SIDE)
    return top in {"workers", "configs"} if top in OURS else top not in WEB


def launch_may(module: str, name: str) -> bool:
    return name.split(".")[0] not in {"tests", "examples"}


def examples_may(module: str, name: str) -> bool:
    """Public names of nanoengine, a sibling example, and any library."""
    top = name.split(".")[0]
    if top != "nanoengine":
        return top not in OURS - {"examples"}
    return name == "nanoengine" or (name.count(".") == 1 and name.split(".")[1] in public_names())


RULES: dict[str, Callable[[str, str], bool]] = {
    "configs": configs_may,
    "nanoengine": nanoengine_may,
    "workers": workers_may,
    "launch": launch_may,
    "examples": examples_may,
}


def public_names() -> list[str]:
    import nanoengine

    return list(nanoengine.__all__)


@pytest.mark.parametrize("package", RULES)
def test_a_package_imports_only_what_its_folder_may(package: str) -> None:
    broken = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        for line, name in imported_modules(path.read_text(encoding="utf-8"), module, is_package):
            if not RULES[package](module, name):
                broken.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not broken, "\n".join(broken)


def test_the_packages_are_found() -> None:
    """Guards the test above against passing because it looked at nothing."""
    for package in PACKAGES:
        assert list((ROOT / package).rglob("*.py")), package


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import torch.nn as nn", "workers.worker", "torch.nn"),
        ("from nanoengine import step", "workers.worker", "nanoengine.step"),
        ("from ..nanoengine.step import StepInput", "workers.worker", "nanoengine.step.StepInput"),
        ("from . import base", "workers.attention.torch", "workers.attention.base"),
        ("def f():\n    from .. import kv_cache", "workers.attention.torch", "workers.kv_cache"),
    ],
)
def test_names_are_resolved(source: str, module: str, expected: str) -> None:
    assert [name for _, name in imported_modules(source, module)] == [expected]


@pytest.mark.parametrize(
    ("package", "module", "name", "allowed"),
    [
        ("configs", "configs.engine", "torch", False),
        ("nanoengine", "nanoengine.scheduler", "torch", False),
        ("nanoengine", "nanoengine.executor", "torch.multiprocessing", False),
        ("nanoengine", "nanoengine.executor", "workers.worker", False),
        ("nanoengine", "nanoengine.tokenizer", "transformers.AutoTokenizer", True),
        ("nanoengine", "nanoengine.engine", "fastapi.FastAPI", False),
        ("workers", "workers.worker", "nanoengine.scheduler", False),
        ("workers", "workers.worker", "nanoengine.stepper", False),
        ("workers", "workers.worker", "nanoengine.step.StepInput", True),
        ("examples", "examples.offline", "workers.sampler", False),
        ("examples", "examples.offline", "nanoengine.scheduler", False),
        ("examples", "examples.train_demo_model", "demo_data", True),
    ],
)
def test_the_rules_say_what_the_table_says(package: str, module: str, name: str, allowed: bool) -> None:
    assert RULES[package](module, name) is allowed
