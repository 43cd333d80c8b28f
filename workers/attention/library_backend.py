"""What backends share whose attention is another library's: their conditions, told before anything is loaded.

The cache and all that stands around attention in a layer are the Triton backend's. It knows no library by name, no
model and no scheduler.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import ClassVar

import torch

from configs.errors import ConfigError
from workers.attention.triton_backend import TritonBackend
from workers.forward_context import AttentionMetadata

LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)


class LibraryBackend(TritonBackend):
    """Attention by a library that is not a part of nanoengine's requirements.

    Attributes:
        name: of the backend, as a user writes it.
        package: whose `__version__` counts.
        least_version: major and minor.
        head_dims: sizes of a head that the library has kernels for.
        block_multiple: what `block_size` must be a multiple of.

    Raises:
        ConfigError: the device is none that the library has kernels for, or the library is too old.
        ImportError: it is not installed.
    """

    capturable = False  # unless a library is known for it
    name: ClassVar[str]
    package: ClassVar[str]
    least_version: ClassVar[tuple[int, int]]
    head_dims: ClassVar[Sequence[int]]
    block_multiple: ClassVar[int] = 1

    def __init__(self, device: torch.device) -> None:
        capability = compute_capability(device)
        if capability < LEAST_CAPABILITY:
            is_gpu = f" of compute capability {_dotted(capability)}" if device.type == "cuda" else ""
            raise ConfigError(
                f"attention_backend {self.name} needs a GPU of compute capability {_dotted(LEAST_CAPABILITY)} or "
                f"newer, the device is {device}{is_gpu}; use attention_backend=auto",
                "attention_backend",
            )
        super().__init__(device)
        self._device = device
        self._library: ModuleType = importlib.import_module(self.package)
        version = str(getattr(self._library, "__version__", "unknown"))
        if _leading_numbers(version) < self.least_version:
            raise ConfigError(
                f"attention_backend {self.name} needs {self.package} {_dotted(self.least_version)} or newer, "
                f"installed is {version}",
                "attention_backend",
            )

    def check(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """See `AttentionBackend.check`; computes two small steps, so that what a library cannot do here shows now."""
        if block_size % self.block_multiple:
            raise ConfigError(
                f"block_size must be a multiple of {self.block_multiple} with attention_backend {self.name}, got "
                f"{block_size}",
                "block_size",
            )
        if dtype not in DTYPES:
            raise ConfigError(
                f"dtype must be float16 or bfloat16 with attention_backend {self.name}, got "
                f"{str(dtype).removeprefix('torch.')}",
                "dtype",
            )
        if head_dim not in self.head_dims:
            raise ConfigError(
                f"attention_backend {self.name} takes heads of {_listed(self.head_dims)}, the model's have {head_dim}; "
                "use attention_backend=triton",
                "attention_backend",
            )
        try:
            for query_lens in ([1, 1], [1, 2]):  # decodes alone, and with a chunk beside one
                self._attend_to_zeros(query_lens, block_size, head_dim, dtype)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ValueError) as error:  # OSError: a compiler that a library calls is missing
            raise ConfigError(
                f"attention_backend {self.name} is installed ({self.package} {self._library.__version__}) but fails on "
                f"{self._device}: {error}",
                "attention_backend",
            ) from error

    @torch.inference_mode()
    def _attend_to_zeros(self, query_lens: list[int], block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        device, num_tokens = self._device, sum(query_lens)
        metadata = AttentionMetadata(
            query_lens=query_lens,
            seq_lens=[2] * len(query_lens),
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            block_tables=torch.zeros(len(query_lens), 2, dtype=torch.int64, device=device),
            block_size=block_size,
        )
        cache = torch.zeros(self.kv_cache_shape(1, block_size, 1, head_dim), dtype=dtype, device=device)
        q = torch.ones(num_tokens, 2, head_dim, dtype=dtype, device=device)
        if self.forward(q, cache, metadata, head_dim**-0.5).count_nonzero():
            raise RuntimeError("attention over values of 0 is not 0")


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, e.g. (9, 0); (0, 0) of anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _leading_numbers(version: str) -> tuple[int, ...]:
    """(2, 8) of "2.8.3.post1"; () where no number comes first."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return () if match is None else (int(match[1]), int(match[2]))


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def _listed(numbers: Sequence[int]) -> str:
    if isinstance(numbers, range):
        return f"{numbers[0]} to {numbers[-1]} in steps of {numbers.step}"
    return ", ".join(str(number) for number in numbers)
