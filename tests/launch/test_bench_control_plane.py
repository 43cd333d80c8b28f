"""`control-plane` small: its parts add up, its bytes do not grow with the context, and its JSON holds the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.bench import __main__ as bench
from launch.bench.bare_ping import BarePing
from launch.bench.control_plane import decode_bytes
from launch.bench.figures import Spread, percentile, table


def test_the_figures_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    options = ["--tp", "2", "--sequences", "1", "20", "--steps", "60", "--context", "40", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["bench", "control-plane", *options])
    bench.main()
    results = json.loads(file.read_text())
    assert [(result["tp"], result["sequences"]) for result in results] == [(2, 1), (2, 20)]
    for result in results:
        assert result["tokens"] == result["steps"] * result["sequences"], "a step lost or repeated a token"
        stages = [result[stage] for stage in ("schedule", "encode", "round_trip", "update", "ping", "cpu")]
        assert all(0 < stage["p10"] <= stage["median"] <= stage["p90"] for stage in stages)
        # Each stage is a part of the wall time, so no stage's fast steps can be slower than the slow whole.
        assert (
            sum(result[stage]["p10"] for stage in ("schedule", "encode", "round_trip", "update"))
            < (result["wall"]["p90"])
        )
        assert result["input_bytes"] == result["input_bytes_long_context"], "a decode step grows with its context"
    assert results[0]["input_bytes"] < results[1]["input_bytes"]
    assert results[0]["output_bytes"] < results[1]["output_bytes"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(results)


def test_bytes_of_a_decode_step_do_not_depend_on_the_context() -> None:
    assert len({decode_bytes(3, context) for context in (16, 200, 300, 70_000)}) == 1


def test_percentiles_and_table() -> None:
    assert percentile([], 0.5) != percentile([], 0.5)  # nan
    assert [percentile([1, 2, 3, 4], share) for share in (0, 0.5, 0.99, 1)] == [1, 3, 4, 4]
    assert Spread.of(range(11), 10) == Spread(50, 10, 90)
    assert table(["ab", "c"], [[1, 2.5]]).splitlines() == ["| ab |   c |", "| -: | --: |", "|  1 | 2.5 |"]


def test_the_yardstick_ends_though_its_peers_have_gone(tmp_path: Path) -> None:
    """Ctrl-C reaches the peers, too, and perhaps before they have connected."""
    with BarePing(2, tmp_path) as ping:
        for peer in ping._peers:
            peer.kill()
            peer.join()
    assert not any(peer.is_alive() for peer in ping._peers)
