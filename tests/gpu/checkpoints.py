"""Writes checkpoints with the shapes of known models and random weights: shapes decide the speed, not the weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

_DEMO_MODEL = Path(__file__).parents[2] / "configs" / "demo_model"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Qwen3 of some size; `tied` embeddings have no head of their own."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tied: bool
    head_dim: int = 128
    vocab_size: int = 151_936

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices of all layers."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.num_hidden_layers * self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """Numbers in the language-model head."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes(self) -> int:
        """K and V of one token over all layers, in bfloat16."""
        return 4 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


QWEN3_06B = Shape("Qwen3-0.6B", 1024, 3072, 28, 16, 8, tied=True)
QWEN3_8B = Shape("Qwen3-8B", 4096, 12288, 36, 32, 8, tied=False)
TINY = Shape("tiny", 64, 96, 2, 4, 2, tied=True, head_dim=16, vocab_size=512)
SHAPES = {"0.6B": QWEN3_06B, "8B": QWEN3_8B, "tiny": TINY}
"""By the names that `run.py` takes; the last one is to try a program on a CPU."""


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """`folder` with config.json and one safetensors file a layer, in bfloat16; nothing is done where it is there.

    The tokenizer is the demo model's: some engines do not start without one, and none is asked for texts.
    """
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "eos_token_id": 151_645,
        "bos_token_id": 151_643,
    } | {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape) if field.name not in _OURS}
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # Eight thousand million numbers take a CPU more than a minute, which a borrowed GPU has better use for.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return drawn.mul_(columns**-0.5).bfloat16().cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    kv_heads = shape.num_key_value_heads * shape.head_dim
    files: dict[str, str] = {}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {
            "input_layernorm.weight": ones(hidden),
            "post_attention_layernorm.weight": ones(hidden),
            "self_attn.q_proj.weight": matrix(heads, hidden),
            "self_attn.k_proj.weight": matrix(kv_heads, hidden),
            "self_attn.v_proj.weight": matrix(kv_heads, hidden),
            "self_attn.o_proj.weight": matrix(hidden, heads),
            "self_attn.q_norm.weight": ones(shape.head_dim),
            "self_attn.k_norm.weight": ones(shape.head_dim),
            "mlp.gate_proj.weight": matrix(shape.intermediate_size, hidden),
            "mlp.up_proj.weight": matrix(shape.intermediate_size, hidden),
            "mlp.down_proj.weight": matrix(hidden, shape.intermediate_size),
        }
        _save(folder, f"layer-{layer}.safetensors", {prefix + name: tensor for name, tensor in tensors.items()}, files)
    rest = {"model.embed_tokens.weight": matrix(shape.vocab_size, hidden), "model.norm.weight": ones(hidden)}
    if not shape.tied:
        rest["lm_head.weight"] = matrix(shape.vocab_size, hidden)
    _save(folder, "rest.safetensors", rest, files)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_DEMO_MODEL / name, folder / name)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if device == "cuda":
        torch.cuda.empty_cache()  # other processes want it
    return folder


_OURS = ("name", "tied")


def _save(folder: Path, name: str, tensors: dict[str, torch.Tensor], files: dict[str, str]) -> None:
    save_file(tensors, folder / name)
    files.update(dict.fromkeys(tensors, name))
