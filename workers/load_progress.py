"""Shows how far the reading of a checkpoint is: a bar on a terminal, lines in the log elsewhere; it reads nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

from tqdm import tqdm

from workers.weight_files import WeightTensor

logger = logging.getLogger(__name__)

# Where there is no terminal, a line comes so often; a checkpoint that is read sooner needs none.
LINE_SECONDS = 5.0
_BYTES = {"F32": 4}  # of a number; the others have 2


def shown_while_read(
    tensors: dict[str, WeightTensor],
    stream: TextIO | None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[str, WeightTensor]]:
    """The tensors by name, in their order; as each is taken, what came before it counts as read.

    Args:
        stream: where a bar may go, if it is a terminal; None for lines in any case.
        clock: seconds that only grow.
    """
    if stream is not None and stream.isatty():
        return _with_bar(tensors, stream)
    return _with_lines(tensors, clock)


def num_bytes(tensors: Iterable[WeightTensor]) -> int:
    """How large the tensors are in their files."""
    return sum(math.prod(tensor.shape) * _BYTES.get(tensor.dtype_name, 2) for tensor in tensors)


def _with_bar(tensors: dict[str, WeightTensor], stream: TextIO) -> Iterator[tuple[str, WeightTensor]]:
    numbers = _file_numbers(tensors)
    total = num_bytes(tensors.values())
    # It vanishes when it is full: the line that follows says what was loaded, and how long that took.
    with tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, file=stream, leave=False) as bar:
        for name, tensor in tensors.items():
            bar.set_postfix_str(f"file {numbers[tensor.path]} of {len(numbers)}", refresh=False)
            yield name, tensor
            bar.update(num_bytes([tensor]))


def _with_lines(tensors: dict[str, WeightTensor], clock: Callable[[], float]) -> Iterator[tuple[str, WeightTensor]]:
    numbers = _file_numbers(tensors)
    total, done, next_line = num_bytes(tensors.values()), 0, clock() + LINE_SECONDS
    for name, tensor in tensors.items():
        yield name, tensor
        done += num_bytes([tensor])
        if clock() >= next_line:
            next_line = clock() + LINE_SECONDS
            logger.info(
                "loading weights: %d%% (%.1f of %.1f GB, file %d of %d)",
                100 * done // total, done / 1e9, total / 1e9, numbers[tensor.path], len(numbers),
            )  # fmt: skip


def _file_numbers(tensors: dict[str, WeightTensor]) -> dict[object, int]:
    """Each file's number, from 1, in the order in which they are read."""
    paths = dict.fromkeys(tensor.path for tensor in tensors.values())
    return {path: number for number, path in enumerate(paths, start=1)}
