"""Keeps our top-level packages ours where the working directory or a script's folder holds others of their names.

`configs`, `workers` and `launch` are common names, and Python looks into the working directory (`python -m`) or
the script's folder before it looks at what is installed. Three things follow, one function each:

* `prefer_own_packages`: a program of ours (`launch`) takes the packages beside itself, whatever sys.path says.
* `check_packages`: a library in somebody's program (`nanoengine`) must not replace his `configs`, so it refuses.
* `child_environment`: a child process of ours does not search the working directory at all.

Uses the standard library only and imports none of our packages, since it decides which ones those are. It knows
nothing of what they hold.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
"""The folder that holds all of our packages: a clone, or site-packages."""


class ForeignPackageError(ImportError):
    """A package that is not ours stands where one of ours is needed; the message names its path."""


def check_packages(*names: str) -> None:
    """Raise ForeignPackageError when one of `names` is, or would be, imported from elsewhere. Imports nothing."""
    for name in names:
        path = _location(name)
        if path is not None and not _is_ours(name, path):
            raise ForeignPackageError(
                f"the package {name!r} of nanoengine ({ROOT / name}) is hidden by another of that name: {path}; "
                "rename that one, or take its parent folder off the import path",
                name=name,
                path=str(path),
            )


def prefer_own_packages(*names: str) -> None:
    """Import, from beside this package, each of `names` that sys.path would take from elsewhere.

    Raises ForeignPackageError for one that was already imported from elsewhere: somebody uses that one.
    """
    for name in names:
        path = _location(name)
        if name not in sys.modules and (path is None or not _is_ours(name, path)):
            _import_own(name)
    check_packages(*names)


def child_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment (`base`, by default os.environ) in which `python -m nanoengine.…` finds our packages.

    PYTHONSAFEPATH keeps the child's working directory out of its sys.path, and multiprocessing hands that down to
    the processes the child spawns. A clone that is not installed is put on the path; site-packages is not, as it
    is there already and must stay behind the standard library.
    """
    environment = dict(os.environ if base is None else base)
    environment["PYTHONSAFEPATH"] = "1"
    if not any(_is_same(ROOT, folder) for folder in [*site.getsitepackages(), site.getusersitepackages()]):
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
    return environment


def _location(name: str) -> Path | None:
    """Where `name` was imported from, or would be; None where nothing of that name is found."""
    module = sys.modules.get(name)
    spec: ModuleSpec | None
    if module is not None:
        spec = getattr(module, "__spec__", None)
    else:
        spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    if folders:
        return Path(folders[0])
    return Path(spec.origin) if spec.origin else None


def _is_ours(name: str, path: Path) -> bool:
    return _is_same(ROOT / name, path)


def _is_same(left: Path | str, right: Path | str) -> bool:
    try:
        return os.path.samefile(left, right)
    except OSError:  # one of the two does not exist
        return False


def _import_own(name: str) -> None:
    spec = PathFinder.find_spec(name, [str(ROOT)])
    if spec is None or spec.loader is None:
        raise ForeignPackageError(f"the package {name!r} is missing from {ROOT}: install nanoengine again", name=name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
