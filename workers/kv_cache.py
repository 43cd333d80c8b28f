"""The paged K/V cache and the host tier below it: how many blocks fit, their allocation, and copies between them.

On the device there is one tensor a layer, the block its first axis. On the host a block is one piece of memory over
all layers, so that it moves in one transfer. This module knows neither sequences nor how attention reads a block.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.engine import EngineConfig
from configs.errors import CapacityError, EngineError
from nanoengine.step import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, BlockCopy
from workers.attention.base import AttentionBackend
from workers.staging import send

GIB = 1 << 30
# What all ranks on a CPU share by default: a quarter of the free memory, at most 4 GiB; but as much as one sequence
# needs, up to a half. Pages are taken as they are written, so a long context costs nothing until somebody uses it.
MAX_CPU_BUDGET = 4 * GIB
CPU_SHARE = 4
CPU_SHARE_OF_ONE_SEQUENCE = 2
# So many blocks at most are gathered at once on their way: it bounds the memory that this takes on the device.
MAX_BLOCKS_PER_COPY = 32


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

    def allocate_host(self, num_blocks: int, device: torch.device) -> torch.Tensor | None:
        """The host tier of a rank on `device`: (num_blocks, num_layers, *shape of a layer's block); None without any.

        On CPU, pages are taken from the system as they are first written. For a GPU they are pinned, all of them now:
        only so can transfers run beside the computing, and memory that is not there is noticed before serving.

        Raises:
            CapacityError: the host has not that much memory, or cannot pin it.
        """
        if not num_blocks:
            return None
        try:
            host = _zeros((num_blocks, self.num_layers, *self.layer_shape(1)[1:]), self.dtype, torch.device("cpu"))
            return host if device.type != "cuda" else _pinned(host)
        except (MemoryError, RuntimeError) as error:
            raise CapacityError(
                f"a swap_space of {num_blocks} K/V blocks, {_gib(self.bytes_per_block * num_blocks)}, does not fit "
                f"the host's memory: {error}"
            ) from error


def _pinned(host: torch.Tensor) -> torch.Tensor:
    """Pin the memory of `host` as it is: torch's own pinned allocator would round gigabytes up to a power of two."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)))
    weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr())
    return host


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
        on_gpu: the rank has a GPU of its own; else its share of the host's memory is meant, beside all swap_space.
        measure: bytes free for K/V: on a GPU this rank's, on CPU what the host has left for all ranks.

    Raises:
        CapacityError: num_kv_blocks is more than fits, or by default not one sequence of max_model_len fits.
    """
    ranks = 1 if on_gpu else config.parallel.world_size
    free = max(0, measure() - (0 if on_gpu else _swap_bytes(config)))
    asked = config.cache.num_kv_blocks
    if asked is not None:
        fitting = free // (spec.bytes_per_block * ranks)
        if asked > fitting:
            raise CapacityError(
                f"num_kv_blocks={asked} needs {_gib(asked * spec.bytes_per_block * ranks)} for {_ranks(ranks)}, "
                f"but {_gib(free)} are free; at most {fitting} blocks of {spec.block_size} tokens fit"
            )
        return asked
    per_sequence = -(-config.max_model_len // spec.block_size)
    budget = free
    if not on_gpu:
        one_sequence = min(per_sequence * spec.bytes_per_block * ranks, free // CPU_SHARE_OF_ONE_SEQUENCE)
        budget = max(min(MAX_CPU_BUDGET, free // CPU_SHARE), one_sequence)
    fitting = budget // (spec.bytes_per_block * ranks)
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


def max_host_blocks(config: EngineConfig, spec: KVCacheSpec, measure: Callable[[], int]) -> int:
    """How many blocks of this rank `swap_space` holds.

    Args:
        config: resolved.
        spec: this rank's cache.
        measure: bytes of free host memory, which all ranks share.

    Raises:
        CapacityError: the ranks' swap space is more than that, or holds not even one block.
    """
    swap_space, ranks = config.cache.swap_space, config.parallel.world_size
    if not swap_space:
        return 0
    free = max(0, measure())
    if _swap_bytes(config) > free:
        raise CapacityError(
            f"swap_space={swap_space:g} needs {_gib(_swap_bytes(config))} of host memory for {_ranks(ranks)}, but "
            f"{_gib(free)} are free; set it to at most {free / GIB / ranks:.2f}"
        )
    fitting = int(swap_space * GIB) // spec.bytes_per_block
    if not fitting:
        raise CapacityError(
            f"swap_space={swap_space:g} holds not one K/V block of {spec.bytes_per_block} bytes; set it to at least "
            f"{math.ceil(spec.bytes_per_block / GIB * 1e6) / 1e6:g}, or to 0"
        )
    return fitting


def _swap_bytes(config: EngineConfig) -> int:
    """Host memory that the swap space of all ranks takes."""
    return int(config.cache.swap_space * GIB) * config.parallel.world_size


def copy_blocks(caches: list[torch.Tensor], copies: list[BlockCopy], host: torch.Tensor | None = None) -> None:
    """Perform (direction, source, destination) copies in every layer, in order.

    On a GPU they are queued on the current stream, like all that reads or writes either side, and nothing waits.

    Args:
        caches: one tensor a layer, block first.
        copies: as in `StepInput`.
        host: what `KVCacheSpec.allocate_host` made, if there is a host tier.

    Raises:
        EngineError: a block or a direction that does not exist; nothing has been copied then.
    """
    num_blocks, num_host_blocks = len(caches[0]), 0 if host is None else len(host)
    sides = {
        DEVICE_TO_DEVICE: (num_blocks, num_blocks),
        DEVICE_TO_HOST: (num_blocks, num_host_blocks),
        HOST_TO_DEVICE: (num_host_blocks, num_blocks),
    }
    for direction, source, destination in copies:
        limits = sides.get(direction, (0, 0))
        if not (0 <= source < limits[0] and 0 <= destination < limits[1]):
            raise EngineError(
                f"block copy {source} -> {destination} (direction {direction}) is outside the cache of {num_blocks} "
                f"blocks and {num_host_blocks} on the host"
            )
    for direction, sources, destinations in _independent(copies):
        if direction == DEVICE_TO_DEVICE:
            _copy_on_device(caches, sources, destinations)
        elif host is not None:
            copy = _copy_to_host if direction == DEVICE_TO_HOST else _copy_from_host
            copy(caches, host, sources, destinations)


def _independent(copies: list[BlockCopy]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Runs of copies of one direction that may as well happen at once: direction, sources, destinations."""
    direction = -1
    sources: list[int] = []
    destinations: list[int] = []
    for kind, source, destination in copies:
        depends = destination in destinations or (kind == DEVICE_TO_DEVICE and source in destinations)
        if sources and (kind != direction or depends or len(sources) == MAX_BLOCKS_PER_COPY):
            yield direction, sources, destinations
            sources, destinations = [], []
        direction = kind
        sources.append(source)
        destinations.append(destination)
    if sources:
        yield direction, sources, destinations


def _copy_on_device(caches: list[torch.Tensor], sources: list[int], destinations: list[int]) -> None:
    taken, put = (send(ids, caches[0].device) for ids in (sources, destinations))
    for cache in caches:
        cache.index_copy_(0, put, cache.index_select(0, taken))


def _copy_to_host(caches: list[torch.Tensor], host: torch.Tensor, sources: list[int], destinations: list[int]) -> None:
    taken = send(sources, caches[0].device)
    gathered = torch.stack([cache.index_select(0, taken) for cache in caches], dim=1)  # (copies, layers, ...)
    for block, destination in zip(gathered, destinations, strict=True):
        host[destination].copy_(block, non_blocking=True)


def _copy_from_host(
    caches: list[torch.Tensor], host: torch.Tensor, sources: list[int], destinations: list[int]
) -> None:
    put = send(destinations, caches[0].device)
    gathered = torch.empty((len(sources), *host.shape[1:]), dtype=host.dtype, device=caches[0].device)
    for block, source in zip(gathered, sources, strict=True):
        block.copy_(host[source], non_blocking=True)
    for layer, cache in enumerate(caches):
        cache.index_copy_(0, put, gathered[:, layer])


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


def free_gpu_memory(
    device: torch.device, utilization: float, profile: Callable[[], None], num_sharing: int, meet: Callable[[], None]
) -> int:
    """Bytes left for a rank's K/V on a GPU when all else, the largest step's activations included, has its share.

    Args:
        device: this rank's.
        utilization: share of the GPU's memory that may be used in all.
        profile: runs the largest step, on a cache of next to nothing.
        num_sharing: ranks on this GPU.
        meet: returns once every rank has called it.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    profile()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    meet()  # ranks on this GPU have given back what they took for the profile, and none has made its cache
    # Other processes' memory, the weights and whatever the libraries took in their first call.
    free, total = torch.cuda.mem_get_info(device)
    meet()
    return (int(total * utilization) - (total - free)) // num_sharing - activations


def _gib(number: int) -> str:
    return f"{number / GIB:.2f} GiB"


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
