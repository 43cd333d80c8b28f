"""All that decides: requests, sequences, scheduling, blocks, messages, clients. It touches no tensor.

The public names are resolved when they are first used, so that the scheduler and the workers, which import this
package too, never load a tokenizer or a client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanoengine._packages import check_packages
from nanoengine.version import __version__

check_packages("configs")

if TYPE_CHECKING:
    from configs.errors import NanoEngineError, RequestError
    from nanoengine.beam_params import BeamSearchParams
    from nanoengine.llm import LLM, AsyncLLM
    from nanoengine.outputs import CompletionOutput, RequestMetrics, RequestOutput
    from nanoengine.sampling_params import SamplingParams
    from nanoengine.structured_outputs import StructuredOutputsParams

_WHERE = {
    "LLM": "nanoengine.llm",
    "AsyncLLM": "nanoengine.llm",
    "SamplingParams": "nanoengine.sampling_params",
    "BeamSearchParams": "nanoengine.beam_params",
    "StructuredOutputsParams": "nanoengine.structured_outputs",
    "RequestOutput": "nanoengine.outputs",
    "CompletionOutput": "nanoengine.outputs",
    "RequestMetrics": "nanoengine.outputs",
    "NanoEngineError": "configs.errors",
    "RequestError": "configs.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "BeamSearchParams",
    "StructuredOutputsParams",
    "RequestOutput",
    "CompletionOutput",
    "RequestMetrics",
    "NanoEngineError",
    "RequestError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
