"""Builds the wheel and looks: a wheel without package data has no model and no yaml, and nothing says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.setup.repository import PACKAGES, ROOT

# The metadata names README.md; the licence, should there be one, is found by setuptools.
METADATA = ("pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy (a build leaves folders behind) with no network and no build environment."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in METADATA:
        shutil.copy(ROOT / name, source)
    # What must stay out, were it found by auto-discovery.
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "out", "."]
    build = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = (source / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def files_of(folder: Path) -> set[str]:
    return {
        str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_file_of_our_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """A data file of a kind that pyproject.toml does not name would be missing."""
    held = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert held == set().union(*(files_of(ROOT / package) for package in PACKAGES))


def test_the_registry_and_the_demo_model_are_package_data(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "configs/model_paths.yaml" in names
    demo = {name.removeprefix("configs/demo_model/") for name in names if name.startswith("configs/demo_model/")}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= demo
    assert any(name.endswith(".safetensors") for name in demo)


def test_every_package_is_marked_as_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_the_console_command_is_declared(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "nanoengine = launch.cli:main" in wheel.read(entry_points).decode()


def test_the_version_has_one_source(wheel: zipfile.ZipFile) -> None:
    from nanoengine.version import __version__

    assert Path(str(wheel.filename)).name.startswith(f"nanoengine-{__version__}-py3-none-any")
