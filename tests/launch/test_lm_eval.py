"""lm-eval's `local-completions` on tasks in a local file, against the demo model; skipped where it is not installed.

`test_serve_demo.py` sends the same requests without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.server_process import ROOT, ServerProcess

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "What is 17 + 25? Answer:", "choices": [" 43", " 42", " 12"], "label": 1},
    {"question": "What is 20 + 30? Answer:", "choices": [" 50", " 51", " 12"], "label": 0},
]
TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
doc_to_text: "{{question}}"
target_delimiter: ""
"""
CHOOSES = """
task: chooses
output_type: multiple_choice
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITES = """
task: writes
output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: [".", "\\n"], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.timeout(300)
def test_the_harness_finds_the_demo_models_knowledge(tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in (("chooses", CHOOSES), ("writes", WRITES)):
        (tmp_path / f"{name}.yaml").write_text(text + TASK % data)
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with ServerProcess() as server:
        model = (
            f"model=demo,base_url={server.wait_ready()}/v1/completions,num_concurrent=4,"
            f"tokenizer_backend=huggingface,tokenizer={ROOT / 'configs' / 'demo_model'}"
        )
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
        command += ["--include_path", str(tmp_path), "--tasks", "chooses,writes", "--output_path", str(tmp_path)]
        subprocess.run(command, cwd=tmp_path, env=os.environ | offline, check=True, capture_output=True, timeout=240)
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert (results["chooses"]["acc,none"], results["writes"]["exact_match,none"]) == (1.0, 1.0)
