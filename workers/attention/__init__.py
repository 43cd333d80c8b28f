"""The attention backends by name, each imported only when it is asked for; knows nothing of how they work."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from configs.errors import ConfigError
from workers.attention.base import AttentionBackend
from workers.native import NativeKernels

# name -> "module:class". An optional backend's import may fail where its library is not installed.
_BACKENDS = {
    "torch": "workers.attention.torch_backend:TorchBackend",
    "triton": "workers.attention.triton_backend:TritonBackend",
    "flash_attn": "workers.attention.varlen_backend:FlashAttnBackend",
    "flashinfer": "workers.attention.flashinfer_backend:FlashInferBackend",
    "torch_varlen": "workers.attention.varlen_backend:TorchVarlenBackend",
}


def get_backend(name: str, device: torch.device, native: NativeKernels | None = None) -> AttentionBackend:
    """Make the backend called `name`, or with `auto` the best one for `device`.

    That is `triton` on a GPU where Triton is installed (it comes with torch's CUDA builds), on a CPU the native kernels
    if they are given, else `torch`. Another library's kernels are never chosen because they happen to be installed:
    they want other block sizes, and their bits change with their versions.

    Raises:
        ConfigError: an unknown name, a backend whose library is missing or too old, or one that the device cannot run.
    """
    if name == "auto" and native is not None and device.type == "cpu":
        from workers.attention.native_backend import NativeBackend

        return NativeBackend(native)
    chosen = _best(device) if name == "auto" else name
    if chosen not in _BACKENDS:
        known = ", ".join(["auto", *_BACKENDS])
        raise ConfigError(f"attention_backend must be one of {known}, got {name!r}", "attention_backend")
    module_name, _, class_name = _BACKENDS[chosen].partition(":")
    try:
        backend: AttentionBackend = getattr(importlib.import_module(module_name), class_name)(device)
    except ImportError as error:
        raise ConfigError(f"attention_backend {chosen!r} is not available: {error}", "attention_backend") from error
    return backend


def _best(device: torch.device) -> str:
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") is not None else "torch"
