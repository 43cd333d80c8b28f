"""`LLM` and `AsyncLLM` with real processes, as a user's script starts them; what they compute is tested elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from nanoengine import LLM, AsyncLLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPT = "中国的首都是"

# No main guard, no close, from standard input, with a folder named like one of our packages beside it.
SCRIPT = """
    from nanoengine import LLM, SamplingParams
    llm = LLM("demo")
    greedy = SamplingParams(temperature=0, max_tokens=8)
    print(llm.generate("中国的首都是", greedy, use_tqdm=False)[0].outputs[0].text, flush=True)
    try:
        print("busy", flush=True)
        llm.generate([[5, 6]] * 64, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(llm.generate("中国的首都是", greedy, use_tqdm=False)[0].outputs[0].text, flush=True)
"""


@pytest.mark.timeout(180)
def test_a_script_without_a_guard_survives_an_interrupt_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "utf-8"}
    script = subprocess.Popen(
        [sys.executable, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
    )
    try:
        assert script.stdin is not None
        assert script.stdout is not None
        script.stdin.write(textwrap.dedent(SCRIPT))
        script.stdin.close()
        first = script.stdout.readline()
        assert script.stdout.readline() == "busy\n"
        time.sleep(0.5)
        children = psutil.Process(script.pid).children(recursive=True)
        assert len(children) >= 2
        os.killpg(script.pid, signal.SIGINT)  # what a terminal does: everybody in the group gets it
        assert script.stdout.readline() == "interrupted\n"
        assert script.stdout.readline() == first, "the engine did not outlive the interrupt"
        assert script.wait(20) == 0
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
    finally:
        script.kill()
        script.wait()
        assert script.stdout is not None
        script.stdout.close()


@pytest.mark.timeout(180)
async def test_two_engines_at_once_give_the_same_answer_whatever_runs_beside_it() -> None:
    one = LLM("demo", executor="inprocess")
    async with AsyncLLM("demo", executor="inprocess") as several:
        alone = [output async for output in several.generate(PROMPT, GREEDY)][-1].outputs[0]
        async for _ in several.generate([5, 6], SamplingParams(max_tokens=None, ignore_eos=True)):
            break
        beside = [output async for output in several.generate(PROMPT, GREEDY)][-1].outputs[0]
        assert several.num_unfinished == 0
        batch = one.generate([PROMPT, [5, 6], PROMPT], GREEDY, use_tqdm=False)
    one.close()
    answers = [alone, beside, batch[0].outputs[0], batch[2].outputs[0]]
    assert all(answer == alone for answer in answers)
    assert alone.finish_reason in ("stop", "length")
    assert "\ufffd" not in alone.text
