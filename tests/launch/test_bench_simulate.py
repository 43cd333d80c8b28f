"""`simulate` small: every request ends, tokens are conserved, a seed decides everything, and pressure shows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from launch.bench import __main__ as bench
from launch.bench.simulate import BLOCK_SIZE, Simulation, StepTimeModel, simulate
from launch.bench.traces import TraceSpec, generate
from nanoengine.scheduler import SchedulerLimits
from nanoengine.step import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, Epoch, SequenceState, StepInput

SPEC = TraceSpec(num_requests=200, rate=20, prompt_median=60, output_median=12, max_prompt=400, max_output=60)


def limits(**changes: Any) -> SchedulerLimits:
    defaults: dict[str, Any] = {
        "max_num_batched_tokens": 512,
        "max_num_seqs": 32,
        "max_model_len": 1024,
        "num_kv_blocks": 2000,
        "block_size": BLOCK_SIZE,
    }
    return SchedulerLimits(**(defaults | changes))


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
@pytest.mark.parametrize("num_kv_blocks", [60, 2000])
def test_every_request_ends_and_every_token_comes_out_once(arrivals: str, num_kv_blocks: int) -> None:
    spec = dataclasses.replace(SPEC, arrivals=arrivals)
    simulation = Simulation(limits(num_kv_blocks=num_kv_blocks), StepTimeModel())
    simulation.run(generate(spec))
    figures = simulation.figures()
    assert figures["finished"] == spec.num_requests
    assert figures["refused"] == 0
    assert figures["output_tokens"] == sum(request.num_output_tokens for request in generate(spec))
    assert (figures["preemptions"] > 0) == (num_kv_blocks == 60), "60 blocks are too few, 2,000 are enough"
    assert simulation.scheduler.blocks.num_free_blocks == num_kv_blocks
    assert len(simulation.ttft) == spec.num_requests
    assert min(simulation.ttft) >= StepTimeModel().base, "a first token before a step could compute it"


def test_a_prompt_that_never_fits_is_counted_as_refused() -> None:
    simulation = Simulation(limits(num_kv_blocks=10), StepTimeModel())
    simulation.run(generate(SPEC))
    figures = simulation.figures()
    assert figures["refused"] > 0
    assert figures["finished"] + figures["refused"] == SPEC.num_requests


def test_the_same_seed_gives_the_same_figures_and_another_gives_others() -> None:
    def figures(seed: int) -> dict[str, Any]:
        result = simulate(dataclasses.replace(SPEC, seed=seed), limits(), StepTimeModel())
        return {name: value for name, value in result.items() if name != "replay_s"}

    assert figures(0) == figures(0)
    assert figures(0) != figures(1)


def test_a_single_request_takes_the_time_the_model_says() -> None:
    model = StepTimeModel(base=1.0, per_token=0.1, per_decode_row=0.01, per_attended=0.001)
    spec = dataclasses.replace(SPEC, num_requests=1, prefix_share=0.0)
    (request,) = generate(spec)
    simulation = Simulation(limits(), model)
    simulation.run(generate(spec))
    length, decodes = len(request.prompt_token_ids), request.num_output_tokens - 1
    assert length > 1
    assert decodes > 0
    assert simulation.ttft[0] == pytest.approx(1.0 + 0.1 * length)
    attended = sum(length + i for i in range(decodes))
    assert simulation.tpot[0] == pytest.approx(1.0 + 0.1 + 0.01 + 0.001 * attended / decodes)


def test_a_chunk_reads_the_context_before_it_once_a_tile() -> None:
    model = StepTimeModel(base=0, per_token=0, per_decode_row=0, per_attended=1)
    rows = [SequenceState(1, list(range(130)), 1000, [], False), SequenceState(2, [5], 70, [], True)]
    assert model.seconds(StepInput(Epoch(1, 1), 1, [], rows, [])) == 3 * 1000 + 70
    assert model.seconds(StepInput(Epoch(1, 1), 2, [], [], [2])) == 0


def test_copies_to_the_host_and_back_take_their_time() -> None:
    model = StepTimeModel(base=0, per_swapped_block=3)
    copies = [(DEVICE_TO_HOST, 1, 2), (DEVICE_TO_DEVICE, 3, 4), (HOST_TO_DEVICE, 2, 5)]
    assert model.seconds(StepInput(Epoch(1, 1), 1, copies, [], [])) == 2 * 3


def test_bursty_arrivals_come_in_clumps_at_the_same_rate() -> None:
    variations = {}
    for arrivals in ("poisson", "bursty"):
        spec = dataclasses.replace(SPEC, num_requests=20_000, arrivals=arrivals, prompt_median=1, prefix_share=0.0)
        times = [0.0, *(request.arrival for request in generate(spec))]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(1 / spec.rate, rel=0.1)
        variations[arrivals] = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variations["poisson"] == pytest.approx(1, rel=0.1)
    assert variations["bursty"] == pytest.approx(4, rel=0.15)


def test_prompts_share_a_prefix_or_nothing() -> None:
    spec = dataclasses.replace(SPEC, num_prefixes=3)
    heads = [tuple(request.prompt_token_ids[: spec.prefix_length]) for request in generate(spec)]
    shared = [head for head in heads if heads.count(head) > 1]
    assert len(set(shared)) == 3
    assert len(shared) == pytest.approx(spec.num_requests * spec.prefix_share, rel=0.2)


def test_the_command_runs_each_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figures.json"
    options = ["--requests", "50", "--num-kv-blocks", "700", "2000", "--max-num-batched-tokens", "256", "1024"]
    monkeypatch.setattr("sys.argv", ["bench", "simulate", *options, "--step-base", "0.01", "--json", str(file)])
    bench.main()
    report = json.loads(file.read_text())
    settings = [(run["num_kv_blocks"], run["max_num_batched_tokens"]) for run in report["runs"]]
    assert settings == [(700, 256), (700, 1024), (2000, 256), (2000, 1024)]
    assert all(run["finished"] == 50 for run in report["runs"])
    assert report["model"]["base"] == 0.01
    assert len({run["output_tokens"] for run in report["runs"]}) == 1, "settings change the speed, not the tokens"


def test_the_command_swaps_only_where_there_is_a_host_tier(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    options = ["--requests", "30", "--num-kv-blocks", "300", "--preemption-mode", "recompute", "swap"]
    monkeypatch.setattr("sys.argv", ["bench", "simulate", *options])
    assert bench.main() == 2
    assert "needs --num-host-blocks greater than 0" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench", "simulate", *options, "--num-host-blocks", "500", "--json", str(file)])
    bench.main()
    runs = json.loads(file.read_text())["runs"]
    assert [(run["num_host_blocks"], run["preemption_mode"]) for run in runs] == [(500, "recompute"), (500, "swap")]


def test_a_larger_cache_hits_more_and_preempts_less() -> None:
    spec = dataclasses.replace(SPEC, num_requests=400, rate=60)
    small, large = (simulate(spec, limits(num_kv_blocks=blocks), StepTimeModel()) for blocks in (80, 2000))
    assert small["hit_rate"] < large["hit_rate"]
    assert small["preemptions"] > large["preemptions"]
    assert small["ttft_p90_ms"] > large["ttft_p90_ms"]


def test_a_bound_on_the_gap_between_tokens_shows() -> None:
    """Every step takes its modelled time, which is what the scheduler learns its bound from."""
    model = StepTimeModel(base=0.01, per_token=1e-4, per_decode_row=0, per_attended=0)
    spec = dataclasses.replace(SPEC, rate=100)
    free, bounded = (simulate(spec, limits(max_decode_gap=gap), model) for gap in (0, 3))
    assert free["gap_max_ms"] > 50
    assert bounded["gap_max_ms"] < 40
    assert free["output_tokens"] == bounded["output_tokens"]


def test_urgent_requests_wait_less_under_the_policy_priority() -> None:
    spec = dataclasses.replace(SPEC, rate=200, urgent_share=0.2)
    assert [dataclasses.replace(each, priority=0) for each in generate(spec)] == [
        *generate(dataclasses.replace(spec, urgent_share=0))
    ], "who is urgent changes nothing else"
    fcfs, priority = (simulate(spec, limits(policy=policy), StepTimeModel()) for policy in ("fcfs", "priority"))
    assert priority["urgent_ttft_p90_ms"] < fcfs["urgent_ttft_p90_ms"]
    assert priority["output_tokens"] == fcfs["output_tokens"]


@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
def test_a_host_tier_hits_what_the_device_evicted(preemption_mode: str) -> None:
    spec = dataclasses.replace(SPEC, num_requests=400, rate=60)
    changes = {"num_kv_blocks": 80, "num_host_blocks": 2000, "preemption_mode": preemption_mode}
    alone, tiered = (simulate(spec, limits(**each), StepTimeModel()) for each in ({"num_kv_blocks": 80}, changes))
    assert tiered["finished"] == spec.num_requests
    assert tiered["hit_rate"] > alone["hit_rate"]
    assert tiered["host_hit_rate"] > 0 == alone["host_hit_rate"]
    assert tiered["blocks_swapped_out"] > tiered["blocks_swapped_in"] > 0
    assert tiered["swaps"] == (tiered["preemptions"] if preemption_mode == "swap" else 0)
