"""What is wrong with a model or does not fit the machine reaches the user, typed, out of the process that found it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import CapacityError, CheckpointError, NanoEngineError, TokenizerError
from nanoengine import LLM
from tests.workers.tiny_models import make_tiny_checkpoint


def drop_a_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, path / "model.safetensors")


def bend_a_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(5)
    save_file(weights, path / "model.safetensors")


def pickle_them(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "settings", "kind", "words"),
    [
        (drop_a_weight, {}, CheckpointError, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        (bend_a_weight, {"tensor_parallel_size": 2}, CheckpointError, r"model\.norm\.weight"),
        (pickle_them, {}, CheckpointError, r"pytorch_model\.bin.*safetensors"),
        (None, {"num_kv_blocks": 2**31 - 1}, CapacityError, r"2147483647.*GiB"),
    ],
)
def test_error_of_a_rank_reaches_the_caller_as_it_is(
    tmp_path: Path, change: Any, settings: dict[str, Any], kind: type[NanoEngineError], words: str
) -> None:
    make_tiny_checkpoint(tmp_path, "qwen3")
    if change is not None:
        change(tmp_path)
    with pytest.raises(kind, match=words):
        LLM(str(tmp_path), skip_tokenizer_init=True, device="cpu", **settings)


def test_model_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, "qwen3")
    with pytest.raises(TokenizerError, match="skip_tokenizer_init"):
        LLM(str(tmp_path))
