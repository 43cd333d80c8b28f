"""Runs what needs a GPU, compares with other engines, and prints the tables; see README.md beside it.

    python tests/gpu/run.py [--only tests ours profile peers] [--models 0.6B 8B] [--folder DIR] [--record]

Each figure stands beside the limit that the same machine was measured to have: the bandwidth of a copy, and the rate
of a bfloat16 matrix product. Every engine, and the profile, runs in a process of its own that is ended when its time is
up; what it had measured by then counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from launch.bench.peers import last_line, run_process  # noqa: E402
from nanoengine.version import __version__  # noqa: E402
from tests.gpu.checkpoints import SHAPES, write_checkpoint  # noqa: E402
from tests.gpu.engines import ENGINES  # noqa: E402
from tests.gpu.report import RESULTS, record, section  # noqa: E402

PARTS = ("tests", "ours", "profile", "peers")
TESTS = ("tests/gpu", "tests/workers/kernels", "tests/workers/test_cuda_graph.py")
# Other versions of libraries than ours warn of other things, which must not fail a test there; nor need pytest have
# plugins for what these tests do not do.
PYTEST = ("-q", "-n", "0", "-W", "default", "-o", "addopts=--strict-markers --import-mode=importlib -ra")
TESTS_SECONDS, PROFILE_SECONDS = 420.0, 240.0
_LOGGED_BYTES = 100_000
_GRACE = 60.0
"""An engine shares its seconds out among its works; this is for the one that was under way when they ended."""


class Run:
    """What has been found so far, kept in a file, and where the rest goes."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self._deadline = time.monotonic() + arguments.seconds
        self._file = folder / "results.json"
        self.found: dict[str, Any] = {"engines": {}, "profiles": {}, "commands": []}
        device = device_name(arguments.device)
        if self._file.is_file():
            before = json.loads(self._file.read_text(encoding="utf-8"))
            if before["machine"]["device"] == device:
                self.found = before
        self.found.setdefault("started", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"))
        self.found["machine"] = {"device": device} | versions()
        self.found["commands"].append(" ".join(["python tests/gpu/run.py", *map(shlex.quote, arguments.given)]))

    def left(self, most: float) -> float:
        """Seconds that something may still take."""
        return max(1.0, min(most, self._deadline - time.monotonic()))

    def save(self) -> None:
        """Write what there is by now, as JSON and as Markdown."""
        text = section(self.found)
        self._file.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        self.arguments.out.mkdir(parents=True, exist_ok=True)
        for name, content in (("results.md", text), ("results.json", json.dumps(self.found, indent=1) + "\n")):
            (self.arguments.out / name).write_text(content, encoding="utf-8")
        if self.arguments.record:
            record(text, self.arguments.results)

    def child(self, script: str, *options: str, seconds: float) -> dict[str, Any]:
        """What a script of this folder wrote, with an `error` where it did not come to its end."""
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "out.json", Path(folder) / "log"
            command = [sys.executable, str(Path(__file__).parent / script), *options, "--out", str(out)]
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            code, _ = run_process(command, log, self.left(seconds), {"PYTHONPATH": path})
            result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
            if code:
                ended = "its time was up" if code == -9 else f"exit code {code}"
                result["error"] = f"{ended}: {last_line(log)}"
                self.arguments.out.mkdir(parents=True, exist_ok=True)
                with (self.arguments.out / "errors.log").open("ab") as errors:
                    errors.write(log.read_bytes()[-_LOGGED_BYTES:])
        return result


def main(given: list[str] | None = None) -> int:
    """Run the parts that are asked for; 0 when the tests passed and our engine came to its end."""
    arguments = parse(sys.argv[1:] if given is None else given)
    if arguments.record_from is not None:
        record(section(json.loads(arguments.record_from.read_text(encoding="utf-8"))), arguments.results)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device; --device cpu --models tiny tries this program without", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(arguments, folder)
        if "limits" not in run.found:
            run.found["limits"] = {"bandwidth": copy_bandwidth(arguments.device), "rate": matrix_rate(arguments.device)}
            if arguments.device == "cuda":
                torch.cuda.empty_cache()  # the memory is the engines' now, which are other processes
        failed = False
        for part in PARTS:
            if part in arguments.only:
                failed |= RUNNERS[part](run)
        print(section(run.found))
    return int(failed)


def parse(given: list[str]) -> argparse.Namespace:
    """The options; `given` stays known for the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["0.6B", "8B"], help="(default: 0.6B 8B)")
    parser.add_argument(
        "--folder", type=Path, help="keeps checkpoints and results, so that several commands add up (default: none)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"),
        help="a folder for results.md, results.json and errors.log (default: $OUT, else gpu-results)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1e6, help="for all parts; what runs then is ended")
    parser.add_argument(
        "--engine-seconds", type=float, default=120, help="for one engine on one model (default: %(default)s)"
    )
    peers = [name for name in ENGINES if name != "nanoengine"]
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers, help="(default: all that are installed)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries this program, on `tiny`")
    parser.add_argument("--record", action="store_true", help=f"also put the results into {RESULTS.name}")
    parser.add_argument(
        "--record-from", type=Path, metavar="FILE",
        help="do only that, with the results.json that another machine's run has left",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"what to record in (default: {RESULTS.name})")
    arguments = parser.parse_args(given)
    arguments.given = given
    return arguments


def run_tests(run: Run) -> bool:
    """All tests that need a GPU, one after another: they would share its memory. Whether one failed."""
    if run.arguments.device == "cpu":
        return False
    command = [sys.executable, "-m", "pytest", *PYTEST, *TESTS]
    with tempfile.TemporaryFile("w+") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, check=False, stdout=log, timeout=run.left(TESTS_SECONDS)
            ).returncode
        except subprocess.TimeoutExpired:
            code = -9
        log.seek(0)
        text = log.read()
    print(text, flush=True)
    last = text.strip().splitlines()[-1:] or [""]
    run.found["tests"] = last[0].strip("= ") if code != -9 else f"ended when their time was up: {last[0]}"
    run.save()
    return code != 0


def run_ours(run: Run) -> bool:
    """Our figures. Whether something went wrong."""
    failed = [run_engine(run, "nanoengine", model) for model in run.arguments.models]
    return any(failed)


def run_peers(run: Run) -> bool:
    """The others' figures. What goes wrong with one of them stands in the table."""
    for model in run.arguments.models:
        for name in run.arguments.peers:
            run_engine(run, name, model)
    return False


def run_engine(run: Run, name: str, model: str) -> bool:
    """Let one engine do all works on one model; whether that failed."""
    path = write_checkpoint(run.folder / SHAPES[model].name, SHAPES[model])
    options = ["--engine", name, "--model", str(path), "--device", run.arguments.device]
    options += ["--vocab-size", str(SHAPES[model].vocab_size)]
    seconds = run.left(run.arguments.engine_seconds)
    result = run.child("engines.py", *options, "--seconds", str(seconds), seconds=seconds + _GRACE)
    run.found["engines"].setdefault(model, {})[name] = result
    run.save()
    told = "not installed" if result.get("missing") else result.get("error", "done")
    print(f"{name} on {SHAPES[model].name}: {told}", file=sys.stderr, flush=True)
    return "error" in result


def run_profile(run: Run) -> bool:
    """Kernels of a decode step, and the idle time between steps. Whether something went wrong."""
    for model in run.arguments.models:
        path = write_checkpoint(run.folder / SHAPES[model].name, SHAPES[model])
        options = ["--model", str(path), "--device", run.arguments.device]
        if run.arguments.device == "cpu":
            options += ["--streams", "2", "--context", "20", "--tokens", "60"]
        result = run.child("decode_profile.py", *options, seconds=PROFILE_SECONDS)
        run.found["profiles"][model] = {"idle": [], "profiles": []} | result
        run.save()
        print(f"profile of {SHAPES[model].name}: {result.get('error', 'done')}", file=sys.stderr, flush=True)
    return any("error" in run.found["profiles"][model] for model in run.arguments.models)


RUNNERS: dict[str, Callable[[Run], bool]] = {
    "tests": run_tests,
    "ours": run_ours,
    "profile": run_profile,
    "peers": run_peers,
}


def device_name(device: str) -> str:
    """The GPU's, or CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"Python": platform.python_version(), "torch": torch.__version__, "nanoengine": __version__}
    if torch.version.cuda:
        import triton

        found |= {"Triton": triton.__version__, "CUDA": torch.version.cuda}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    return found | ({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})


def seconds_of(work: Callable[[], Any], repeats: int, device: str) -> float:
    """The median time of a call on the device."""
    times = []
    for _ in range(repeats + 2):
        if device == "cpu":
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[2:])[repeats // 2]


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy of 2 GiB (on a CPU, of 16 MiB)."""
    source = torch.empty(1 << (31 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), 11, device)


def matrix_rate(device: str) -> float:
    """Operations a second of a bfloat16 product of 8,192 squared (on a CPU, of 256)."""
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 11, device)


if __name__ == "__main__":
    sys.exit(main())
