"""Compiles what the launchers launch, for a GPU that is not there, and prints what each kernel takes of it.

    python tests/workers/kernels/compile_offline.py [--short] [80 90 …]      # compute capabilities; by default 90

The kernels' launchers are called with CPU tensors while Triton's launch is replaced by a compilation with the same
arguments, the same divisibility hints and the same options; ptxas then tells registers and spills. One JSON object a
line goes to stdout. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from workers.kernels import activation, attention, norm, rotary_store, sampling

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def main() -> None:
    """Compile every kernel in the shapes of `launch_all`."""
    short = "--short" in sys.argv
    capabilities = [int(argument) for argument in sys.argv[1:] if argument != "--short"] or [90]
    warnings.simplefilter("error")
    seen: set[tuple[Any, ...]] = set()
    for capability in capabilities:

        def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, _capability=capability, **options: Any):
            values = dict(zip(self.arg_names, args, strict=False))
            values.update({name: options.pop(name) for name in list(options) if name in self.arg_names})
            key = (_capability, self.fn.__name__, str({name: _kind(value) for name, value in values.items()}))
            if key not in seen:
                seen.add(key)
                print(json.dumps(_compile(self, values, options, _capability)), flush=True)

        JITFunction.run = compile_instead  # type: ignore[method-assign, assignment]
        launch_all(short)


def _kind(value: Any) -> Any:
    return value.dtype if isinstance(value, torch.Tensor) else value


def _compile(function: Any, values: dict[str, Any], options: dict[str, Any], capability: int) -> dict[str, Any]:
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:  # Triton makes a constant of it
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
        if signature[parameter.name] == "constexpr" or parameter.do_not_specialize:
            continue
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _registers(compiled.asm["ptx"], capability)
    return {
        "kernel": function.fn.__name__,
        "sm": capability,
        "dtype": next(kind for kind in signature.values() if kind.startswith("*")),
        "constants": {name: value for name, value in constants.items() if isinstance(value, int)},
        "warps": compiled.metadata.num_warps,
        "shared_bytes": compiled.metadata.shared,
        "registers": registers,
        "spilled_bytes": spilled,
    }


def _registers(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, as ptxas tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", path, "-o", Path(folder) / "kernel.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", told)
    assert registers is not None, told
    return int(registers[1]), sum(int(spilled) for spilled in re.findall(r"(\d+) bytes spill stores", told))


def launch_all(short: bool) -> None:
    """Call every launcher in the shapes of Qwen3-0.6B; unless `short`, in many others, too."""
    _launch_layer(torch.bfloat16, 16, 8, 128, 1024, (None,))
    _launch_sampling(torch.bfloat16, 151_936)
    if short:
        return
    for dtype, heads, kv_heads, head_dim, hidden in [
        (torch.bfloat16, 32, 8, 128, 4096),
        (torch.bfloat16, 8, 4, 64, 512),
        (torch.float16, 8, 2, 96, 1024),
        (torch.bfloat16, 8, 2, 256, 2048),
        (torch.float32, 16, 8, 128, 1024),
    ]:
        _launch_layer(dtype, heads, kv_heads, head_dim, hidden, (None, torch.zeros(4, dtype=torch.int64)))
    for vocab_size in (151_936, 128_256):
        _launch_sampling(torch.float32, vocab_size)


def _launch_layer(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, hidden: int, indices: tuple[torch.Tensor | None, ...]
) -> None:
    block_size, num_tokens = 16, 4
    x = torch.zeros(num_tokens, hidden, dtype=dtype)
    norm.add_rms_norm(x, x, x[0], 1e-6)
    norm.add_rms_norm(x, None, x[0], 1e-6)
    activation.silu_and_mul(x)
    qkv = torch.zeros(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    angles = torch.zeros(num_tokens, 2, head_dim // 2)
    cache = torch.zeros(2, 2, kv_heads, block_size, head_dim, dtype=dtype)
    slots = torch.zeros(num_tokens, dtype=torch.int64)
    for weights in (None, torch.zeros(heads + kv_heads, head_dim, dtype=dtype)):
        rotary_store.rotate_and_store(qkv, heads, *(angles[:, None, i] for i in (0, 1)), weights, 1e-6, cache, slots)
    q = torch.zeros(num_tokens, heads, head_dim, dtype=dtype)
    tables = torch.zeros(num_tokens, 64, dtype=torch.int64)
    for index in indices:
        which = None if index is None else (index, index)
        for splits in (1, 16):
            attention.decode_attention(q, cache, tables, slots, 0.1, splits, q.clone(), which)
    attention.prefill_attention(q, cache, tables, torch.zeros(4, dtype=torch.int64), 0.1, q.clone())


def _launch_sampling(dtype: torch.dtype, vocab_size: int) -> None:
    each = torch.zeros(1, dtype=torch.float32)
    rows = sampling.DeviceRows(each, each.int(), each.double(), each, each.double())
    sampling.sample(torch.zeros(1, vocab_size, dtype=dtype), rows)


if __name__ == "__main__":
    main()
