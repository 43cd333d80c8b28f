"""Writes tiny random checkpoints of every family the decoder serves, and loads transformers' twin of them.

Shapes are awkward on purpose: head_dim is not hidden/heads, the vocabulary is odd, no dimension is a power of two.
Weights are scaled by fan-in with a gain above one, so that attention is peaked and logits are spread: greedy
decoding has a clear winner nearly everywhere (a test that needs that asserts it). Knows nothing of our own code.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from transformers import Qwen2Config, Qwen3Config  # isort: skip

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")

_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "llama3": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# Every family takes 1, 2 and 4 ranks: 8 heads, and K/V heads that are split, replicated, or both by turns.
_COMMON: dict[str, Any] = {
    "vocab_size": 263,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# What makes a family itself, with the K/V heads and the tying spread over the families.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8},
    "llama3": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def make_tiny_checkpoint(
    path: str | Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write `config.json` and safetensors of a random model of `family` (one of FAMILIES); returns the directory.

    `overrides` are keys of the family's transformers config, e.g. num_key_value_heads=1, tie_word_embeddings=True,
    vocab_size=130. There is no tokenizer: engines need skip_tokenizer_init. There is no eos unless it is given.
    `max_shard_size="50KB"` makes a sharded checkpoint with an index.
    """
    config = _CONFIGS[family](**(_COMMON | _OWN[family] | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_weight(name, parameter, generator))
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)


def load_reference(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model of a checkpoint, with its plain ("eager") attention, ready to be compared with."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.eval()


def _random_weight(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.5 * noise
    if "embed_tokens" in name:  # small beside what the layers add, or a tied head would only repeat its input
        return 0.3 * noise
    gain = 2.0 if "o_proj" in name or "down_proj" in name else 1.5
    return gain / math.sqrt(like.shape[1]) * noise
