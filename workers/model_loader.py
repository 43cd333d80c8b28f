"""Builds a model from its directory, each rank its own share; decides neither where it lives nor what it computes."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from configs.checkpoint import CheckpointConfig
from configs.engine import EngineConfig
from configs.errors import CheckpointError
from workers.attention import get_backend
from workers.cpu_features import has_native_bfloat16
from workers.layers.parameter import ShardedParameter
from workers.load_progress import shown_while_read
from workers.models.decoder import Decoder, DecoderSpec
from workers.models.registry import get_model_class
from workers.native import NativeKernels
from workers.native import load as load_native
from workers.parallel import Communicator, SingleCommunicator
from workers.weight_files import WeightTensor, name_some, open_weights

logger = logging.getLogger(__name__)

ReadOrder = Callable[[dict[str, WeightTensor]], Iterable[tuple[str, WeightTensor]]]

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Buffers that older versions of transformers saved; they follow from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


class ModelLoader:
    """Loads the model of a resolved config.

    Args:
        config: after `EngineConfig.resolve`.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    def load_model(
        self,
        device: torch.device,
        communicator: Communicator | None = None,
        dtype: torch.dtype | None = None,
    ) -> Decoder:
        """This rank's share of the model on `device`, in eval mode, without gradients.

        Weights are converted to `dtype` (by default `resolve_dtype`) while they are read; a rank reads and holds its
        own part of each tensor only.

        Raises:
            CheckpointError: a file is missing, damaged or of a refused format, or a tensor is missing, left over or
                of another shape; the message names them.
            ConfigError: the model cannot be split over the group, or the attention backend cannot serve it.
        """
        began = time.perf_counter()
        config, checkpoint = self._config, self._config.resolved_checkpoint
        communicator = communicator or SingleCommunicator()
        dtype = dtype or resolve_dtype(config, device)
        native = native_kernels(config, device, dtype)
        backend = get_backend(config.model.attention_backend, device, native)
        backend.check(config.cache.block_size, checkpoint.head_dim, dtype)
        assert config.model_dir is not None, "resolve() comes first"
        spec = DecoderSpec(
            config=checkpoint,
            communicator=communicator,
            backend=backend,
            dtype=dtype,
            device=device,
            max_positions=config.max_model_len,
            native=native,
        )
        with open_weights(Path(config.model_dir)) as tensors:
            _check_size(checkpoint, tensors, config.model_dir)
            model = get_model_class(checkpoint.architecture)(spec)
            load_weights(model, tensors, config.model_dir, self._read_order(communicator))
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        read = time.perf_counter()
        model.finish_loading()
        logger.log(
            logging.INFO if communicator.rank == 0 else logging.DEBUG,
            "loaded %s (%s) on %s as %s: %.1f M parameters on rank %d of %d, %.2f s (reading %.2f s, packing %.2f s)",
            checkpoint.architecture,
            config.model.model,
            device,
            str(dtype).removeprefix("torch."),
            num_parameters / 1e6,
            communicator.rank,
            communicator.world_size,
            time.perf_counter() - began,
            read - began,
            time.perf_counter() - read,
        )
        return model.eval()

    def _read_order(self, communicator: Communicator) -> ReadOrder:
        """One rank tells how far it is. A bar is nothing for a log of JSON, or of warnings alone."""
        if communicator.rank != 0:
            return dict.items
        server = self._config.server
        has_bar = server.log_format == "text" and server.log_level in ("debug", "info")
        return lambda tensors: shown_while_read(tensors, sys.stderr if has_bar else None)


def load_weights(
    model: Decoder, tensors: dict[str, WeightTensor], where: str, read_order: ReadOrder = dict.items
) -> None:
    """Fill the model's parameters from a checkpoint's tensors; `where` is named in errors.

    `read_order` gives them one after another, and may show how far it is.

    Names and shapes are checked before anything is read.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    wanted = model.checkpoint_parameters()
    present = {name: tensor for name, tensor in tensors.items() if not name.endswith(_IGNORED_SUFFIXES)}
    tied_head = present.pop(_HEAD, None) if model.config.tie_word_embeddings else None
    if tied_head is not None and _EMBEDDING not in present:
        present[_EMBEDDING], tied_head = tied_head, None  # saved under the head's name only
    _check_names_and_shapes(wanted, present, tied_head, where)
    for name, tensor in read_order(present):
        parameter, shard = wanted[name]
        parameter.load(shard, tensor)
        tensor.release()
    if tied_head is None:
        return
    is_same = wanted[_EMBEDDING][0].holds("", tied_head)
    tied_head.release()
    if not is_same:
        raise CheckpointError(
            f"{where} says tie_word_embeddings, but {_HEAD} differs from {_EMBEDDING}; one of the two is wrong"
        )


def _check_size(checkpoint: CheckpointConfig, tensors: dict[str, WeightTensor], where: str) -> None:
    """Raise CheckpointError before memory is taken for a config.json whose sizes the files are far from filling."""
    heads = 2 * checkpoint.num_attention_heads + 2 * checkpoint.num_key_value_heads
    layer = checkpoint.hidden_size * (heads * checkpoint.head_dim + 3 * checkpoint.intermediate_size)
    wanted = checkpoint.vocab_size * checkpoint.hidden_size + checkpoint.num_hidden_layers * layer
    held = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if wanted > 4 * held + 2**20:
        raise CheckpointError(
            f"the weights in {where} do not fit its config.json, which asks for {wanted} numbers; the files hold {held}"
        )


def _check_names_and_shapes(
    wanted: dict[str, tuple[ShardedParameter, str]],
    present: dict[str, WeightTensor],
    tied_head: WeightTensor | None,
    where: str,
) -> None:
    problems = []
    missing, left_over = wanted.keys() - present.keys(), present.keys() - wanted.keys()
    if missing:
        problems.append(f"missing: {name_some(missing)}")
    if left_over:
        problems.append(f"left over: {name_some(left_over)}")
    shapes = {name: parameter.shards[shard].shape for name, (parameter, shard) in wanted.items()}
    pairs = [(name, tensor, shapes[name]) for name, tensor in present.items() if name in shapes]
    if tied_head is not None and _EMBEDDING in shapes:
        pairs.append((_HEAD, tied_head, shapes[_EMBEDDING]))
    misshapen = {
        f"{name} is {list(tensor.shape)} instead of {list(shape)}"
        for name, tensor, shape in pairs
        if tensor.shape != shape
    }
    if misshapen:
        problems.append(f"of another shape: {name_some(misshapen)}")
    if problems:
        raise CheckpointError(f"the weights in {where} do not fit its config.json; " + "; ".join(problems))


def native_kernels(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> NativeKernels | None:
    """The native kernels, where they are wanted and compute this type on this device."""
    wanted = config.model.native_kernels and device.type == "cpu" and dtype is torch.bfloat16
    return load_native() if wanted else None


def resolve_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The type to compute in: what was asked for, or what `auto` means for this checkpoint on this device.

    On a GPU the checkpoint's own, float16 in place of a bfloat16 that the GPU lacks. On CPU bfloat16 when the
    checkpoint has 16 bits and the processor multiplies bfloat16 itself, else float32.
    """
    asked = config.model.torch_dtype_name
    checkpoint: torch.dtype = getattr(torch, config.resolved_checkpoint.dtype)
    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    if device.type == "cuda":
        lacks_bfloat16 = torch.cuda.get_device_capability(device) < (8, 0)
        return torch.float16 if checkpoint is torch.bfloat16 and lacks_bfloat16 else checkpoint
    return torch.bfloat16 if checkpoint.itemsize == 2 and has_native_bfloat16() else torch.float32
