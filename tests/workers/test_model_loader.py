"""Loading: every checkpoint that is damaged, incomplete or refused says so, and no rank reads more than its share."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.engine import EngineConfig
from configs.errors import CheckpointError, ConfigError
from tests.workers.ranks import run_ranks
from tests.workers.tiny_models import make_tiny_checkpoint
from workers import model_loader, weight_files
from workers.model_loader import ModelLoader, resolve_dtype
from workers.models.registry import get_model_class
from workers.parallel import Communicator
from workers.weight_files import WeightTensor, open_weights

CPU = torch.device("cpu")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that tests copy: untied in one file, tied, and sharded."""
    root = tmp_path_factory.mktemp("originals")
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 37, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "untied": make_tiny_checkpoint(root / "untied", "qwen3", **sizes),
        "tied": make_tiny_checkpoint(root / "tied", "qwen2", **sizes),
        "sharded": make_tiny_checkpoint(root / "sharded", "mistral", max_shard_size="12KB", **sizes),
    }


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        for file in originals[name].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


def config_of(path: Path, **settings: Any) -> EngineConfig:
    return EngineConfig.create(model=str(path), skip_tokenizer_init=True, **settings).resolve()


def load(path: Path, communicator: Communicator | None = None, dtype: torch.dtype = torch.float32) -> Any:
    return ModelLoader(config_of(path)).load_model(CPU, communicator, dtype)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = SINGLE) -> None:
    tensors = load_file(path / file)
    change(tensors)
    save_file(tensors, path / file)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    for word in words:
        assert word in caught.value.message


# What does not fit


def test_a_missing_weight_stays_uninitialised(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    edit(path, lambda tensors: [tensors.pop(GATE), tensors.pop("model.layers.1.self_attn.k_norm.weight")])
    refused(path, "missing", GATE, "model.layers.1.self_attn.k_norm.weight")


def test_a_left_over_weight_is_ignored(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    edit(path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    refused(path, "left over: model.layers.0.self_attn.q_proj.bias")


def test_a_hundred_wrong_names_flood_the_terminal(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    edit(path, lambda tensors: tensors.update({f"extra.{i:03}": torch.zeros(1) for i in range(100)}))
    refused(path, "extra.000", "extra.007 and 92 more")


@pytest.mark.parametrize("name", [GATE, EMBEDDING, "model.norm.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_a_weight_of_another_shape_is_cut_or_broadcast(copy: Callable[[str], Path], name: str) -> None:
    path = copy("untied")
    edit(path, lambda tensors: tensors.update({name: torch.cat((tensors[name], tensors[name]))}))
    refused(path, "of another shape", name, "instead of")


def test_reading_begins_before_all_names_are_checked(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy("untied")
    edit(path, lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(WeightTensor, "read", lambda *_: pytest.fail("read"))
    refused(path, "model.norm.weight")


@pytest.mark.parametrize("suffix", ["rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq"])
def test_buffers_of_old_checkpoints_are_refused(copy: Callable[[str], Path], suffix: str) -> None:
    path = copy("untied")
    edit(path, lambda tensors: tensors.update({f"model.layers.0.{suffix}": torch.ones(4)}))
    load(path)


def test_a_quantised_weight_is_read_as_numbers(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    edit(path, lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int8)}))
    refused(path, "I8", GATE)


# Files


def test_an_empty_folder_loads(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    (path / SINGLE).unlink()
    refused(path, "neither model.safetensors nor model.safetensors.index.json")


def test_weights_under_another_name_are_not_mentioned(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    (path / SINGLE).rename(path / "consolidated.safetensors")
    refused(path, "consolidated.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_loaded(copy: Callable[[str], Path], name: str) -> None:
    path = copy("untied")
    (path / SINGLE).unlink()
    (path / name).write_bytes(b"\x80\x02cos\nsystem\n")
    refused(path, name, "safetensors only")


def test_a_pickle_beside_safetensors_is_in_the_way(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    (path / "pytorch_model.bin").write_bytes(b"")
    load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -40])
def test_a_truncated_file_crashes_or_loads(copy: Callable[[str], Path], keep: int) -> None:
    path = copy("untied")
    (path / SINGLE).write_bytes((path / SINGLE).read_bytes()[:keep])
    refused(path, SINGLE, "not a readable safetensors file")


def test_a_garbled_header_crashes_or_loads(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    data = bytearray((path / SINGLE).read_bytes())
    data[8:40] = b"\xff" * 32
    (path / SINGLE).write_bytes(data)
    refused(path, SINGLE, "not a readable safetensors file")


# Shards


def test_a_sharded_checkpoint_differs_from_a_single_file(originals: dict[str, Path], tmp_path: Path) -> None:
    sharded = originals["sharded"]
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    merged: dict[str, torch.Tensor] = {}
    for file in files:
        merged |= load_file(file)
    save_file(merged, tmp_path / SINGLE)
    with open_weights(sharded) as left, open_weights(tmp_path) as right:
        assert left.keys() == right.keys()
        for name in left:
            size = left[name].shape[0]
            assert torch.equal(left[name].read(0, 0, size), right[name].read(0, 0, size))
    load(sharded)


@pytest.mark.parametrize(
    "file_name",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".hidden.safetensors", "a\\b.safetensors",
     "model.bin", "", None, 3, "\0.safetensors"],
)  # fmt: skip
def test_an_index_leads_out_of_the_directory(copy: Callable[[str], Path], file_name: object) -> None:
    path = copy("sharded")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][GATE] = file_name
    (path / INDEX).write_text(json.dumps(index))
    refused(path, INDEX, GATE, repr(file_name))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff"])
def test_a_malformed_index_crashes(copy: Callable[[str], Path], text: str) -> None:
    path = copy("sharded")
    (path / INDEX).write_bytes(text.encode("latin-1"))
    refused(path, INDEX)


def test_a_missing_shard_is_skipped(copy: Callable[[str], Path]) -> None:
    path = copy("sharded")
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    refused(path, "do not exist", gone.name)


def test_an_index_promises_what_a_shard_lacks(copy: Callable[[str], Path]) -> None:
    path = copy("sharded")
    index = json.loads((path / INDEX).read_text())
    edit(path, lambda tensors: tensors.pop(GATE), index["weight_map"][GATE])
    refused(path, index["weight_map"][GATE], GATE)


def test_two_shards_hold_the_same_weight(copy: Callable[[str], Path]) -> None:
    path = copy("sharded")
    files = [file.name for file in sorted(path.glob("*.safetensors"))]
    name = next(iter(load_file(path / files[0])))
    edit(path, lambda tensors: tensors.update({name: torch.ones(3)}), files[1])
    refused(path, "both hold", name)


# Tied embeddings


@pytest.mark.parametrize("present", ["embedding", "head", "both"])
def test_a_tied_head_is_only_found_in_one_place(copy: Callable[[str], Path], present: str) -> None:
    path = copy("tied")
    table = load_file(path / SINGLE)[EMBEDDING]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if present != "embedding":
            tensors[HEAD] = tensors[EMBEDDING].clone()
        if present == "head":
            del tensors[EMBEDDING]

    edit(path, change)

    def check(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor | None]:
        model = load(path, communicator)
        return model.embed_tokens(torch.arange(37)), model.compute_logits(torch.eye(24))

    for embedded, logits in run_ranks(2, check):
        assert torch.equal(embedded, table)
        if logits is not None:
            torch.testing.assert_close(logits, table.T)


def test_a_tied_head_that_differs_is_ignored(copy: Callable[[str], Path]) -> None:
    path = copy("tied")
    edit(path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    refused(path, "tie_word_embeddings", HEAD)
    edit(path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:5].clone()}))
    refused(path, "of another shape", HEAD)


def test_an_untied_head_may_be_absent(copy: Callable[[str], Path]) -> None:
    path = copy("untied")
    edit(path, lambda tensors: tensors.pop(HEAD))
    refused(path, f"missing: {HEAD}")


# Shares and dtypes


@pytest.mark.parametrize("family", ["untied", "tied"])
def test_a_rank_reads_whole_tensors(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    read = WeightTensor.read
    largest: dict[str, float] = {}

    def watch(tensor: WeightTensor, dim: int, start: int, size: int) -> torch.Tensor:
        part = read(tensor, dim, start, size)
        share = part.numel() / torch.Size(tensor.shape).numel()
        largest[tensor._name] = max(largest.get(tensor._name, 0), share)
        return part

    monkeypatch.setattr(WeightTensor, "read", watch)
    run_ranks(4, lambda communicator: load(originals[family], communicator))
    for name, share in largest.items():
        if "norm" in name:
            assert share == 1
        elif "k_proj" in name or "v_proj" in name:
            assert share == 1 / 2  # 2 heads over 4 ranks
        else:
            assert share <= 10 / 37, name  # a quarter of 40, the padded vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_is_computed_in_another_type_or_with_gradients(originals: dict[str, Path], dtype: torch.dtype) -> None:
    model = load(originals["untied"], dtype=dtype)
    assert not model.training
    assert all(not parameter.requires_grad and parameter.dtype == dtype for parameter in model.parameters())
    assert model.embed_tokens(torch.arange(3)).dtype == dtype
    logits = model.compute_logits(torch.randn(2, 24).to(dtype))
    assert logits.shape == (2, 37)
    assert logits.dtype == torch.float32


def test_a_model_that_cannot_be_split_is_split(originals: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="cannot be split over 3 ranks"):
        run_ranks(3, lambda communicator: load(originals["untied"], communicator))


def test_loading_reports_nothing(originals: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "workers.model_loader"):
        load(originals["untied"], dtype=torch.bfloat16)
    assert re.search(r"loaded Qwen3ForCausalLM .*cpu as bfloat16: 0\.0 M parameters.*, \d+\.\d\d s", caplog.text)


def test_an_unknown_architecture_crashes() -> None:
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel.*known: LlamaForCausalLM, Mistral"):
        get_model_class("GPT2LMHeadModel")


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(model_loader, "has_native_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_auto_computes_in_a_type_the_processor_lacks(
    copy: Callable[[str], Path], native_bfloat16: bool, stored: str
) -> None:
    path = copy("untied")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"dtype": stored}))
    wanted = torch.bfloat16 if native_bfloat16 and stored != "float32" else torch.float32
    assert resolve_dtype(config_of(path), CPU) == wanted
    assert resolve_dtype(config_of(path, dtype="half"), CPU) == torch.float16
    assert resolve_dtype(config_of(path, dtype="float"), CPU) == torch.float32


@pytest.mark.parametrize(
    ("stored", "capability", "wanted"),
    [("bfloat16", (7, 5), torch.float16), ("bfloat16", (8, 0), torch.bfloat16), ("float16", (9, 0), torch.float16)],
)
def test_auto_computes_in_a_type_the_gpu_lacks(
    copy: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    capability: tuple[int, int],
    wanted: torch.dtype,
) -> None:
    path = copy("untied")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"dtype": stored}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype(config_of(path), torch.device("cuda")) == wanted


def test_a_list_of_names_is_cut_silently() -> None:
    assert weight_files.name_some({"b", "a"}) == "a, b"
    assert weight_files.name_some({str(i) for i in range(10)}, limit=2) == "0, 1 and 8 more"


# Memory


def test_what_was_read_counts_as_memory_until_the_end(tmp_path: Path) -> None:
    wanted = torch.randn(3000, 1000)
    save_file({"large": wanted, "small": torch.ones(3)}, tmp_path / SINGLE)

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        found = [next(line for line in lines if line.startswith("Rss:")) for line in lines if str(tmp_path) in line]
        return sum(int(line.split()[1]) * 1024 for line in found)

    with open_weights(tmp_path) as tensors:
        large = tensors["large"]
        for dim, start, size in ((0, 0, 3000), (1, 400, 600), (0, 0, 0)):
            assert torch.equal(large.read(dim, start, size), wanted.narrow(dim, start, size))
            before = resident()
            large.release()
            assert resident() < before / 10 or size == 0
        assert before < wanted.nbytes / 10
        assert torch.equal(tensors["small"].read(0, 0, 3), torch.ones(3))
        tensors["small"].release()


def test_files_are_read_by_the_order_of_names(tmp_path: Path) -> None:
    """safetensors puts what has larger numbers first."""
    save_file({"a": torch.ones(4).bfloat16(), "b": torch.ones(4), "c": torch.ones(4).half()}, tmp_path / SINGLE)
    with open_weights(tmp_path) as tensors:
        assert list(tensors) == ["b", "a", "c"]
