"""Model directories that nobody should load, and a program that tries to.

`python [-O] -m tests.end_to_end.hostile_models FOLDER` prints a line of JSON for each, and what was raised.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.engine import EngineConfig
from configs.errors import NanoEngineError
from nanoengine.llm_engine import load_tokenizer
from workers.model_loader import ModelLoader

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo_model"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path, Path], object]
"""Spoils a copy of the demo model; the second path is the canary's, which must never come to be."""


class Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _edit(name: str, **values: Any) -> Change:
    def change(model: Path, canary: Path) -> None:
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _write(name: str, data: bytes) -> Change:
    return lambda model, canary: (model / name).write_bytes(data)


def _instead(name: str, make: Change) -> Change:
    def change(model: Path, canary: Path) -> None:
        (model / name).unlink()
        make(model, canary)

    return change


def _pickled(name: str) -> Change:
    return _instead(WEIGHTS, lambda model, canary: (model / name).write_bytes(pickle.dumps(Canary(canary))))


def _linked(name: str, to: str) -> Change:
    def change(model: Path, canary: Path) -> None:
        shutil.copy(model / name, model.parent / "outside")
        (model / name).unlink()
        (model / name).symlink_to(to.replace("OUTSIDE", str(model.parent / "outside")))

    return change


def _header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of the weights and keep their data."""

    def apply(model: Path, canary: Path) -> None:
        data = (model / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        (model / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def _sparse(name: str, size: int) -> Change:
    def change(model: Path, canary: Path) -> None:
        with (model / name).open("r+b") as file:
            file.truncate(size)

    return change


def _index(file_name: Any) -> Change:
    weight_map = {"model.norm.weight": file_name}
    return _instead(WEIGHTS, _write(INDEX, json.dumps({"weight_map": weight_map}).encode()))


def _many(name: str, values: list[Any], file: str = "config.json") -> dict[str, Change]:
    return {f"{file}: {name}={value!r:.30}": _edit(file, **{name: value}) for value in values}


def _pipe(name: str) -> Change:
    return _instead(name, lambda model, canary: os.mkfifo(model / name))


def _folder(name: str) -> Change:
    return _instead(name, lambda model, canary: (model / name).mkdir())


def _cut(name: str) -> Change:
    return lambda model, canary: (model / name).write_bytes((model / name).read_bytes()[:100])


def _claiming(size: int) -> Change:
    def change(model: Path, canary: Path) -> None:
        (model / WEIGHTS).write_bytes(struct.pack("<Q", size) + (model / WEIGHTS).read_bytes()[8:])

    return change


def _configs() -> dict[str, Change]:
    odd = [-1, 0, 2**63, 10**400, 1.5, "8", True, [], {}, float("nan"), float("inf")]
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
    found: dict[str, Change] = {}
    for key in sizes:
        found |= _many(key, odd)
    ropes: list[Any] = [5, "x", {"rope_type": "evil"}, {"rope_type": []}, {"rope_type": "linear", "factor": -1}]
    found |= _many("rope_parameters", [*ropes, {"rope_type": "llama3", "factor": 10**400}])
    found |= _many("rms_norm_eps", [-1, 0, "x", float("nan"), float("inf"), 10**400, True, []])
    found |= _many("eos_token_id", [-1, 2**63, "x", [1.5], [[1]], {}, True, 10**400])
    found |= _many("architectures", [[], [{}], [["x"]], "Qwen3ForCausalLM", ["os.system"], 5, {}, None])
    found |= _many("auto_map", [{"AutoModel": "evil.Model"}, {}, None, "x"])
    found |= _many("quantization_config", [{"quant_method": "gptq"}, "x"])
    found |= _many("layer_types", [5, "x", ["evil"], [[]], {}])
    found |= _many("tie_word_embeddings", ["yes", 5]) | _many("hidden_act", ["evil", 5, ["silu"]])
    found |= _many("dtype", ["int8", 5]) | _many("hidden_size", [2**24, 64]) | _many("num_hidden_layers", [1024, 1])
    found |= _many("vocab_size", [2**24, 8]) | _many("intermediate_size", [2**24])
    found |= _many("eos_token_id", [-1, 2**70, "x"], "generation_config.json")
    return found | _many("temperature", [10**400, "hot", float("nan"), []], "generation_config.json")


def _files() -> dict[str, Change]:
    pickles = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl")
    found = {f"pickle {name}": _pickled(name) for name in pickles}
    found["a pickle by another name"] = lambda model, canary: (model / WEIGHTS).write_bytes(
        pickle.dumps(Canary(canary))
    )
    names = ("../outside", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "x\0.safetensors", "", 5, None, [],
             ".hidden.safetensors", "pytorch_model.bin", "missing.safetensors", "../outside.safetensors")  # fmt: skip
    found |= {f"index: {name!r}": _index(name) for name in names}
    for name in (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"):
        found |= {
            f"{name} is a link out": _linked(name, "OUTSIDE"),
            f"{name} is a pipe": _pipe(name),
            f"{name} is a folder": _folder(name),
            f"{name} is cut": _cut(name),
            f"{name} is empty": _write(name, b""),
            f"{name} is nested": _write(name, b"[" * 100_000),
            f"{name} is deep": _write(name, b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
            f"{name} is no text": _write(name, b"\xff\xfe\x00" * 50),
        }
        if name != WEIGHTS:
            found[f"{name} of 1 GB"] = _sparse(name, 2**30)
    return found


def _headers() -> dict[str, Change]:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    headers: dict[str, Callable[[dict[str, Any]], object]] = {
        "overlap": lambda header: _first(header).update(data_offsets=[0, 8]),
        "behind the end": lambda header: _first(header).update(data_offsets=[2**40, 2**40 + 8]),
        "backwards": lambda header: _first(header).update(data_offsets=[8, 0]),
        "negative": lambda header: _first(header).update(data_offsets=[-8, 0]),
        "another type": lambda header: _first(header).update(dtype="F64"),
        "int8": lambda header: _first(header).update(dtype="I8"),
        "no type": lambda header: _first(header).update(dtype="EVIL"),
        "a huge shape": lambda header: _first(header).update(shape=[2**32, 2**32]),
        "an overflowing shape": lambda header: _first(header).update(shape=[2**63, 2]),
        "a negative shape": lambda header: _first(header).update(shape=[-1]),
        "twice": lambda header: header.update({"x": dict(_first(header))}),
        "left over": lambda header: header.update(evil=empty),
    }
    sizes = (2**63, 2**64 - 1, 2**40, 10**9, 0, 1)
    claims = {f"safetensors: a header of {size} bytes": _claiming(size) for size in sizes}
    return claims | {f"safetensors: {name}": _header(change) for name, change in headers.items()}


def _tokenizers() -> dict[str, Change]:
    settings = "tokenizer_config.json"
    models: list[Any] = [5, {}, {"type": "Evil"}]
    for vocab, merges in (({"a": -1}, []), ({"a": 2**31}, []), ({"a": 0}, [["b", "c"]])):
        models.append({"type": "BPE", "vocab": vocab, "merges": merges})
    pattern = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    found = _many("auto_map", [{"AutoTokenizer": ["evil.Tokenizer", None]}], settings)
    found |= _many("added_tokens_decoder", [5, [], {"x": {}}, {"-1": {}}, {"1": 5}, {"9" * 400: {}}], settings)
    found |= _many("extra_special_tokens", [5, "x", [5], {"x": 5}, [None]], settings)
    return found | _many("model", models, "tokenizer.json") | _many("pre_tokenizer", [pattern], "tokenizer.json")


def changes() -> dict[str, Change]:
    """What is done to the demo model, by name."""
    return _configs() | _files() | _headers() | _tokenizers()


# These say nothing, as if they were left out.
HARMLESS = frozenset({"config.json: layer_types={}", "tokenizer_config.json: added_tokens_decoder=[]"})


def try_to_load(model: Path) -> str:
    """The name of what was raised, with its message; "loaded" if nothing was."""
    try:
        config = EngineConfig.create(model=str(model), device="cpu").resolve()
        load_tokenizer(config)
        ModelLoader(config).load_model(torch.device("cpu"))
        return "loaded"
    except NanoEngineError as error:
        return f"refused: {error.message:.200}"
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.200}"


def main() -> None:
    """Try all of them."""
    folder = Path(sys.argv[1])
    limit = 8 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number, (name, change) in enumerate(changes().items()):
        model, canary = folder / str(number) / "model", folder / f"canary{number}"
        model.mkdir(parents=True)
        for file in DEMO.iterdir():
            if file.is_file():
                shutil.copy(file, model)
        change(model, canary)
        began = time.process_time()
        said = try_to_load(model)
        seconds = time.process_time() - began
        print(json.dumps({"name": name, "said": said, "seconds": seconds, "canary": canary.exists()}), flush=True)
        shutil.rmtree(model.parent)


if __name__ == "__main__":
    main()
