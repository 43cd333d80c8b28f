"""The K/V budget, the numbers in its errors, where free memory is read from, and block copies."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.engine import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from configs.errors import CapacityError, EngineError
from nanoengine.step import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, BlockCopy
from workers.attention import get_backend
from workers.kv_cache import (
    GIB,
    MAX_BLOCKS_PER_COPY,
    KVCacheSpec,
    copy_blocks,
    free_gpu_memory,
    free_host_memory,
    max_host_blocks,
    max_kv_blocks,
)
from workers.memory import explained

CPU = torch.device("cpu")
# 8 layers of 2 x 4 x 64 float32 a token: 16 KiB a token, 256 KiB a block.
SPEC = KVCacheSpec(get_backend("torch", CPU), 8, 16, 4, 64, torch.float32)


def config(
    world_size: int = 1, max_model_len: int = 4096, num_kv_blocks: int | None = None, swap_space: float = 0
) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(max_model_len=max_model_len),
        cache=CacheConfig(num_kv_blocks=num_kv_blocks, swap_space=swap_space),
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_context_beyond_the_usual_budget_is_refused_although_half_the_memory_holds_it(world_size: int) -> None:
    tokens = 5 * GIB // (SPEC.bytes_per_block // SPEC.block_size) // world_size
    blocks = max_kv_blocks(config(world_size, max_model_len=tokens), SPEC, False, lambda: 10 * GIB)
    assert blocks * SPEC.block_size == tokens
    with pytest.raises(CapacityError, match=f"lower --max-model-len to at most {tokens}, or set --num-kv-blocks"):
        max_kv_blocks(config(world_size, max_model_len=tokens + 1), SPEC, False, lambda: 10 * GIB)


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
        max_kv_blocks(config(), SPEC, False, lambda: GIB // 16)
    assert max_kv_blocks(config(max_model_len=2048), SPEC, False, lambda: GIB // 16) == 128
    with pytest.raises(CapacityError, match="free some memory"):
        max_kv_blocks(config(), SPEC, True, lambda: -GIB)


@pytest.mark.parametrize("world_size", [1, 2])
def test_swap_space_is_each_ranks_own_and_taken_off_what_the_cache_may_use(world_size: int) -> None:
    swapping = config(world_size, swap_space=1.5)
    assert max_host_blocks(swapping, SPEC, lambda: 8 * GIB) == 1.5 * GIB // SPEC.bytes_per_block
    budget = (8 * GIB - world_size * 1.5 * GIB) / 4
    assert max_kv_blocks(swapping, SPEC, False, lambda: 8 * GIB) == budget // SPEC.bytes_per_block // world_size
    assert max_kv_blocks(swapping, SPEC, True, lambda: GIB) == GIB // SPEC.bytes_per_block, (
        "a GPU has memory of its own"
    )
    assert max_host_blocks(config(world_size), SPEC, lambda: 0) == 0


def test_swap_space_that_cannot_be_is_refused_with_numbers() -> None:
    with pytest.raises(CapacityError, match=r"swap_space=4\.5 needs 9\.00 GiB of host memory for 2 ranks, but 8\.00 "
                       r"GiB are free; set it to at most 4\.00"):  # fmt: skip
        max_host_blocks(config(2, swap_space=4.5), SPEC, lambda: 8 * GIB)
    with pytest.raises(CapacityError, match=r"holds not one K/V block of 262144 bytes; set it to at least 0\.000245"):
        max_host_blocks(config(swap_space=1e-4), SPEC, lambda: 8 * GIB)
    assert max_host_blocks(config(swap_space=0.000245), SPEC, lambda: 8 * GIB) == 1
    with pytest.raises(CapacityError, match=r"swap_space of 4398046511104 K/V blocks, .* GiB, does not fit"):
        SPEC.allocate_host(2**42, CPU)


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


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(DEVICE_TO_DEVICE), st.integers(0, 4), st.integers(0, 4)),
            st.tuples(st.just(DEVICE_TO_HOST), st.integers(0, 4), st.integers(0, 2)),
            st.tuples(st.just(HOST_TO_DEVICE), st.integers(0, 2), st.integers(0, 4)),
        ),
        max_size=30,
    )
)
def test_copies_in_any_direction_equal_one_after_the_other(copies: list[BlockCopy]) -> None:
    device, layers = [f"device {i}" for i in range(5)], 2
    names = {name: float(i) for i, name in enumerate([*device, *(f"host {i}" for i in range(3))])}
    caches = [torch.empty(5, 2, 2, 1, 4) for _ in range(layers)]
    host = torch.empty(3, layers, 2, 2, 1, 4)
    sides = {
        DEVICE_TO_DEVICE: ("device", "device"),
        DEVICE_TO_HOST: ("device", "host"),
        HOST_TO_DEVICE: ("host", "device"),
    }

    def blocks(name: str) -> list[torch.Tensor]:
        side, number = name.split()
        return [cache[int(number)] if side == "device" else host[int(number), i] for i, cache in enumerate(caches)]

    for name, value in names.items():
        for layer, block in enumerate(blocks(name)):
            block.fill_(100 * layer + value)
    for direction, source, destination in copies:
        names[f"{sides[direction][1]} {destination}"] = names[f"{sides[direction][0]} {source}"]
    copy_blocks(caches, copies, host)
    for name, value in names.items():
        for layer, block in enumerate(blocks(name)):
            assert (block == 100 * layer + value).all(), name


def test_many_blocks_survive_the_way_to_the_host_and_back() -> None:
    number = 2 * MAX_BLOCKS_PER_COPY + 3
    spec = dataclasses.replace(SPEC, block_size=2, num_layers=3, dtype=torch.bfloat16)
    caches, host = spec.allocate(number, CPU), spec.allocate_host(number, CPU)
    for cache in caches:
        cache.copy_(torch.randn(cache.shape))
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, [(DEVICE_TO_HOST, i, number - 1 - i) for i in range(number)], host)
    for cache in caches:
        cache.zero_()
    copy_blocks(caches, [(HOST_TO_DEVICE, number - 1 - i, (i + 1) % number) for i in range(number)], host)
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old.roll(1, 0))


@pytest.mark.parametrize(
    "copy",
    [
        (DEVICE_TO_HOST, 0, 3),
        (DEVICE_TO_HOST, 5, 0),
        (HOST_TO_DEVICE, 3, 0),
        (HOST_TO_DEVICE, 0, 5),
        (DEVICE_TO_DEVICE, 0, 5),
        (DEVICE_TO_DEVICE, -1, 0),
        (7, 0, 0),
    ],
)
def test_impossible_copies_are_refused_before_any_is_done(copy: BlockCopy) -> None:
    cache, host = torch.ones(5, 2, 2, 1, 4), torch.ones(3, 1, 2, 2, 1, 4)
    cache[0] = 0
    with pytest.raises(EngineError, match="block copy"):
        copy_blocks([cache], [(DEVICE_TO_DEVICE, 0, 1), copy], host)
    assert cache[1].all()


def test_copy_to_the_host_without_a_host_tier_is_refused() -> None:
    with pytest.raises(EngineError, match=r"block copy 0 -> 0 \(direction 1\).* 0 on the host"):
        copy_blocks([torch.zeros(5, 2, 2, 1, 4)], [(DEVICE_TO_HOST, 0, 0)])


def test_cache_and_swap_space_take_no_memory_before_they_are_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    number = 2**30 // SPEC.bytes_per_block
    caches, host = SPEC.allocate(number, CPU), SPEC.allocate_host(number, CPU)
    assert host is not None
    assert sum(cache.nbytes for cache in caches) == host.nbytes > 0.99 * 2**30
    assert resident() - before < 2**24
    assert not caches[-1][-1].any()
    assert not host[-1].any()


def test_what_does_not_fit_a_gpu_is_told_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own message names neither the model nor what could be done."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
    with (
        pytest.raises(CapacityError, match=r"the model does not fit cuda:1, of whose 8\.00 GiB .* 3\.00 GiB; use tp"),
        explained(torch.device("cuda", 1), "the model", "use tp"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_ranks_on_one_gpu_share_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 units, 90 % of them to be used, 12 taken by now: 60 for two ranks, each of which needs 5 to compute."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (68, 80))
    met: list[str] = []
    free = free_gpu_memory(torch.device("cuda"), 0.9, lambda: met.append("profile"), 2, lambda: met.append("meet"))
    assert free == 60 // 2 - 5
    assert met == ["profile", "meet", "meet"]
