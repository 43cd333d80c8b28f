"""The one decoder for Llama, Mistral, Qwen2 and Qwen3, driven by the checkpoint's config; knows no file.

The families differ in flags alone (biases, q/k norms, rope), which `CheckpointConfig` has sorted out. Submodules
carry the names of Hugging Face checkpoints, fused ones (`qkv_proj`, `gate_up_proj`) in place of their parts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from configs.checkpoint import CheckpointConfig
from workers.attention.base import AttentionBackend
from workers.attention.native_backend import NativeBackend
from workers.forward_context import get_forward_context
from workers.layers.attention import Attention
from workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from workers.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from workers.layers.norm import RMSNorm
from workers.layers.parameter import ShardedParameter
from workers.layers.rotary import RotaryEmbedding
from workers.native import NativeKernels, NativeLinear
from workers.native.decoder import LayerShape, LayerWeights, NativeLayers
from workers.native.kernels import QUANTUM
from workers.parallel import Communicator


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """What a decoder is built from.

    Attributes:
        config: the normalised checkpoint config.
        communicator: this rank's.
        backend: how attention, and what stands around it in a layer, is computed.
        dtype: of weights and activations.
        device: where it lives.
        max_positions: how many positions a sequence can have.
        native: kernels that compute what they apply to, on CPU.
    """

    config: CheckpointConfig
    communicator: Communicator
    backend: AttentionBackend
    dtype: torch.dtype
    device: torch.device
    max_positions: int
    native: NativeKernels | None = None


class DecoderAttention(nn.Module):
    """Projections, rotation and attention over this rank's heads."""

    def __init__(self, spec: DecoderSpec, layer_index: int) -> None:
        super().__init__()
        config, dtype, device = spec.config, spec.dtype, spec.device
        head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            config.qkv_bias,
            spec.communicator,
            dtype,
            device,
            spec.native,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim,
            config.hidden_size,
            config.attention_output_bias,
            spec.communicator,
            dtype,
            device,
            spec.native,
        )
        self._heads, self._kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.head_dim, self.eps = head_dim, config.rms_norm_eps
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype, device) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype, device) if config.qk_norm else None
        self.head_norm: tuple[torch.Tensor, float] | None = None
        self.attn = Attention(layer_index, self._heads, self._kv_heads, head_dim, head_dim**-0.5, spec.backend)

    def finish_loading(self) -> None:
        """Put both norms into one weight, since q and k are normalised together."""
        if self.q_norm is not None and self.k_norm is not None:
            weights = [self.q_norm.weight] * self._heads + [self.k_norm.weight] * self._kv_heads
            stacked = torch.stack([weight.data for weight in weights])  # (heads + kv_heads, head_dim)
            self.head_norm = (stacked, self.eps)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Map (num_tokens, hidden_size) to the same shape."""
        qkv = self.qkv_proj(hidden).view(len(hidden), self._heads + 2 * self._kv_heads, self.head_dim)
        out = self.attn.forward_projected(qkv, (cos, sin), self.head_norm)  # (num_tokens, heads, head_dim)
        return self.o_proj(out.reshape(len(hidden), -1))  # type: ignore[no-any-return]


class DecoderMLP(nn.Module):
    """SwiGLU between two projections; the native kernel computes it with the first of them."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        config = spec.config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            config.intermediate_size,
            ("gate_proj", "up_proj"),
            config.mlp_bias,
            spec.communicator,
            spec.dtype,
            spec.device,
            spec.native,
            "swiglu",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            config.mlp_bias,
            spec.communicator,
            spec.dtype,
            spec.device,
            spec.native,
        )
        self._silu_and_mul = spec.backend.silu_and_mul
        self.intermediate_size = config.intermediate_size // spec.communicator.world_size  # of this rank
        kernel = self.gate_up_proj.kernel
        self.gated = kernel if isinstance(kernel, NativeLinear) else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (num_tokens, hidden_size) to the same shape."""
        hidden = self.gate_up_proj(hidden)
        if self.gated is None:
            hidden = self._silu_and_mul(hidden)
        return self.down_proj(hidden)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, spec: DecoderSpec, layer_index: int) -> None:
        super().__init__()
        size, eps = spec.config.hidden_size, spec.config.rms_norm_eps
        kernel = spec.backend.add_rms_norm
        self.input_layernorm = RMSNorm(size, eps, spec.dtype, spec.device, kernel)
        self.self_attn = DecoderAttention(spec, layer_index)
        self.post_attention_layernorm = RMSNorm(size, eps, spec.dtype, spec.device, kernel)
        self.mlp = DecoderMLP(spec)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's contribution, and the residual stream that it has not been added to yet."""
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos, sin)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual

    def native_weights(self) -> LayerWeights | None:
        """What the native kernels need to compute the whole layer; None where one of its parts is not theirs."""
        attention, mlp = self.self_attn, self.mlp
        if (type(self), type(attention), type(mlp)) != (DecoderLayer, DecoderAttention, DecoderMLP):
            return None  # a subclass may compute something else
        kernels = [layer.kernel for layer in (attention.qkv_proj, attention.o_proj, mlp.down_proj)]
        qkv, o, down = (kernel if isinstance(kernel, NativeLinear) else None for kernel in kernels)
        if qkv is None or o is None or down is None or mlp.gated is None or attention.head_dim % QUANTUM:
            return None
        return LayerWeights(
            input_norm=self.input_layernorm.weight,
            qkv=qkv,
            qkv_bias=attention.qkv_proj.bias,
            head_norm=None if attention.head_norm is None else attention.head_norm[0],
            o=o,
            o_bias=attention.o_proj.bias,
            post_norm=self.post_attention_layernorm.weight,
            gate_up=mlp.gated,
            gate_up_bias=mlp.gate_up_proj.bias,
            down=down,
            down_bias=mlp.down_proj.bias,
        )

    def native_shape(self) -> LayerShape:
        """The sizes that belong to `native_weights`."""
        attention = self.self_attn.attn
        return LayerShape(
            size=self.input_layernorm.weight.shape[0],
            heads=attention.num_heads,
            kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            intermediate=self.mlp.intermediate_size,
            eps=self.self_attn.eps,
            scale=attention.scale,
        )


class Decoder(nn.Module):
    """Token ids and positions to hidden states, and hidden states to logits; this rank's share of it."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        config, dtype, device = spec.config, spec.dtype, spec.device
        vocabulary = (config.vocab_size, config.hidden_size, spec.communicator, dtype, device)
        self.config = config
        tied = config.tie_word_embeddings
        self.embed_tokens = VocabParallelEmbedding(*vocabulary, native=spec.native if tied else None)
        self.layers = nn.ModuleList(DecoderLayer(spec, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device, spec.backend.add_rms_norm)
        self.lm_head = ParallelLMHead(*vocabulary, tied_to=self.embed_tokens if tied else None, native=spec.native)
        self._rotary = RotaryEmbedding(config.head_dim, spec.max_positions, config.rope, device)
        self._native, self._backend, self._communicator = spec.native, spec.backend, spec.communicator
        self._native_layers: NativeLayers | None = None

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Compute one step's tokens inside a forward context.

        Args:
            input_ids: (num_tokens,) int64.
            positions: (num_tokens,) int64, each below max_positions.

        Returns:
            (num_tokens, hidden_size), normalised, whole on every rank.
        """
        cos, sin = self._rotary(positions)
        hidden: torch.Tensor = self.embed_tokens(input_ids)
        residual: torch.Tensor | None = None
        if self._native_layers is not None and isinstance(self._backend, NativeBackend):
            context, shape = get_forward_context(), self._native_layers.shape
            plan = self._backend.plan(context.metadata, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
            hidden, residual = self._native_layers(hidden, cos, sin, context.kv_caches, plan)
            return self.norm(hidden, residual)[0]  # type: ignore[no-any-return]
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, cos, sin)
        normalised: torch.Tensor = self.norm(hidden, residual)[0]
        return normalised

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Map (num_rows, hidden_size) to (num_rows, vocab_size) float32 on rank 0, to None on the other ranks."""
        return self.lm_head.compute_logits(hidden)

    def compute_logits_and_argmax(
        self, hidden: torch.Tensor, num_logits: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits of the first rows and the likeliest ids of the others: `ParallelLMHead.compute_logits_and_argmax`."""
        return self.lm_head.compute_logits_and_argmax(hidden, num_logits)

    def checkpoint_parameters(self) -> dict[str, tuple[ShardedParameter, str]]:
        """For each tensor that the checkpoint must hold: the parameter it belongs to, and its name in there."""
        found: dict[str, tuple[ShardedParameter, str]] = {}
        for path, parameter in self.named_parameters():
            assert isinstance(parameter, ShardedParameter), path
            module, _, leaf = path.rpartition(".")
            parent = module.rpartition(".")[0]
            prefix = "" if path.startswith("lm_head.") else "model."
            for name in parameter.shards:
                found[f"{prefix}{parent}.{name}.{leaf}" if name else prefix + path] = (parameter, name)
        return found

    def finish_loading(self) -> None:
        """Bring the loaded weights into the form that is computed with. Call once."""
        for module in self.modules():
            if isinstance(module, DecoderAttention | LinearBase):
                module.finish_loading()
        if self._native is not None and isinstance(self._backend, NativeBackend):
            layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
            found = [weights for layer in layers if (weights := layer.native_weights()) is not None]
            if len(found) == len(self.layers):
                shape = layers[0].native_shape()
                self._native_layers = NativeLayers(self._native, found, shape, self._communicator)
