"""The K/V budget, the numbers in its errors, where free memory is read from, and block copies."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from configs.engine import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from configs.errors import CapacityError, EngineError
from nanoengine.step import DEVICE_TO_DEVICE, DEVICE_TO_HOST
from workers.attention import get_backend
from workers.kv_cache import GIB, KVCacheSpec, copy_blocks, free_host_memory, max_kv_blocks

CPU = torch.device("cpu")
# 8 layers of 2 x 4 x 64 float32 a token: 16 KiB a token, 256 KiB a block.
SPEC = KVCacheSpec(get_backend("torch", CPU), 8, 16, 4, 64, torch.float32)


def config(world_size: int = 1, max_model_len: int = 4096, num_kv_blocks: int | None = None) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(max_model_len=max_model_len),
        cache=CacheConfig(num_kv_blocks=num_kv_blocks),
        scheduler=SchedulerConfig(max_num_seqs=100),
        parallel=ParallelConfig(tensor_parallel_size=world_size),
    )


def test_bytes_per_block_counts_all_layers_and_both_k_and_v() -> None:
    assert SPEC.bytes_per_block == 256 * 1024
    assert sum(cache.nbytes for cache in SPEC.allocate(3, CPU)) == 3 * SPEC.bytes_per_block
    assert dataclasses.replace(SPEC, dtype=torch.bfloat16).bytes_per_block == 128 * 1024


@pytest.mark.parametrize(("free", "budget"), [(8 * GIB, 2 * GIB), (1000 * GIB, 4 * GIB)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_cpu_ranks_share_one_budget(free: int, budget: int, world_size: int) -> None:
    """A quarter of free memory or 4 GiB, over all local ranks together."""
    blocks = max_kv_blocks(config(world_size), SPEC, False, lambda: free)
    assert blocks == budget // SPEC.bytes_per_block // world_size


def test_gpu_takes_all_that_the_profile_run_leaves() -> None:
    assert max_kv_blocks(config(2), SPEC, True, lambda: 5 * GIB) == 5 * GIB // SPEC.bytes_per_block


def test_never_more_blocks_than_the_sequences_can_fill() -> None:
    assert max_kv_blocks(config(max_model_len=33), SPEC, False, lambda: 1000 * GIB) == 100 * 3


def test_explicit_number_is_taken_as_it_is() -> None:
    """More than the default budget, or less than one sequence needs (which makes preemption testable)."""
    assert max_kv_blocks(config(num_kv_blocks=20_000), SPEC, False, lambda: 8 * GIB) == 20_000
    assert max_kv_blocks(config(num_kv_blocks=1), SPEC, False, lambda: 8 * GIB) == 1


def test_more_than_there_is_is_refused_with_numbers() -> None:
    with pytest.raises(CapacityError, match=r"num_kv_blocks=20000 needs 9\.77 GiB for 2 ranks, but 8\.00 GiB are free; "
                       r"at most 16384 blocks of 16 tokens fit"):  # fmt: skip
        max_kv_blocks(config(2, num_kv_blocks=20_000), SPEC, False, lambda: 8 * GIB)


def test_budget_below_one_sequence_suggests_a_length_that_fits() -> None:
    with pytest.raises(CapacityError, match="lower --max-model-len to at most 2048, or set --num-kv-blocks"):
        max_kv_blocks(config(), SPEC, False, lambda: GIB // 8)
    assert max_kv_blocks(config(max_model_len=2048), SPEC, False, lambda: GIB // 8) == 128
    with pytest.raises(CapacityError, match="free some memory"):
        max_kv_blocks(config(), SPEC, True, lambda: -GIB)


def test_memory_that_the_system_refuses_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="do not fit"):
        SPEC.allocate(2**42, CPU)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"proc/self/cgroup": "0::/\n"}, 1000 * 1024),
        ({}, 1000 * 1024),
        # Version 2: the parent's limit is the tighter one; dropped cache counts as free.
        (
            {
                "proc/self/cgroup": "0::/outer/inner\n",
                "cg/outer/inner/memory.max": "max\n",
                "cg/outer/inner/memory.current": "5000\n",
                "cg/outer/inner/memory.stat": "inactive_file 1\n",
                "cg/outer/memory.max": "100000\n",
                "cg/outer/memory.current": "60000\n",
                "cg/outer/memory.stat": "anon 7\ninactive_file 10000\n",
            },
            50_000,
        ),
        # Version 1, seen from inside a container: only the mount's root is there.
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n2:memory:/docker/abc\n0::/\n",
                "cg/memory/memory.limit_in_bytes": "70000\n",
                "cg/memory/memory.usage_in_bytes": "90000\n",
                "cg/memory/memory.stat": "total_inactive_file 30000\n",
            },
            10_000,
        ),
    ],
)
def test_a_container_limit_bounds_free_memory(tmp_path: Path, files: dict[str, str], free: int) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 2000 kB\nMemAvailable:    1000 kB\n", **files})
    assert free_host_memory(tmp_path / "proc", tmp_path / "cg") == free


def test_free_memory_of_this_machine_is_plausible() -> None:
    assert 2**20 < free_host_memory() < 2**50


def test_copies_happen_in_order_in_every_layer() -> None:
    """1 -> 2 -> 3 moves block 1 on to 3; a parallel copy would move the old 2."""
    caches = [torch.randn(5, 2, 2, 1, 4) for _ in range(2)]
    ones = [cache[1].clone() for cache in caches]
    copy_blocks(caches, [(DEVICE_TO_DEVICE, 1, 2), (DEVICE_TO_DEVICE, 2, 3)])
    for cache, one in zip(caches, ones, strict=True):
        assert torch.equal(cache[3], one)


@pytest.mark.parametrize("copy", [(DEVICE_TO_HOST, 0, 0), (DEVICE_TO_DEVICE, 0, 5), (DEVICE_TO_DEVICE, -1, 0)])
def test_impossible_copies_are_refused(copy: tuple[int, int, int]) -> None:
    with pytest.raises(EngineError, match="block copy"):
        copy_blocks([torch.zeros(5, 2, 2, 1, 4)], [copy])


def test_cache_takes_no_memory_before_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    caches = SPEC.allocate(2**30 // SPEC.bytes_per_block, CPU)
    assert sum(cache.nbytes for cache in caches) > 0.99 * 2**30
    assert resident() - before < 2**24
    assert not caches[-1][-1].any()
