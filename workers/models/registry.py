"""Which class computes which architecture; knows nothing of how. A model of one's own is added with one line."""

from __future__ import annotations

import importlib

from configs.errors import CheckpointError
from workers.models.decoder import Decoder

# The name under `architectures` in config.json -> "module:class", imported only when asked for.
_MODELS = {
    "LlamaForCausalLM": "workers.models.decoder:Decoder",
    "MistralForCausalLM": "workers.models.decoder:Decoder",
    "Qwen2ForCausalLM": "workers.models.decoder:Decoder",
    "Qwen3ForCausalLM": "workers.models.decoder:Decoder",
}


def get_model_class(architecture: str) -> type[Decoder]:
    """The class for an architecture.

    Raises:
        CheckpointError: it is not implemented; the message lists those that are.
    """
    if architecture not in _MODELS:
        raise CheckpointError(f"architecture {architecture!r} is not implemented; known: {', '.join(_MODELS)}")
    module_name, _, class_name = _MODELS[architecture].partition(":")
    model: type[Decoder] = getattr(importlib.import_module(module_name), class_name)
    return model
