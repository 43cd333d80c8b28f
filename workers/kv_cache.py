"""The paged K/V cache: how many blocks the memory holds, their allocation, and copies between them.

One tensor a layer, the block its first axis. It knows neither sequences nor how attention reads a block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from configs.engine import EngineConfig
from configs.errors import CapacityError, EngineError
from nanoengine.step import DEVICE_TO_DEVICE
from workers.attention.base import AttentionBackend

GIB = 1 << 30
# DESIGN.md, section 8: what all ranks on a CPU share by default.
MAX_CPU_BUDGET = 4 * GIB
CPU_SHARE = 4


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """Size and type of this rank's cache."""

    backend: AttentionBackend
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def layer_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of one layer's tensor; block first."""
        return self.backend.kv_cache_shape(num_blocks, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, on this rank."""
        return self.num_layers * math.prod(self.layer_shape(1)) * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> list[torch.Tensor]:
        """One tensor a layer. On CPU, pages are taken from the system as they are first written.

        Raises:
            CapacityError: the device has not that much memory.
        """
        try:
            shape = self.layer_shape(num_blocks)
            return [_zeros(shape, self.dtype, device) for _ in range(self.num_layers)]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise CapacityError(
                f"{num_blocks} K/V blocks of {_gib(self.bytes_per_block * num_blocks)} in all do not fit: {error}"
            ) from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU, untouched pages of the system, where torch would write gigabytes of them at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


def max_kv_blocks(config: EngineConfig, spec: KVCacheSpec, on_gpu: bool, measure: Callable[[], int]) -> int:
    """How many blocks this rank can hold.

    Args:
        config: resolved.
        spec: this rank's cache.
        on_gpu: the rank has a GPU of its own; else its share of the host's memory is meant.
        measure: bytes free for K/V: on a GPU this rank's, on CPU what the host has left for all ranks.

    Raises:
        CapacityError: num_kv_blocks is more than fits, or by default not one sequence of max_model_len fits.
    """
    ranks = 1 if on_gpu else config.parallel.world_size
    free = max(0, measure())
    asked = config.cache.num_kv_blocks
    if asked is not None:
        fitting = free // (spec.bytes_per_block * ranks)
        if asked > fitting:
            raise CapacityError(
                f"num_kv_blocks={asked} needs {_gib(asked * spec.bytes_per_block * ranks)} for {_ranks(ranks)}, "
                f"but {_gib(free)} are free; at most {fitting} blocks of {spec.block_size} tokens fit"
            )
        return asked
    budget = free if on_gpu else min(MAX_CPU_BUDGET, free // CPU_SHARE)
    fitting = budget // (spec.bytes_per_block * ranks)
    per_sequence = -(-config.max_model_len // spec.block_size)
    if fitting < per_sequence:
        if not fitting:
            advice = "free some memory or use fewer ranks"
        else:
            advice = f"lower --max-model-len to at most {fitting * spec.block_size}"
        raise CapacityError(
            f"one sequence of max_model_len {config.max_model_len} needs "
            f"{_gib(per_sequence * spec.bytes_per_block * ranks)} of K/V for {_ranks(ranks)}, but the budget is "
            f"{_gib(budget)} of {_gib(free)} free; {advice}"
            + ("" if on_gpu else ", or set --num-kv-blocks to use more of the memory")
        )
    return min(fitting, config.scheduler.max_num_seqs * per_sequence)


def copy_blocks(caches: list[torch.Tensor], copies: list[tuple[int, int, int]]) -> None:
    """Perform (direction, source, destination) copies in every layer, in order.

    Raises:
        EngineError: a block that does not exist, or a copy to or from the host.
    """
    num_blocks = len(caches[0])
    for direction, source, destination in copies:
        if direction != DEVICE_TO_DEVICE:
            raise EngineError(f"block copy {source} -> {destination} involves the host: swapping is not built yet")
        if not (0 <= source < num_blocks and 0 <= destination < num_blocks):
            raise EngineError(f"block copy {source} -> {destination} is outside the cache of {num_blocks} blocks")
        for cache in caches:
            cache[destination].copy_(cache[source])


def free_host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take without swapping: the kernel's MemAvailable, or less in a container.

    Args:
        proc: where procfs is mounted.
        cgroups: where control groups are mounted, of version 1 or 2.
    """
    free = min(_available(proc / "meminfo"), *_cgroup_rests(proc, cgroups), 1 << 62)
    return max(0, free)


def _available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise EngineError(f"{meminfo} has no MemAvailable")


def _cgroup_rests(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each limiting group around this process leaves; page cache that can be dropped counts as free."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's, of which only the mount's root is visible.
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            rest = _group_rest(group, *names)
            if rest is not None:
                yield rest
            if group == root:
                break


def _group_rest(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit, usage = (group / limit_name).read_text().strip(), int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - usage + int(stat.get(cache_name, 0))


def free_gpu_memory(device: torch.device, utilization: float, profile: Callable[[], None]) -> int:
    """Bytes left for K/V on a GPU when everything else, the largest step's activations included, has its share.

    Args:
        device: this rank's.
        utilization: share of the GPU's memory that may be used in all.
        profile: runs the largest step, on a cache of next to nothing.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    profile()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    # Other processes' memory, the weights and whatever the libraries took in their first call.
    free, total = torch.cuda.mem_get_info(device)
    return int(total * utilization) - (total - free) - activations


def _gib(number: int) -> str:
    return f"{number / GIB:.2f} GiB"


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
