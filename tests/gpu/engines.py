"""Does the work of `works.py` on one engine, ours or another that is installed; a process of its own.

    python -m tests.gpu.engines --engine transformers --model DIR --out FILE [--works single,bench] [--seconds 120]

The file is written anew after each work, so that what was measured stands there however this process ends.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.gpu.works import Generate, Work, measure, works

_LONG = {"max_model_len": 9000, "max_num_batched_tokens": 8192, "max_num_seqs": 64}
_SHORT = {"max_model_len": 4096}


class Engine(abc.ABC):
    """One engine, of which `sessions` are opened one after another.

    Args:
        model: a checkpoint's directory.
        device: cuda, or cpu to try this program.

    Attributes:
        package: what is imported.
        distribution: whose version is told.
    """

    package = distribution = ""

    def __init__(self, model: str, device: str) -> None:
        self.model, self.device = model, device

    @abc.abstractmethod
    def sessions(self, todo: list[Work]) -> Iterator[tuple[list[Work], AbstractContextManager[Generate]]]:
        """The works that go together, and what must be entered for them."""


class NanoEngine(Engine):
    """This one, through `LLM` and its processes."""

    package = distribution = "nanoengine"

    def sessions(self, todo: list[Work]) -> Iterator[tuple[list[Work], AbstractContextManager[Generate]]]:
        for is_long in (True, False):
            some = [work for work in todo if work.is_long == is_long]
            if some:
                yield some, self._session(_LONG if is_long and self.device == "cuda" else _SHORT)

    @contextlib.contextmanager
    def _session(self, settings: dict[str, Any]) -> Iterator[Generate]:
        from nanoengine import LLM, SamplingParams

        if self.device == "cpu":
            settings = {}
        with LLM(self.model, skip_tokenizer_init=True, device=self.device, **settings) as llm:

            def generate(prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
                params = [SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=n) for n in lengths]
                return [len(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]

            yield generate


class Transformers(Engine):
    """Continuous batching of transformers, as `generate_batch` sets it up.

    That one takes one length for all answers, so requests are handed to its manager, which it makes in the same way.
    """

    package = distribution = "transformers"

    def sessions(self, todo: list[Work]) -> Iterator[tuple[list[Work], AbstractContextManager[Generate]]]:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16).to(self.device).eval()
        for work in todo:
            yield [work], self._session(model, work)

    @contextlib.contextmanager
    def _session(self, model: Any, work: Work) -> Iterator[Generate]:
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        prompts, lengths = work.draw(0, model.config.vocab_size)
        # Its kernels, graphs and batches are chosen by what it is told to expect, as `generate_batch` tells it.
        hints = WorkloadHints(max(map(len, prompts)), max(lengths), len(prompts))
        drawn = {"do_sample": True, "temperature": work.temperature, "top_k": 0, "top_p": 1.0}
        sampling: dict[str, Any] = drawn if work.temperature else {"do_sample": False}
        generation = GenerationConfig(eos_token_id=-1, pad_token_id=0, max_new_tokens=max(lengths), **sampling)
        batching = ContinuousBatchingConfig(allow_block_sharing=False)
        if self.device == "cpu":  # it sizes these by a GPU's memory
            batching.num_blocks, batching.max_batch_tokens = 64, 512
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching, block=True, timeout=5,
            workload_hints=hints,
        ) as manager:  # fmt: skip

            def generate(prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
                ids = [
                    manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
                    for prompt, length in zip(prompts, lengths, strict=True)
                ]
                made: dict[str, int] = {}
                while len(made) < len(ids):
                    result = manager.get_result(timeout=1)
                    if result is None:
                        if not manager.is_running():
                            raise RuntimeError("the thread of its manager ended")
                    elif result.is_finished():
                        if result.error is not None:
                            raise RuntimeError(f"{result.request_id}: {result.error}")
                        made[result.request_id] = len(result.generated_tokens)
                return [made[each] for each in ids]

            yield generate


class Vllm(Engine):
    """vLLM, offline, with its prefix cache off: prompts are repeated."""

    package = distribution = "vllm"

    def sessions(self, todo: list[Work]) -> Iterator[tuple[list[Work], AbstractContextManager[Generate]]]:
        yield todo, self._session()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Generate]:
        os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

        llm = LLM(
            self.model, skip_tokenizer_init=True, enable_prefix_caching=False, dtype="bfloat16",
            max_model_len=_LONG["max_model_len"], max_num_batched_tokens=_LONG["max_num_batched_tokens"],
        )  # fmt: skip

        def generate(prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
            params = [
                SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=n, detokenize=False)
                for n in lengths
            ]
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            return [len(output.outputs[0].token_ids) for output in outputs]

        yield generate


class NanoVllm(Engine):
    """nano-vllm (https://github.com/GeeeekExplorer/nano-vllm), which needs flash-attn; it has no greedy sampling."""

    package, distribution = "nanovllm", "nano-vllm"

    def sessions(self, todo: list[Work]) -> Iterator[tuple[list[Work], AbstractContextManager[Generate]]]:
        yield todo, self._session()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Generate]:
        from nanovllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

        llm = LLM(self.model, max_model_len=_LONG["max_model_len"])

        def generate(prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
            params = [
                SamplingParams(temperature=max(temperature, 1e-5), ignore_eos=True, max_tokens=n) for n in lengths
            ]
            return [len(output["token_ids"]) for output in llm.generate(prompts, params, use_tqdm=False)]

        yield generate


ENGINES: dict[str, type[Engine]] = {
    "nanoengine": NanoEngine,
    "transformers": Transformers,
    "vllm": Vllm,
    "nano-vllm": NanoVllm,
}


def main() -> None:
    """Measure, and write `version`, `load_s` and `works` of the engine, or that it is `missing`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", required=True, help="a checkpoint's directory")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--works", help="names, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, default=120, help="for all works together (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    kind = ENGINES[arguments.engine]
    if importlib.util.find_spec(kind.package) is None:
        arguments.out.write_text(json.dumps({"missing": True}), encoding="utf-8")
        return
    todo = works(small=arguments.device == "cpu")
    if arguments.works is not None:
        todo = [work for work in todo if work.name in arguments.works.split(",")]
    engine = kind(arguments.model, arguments.device)
    do_all(engine, todo, arguments.vocab_size, arguments.seconds, arguments.out)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)  # some of them leave threads behind that never end


def do_all(engine: Engine, todo: list[Work], vocab_size: int, seconds: float, out: Path) -> None:
    """All works; the time that is left when an engine is ready is shared out evenly among those still to come."""
    result: dict[str, Any] = {"version": _version(engine.distribution), "works": {}}
    deadline, began, left = time.perf_counter() + seconds, time.perf_counter(), len(todo)
    for some, session in engine.sessions(todo):
        with session as generate:
            result.setdefault("load_s", time.perf_counter() - began)
            for work in some:
                share = (deadline - time.perf_counter()) / left
                result["works"][work.name] = measure(work, generate, vocab_size, share)
                out.write_text(json.dumps(result), encoding="utf-8")
                left -= 1


def _version(distribution: str) -> str:
    if distribution == "nanoengine":
        from nanoengine.version import __version__

        return __version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return "?"


if __name__ == "__main__":
    main()
