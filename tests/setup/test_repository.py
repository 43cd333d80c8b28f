"""What a clone must be: free of one machine's paths, small, its shell scripts well-formed, its numbers agreeing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib

import pytest

from tests.setup.repository import ROOT, tracked_files

SCRIPTS = ["setup_env.sh", "activate.sh", ".ci/run"]
DEMO_MODEL = "configs/demo_model/"
MEGABYTE = 1_000_000


def test_no_file_holds_a_path_of_one_machine() -> None:
    # Spelt apart, so that this file does not find itself.
    machine_path = re.compile(rb"(?<![\w.}>\"'/-])/(?:" + b"|".join([b"wo" + b"rk", b"ro" + b"ot"]) + rb")/[\w.]")
    found = []
    for name in tracked_files():
        content = (ROOT / name).read_bytes()
        if b"\0" in content[:8192]:
            continue
        found += [f"{name}: {match.group()!r}" for match in machine_path.finditer(content)]
    assert not found, "\n".join(found)


def test_files_are_small() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in tracked_files()}
    large = {name: size for name, size in sizes.items() if size > MEGABYTE and not name.startswith(DEMO_MODEL)}
    assert not large
    assert sum(size for name, size in sizes.items() if name.startswith(DEMO_MODEL)) <= 12 * MEGABYTE


def test_nothing_that_is_built_is_tracked() -> None:
    built = re.compile(r"(^|/)(__pycache__|build|dist|\.venv|[^/]*\.egg-info)/|\.(pyc|so|whl|log)$")
    assert not [name for name in tracked_files() if built.search(name)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shell_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize("script", ["setup_env.sh", ".ci/run"])
def test_a_command_of_the_readme_is_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    subprocess.run(["shellcheck", *SCRIPTS], check=True, cwd=ROOT)


def test_setup_and_metadata_agree_on_python_and_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    script = (ROOT / "setup_env.sh").read_text(encoding="utf-8")
    versions = re.search(r"MIN_MINOR=(\d+) MAX_MINOR=(\d+)", script)
    torch = re.search(r"MIN_TORCH=([\d.]+)", script)
    assert versions is not None
    assert torch is not None
    assert project["requires-python"] == f">=3.{versions[1]},<3.{int(versions[2]) + 1}"
    assert f"torch>={torch[1]}" in project["dependencies"]


def test_every_dependency_has_a_tested_version() -> None:
    """A dependency without a pin installs whatever is newest on the day."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    ranges = {
        "requirements.txt": project["dependencies"],
        "requirements-dev.txt": extras["dev"] + extras["eval"],
    }
    for file, requirements in ranges.items():
        pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
        names = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}
        assert {name.lower() for name in pinned} == {name.lower() for name in names}, file


def test_ci_runs_the_command_of_the_readme() -> None:
    command = "./setup_env.sh --dev && .venv/bin/python -m pytest"
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
