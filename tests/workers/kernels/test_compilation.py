"""Every kernel compiles for real GPUs, of which none is needed, and fits them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workers.kernels.inputs import DEVICE

ROOT = Path(__file__).parents[3]
# Shared memory of a block: 227 KiB on an H100, 163 KiB on an A100, 99 KiB on an RTX 3090 or 4090.
SMALLEST_SHARED_MEMORY = 99 * 1024

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" or importlib.util.find_spec("triton.backends.nvidia") is None,
    reason="the tests of the kernels compile them, or there is no compiler for NVIDIA",
)


def compile_kernels(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the compiler tells of each kernel; in a process of its own, since kernels are interpreted in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("compile_offline.py")
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fit(kernels: list[dict[str, Any]], most_spilled: int = 0) -> None:
    """Of a thread's registers at most so many bytes are spilled, and no program needs more than a supported GPU has."""
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SMALLEST_SHARED_MEMORY, kernel
        # float32 is there to compare with, and its products keep whole operands in registers.
        assert kernel["spilled_bytes"] <= (most_spilled if kernel["dtype"] != "*fp32" else 512), kernel


@pytest.mark.timeout(400)
def test_kernels_of_a_layer_compile_for_an_h100(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler refuses; head_dim 128 in bfloat16, as in Qwen3-0.6B."""
    kernels = compile_kernels(tmp_path, "--short", "90")
    assert {kernel["kernel"] for kernel in kernels} == {
        "_add_rms_norm", "_silu_and_mul", "_rotate_and_store", "_decode", "_merge_splits", "_prefill", "_sample",
    }  # fmt: skip
    assert_fit(kernels)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_kernels_compile_for_all_generations(tmp_path: Path) -> None:
    """Every type, head size and number of heads, for Ampere, Ada and Hopper."""
    # On Ampere, chunks of prompts spill some 26 registers of heads of 96 and 128.
    assert_fit(compile_kernels(tmp_path, "80", "89", "90"), most_spilled=128)
