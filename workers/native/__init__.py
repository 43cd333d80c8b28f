"""Kernels in C for processors with AMX tiles of bfloat16, compiled once with the system's C compiler.

`load()` gives them, or None where they cannot be had: then the plain twins compute, with other bits and more slowly.
"""

from workers.native.build import build
from workers.native.kernels import NativeKernels, NativeLinear, load

__all__ = ["NativeKernels", "NativeLinear", "build", "load"]
