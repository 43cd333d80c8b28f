"""A folder of ours' name in the working directory does not hide ours; one that wins all the same is named."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

from nanoengine._packages import child_environment
from tests.setup.repository import ROOT

WHERE = "import configs; print(configs.__path__[0])"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A working directory with a package `configs` that is not ours."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    return tmp_path


def run_python(
    *arguments: str, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    if environment is None:
        # Ours is on the path, behind the working directory, as after an install.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_the_foreign_one_would_win_without_a_guard(foreign: Path) -> None:
    """Otherwise the tests below prove nothing."""
    assert run_python("-c", WHERE, cwd=foreign).stdout.strip() == str(foreign / "configs")


@pytest.mark.parametrize("name", ["configs", "nanoengine", "workers"])
@pytest.mark.parametrize("kind", ["package", "module", "folder"])
def test_ours_wins_over_the_working_directory(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "module":
        (tmp_path / f"{name}.py").touch()
    else:
        (tmp_path / name).mkdir()
    if kind == "package":
        (tmp_path / name / "__init__.py").touch()
    result = run_python("-c", f"import launch, {name}; print({name}.__path__[0])", cwd=tmp_path)
    assert result.stdout.strip() == str(ROOT / name), result.stderr


def test_the_command_line_starts_beside_a_foreign_configs(foreign: Path) -> None:
    (foreign / "configs" / "__init__.py").write_text("raise RuntimeError('the foreign one was imported')\n")
    result = run_python("-m", "launch", "--help", cwd=foreign)
    assert result.returncode == 0, result.stderr
    assert "--tp" in result.stdout


def test_a_foreign_one_that_wins_ends_the_program_with_one_line(foreign: Path) -> None:
    result = run_python("-c", "import configs, launch", cwd=foreign)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("nanoengine: ")
    assert str(foreign / "configs") in line


@pytest.mark.parametrize("before", ["", "import configs"])
def test_a_script_beside_a_foreign_configs_is_told_its_path(foreign: Path, before: str) -> None:
    """The library does not replace the package of somebody's program; it ends with a line that says what is wrong."""
    script = foreign / "script.py"
    script.write_text(f"{before}\nimport nanoengine\n")
    result = run_python(str(script), cwd=ROOT)
    assert result.returncode == 1
    assert str(foreign / "configs") in result.stderr.splitlines()[-1]


def test_a_script_beside_a_plain_folder_of_that_name_runs(tmp_path: Path) -> None:
    """A folder of yaml files called configs is common, and hides nothing."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "script.py").write_text("import nanoengine\n" + WHERE)
    result = run_python(str(tmp_path / "script.py"), cwd=tmp_path)
    assert result.stdout.strip() == str(ROOT / "configs"), result.stderr


def test_a_child_process_and_what_it_spawns_see_ours(foreign: Path) -> None:
    spawn = f"""
import multiprocessing
{WHERE}
process = multiprocessing.get_context("spawn").Process(target=exec, args=({WHERE!r},))
process.start()
process.join()
"""
    result = run_python("-c", spawn, cwd=foreign, environment=child_environment())
    assert result.stdout.split() == [str(ROOT / "configs")] * 2, result.stderr


def test_a_child_keeps_the_path_it_inherits_behind_ours() -> None:
    environment = child_environment({"PYTHONPATH": "elsewhere", "HOME": "home"})
    assert environment["HOME"] == "home"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "elsewhere"


def test_site_packages_are_not_put_before_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(ROOT)])
    assert "PYTHONPATH" not in child_environment({})
