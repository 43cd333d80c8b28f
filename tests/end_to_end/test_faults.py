"""Exceptions and failed allocations anywhere in a step: streams go on as if nothing had been, or one request fails.

A fault is raised in place of a random line that is executed, in the scheduler's code, the workers' or the front end's.
The full counts of places are behind --slow.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine import BeamSearchParams, SamplingParams
from nanoengine.prompts import Prompt
from nanoengine.recovery import RecoveryStats
from nanoengine.structured_outputs import StructuredOutputsParams
from tests.end_to_end.engine_in_step import EngineInStep, Params
from tests.end_to_end.ranks_without_memory import FAILURES, take_memory_from
from tests.fault_injection import Faults, faults
from tests.nanoengine.process_tools import descendants, short_directory
from workers.native import load as load_native

SCHEDULER = [
    "nanoengine." + name
    for name in (
        "admission", "beam_group", "beam_search", "block_manager", "block_pool", "decode_set", "engine", "engine_stats",
        "forking", "front_socket", "host_pool", "inprocess_executor", "outbox", "prompt_log", "recovery", "row_params",
        "scheduler", "sequence", "step", "step_batch", "step_costs",
    )
]  # fmt: skip
WORKERS = [
    "workers." + name
    for name in (
        "attention.torch_backend", "cpu_sampler", "forward_context", "input_batch", "kv_cache", "layers.attention",
        "layers.embedding", "layers.linear", "logits_processors", "logprobs", "model_runner", "models.decoder",
        "packed_linear", "prompt_logprobs", "sampler", "structured",
    )
]  # fmt: skip
FRONT_END = ["nanoengine." + name for name in ("detokenizer", "engine_client", "journal")]
NAMES = ["scheduler", "workers", "front end"]
# Small enough that sequences give way to each other, and are swapped out.
SETTINGS: dict[str, Any] = {
    "model": "demo", "block_size": 4, "num_kv_blocks": 36, "max_num_batched_tokens": 24, "max_num_seqs": 8,
    "swap_space": 0.01, "preemption_mode": "swap", "max_model_len": 256,
}  # fmt: skip


def load() -> list[tuple[Prompt, Params]]:
    """Eight requests that use every part of a step."""

    def params(**given: Any) -> SamplingParams:
        return SamplingParams(**({"max_tokens": 8, "ignore_eos": True, "temperature": 0} | given))

    kinds: list[Params] = [
        params(max_tokens=12),
        params(temperature=0.9, seed=11, top_p=0.9, logprobs=2),
        params(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, bad_words=["garden"]),
        params(temperature=1.0, seed=13, n=2),
        params(prompt_logprobs=1, logprobs=0),
        params(structured_outputs=StructuredOutputsParams(regex="[a-f]{4,12}"), ignore_eos=False),
        params(temperature=0.7, seed=15, min_p=0.05, top_k=20, stop=["zzzz"], logit_bias={"50": 1.5}),
        BeamSearchParams(beam_width=2, max_tokens=6),
    ]
    story = "Tell me a story about Lily the bear, the garden and"
    prompts = [f"{story} {number}." if number % 2 else "中国的首都是" for number in range(len(kinds))]
    return [(Prompt(prompt), each) for prompt, each in zip(prompts, kinds, strict=True)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def undisturbed(run_dir: Path) -> list[Any]:
    with contextlib.closing(EngineInStep(run_dir, **SETTINGS)) as engine:
        outputs = engine.run(load())
        assert engine.core.scheduler.num_preemptions > 0
        assert engine.core.scheduler.num_swaps > 0
        return outputs


EXCEPTIONS: list[Callable[[], BaseException]] = [
    lambda: RuntimeError("injected"),
    lambda: ValueError("injected"),
    lambda: KeyError("injected"),
    lambda: IndexError("injected"),
    lambda: AssertionError("injected"),
    lambda: OSError(5, "injected"),
]
FAILED_ALLOCATIONS: list[Callable[[], BaseException]] = [
    lambda: MemoryError("injected"),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


def num_lines(run_dir: Path, modules: list[str]) -> int:
    """How many lines of these modules the load executes when it is left in peace."""
    with contextlib.closing(EngineInStep(run_dir, **SETTINGS)) as engine:
        journals = [engine.add(*request) for request in load()]
        with faults(modules) as found:
            engine.finish(journals)
    return found.num_lines


def disturb(
    run_dir: Path, modules: list[str], error: Callable[[], BaseException], at: int, expected: list[Any]
) -> tuple[list[str], EngineInStep, Faults]:
    """Run the load with a fault; returns the errors of requests that failed, the others being as they should be."""
    with contextlib.closing(EngineInStep(run_dir, **SETTINGS)) as engine:
        journals = [engine.add(*request) for request in load()]
        with faults(modules, error, at) as found:
            outputs = engine.finish(journals)
        engine.settle()
        assert engine.run(load()[:1]) == expected[:1], f"it does not serve on after a fault at {found.place}"
    errors = []
    for answer, wanted in zip(outputs, expected, strict=True):
        if answer != wanted:
            messages = {message for *_, message in answer[-1]} - {None}  # some of its outputs may be complete
            assert len(messages) == 1, f"{answer} instead of {wanted} after a fault at {found.place}"
            errors += messages
    return errors, engine, found


def places(total: int, number: int, seed: int) -> Iterator[int]:
    dice = random.Random(seed)
    return (dice.randrange(1, total + 1) for _ in range(number))


def report(what: str, outcomes: Counter[str]) -> None:
    print(f"\n{what}: {dict(outcomes)}")


def check_exceptions(run_dir: Path, undisturbed: list[Any], modules: list[str], number: int) -> None:
    total, outcomes = num_lines(run_dir, modules), Counter[str]()
    for trial, at in enumerate(places(total, number, seed=1)):
        error = EXCEPTIONS[trial % len(EXCEPTIONS)]
        errors, engine, found = disturb(run_dir, modules, error, at, undisturbed)
        assert len(errors) <= 1, f"a fault at {found.place} was the end of {errors}"
        assert all("injected" in message for message in errors)
        stats = engine.core.recovery.stats
        num_noticed = stats.scheduler_faults + stats.restarts.total() + stats.steps_given_up
        outcomes["in all"] += 1
        outcomes["one request failed"] += len(errors)
        outcomes["another scheduler"] += stats.scheduler_faults
        outcomes["another group"] += stats.restarts.total()
        assert num_noticed <= 1
    report(f"exceptions at random ones of {total} lines", outcomes)


def check_allocations(run_dir: Path, undisturbed: list[Any], modules: list[str], number: int) -> None:
    """No group is replaced: with processes for ranks, none of them ends."""
    total, outcomes = num_lines(run_dir, modules), Counter[str]()
    for trial, at in enumerate(places(total, number, seed=2)):
        error = FAILED_ALLOCATIONS[trial % len(FAILED_ALLOCATIONS)]
        errors, engine, found = disturb(run_dir, modules, error, at, undisturbed)
        stats = engine.core.recovery.stats
        assert not stats.restarts, f"a failed allocation at {found.place} was the end of the ranks"
        assert len(errors) <= (modules is not WORKERS), f"a failed allocation at {found.place} was the end of {errors}"
        outcomes["in all"] += 1
        outcomes["one request failed"] += len(errors)
        outcomes["another scheduler"] += stats.scheduler_faults
        outcomes["step given up"] += stats.steps_given_up
    report(f"failed allocations at random ones of {total} lines", outcomes)


@pytest.mark.parametrize(("modules", "number"), [(SCHEDULER, 8), (WORKERS, 5), (FRONT_END, 3)], ids=NAMES)
def test_an_exception_fails_one_request_or_none(
    modules: list[str], number: int, run_dir: Path, undisturbed: list[Any]
) -> None:
    check_exceptions(run_dir, undisturbed, modules, number)


@pytest.mark.parametrize(("modules", "number"), [(SCHEDULER, 3), (WORKERS, 5)], ids=NAMES[:2])
def test_a_failed_allocation_ends_no_group(
    modules: list[str], number: int, run_dir: Path, undisturbed: list[Any]
) -> None:
    check_allocations(run_dir, undisturbed, modules, number)


ROOM: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 128}
TENTH: list[Any] = [
    {},
    pytest.param({"preemption_mode": "recompute"}, marks=pytest.mark.slow),
    pytest.param({"preemption_mode": "recompute", "swap_space": 0}, marks=pytest.mark.slow),
    pytest.param({"enable_prefix_caching": False, "async_scheduling": False}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", TENTH, ids=str)
def test_a_cache_of_a_tenth_of_what_is_open(settings: dict[str, Any], run_dir: Path, undisturbed: list[Any]) -> None:
    times = 8
    with contextlib.closing(EngineInStep(run_dir, **SETTINGS | ROOM | settings)) as engine:
        journals = [engine.add(*request) for request in times * load()]
        num_tokens = sum(len(each.sequences) * (each.num_prompt_tokens + each.max_tokens) for each in journals)
        assert num_tokens >= 10 * SETTINGS["num_kv_blocks"] * SETTINGS["block_size"]
        assert engine.finish(journals) == times * undisturbed
        engine.settle()
        num_sequences = sum(len(each.sequences) for each in journals)
        assert 0 < engine.core.scheduler.num_preemptions <= 2 * num_sequences
        assert engine.core.recovery.stats == RecoveryStats()


@pytest.mark.parametrize(("as_processes", "is_native"), [(False, True), (True, False), (True, True)])
def test_two_ranks_give_up_steps_in_the_middle_and_neither_ends(
    as_processes: bool, is_native: bool, run_dir: Path
) -> None:
    """As threads and as processes that leave the layers for each sum, and as processes whose layers are one call."""
    if as_processes and is_native and load_native() is None:
        pytest.skip("no AMX tiles of bfloat16 here, or no C compiler")
    settings = SETTINGS | {"tensor_parallel_size": 2, "native_kernels": is_native}
    with contextlib.closing(EngineInStep(run_dir, **settings)) as engine:
        two_ranks = engine.run(load())
    entry = "tests.end_to_end.ranks_without_memory:run_worker" if as_processes else ""
    with short_directory() as directory, contextlib.closing(EngineInStep(directory, entry, **settings)) as engine:
        processes = descendants()
        assert len(processes) == 2 * as_processes
        for rank in [] if as_processes else getattr(engine.executor, "_ranks"):  # noqa: B009 - it is not on all executors
            take_memory_from(rank._communicator)
        assert engine.run(load()) == two_ranks
        engine.settle()
        stats = engine.core.recovery.stats
        assert stats.steps_given_up == sum(map(len, FAILURES.values()))
        assert not stats.restarts
        assert not stats.scheduler_faults
        assert descendants() == processes


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("modules", [SCHEDULER, WORKERS, FRONT_END], ids=NAMES)
def test_100_exceptions(modules: list[str], run_dir: Path, undisturbed: list[Any]) -> None:
    check_exceptions(run_dir, undisturbed, modules, 100)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("modules", [SCHEDULER, WORKERS], ids=NAMES[:2])
def test_50_failed_allocations(modules: list[str], run_dir: Path, undisturbed: list[Any]) -> None:
    check_allocations(run_dir, undisturbed, modules, 50)
