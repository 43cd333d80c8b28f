"""Reads a checkpoint's config.json once, into one normalised dataclass; knows no tensor and no device.

Nothing is guessed: a rope type, activation, window or architecture that the decoder does not implement raises
here, before any process starts. Field names follow Hugging Face's `config.json`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from configs.errors import CheckpointError
from configs.model_files import read_json_object

# How each architecture differs where its config.json does not say so itself.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "MistralForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
}
# What generation_config.json may say of sampling, where a request does not, and the request's own name for it.
# max_length is not among them, as in vLLM: it counts the prompt, which a default for requests knows nothing of.
_SAMPLING_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `rope_type` is `default`, `linear` or `llama3`; the rest belongs to the scaled types."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What a decoder needs to know of its checkpoint, the same for every family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    default_sampling: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for the pipe to another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CheckpointConfig:
        """Inverse of `to_dict`."""
        fields = dict(data)
        fields["rope"] = RopeConfig(**fields["rope"])
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        fields["default_sampling"] = tuple((name, value) for name, value in fields["default_sampling"])
        return cls(**fields)


def load_checkpoint_config(model_dir: str | Path, use_generation_config: bool = True) -> CheckpointConfig:
    """Normalise `config.json` of a model directory, and eos ids and sampling defaults of `generation_config.json`.

    Raises:
        CheckpointError: the file is missing or not JSON, a value is out of range, or it asks for something that
            the decoder does not implement; the message names the key.
    """
    root = Path(model_dir)
    raw = _read_json(root / "config.json", required=True)
    generation = _read_json(root / "generation_config.json", required=False) if use_generation_config else {}
    if "auto_map" in raw:
        raise CheckpointError(
            f"{root / 'config.json'} names remote code (auto_map); models are data, remote code is refused"
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{root / 'config.json'} has a quantization_config; quantised weights are not implemented"
        )
    names = raw.get("architectures") or []
    architecture = names[0] if isinstance(names, list) and names else None
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise CheckpointError(
            f"architecture {architecture!r} in {root / 'config.json'} is not implemented; known: {', '.join(_FAMILIES)}"
        )
    return _Normaliser(raw, root / "config.json").build(architecture, generation)


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} does not exist; a model directory needs config.json and *.safetensors")
        return {}
    return read_json_object(path, path.parent, CheckpointError)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e308 < value < 1e308  # math.isfinite raises for an int that is no float


class _Normaliser:
    """Takes values out of one config.json, each with its type and range checked."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def build(self, architecture: str, generation: dict[str, Any]) -> CheckpointConfig:
        family = _FAMILIES[architecture]
        heads = self.integer("num_attention_heads", maximum=4096)
        hidden = self.integer("hidden_size")
        kv_heads = self.integer("num_key_value_heads", default=heads, maximum=4096)
        head_dim = self.integer("head_dim", default=hidden // heads, maximum=1024)
        if heads % kv_heads:
            raise self.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        if head_dim % 2:
            raise self.error("head_dim", head_dim, "an even number")
        self.choice("hidden_act", ("silu", "swish"), default="silu")
        attention_bias = self.boolean("attention_bias", default=family["qkv_bias"])
        return CheckpointConfig(
            architecture=architecture,
            vocab_size=self.integer("vocab_size", maximum=2**24),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_hidden_layers=self.integer("num_hidden_layers", maximum=1024),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.number("rms_norm_eps", default=1e-6),
            rope=self.rope(),
            max_position_embeddings=self.integer("max_position_embeddings", default=2048, maximum=2**31 - 1),
            tie_word_embeddings=self.boolean("tie_word_embeddings", default=False),
            # Qwen2 always biases q, k and v and never o; Llama and Qwen3 say so with attention_bias, for all four.
            qkv_bias=family["qkv_bias"] or attention_bias,
            attention_output_bias=attention_bias and not family["qkv_bias"],
            mlp_bias=self.boolean("mlp_bias", default=False),
            qk_norm=family["qk_norm"],
            dtype=self.dtype(),
            sliding_window=self.sliding_window(architecture),
            bos_token_id=self.raw.get("bos_token_id") if isinstance(self.raw.get("bos_token_id"), int) else None,
            eos_token_ids=self.eos_token_ids(generation),
            default_sampling=self.default_sampling(generation),
        )

    def error(self, key: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{key} in {self.path} must be {wanted}, got {value!r:.200}")

    def integer(self, key: str, default: int | None = None, maximum: int = 2**24) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.error(key, value, f"a whole number from 1 to {maximum}")
        return value

    def number(self, key: str, default: float) -> float:
        return self._number(key, self.raw.get(key, default))

    def _number(self, key: str, value: Any) -> float:
        if not _is_finite(value) or value <= 0:
            raise self.error(key, value, "a number greater than 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self.raw.get(key) or default
        if value not in choices:
            raise self.error(key, value, "one of " + ", ".join(choices))
        return str(value)

    def dtype(self) -> str:
        # transformers 5 writes `dtype`, earlier versions `torch_dtype`.
        value = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        if value not in ("float32", "bfloat16", "float16"):
            raise self.error("dtype", value, "one of float32, bfloat16, float16")
        return str(value)

    def rope(self) -> RopeConfig:
        """Newer checkpoints keep theta inside the rope dict (`rope_parameters`), older ones beside it."""
        scaling = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise self.error("rope_scaling", scaling, "an object or null")
        if self.raw.get("partial_rotary_factor", 1.0) != 1.0 or scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.error("partial_rotary_factor", "other than 1", "1 (partial rotary embedding is not implemented)")
        theta = self._number("rope_theta", scaling.get("rope_theta", self.raw.get("rope_theta", 10000.0)))
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type == "default":
            return RopeConfig(theta=theta)
        if rope_type == "linear":
            return RopeConfig(
                theta=theta, rope_type="linear", factor=self._number("rope factor", scaling.get("factor"))
            )
        if rope_type != "llama3":
            raise self.error("rope_type", rope_type, "one of default, linear, llama3")
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = {key: self._number(f"rope {key}", scaling.get(key)) for key in keys}
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise self.error("high_freq_factor", values["high_freq_factor"], "greater than low_freq_factor")
        original = int(values.pop("original_max_position_embeddings"))
        return RopeConfig(theta=theta, rope_type="llama3", original_max_position_embeddings=original, **values)

    def sliding_window(self, architecture: str) -> int | None:
        """The window that would have to be honoured; None when every layer attends to everything."""
        layer_types = self.raw.get("layer_types") or []
        if not isinstance(layer_types, list):
            raise self.error("layer_types", layer_types, "a list of names")
        if any(kind != "full_attention" for kind in layer_types):
            if self.raw.get("sliding_window") is None:
                raise self.error("layer_types", sorted(set(map(str, layer_types))), "full_attention throughout")
            return self.integer("sliding_window")
        if architecture.startswith("Qwen") and not self.raw.get("use_sliding_window", False):
            return None
        return None if self.raw.get("sliding_window") is None else self.integer("sliding_window")

    def default_sampling(self, generation: dict[str, Any]) -> tuple[tuple[str, float], ...]:
        """What a request that leaves a field out takes instead; its range is the request's business."""
        found = []
        for key, name in _SAMPLING_DEFAULTS.items():
            value = generation.get(key)
            if value is None:
                continue
            kinds = int if key in ("top_k", "max_new_tokens") else int | float
            if not isinstance(value, kinds) or not _is_finite(value):
                raise self.error(f"{key} of the generation_config.json beside", value, "a number")
            found.append((name, value))
        return tuple(found)

    def eos_token_ids(self, generation: dict[str, Any]) -> tuple[int, ...]:
        """One set out of config.json and generation_config.json, where eos may be an int or a list."""
        found: set[int] = set()
        for source in (self.raw, generation):
            value = source.get("eos_token_id")
            for token in value if isinstance(value, list) else [value]:
                if token is None:
                    continue
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
                    raise self.error("eos_token_id", value, "a token id or a list of token ids")
                found.add(token)
        return tuple(sorted(found))
