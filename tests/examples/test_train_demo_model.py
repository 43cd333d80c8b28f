"""The training script of the demo model, end to end on a model too small to know anything.

Knows nothing of what the shipped model answers; tests/configs/test_demo_model.py does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo_model.py"


def test_smoke_run_writes_a_complete_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, str(SCRIPT), "--smoke", "--threads", "1", "--seed", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in out.iterdir()}
    assert written == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    # Nothing but the result stays behind beside it.
    assert list(tmp_path.iterdir()) == [out]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "--seed 1" in card
    assert str(tmp_path) not in card


def test_held_out_items_never_reach_training() -> None:
    """A held-out answer seen in training would make the card's scores worthless."""
    code = """
import random, sys
from demo_data import all_skills
rng = random.Random(5)
for skill in all_skills():
    for form in ("completion", "chat"):
        if skill.phrasings(form):
            held = {item.prompt for item in skill.held_out_items(form)}
            assert held or skill.name == "introductions", skill.name
            assert not held & {skill.draw(rng, form).prompt for _ in range(2000)}, skill.name
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
