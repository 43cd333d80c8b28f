"""The command line: how options become settings, and that what is wrong is said in one line."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.engine import LAYERS, EngineConfig, setting_owners
from configs.errors import ConfigError
from launch.cli import main, make_parser, parse
from nanoengine.version import __version__


def flat(config: EngineConfig) -> dict[str, Any]:
    return {name: getattr(getattr(config, layer), name) for name, layer in setting_owners().items()}


def test_without_options_every_setting_has_its_declared_default() -> None:
    assert parse([]) == EngineConfig()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model /some/where", {"model": "/some/where"}),
        ("--tp 2", {"tensor_parallel_size": 2}),
        ("--tensor-parallel-size=4", {"tensor_parallel_size": 4}),
        ("--max-model-len 128 --max-num-seqs 3", {"max_model_len": 128, "max_num_seqs": 3}),
        ("--max_model_len=128 --max_num_seqs 3", {"max_model_len": 128, "max_num_seqs": 3}),
        ("--num-kv-blocks 7", {"num_kv_blocks": 7}),
        ("--num-gpu-blocks-override 7", {"num_kv_blocks": 7}),
        ("--gpu-memory-utilization 0.5", {"gpu_memory_utilization": 0.5}),
        ("--gpu-memory-utilization 1", {"gpu_memory_utilization": 1.0}),
        ("--no-prefix-caching", {"enable_prefix_caching": False}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--enable-prefix-caching", {"enable_prefix_caching": True}),
        ("--no-prefix-caching --enable-prefix-caching", {"enable_prefix_caching": True}),
        ("--no-enable-chunked-prefill", {"enable_chunked_prefill": False}),
        ("--enforce-eager --skip-tokenizer-init", {"enforce_eager": True, "skip_tokenizer_init": True}),
        ("--no-enforce-eager", {"enforce_eager": False}),
        ("--host ::1 --port 0 --api-key k_e_y", {"host": "::1", "port": 0, "api_key": ("k_e_y",)}),
        ("--api-key one --api-key=two", {"api_key": ("one", "two")}),
        ("--served-model-name my_model --log-level error", {"served_model_name": "my_model", "log_level": "error"}),
        ("--device cpu --dtype half --seed 9", {"device": "cpu", "dtype": "half", "seed": 9}),
    ],
)
def test_options_set_what_they_name_and_nothing_else(arguments: str, expected: dict[str, Any]) -> None:
    assert flat(parse(arguments.split())) == flat(EngineConfig()) | expected


def test_every_setting_has_an_option_and_a_line_of_help() -> None:
    text = make_parser().format_help()
    for kind in LAYERS.values():
        for field in dataclasses.fields(kind):
            if "help" in field.metadata:
                name = field.name.replace("_", "-")
                assert f"--{name}" in text or f"--no-{name.removeprefix('enable-')}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--block-size 0", "block_size must be at least 1 and at most 1024, got 0"),
        ("--tp two", "tensor_parallel_size must be a whole number, got 'two'"),
        ("--gpu-memory-utilization much", "gpu_memory_utilization must be a number, got 'much'"),
        ("--gpu-memory-utilization 0", "gpu_memory_utilization must be greater than 0"),
        ("--swap-space nan", "swap_space must be a finite number"),
        ("--dtype int3", "dtype must be one of"),
        ("--port 70000", "port must be at least 0 and at most 65535, got 70000"),
        ("--no-such-thing", "unknown option --no-such-thing"),
        ("--max-model-length 5", "did you mean --max-model-len?"),
        ("--max-model 5", "unknown option --max-model"),  # no abbreviations: the next version may make them ambiguous
        ("serve", "unexpected argument 'serve'"),
        ("--tp", "expected one argument"),
        ("--enforce-eager=yes", "enforce-eager"),
        ("--model no-such-model", "unknown model: 'no-such-model'; known models: demo"),
        ("--model ./no/such/dir", "no such directory"),
        ("--tp 3", "tensor_parallel_size must be one of 1, 2, 4"),
        ("--max-model-len 999999", "max_model_len must be at most 4096"),
        ("--host 0.0.0.0", "set api_key (--api-key KEY)"),
        ("--host no.such.host.invalid", "host must be an address of this machine"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_with_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nanoengine: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_busy_port_is_noticed_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in captured.err


def test_a_broken_checkpoint_is_one_line_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert main(["--model", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("nanoengine: error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", [["-m", "launch"], ["-c", "from launch.cli import main; raise SystemExit(main())"]])
def test_the_command_prints_version_help_and_errors(command: list[str]) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, timeout=60)

    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"nanoengine {__version__}\n", "")
    done = run("--help")
    assert done.returncode == 0
    assert "--tensor-parallel-size N, --tp N" in done.stdout
    done = run("--tp", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nanoengine: error: tensor_parallel_size must be at least 1 and at most 64, got 0\n"


def test_parsing_imports_no_web_framework() -> None:
    """An error in the settings must not wait for what only a server needs."""
    code = "import sys; from launch.cli import parse; parse(['--tp', '2']); sys.exit('fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_parser_error_is_an_error_of_the_settings() -> None:
    with pytest.raises(ConfigError):
        parse(["--port"])
