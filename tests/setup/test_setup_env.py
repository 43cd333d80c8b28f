"""setup_env.sh: its options, its choice of Python and of torch, and what it asks of pip.

pip is a stand-in that writes down what it was asked and pretends: no network, nothing installed. What the real one
does is seen whenever CI sets up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.setup.repository import ROOT

CPU_INDEX = "https://download.pytorch.org/whl/cpu"

FAKE_PIP = """
import json, os, pathlib, sys
arguments = sys.argv[1:]
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(json.dumps([arguments, os.environ.get("PIP_EXTRA_INDEX_URL")]) + "\\n")
packages = pathlib.Path(__file__).parent.parent
def write(path, text=""):
    (packages / path).parent.mkdir(exist_ok=True)
    (packages / path).write_text(text)
if arguments[-1].startswith("torch=="):
    source = "local" if "--no-index" in arguments else "index"
    if source not in os.environ["FAKE_PIP_SOURCES"].split(","):
        sys.exit("ERROR: No matching distribution found for " + arguments[-1])
    version = arguments[-1].removeprefix("torch==")
    cuda = None if "+cpu" in version else "13.0"
    write("torch/version.py", f"__version__ = {version!r}\\ncuda = {cuda!r}\\n")
    write("torch/__init__.py", "class cuda:\\n    is_available = staticmethod(lambda: False)\\n")
elif arguments[-1] == "lm-eval[api]" and os.environ["FAKE_PIP_SOURCES"] == "no harness":
    sys.exit("ERROR: No matching distribution found for lm-eval")
elif "--editable" in arguments:
    names = "transformers tokenizers safetensors llguidance zmq msgpack yaml fastapi uvicorn"
    names += " pytest hypothesis httpx jsonschema openai"
    for name in names.split() + ["configs", "nanoengine", "workers", "launch"]:
        write(name + "/__init__.py")
"""


class Clone:
    """A folder with the script, a .venv whose pip is the stand-in, and programs that hide the machine's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a clone"
        self.programs = folder / "programs"
        self.log = folder / "pip.log"
        self.folder.mkdir()
        self.programs.mkdir()
        for name in ("setup_env.sh", "activate.sh", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, self.folder)

    def make_venv(self, torch: str | None = None, cuda: str | None = None) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder / ".venv")], check=True)
        (packages,) = (self.folder / ".venv").glob("lib/python3*/site-packages")
        (packages / "pip").mkdir()
        (packages / "pip" / "__init__.py").touch()
        (packages / "pip" / "__main__.py").write_text(FAKE_PIP)
        if torch is not None:
            (packages / "torch").mkdir()
            (packages / "torch" / "__init__.py").write_text("class cuda:\n    is_available = staticmethod(bool)\n")
            (packages / "torch" / "version.py").write_text(f"__version__ = {torch!r}\ncuda = {cuda!r}\n")

    def add_program(self, name: str, body: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def run(self, *options: str, sources: str = "local,index") -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "FAKE_PIP_LOG": str(self.log),
            "FAKE_PIP_SOURCES": sources,
        }
        command = [str(self.folder / "setup_env.sh"), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def pip_calls(self) -> list[tuple[list[str], str | None]]:
        """Arguments, and the extra index in the environment, of each call of pip."""
        if not self.log.exists():
            return []
        return [(call[0], call[1]) for call in map(json.loads, self.log.read_text().splitlines())]

    def torch_calls(self) -> list[list[str]]:
        """What pip was asked about torch itself, without the options that every call has."""
        calls = [arguments for arguments, _ in self.pip_calls() if arguments[-1].startswith("torch==")]
        return [call[call.index("--no-deps") :] for call in calls]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def cpu_clone(clone: Clone) -> Clone:
    """On Linux, without an NVIDIA device."""
    if Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has an NVIDIA device")
    clone.add_program("uname", "echo Linux")
    clone.add_program("nvidia-smi", "echo 'no devices were found'; exit 6")
    return clone


@pytest.fixture
def gpu_clone(clone: Clone) -> Clone:
    clone.add_program("uname", "echo Linux")
    clone.add_program("nvidia-smi", "echo 'GPU 0: a stand-in'")
    return clone


def pin() -> str:
    (line,) = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    return line.removeprefix("torch==")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frobnicate"], "unknown option '--frobnicate'"),
        (["extra"], "unknown option 'extra'"),
        (["--torch", "rocm"], "--torch takes 'cpu' or 'cuda', not 'rocm'"),
        (["--torch"], "--torch needs a value"),
        (["--torch-index="], "--torch-index needs a value"),
    ],
)
def test_a_wrong_option_ends_with_one_line_and_code_2(clone: Clone, options: list[str], message: str) -> None:
    result = clone.run(*options)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not (clone.folder / ".venv").exists()


def test_help_names_every_option(clone: Clone) -> None:
    result = clone.run("--help")
    assert result.returncode == 0
    for option in ("--dev", "--python", "--torch cpu|cuda", "--torch-index", "--dry-run", "--verbose"):
        assert option in result.stdout


def test_messages_are_plain_where_there_is_no_terminal(clone: Clone) -> None:
    result = clone.run("--frobnicate")
    assert "\033" not in result.stdout + result.stderr


def test_a_python_out_of_range_is_named_with_the_range(clone: Clone) -> None:
    clone.add_program("python3", "echo 3.10.4")
    result = clone.run("--python", str(clone.programs / "python3"))
    assert result.returncode == 1
    assert "is Python 3.10.4; nanoengine needs 3.11 to 3.13" in result.stderr


def test_no_usable_python_lists_what_was_found(clone: Clone) -> None:
    clone.add_program("python3", "echo 3.14.0")
    clone.add_program("python3.13", "echo 'shim: not installed' >&2; exit 127")
    clone.add_program("python3.12", 'case "$*" in *ensurepip*) exit 1 ;; *) echo 3.12.1 ;; esac')
    clone.add_program("python3.11", "exit 127")
    clone.add_program("python", "echo 2.7.18")
    result = clone.run()
    assert result.returncode == 1
    for text in (
        "python3 is 3.14.0",
        "python3.12 (3.12.1) lacks ensurepip",
        "apt install python3-venv",
        "3.11 to 3.13",
    ):
        assert text in result.stderr
    assert "python3.13" not in result.stderr


def test_the_first_python_that_works_is_taken(clone: Clone) -> None:
    clone.add_program("python3", "echo 3.9.2")
    clone.add_program("python3.13", "echo 3.13.0")
    result = clone.run("--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"making .venv with {clone.programs}/python3.13 (3.13.0)" in result.stdout
    assert not (clone.folder / ".venv").exists()


def test_a_half_made_venv_is_made_anew(clone: Clone) -> None:
    (clone.folder / ".venv" / "bin").mkdir(parents=True)
    result = clone.run("--dry-run", "--python", sys.executable)
    assert "anew: it is incomplete" in result.stdout


def test_torch_comes_from_a_local_wheel_where_pip_knows_one(cpu_clone: Clone) -> None:
    cpu_clone.make_venv()
    result = cpu_clone.run(sources="local,index")
    assert result.returncode == 0, result.stderr
    assert cpu_clone.torch_calls() == [["--no-deps", "--no-index", f"torch=={pin()}+cpu"]]


def test_torch_comes_from_the_cpu_index_without_a_local_wheel(cpu_clone: Clone) -> None:
    cpu_clone.make_venv()
    result = cpu_clone.run(sources="index")
    assert result.returncode == 0, result.stderr
    _, call = cpu_clone.torch_calls()
    assert call[call.index("--index-url") + 1] == CPU_INDEX
    # The build is part of the pin and no other index is asked: a CUDA build cannot slip in.
    assert call[-1] == f"torch=={pin()}+cpu"
    assert cpu_clone.pip_calls()[1][1] == CPU_INDEX


def test_an_index_that_does_not_answer_ends_it_with_what_to_do(cpu_clone: Clone) -> None:
    cpu_clone.make_venv()
    result = cpu_clone.run(sources="none")
    assert result.returncode == 1
    assert "--torch-index URL" in result.stderr
    assert all("+cpu" in arguments[-1] for arguments, _ in cpu_clone.pip_calls())


def test_with_an_nvidia_device_the_plain_pin_is_taken(gpu_clone: Clone) -> None:
    gpu_clone.make_venv()
    result = gpu_clone.run()
    assert result.returncode == 0, result.stderr
    assert gpu_clone.torch_calls() == [["--no-deps", f"torch=={pin()}"]]


def test_on_macos_the_plain_pin_is_taken(clone: Clone) -> None:
    clone.add_program("uname", "echo Darwin")
    clone.make_venv()
    assert clone.run().returncode == 0
    assert clone.torch_calls() == [["--no-deps", f"torch=={pin()}"]]


def test_macos_has_no_cuda_build(clone: Clone) -> None:
    clone.add_program("uname", "echo Darwin")
    result = clone.run("--torch", "cuda")
    assert result.returncode == 2
    assert "no CUDA build" in result.stderr


@pytest.mark.parametrize("version", ["2.9.0", "2.10.1+cpu", "3.0.0"])
def test_a_recent_torch_is_kept(cpu_clone: Clone, version: str) -> None:
    cpu_clone.make_venv(torch=version)
    result = cpu_clone.run()
    assert result.returncode == 0, result.stderr
    assert cpu_clone.torch_calls() == []
    assert f"torch=={version}" in (cpu_clone.folder / ".venv" / "constraints.txt").read_text().splitlines()


def test_an_old_torch_is_replaced(cpu_clone: Clone) -> None:
    cpu_clone.make_venv(torch="2.8.1+cpu")
    assert cpu_clone.run().returncode == 0
    assert cpu_clone.torch_calls() == [["--no-deps", "--force-reinstall", "--no-index", f"torch=={pin()}+cpu"]]


def test_torch_cpu_overrides_the_device_and_the_torch_that_is_there(gpu_clone: Clone) -> None:
    gpu_clone.make_venv(torch="2.13.0", cuda="13.0")
    assert gpu_clone.run("--torch", "cpu").returncode == 0
    assert gpu_clone.torch_calls() == [["--no-deps", "--force-reinstall", "--no-index", f"torch=={pin()}+cpu"]]


def test_torch_cuda_overrides_the_missing_device(cpu_clone: Clone) -> None:
    cpu_clone.make_venv()
    assert cpu_clone.run("--torch=cuda").returncode == 0
    assert cpu_clone.torch_calls() == [["--no-deps", f"torch=={pin()}"]]


def test_torch_index_overrides_where_and_whether(gpu_clone: Clone) -> None:
    gpu_clone.make_venv(torch="2.13.0+cpu")
    assert gpu_clone.run("--torch-index", "https://index.example/cu130").returncode == 0
    (call,) = gpu_clone.torch_calls()
    assert call[:4] == ["--no-deps", "--force-reinstall", "--index-url", "https://index.example/cu130"]
    assert call[-1] == f"torch=={pin()}"
    assert gpu_clone.pip_calls()[0][1] == "https://index.example/cu130"


def test_a_cpu_torch_that_is_kept_beside_an_nvidia_device_is_mentioned(gpu_clone: Clone) -> None:
    gpu_clone.make_venv(torch="2.13.0+cpu")
    result = gpu_clone.run()
    assert result.returncode == 0
    assert "--torch cuda replaces it" in result.stderr


@pytest.mark.parametrize(("cuda", "has_triton"), [(None, True), ("13.0", False)])
def test_the_rest_installs_under_the_exact_torch(cpu_clone: Clone, cuda: str | None, has_triton: bool) -> None:
    cpu_clone.make_venv(torch="2.13.0+local", cuda=cuda)
    result = cpu_clone.run("--dev")
    assert result.returncode == 0, result.stderr
    constraints = cpu_clone.folder / ".venv" / "constraints.txt"
    for arguments, _ in cpu_clone.pip_calls():
        if "install" in arguments:
            assert arguments[arguments.index("-c") + 1] == str(constraints)
    lines = constraints.read_text().splitlines()
    assert [line for line in lines if line.startswith("torch==")] == ["torch==2.13.0+local"]
    assert any(line.startswith("pytest==") for line in lines)
    assert any(line.startswith("triton==") for line in lines) is has_triton


@pytest.mark.parametrize(("options", "what"), [([], "."), (["--dev"], ".[dev]")])
def test_dev_adds_the_extra(cpu_clone: Clone, options: list[str], what: str) -> None:
    cpu_clone.make_venv(torch="2.13.0+cpu")
    assert cpu_clone.run(*options).returncode == 0
    assert [arguments[-1] for arguments, _ in cpu_clone.pip_calls() if "--editable" in arguments] == [what]


def test_the_harness_of_one_test_is_asked_for_and_not_insisted_on(cpu_clone: Clone) -> None:
    cpu_clone.make_venv(torch="2.13.0+cpu")
    assert cpu_clone.run("--dev").returncode == 0
    assert not [arguments for arguments, _ in cpu_clone.pip_calls() if "lm-eval[api]" in arguments]
    result = cpu_clone.run("--dev", "--eval", sources="no harness")
    assert result.returncode == 0
    assert "test_lm_eval.py will be skipped" in result.stderr
    assert "lm-eval could not be installed" not in cpu_clone.run("--dev", "--eval").stderr
    (first, _) = (arguments for arguments, _ in cpu_clone.pip_calls() if "lm-eval[api]" in arguments)
    assert first[first.index("-c") + 1] == str(cpu_clone.folder / ".venv" / "constraints.txt")


def test_a_dry_run_asks_nothing_of_pip(cpu_clone: Clone) -> None:
    cpu_clone.make_venv()
    result = cpu_clone.run("--dry-run", "--dev")
    assert result.returncode == 0
    assert f"torch {pin()}+cpu" in result.stdout
    assert cpu_clone.pip_calls() == []


def test_activate_says_what_is_missing_and_how_to_run_it(clone: Clone) -> None:
    executed = subprocess.run(["bash", str(clone.folder / "activate.sh")], capture_output=True, text=True)
    assert executed.returncode == 1
    assert "run: source activate.sh" in executed.stderr
    sourcing = ["bash", "-c", 'source "$0" && command -v python', str(clone.folder / "activate.sh")]
    missing = subprocess.run(sourcing, capture_output=True, text=True)
    assert missing.returncode == 1
    assert "run ./setup_env.sh first" in missing.stderr
    clone.make_venv()
    active = subprocess.run(sourcing, capture_output=True, text=True)
    assert active.stdout.strip() == str(clone.folder / ".venv" / "bin" / "python")
