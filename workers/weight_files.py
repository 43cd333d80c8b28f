"""Finds and opens a checkpoint's safetensors files and reads parts of their tensors; knows no model and no device.

Only headers are read when a checkpoint is opened. Files are mapped, and a read touches the part that is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from configs.errors import CheckpointError
from configs.model_files import check_inside, read_json_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_INDEX_BYTES = 64 * 2**20
# The file's own type names. Anything else (int8, float8 …) belongs to a quantisation that is not implemented.
_libc = ctypes.CDLL(None)
_DTYPES = ("F32", "BF16", "F16")


class WeightTensor:
    """One tensor of an open file, of which parts can be read."""

    def __init__(self, file: Any, name: str, path: Path) -> None:
        self._file, self._name, self.path = file, name, path
        header = file.get_slice(name)
        self.shape: tuple[int, ...] = tuple(header.get_shape())
        self.dtype_name: str = header.get_dtype()
        self._mapped: list[torch.Tensor] = []

    def read(self, dim: int, start: int, size: int) -> torch.Tensor:
        """Read `size` indices from `start` along `dim` (0 or 1), and nothing else, in the file's dtype.

        Raises:
            CheckpointError: the file cannot be read.
        """
        wanted = slice(start, start + size)
        try:
            tensor: torch.Tensor = self._file.get_slice(self._name)[(slice(None),) * dim + (wanted,)]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot read {self._name} from {self.path}: {error}") from error
        self._mapped.append(tensor)
        return tensor

    def release(self) -> None:
        """Forget what was read, which nobody may use any more: it counts as this process's memory while it is mapped.

        The file's pages stay in the system's cache. A view of other memory than a file's would lose its contents.
        """
        for tensor in filter(torch.numel, self._mapped):
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            start = tensor.data_ptr()
            end = start + tensor.element_size() * (1 + sum((size - 1) * stride for size, stride in strides))
            start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:
                _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
        self._mapped.clear()


@contextlib.contextmanager
def open_weights(model_dir: Path) -> Iterator[dict[str, WeightTensor]]:
    """All tensors of a model directory by name, readable inside the `with`.

    Raises:
        CheckpointError: there are no safetensors (only pickles, say), the index is malformed or names a file outside
            the directory, a file is missing or damaged, or a type is not a float of 16 or 32 bits.
    """
    with contextlib.ExitStack() as stack:
        tensors: dict[str, WeightTensor] = {}
        for path, promised in _find_files(model_dir).items():
            check_inside(path, model_dir, CheckpointError)
            file = stack.enter_context(_open(path))
            names = set(file.keys())
            if promised is not None and promised - names:
                raise CheckpointError(f"{path} lacks {name_some(promised - names)}, which {_INDEX} says it holds")
            twice = names & tensors.keys()
            if twice:
                raise CheckpointError(f"{path} and another file both hold {name_some(twice)}")
            # As they lie in the file: a disk is read from front to back.
            tensors |= {name: WeightTensor(file, name, path) for name in file.offset_keys()}
        odd = {name: tensor.dtype_name for name, tensor in tensors.items() if tensor.dtype_name not in _DTYPES}
        if odd:
            kinds = ", ".join(sorted(set(odd.values())))
            raise CheckpointError(
                f"{model_dir} holds tensors of type {kinds} ({name_some(set(odd))}); only {', '.join(_DTYPES)} are "
                "implemented"
            )
        yield tensors


def name_some(names: set[str], limit: int = 8) -> str:
    """Up to `limit` names in order, and how many more there are."""
    some = sorted(names)[:limit]
    more = len(names) - len(some)
    return ", ".join(some) + (f" and {more} more" if more else "")


def _find_files(model_dir: Path) -> dict[Path, set[str] | None]:
    """The files to read; with an index, each with the names it must hold."""
    if (model_dir / _SINGLE).is_file():
        return {model_dir / _SINGLE: None}
    if (model_dir / _INDEX).is_file():
        return _read_index(model_dir)
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a directory")
    pickles = {path.name for path in model_dir.iterdir() if path.suffix in _PICKLE_SUFFIXES}
    if pickles:
        raise CheckpointError(
            f"{model_dir} holds its weights as pickles only ({name_some(pickles)}); these can run code when loaded and "
            "are refused: safetensors only. Convert them, or use a revision of the model that has safetensors"
        )
    others = {path.name for path in model_dir.glob("*.safetensors")}
    seen = f" (it holds {name_some(others)})" if others else ""
    raise CheckpointError(f"{model_dir} has neither {_SINGLE} nor {_INDEX}{seen}; there are no weights to load")


def _read_index(model_dir: Path) -> dict[Path, set[str] | None]:
    path = model_dir / _INDEX
    weight_map = read_json_object(path, model_dir, CheckpointError, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} must map tensor names to files under weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file_name in weight_map.items():
        # A plain name in this directory: the index is data and must not lead anywhere else.
        plain = isinstance(file_name, str) and not set(file_name) & set("/\\\0") and not file_name.startswith(".")
        if not plain or not file_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} maps {name} to {file_name!r}; only plain names of .safetensors files in the same "
                "directory are allowed"
            )
        promised = files.setdefault(model_dir / file_name, set())
        assert promised is not None
        promised.add(name)
    missing = {file.name for file in files if not file.is_file()}
    if missing:
        raise CheckpointError(f"{path} names files that do not exist: {name_some(missing)}")
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
