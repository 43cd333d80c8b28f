"""Settings validate themselves and agree with each other and with the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from configs.engine import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig, ServerConfig
from configs.errors import CheckpointError, ConfigError, RequestError, WorkerError, from_wire, to_wire

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
    "dtype": "bfloat16",
    "eos_token_id": 7,
}


def write_config(path: Path, **changes: Any) -> str:
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size must be of type int, got '2'"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size must be at least 1 and at most 1, got 2"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization must be greater than 0 and at most 1, got 0.0"),
        ({"gpu_memory_utilization": float("nan")}, "finite"),
        ({"swap_space": -1}, "swap_space must be at least 0 and at most 1048576, got -1"),
        ({"preemption_mode": "drop"}, "preemption_mode must be one of recompute, swap"),
        ({"dtype": "int8"}, "dtype must be one of auto, half"),
        ({"tokenizer_mode": "fast"}, "auto, slow"),
        ({"policy": "lifo"}, "policy must be one of fcfs, priority"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_num_seqs": True}, "max_num_seqs must be of type int, got True"),
        ({"port": 70000}, "port must be at least 0 and at most 65535, got 70000"),
        ({"model": ""}, "model must name"),
        ({"api_key": ""}, "api_key"),
        ({"colour": 1}, "unknown setting colour; known: "),
    ],
)
def test_impossible_setting_names_field_value_and_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create(**settings)
    assert words in str(caught.value)
    assert caught.value.field == next(iter(settings))


def test_promised_defaults_and_names() -> None:
    assert ModelConfig().model == "demo"
    assert (ModelConfig().seed, ModelConfig().max_model_len) == (0, None)
    assert ModelConfig(dtype="half").torch_dtype_name == "float16"
    assert ModelConfig(dtype="float").torch_dtype_name == "float32"
    cache = CacheConfig()
    assert (cache.block_size, cache.gpu_memory_utilization, cache.enable_prefix_caching) == (16, 0.9, True)
    assert SchedulerConfig().max_num_seqs == 256
    assert ParallelConfig(tensor_parallel_size=4).world_size == 4
    assert (ServerConfig().host, ServerConfig().port) == ("127.0.0.1", 8000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().seed = 3  # type: ignore[misc]


def test_config_survives_the_pipe(tmp_path: Path) -> None:
    config = EngineConfig.create(
        model=write_config(tmp_path), tensor_parallel_size=2, block_size=4, num_kv_blocks=10, max_num_seqs=3
    ).resolve()
    assert EngineConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_resolve_makes_the_layers_agree(tmp_path: Path) -> None:
    config = EngineConfig.create(model=write_config(tmp_path)).resolve()
    assert config.max_model_len == config.scheduler.max_model_len == 512
    assert config.resolved_checkpoint.rope.theta == 5000.0
    assert config.resolved_checkpoint.eos_token_ids == (7,)
    with pytest.raises(ConfigError, match="max_model_len must be at most 512"):
        EngineConfig.create(model=str(tmp_path), max_model_len=513).resolve()
    with pytest.raises(ConfigError, match="max_num_batched_tokens must be at least max_model_len"):
        EngineConfig.create(model=str(tmp_path), enable_chunked_prefill=False, max_num_batched_tokens=100).resolve()


def test_swapping_without_a_place_to_swap_to_is_refused(tmp_path: Path) -> None:
    name = write_config(tmp_path)
    with pytest.raises(
        ConfigError, match="preemption_mode swap needs a swap_space greater than 0 GiB, got 0"
    ) as caught:
        EngineConfig.create(model=name, preemption_mode="swap").resolve()
    assert caught.value.field == "swap_space"
    EngineConfig.create(model=name, preemption_mode="swap", swap_space=0.25).resolve()
    EngineConfig.create(model=name, swap_space=1).resolve()  # for evicted prefixes alone


@pytest.mark.parametrize("tp", [3, 5, 16])
def test_tp_that_cannot_divide_the_heads_is_refused_with_those_that_can(tmp_path: Path, tp: int) -> None:
    with pytest.raises(ConfigError, match=r"must be one of 1, 2, 4, 8 for a model with 8 attention heads"):
        EngineConfig.create(model=write_config(tmp_path), tensor_parallel_size=tp).resolve()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architecture None"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "remote code"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["linear_attention"]}, "layer_types"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"torch_dtype": None, "dtype": "float8"}, "dtype"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ],
)
def test_checkpoint_that_is_not_implemented_raises_and_names_the_key(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        EngineConfig.create(model=write_config(tmp_path, **changes)).resolve()
    assert words in str(caught.value)


def test_sliding_window_is_never_ignored(tmp_path: Path) -> None:
    name = write_config(tmp_path, architectures=["MistralForCausalLM"], sliding_window=128)
    assert EngineConfig.create(model=name).resolve().max_model_len == 128
    with pytest.raises(ConfigError, match="sliding_window"):
        EngineConfig.create(model=name, max_model_len=129).resolve()


def test_unused_sliding_window_of_qwen2_is_no_window(tmp_path: Path) -> None:
    name = write_config(tmp_path, architectures=["Qwen2ForCausalLM"], sliding_window=128, use_sliding_window=False)
    assert EngineConfig.create(model=name).resolve().max_model_len == 512


def test_eos_is_one_set_out_of_both_files(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=[3, 5])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert EngineConfig.create(model=str(tmp_path)).resolve().resolved_checkpoint.eos_token_ids == (3, 5, 9)


def test_theta_inside_the_rope_dict_is_found(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    name = write_config(tmp_path, rope_theta=None, rope_parameters=rope)
    assert EngineConfig.create(model=name).resolve().resolved_checkpoint.rope.theta == 1e6


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        EngineConfig.create(model=str(tmp_path)).resolve()


def test_errors_cross_a_process_boundary_as_data() -> None:
    error = from_wire(json.loads(json.dumps(to_wire(WorkerError("rank 1 died", rank=1)))))
    assert isinstance(error, WorkerError)
    assert (str(error), error.rank) == ("rank 1 died", 1)
    request = from_wire(to_wire(RequestError("too long", "prompt", "context_length_exceeded")))
    assert isinstance(request, RequestError)
    assert (request.param, request.code) == ("prompt", "context_length_exceeded")
    assert "KeyError" in str(from_wire(to_wire(KeyError("x"))))
    assert str(from_wire({"kind": "Unheard", "message": "m"})) == "m"


def test_generation_config_gives_sampling_defaults_unless_it_is_ignored(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "max_new_tokens": 5, "eos_token_id": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    config = EngineConfig.create(model=write_config(tmp_path)).resolve()
    assert config.default_sampling == {"temperature": 0.6, "top_k": 20, "max_tokens": 5}
    assert EngineConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    ignored = EngineConfig.create(model=write_config(tmp_path), generation_config="none").resolve()
    assert ignored.default_sampling == {}
    assert ignored.resolved_checkpoint.eos_token_ids == (7,)


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_k": 1.5}, {"top_p": True}], ids=str)
def test_a_sampling_default_that_is_no_number_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=next(iter(wrong))):
        EngineConfig.create(model=write_config(tmp_path)).resolve()
