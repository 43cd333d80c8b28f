"""`run.py` and its pieces without a GPU: what is measured, what is told of it, and engines that fail or hang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.step import DecodeRows, Epoch, SequenceState, StepInput, int_column
from tests.gpu import run
from tests.gpu.checkpoints import QWEN3_06B, QWEN3_8B, TINY, write_checkpoint
from tests.gpu.report import record, section
from tests.gpu.step_clock import StepTimes, timed
from tests.gpu.works import SHARES, measure, share_of_limit, works

WORKS = {work.name: work for work in works()}


class Engine:
    """Answers at a rate, in a time of its own."""

    def __init__(self, tokens_per_s: float, first: float = 0.0) -> None:
        self.now, self._rate, self._first = 0.0, tokens_per_s, first
        self.asked: list[int] = []

    def generate(self, prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
        self.asked.append(sum(lengths))
        self.now += sum(lengths) / self._rate + self._first
        self._first = 0.0
        return lengths

    def clock(self) -> float:
        return self.now


def test_the_benchmark_is_that_of_the_issue() -> None:
    prompts, lengths = WORKS["bench"].draw(0, 151_936)
    assert (len(prompts), sum(map(len, prompts)), sum(lengths)) == (256, 142_827, 133_966)
    eighth, some = WORKS["bench"].draw(1, 151_936, 0.125)
    assert some == lengths[:32]
    assert eighth[0] != prompts[0]
    prompts, lengths = WORKS["streams"].draw(0, 512, 0.25)
    assert lengths == [128] * 64
    assert max(map(max, prompts)) < 512


@pytest.mark.parametrize(
    ("tokens_per_s", "share", "runs"),
    [(20_000, 1.0, 3), (3_000, 1.0, 1), (2_000, 0.5, 1), (1_000, 0.125, 2), (1, 0.125, 1)],
)
def test_as_much_is_done_as_there_is_time_for(tokens_per_s: float, share: float, runs: int) -> None:
    """In a minute; compiling in the first run makes no engine look slow, and no run of a slow one is repeated."""
    engine = Engine(tokens_per_s, first=3.0)
    found = measure(WORKS["bench"], engine.generate, 151_936, 66.0, clock=engine.clock)
    assert found["figure"] == pytest.approx(tokens_per_s)
    assert (found["share"], found["runs"]) == (share, runs)
    assert engine.asked[0] == engine.asked[1] == sum(WORKS["bench"].draw(0, 151_936, SHARES[-1])[1])


def test_a_prompt_is_done_whole_and_counted_in_what_it_holds() -> None:
    engine = Engine(1.0)
    found = measure(WORKS["prefill"], engine.generate, 151_936, 10.0, clock=engine.clock)
    assert (found["figure"], found["share"]) == (8192, 1.0)


def test_answers_that_end_early_are_no_figure() -> None:
    def short(prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
        return [length - 1 for length in lengths]

    with pytest.raises(ValueError, match="tokens instead of"):
        measure(WORKS["single"], short, 151_936, 10.0)


def test_limits_are_those_of_the_machine() -> None:
    """The benchmark's keys and values are 13.85 TB; a step of one stream reads the weights; a prompt multiplies."""
    assert share_of_limit(WORKS["bench"], QWEN3_06B, 133_966, 13.85e12, 1.0) == pytest.approx(1, rel=5e-3)
    weights = 2 * (QWEN3_8B.layer_parameters + QWEN3_8B.head_parameters)
    assert share_of_limit(WORKS["single"], QWEN3_8B, 1.0, weights, 1.0) == pytest.approx(1, rel=1e-2)
    operations = 2 * 8192 * QWEN3_8B.layer_parameters
    assert 1 < share_of_limit(WORKS["prefill"], QWEN3_8B, 8192, 1.0, operations) < 1.2


class Device:
    """A stream on which each step takes 6, while the host needs `host` to launch one: a clock for `StepTimes`."""

    def __init__(self, hold: float, host: float = 10.0) -> None:
        self.host = self.device = 0.0
        self.length, self._launch = hold, host
        self._ends = [0.0, 0.0]

    def hold(self) -> None:
        self.device = max(self.device, self.host) + self.length

    def hold_longer(self) -> None:
        self.length *= 2

    def mark(self) -> float:
        return max(self.device, self.host)

    def is_past(self, mark: float) -> bool:
        return mark <= self.host

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def compute(self) -> None:
        """The host launches two halves; the device waits for each of them, and the host for the last step but one."""
        self.host = max(self.host, self._ends[-2])
        for _ in range(2):
            self.host += self._launch / 2
            self.device = max(self.device, self.host) + 3
        self._ends.append(self.device)


def decode_step(number: int) -> StepInput:
    return StepInput(Epoch(1, 1), number, [], [], [], DecodeRows(int_column([1, 2]), int_column([5, 5]), number))


PROMPT = StepInput(Epoch(1, 1), 1, [], [SequenceState(1, [1, 2], 0, [0], True)], [])


def decode_twice(device: Device, num_steps: int) -> StepTimes:
    times = StepTimes(device)  # type: ignore[arg-type]
    for step in [PROMPT, *map(decode_step, range(num_steps))] * 2:
        with times.around(step):
            device.compute()
    return times


@pytest.mark.parametrize("hold", [100.0, 0.5])
@pytest.mark.parametrize(("host", "idle"), [(10, 0.4), (6.3, 1 - 6 / 6.3), (5, 0)])
def test_idle_time_is_what_a_step_does_not_compute(hold: float, host: float, idle: float) -> None:
    """Inside a step as between steps, and of a host that is hardly slower than the device.

    A device that was not held for long enough is held for longer the next time, and what was seen does not count.
    """
    (found,) = decode_twice(Device(hold, host), 400).summary().values()
    assert found["busy"] == pytest.approx(6)
    assert found["step"] == pytest.approx(max(host, 6))
    assert found["idle"] == pytest.approx(idle, abs=1e-9)
    assert found["held"] >= 15
    assert found["steps"] >= 390


def test_steps_that_are_not_steady_are_not_counted() -> None:
    assert decode_twice(Device(100.0), 15).summary() == {}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / TINY.name, TINY)


def test_step_times_of_a_whole_engine(checkpoint: Path, tmp_path: Path) -> None:
    """Through the processes that serve; on a CPU the host computes, so next to nothing is idle but the channel."""
    file = tmp_path / "times.json"
    with timed(file), LLM(str(checkpoint), skip_tokenizer_init=True, device="cpu") as llm:
        for _ in range(2):
            llm.generate([[1, 2], [3]], SamplingParams(temperature=0, ignore_eos=True, max_tokens=80), use_tqdm=False)
    found = json.loads(file.read_text())["2"]
    assert 0 < found["busy"] < 1
    assert 0 <= found["idle"] < 1
    assert found["held"] >= 2
    assert found["steps"] >= 30


def parsed(tmp_path: Path, *options: str) -> run.Run:
    given = ["--device", "cpu", "--models", "tiny", "--out", str(tmp_path / "out"), *options]
    return run.Run(run.parse(given), tmp_path)


def test_an_engine_that_fails_or_hangs_does_not_end_the_rest(tmp_path: Path) -> None:
    """What it had written by then counts."""
    script = tmp_path / "engine.py"
    script.write_text(
        "import json, pathlib, signal, sys\n"
        "if sys.argv[1] == 'writes': pathlib.Path(sys.argv[-1]).write_text(json.dumps({'works': {'single': 1}}))\n"
        "if sys.argv[1] == 'fails': sys.exit('out of luck')\n"
        "print('still at it', flush=True)\n"
        "signal.pause()\n"
    )
    trial = parsed(tmp_path)
    assert trial.child(str(script), "fails", seconds=60) == {"error": "exit code 1: out of luck"}
    hung = trial.child(str(script), "writes", seconds=1)
    assert hung["works"] == {"single": 1}
    assert hung["error"].startswith("its time was up")
    assert "out of luck" in (tmp_path / "out" / "errors.log").read_text()


@pytest.fixture
def without_web_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started cannot import what only a server needs: a borrowed machine does not have it."""
    for name in ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"):
        (tmp_path / "none" / name).mkdir(parents=True)
        (tmp_path / "none" / name / "__init__.py").write_text(f"raise ImportError('there is no {name}')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "none"))


@pytest.mark.usefixtures("without_web_packages")
def test_parts_of_several_commands_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours and the profile in one, the others in another: one table with ratios, in one section of the results."""
    common = ["--device", "cpu", "--models", "tiny", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run.main([*common, "--only", "ours", "profile", "--engine-seconds", "10"]) == 0
    assert run.main([*common, "--only", "peers", "--peers", "vllm"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["engines"]["tiny"]["nanoengine"]["works"]) == set(WORKS)
    assert [each["eager"] for each in found["profiles"]["tiny"]["profiles"]] == [False, True]
    assert found["profiles"]["tiny"]["idle"][0]["streams"] == 2
    # What a peer that can be had would have written.
    measured = {
        name: each | {"figure": each["figure"] / 2}
        for name, each in found["engines"]["tiny"]["nanoengine"]["works"].items()
    }
    measured["bench"]["share"] = 0.125
    found["engines"]["tiny"]["transformers"] = {
        "version": "5.17.0",
        "load_s": 9.0,
        "works": measured,
        "error": "its time was up",
    }
    text = section(found)
    assert text.count("x2.00") == len(WORKS)
    assert "on 0.125 of it, x2.00" in text
    assert "not installed" in text  # vLLM, which no environment of ours holds
    assert "transformers on tiny: its time was up" in text
    assert "#### tiny, 2 streams of 20 tokens, launch by launch" in text
    assert text.count("run.py --device cpu") == 2
    results = tmp_path / "RESULTS.md"
    given = ["--record-from", str(tmp_path / "out" / "results.json"), "--results", str(results)]
    assert run.main(given) == 0
    assert "| not installed" in results.read_text()
    assert capsys.readouterr().out.count("## ") >= 2


def test_a_run_has_one_section_of_the_results(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    record("## 1, H100\n\na\n", file)
    record("## 2, H200\n\nb\n", file)
    record("## 1, H100\n\nc\n\n#### more\n\nd\n", file)
    text = file.read_text()
    assert text.startswith("# What was measured on GPUs\n")
    assert text.index("## 2, H200") < text.index("## 1, H100") < text.index("#### more")
    assert "\na\n" not in text
    record("## 1, H100\n\ne\n", file)
    assert file.read_text().endswith("## 1, H100\n\ne\n")
    assert "#### more" not in file.read_text()


@pytest.mark.slow
def test_continuous_batching_of_transformers(tmp_path: Path) -> None:
    """It runs on a CPU, too."""
    common = ["--device", "cpu", "--models", "tiny", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run.main([*common, "--only", "peers", "--peers", "transformers", "--engine-seconds", "60"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["engines"]["tiny"]["transformers"]
    assert "error" not in found
    assert set(found["works"]) == set(WORKS)
