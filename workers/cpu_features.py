"""What this machine's processor can do, read from the kernel's own list; knows no model."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Feature names of /proc/cpuinfo (`flags` on x86, `Features` on ARM), e.g. `avx512_bf16`; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def has_native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512-BF16, AMX or ARM's BF16) instead of converting."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def has_tiles_for(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type in AMX tiles here (unless its own environment variable forbids it)."""
    flag = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "all").lower()
    return flag in cpu_flags() and (limit in ("all", "default") or "amx" in limit)
