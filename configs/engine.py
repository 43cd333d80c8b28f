"""Everything a user may set, as layered frozen dataclasses that validate themselves; knows no process and no tensor.

A default is written once, here: the command line and the Python keyword names are read from these declarations.
Values learnt at run time (how many K/V blocks fit, say) are return values of whoever learns them; no config is
ever written to. `EngineConfig.resolve` makes the layers agree with each other and with the checkpoint.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from configs.checkpoint import CheckpointConfig, load_checkpoint_config
from configs.errors import ConfigError
from configs.fields import setting, validate
from configs.registry import load_model_path

_DTYPE_NAMES = {"half": "float16", "float": "float32"}


class _Validated:
    """Validates its declared fields on construction."""

    def __post_init__(self) -> None:
        validate(self)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Validated):
    """Which model, and in what form it is computed."""

    model: str = setting("demo", "name in the registry, or a model directory")
    tokenizer: str | None = setting(None, "directory of the tokenizer (default: the model's)")
    tokenizer_mode: str = setting(
        "auto",
        "auto: the fast tokenizer where there is one; slow: transformers' Python one",
        choices=("auto", "slow"),
    )
    skip_tokenizer_init: bool = setting(False, "run without a tokenizer: token ids go in and out, text is refused")
    dtype: str = setting(
        "auto", "type of weights, activations and K/V (half = float16, float = float32)",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )  # fmt: skip
    max_model_len: int | None = setting(
        None, "longest prompt plus output, in tokens (default: the checkpoint's)", minimum=1
    )
    generation_config: str = setting(
        "auto",
        "auto: generation_config.json gives eos ids and sampling defaults; none: it is ignored",
        choices=("auto", "none"),
    )
    seed: int = setting(0, "seed that requests without one draw theirs from", minimum=0, maximum=2**63 - 1)
    allow_download: bool = setting(
        False, "let huggingface_hub fetch a name with a slash that is not in the local cache"
    )
    attention_backend: str = setting(
        "auto",
        "kernels of attention and the layers around it: triton = compiled for the GPU; torch = plain; flash_attn, "
        "flashinfer, torch_varlen = attention by these libraries, the rest as with triton; auto = triton on a GPU "
        "where it is installed, else torch",
        choices=("auto", "torch", "triton", "flash_attn", "flashinfer", "torch_varlen"),
    )
    native_kernels: bool = setting(
        True, "compute bfloat16 on a CPU with AMX by C kernels, compiled at the first start; needs a C compiler"
    )
    enforce_eager: bool = setting(False, "never capture CUDA graphs: each step launches its kernels one by one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ConfigError("model must name a model or a directory, got ''", "model")

    @property
    def torch_dtype_name(self) -> str:
        """`auto` or one of torch's own names."""
        return _DTYPE_NAMES.get(self.dtype, self.dtype)


@dataclasses.dataclass(frozen=True)
class CacheConfig(_Validated):
    """K/V memory."""

    block_size: int = setting(16, "tokens in a K/V block", minimum=1, maximum=1024)
    num_kv_blocks: int | None = setting(
        None,
        "K/V blocks (default: from the memory budget)",
        minimum=1,
        maximum=2**31 - 1,
        flags=("--num-gpu-blocks-override",),
    )
    gpu_memory_utilization: float = setting(0.9, "share of the GPU's memory the engine may use", above=0, maximum=1)
    swap_space: float = setting(
        0,
        "GiB of host memory for each rank, where evicted prefixes and swapped sequences are kept",
        minimum=0,
        maximum=2**20,
    )
    enable_prefix_caching: bool = setting(True, "reuse the K/V blocks of equal prefixes")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(_Validated):
    """What one step may hold."""

    max_num_batched_tokens: int = setting(2048, "token budget of one step", minimum=1, maximum=2**20)
    max_num_seqs: int = setting(256, "sequences that run at once", minimum=1, maximum=2**16)
    enable_chunked_prefill: bool = setting(True, "split prompts over several steps")
    policy: str = setting(
        "fcfs",
        "who is served first: fcfs = who came first; priority = the lower `priority`, one level being worth 10 s",
        choices=("fcfs", "priority"),
        flags=("--scheduling-policy",),
    )
    max_decode_gap: float | None = setting(
        None,
        "bound the time between two tokens of a stream while prompts are computed, in multiples of its undisturbed "
        "value; 0 = off (default: 3 for the server, else 0)",
        minimum=0,
    )
    preemption_mode: str = setting(
        "recompute",
        "what happens to a sequence that gives way: recompute = it is computed again; swap = it is kept in swap_space",
        choices=("recompute", "swap"),
    )
    async_scheduling: bool = setting(True, "schedule the next step while the workers compute one")
    check_invariants: bool = setting(False, "check the scheduler's books after every step (slow; for debugging)")
    max_model_len: int | None = None  # the model's, put there by EngineConfig.resolve

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_decode_gap and self.max_decode_gap < 1:
            raise ConfigError(f"max_decode_gap must be 0 or at least 1, got {self.max_decode_gap}", "max_decode_gap")


@dataclasses.dataclass(frozen=True)
class ParallelConfig(_Validated):
    """How many ranks, where they run and how long one waits for them."""

    tensor_parallel_size: int = setting(1, "ranks that share each layer", minimum=1, maximum=64, flags=("--tp",))
    pipeline_parallel_size: int = setting(1, "only 1 until it is built", minimum=1, maximum=1)
    data_parallel_size: int = setting(1, "only 1 until it is built", minimum=1, maximum=1)
    device: str = setting(
        "auto",
        "where the ranks run; auto = cuda where there are enough GPUs",
        choices=("auto", "cpu", "cuda"),
    )
    share_gpus: bool = setting(
        False, "let several ranks use one GPU where there are fewer GPUs than ranks (slow; to try a tp on one GPU)"
    )
    executor: str = setting(
        "multiprocess", "multiprocess: one process a rank; inprocess: threads of the scheduler, for debugging",
        choices=("multiprocess", "inprocess"),
    )  # fmt: skip
    start_timeout: float = setting(600.0, "seconds within which every rank must be ready", above=0, maximum=86400)
    step_timeout: float = setting(
        60.0,
        "seconds within which any step must return before its ranks count as hung; usual steps get 5 s, or 10 times "
        "what their kind takes",
        above=0,
        maximum=86400,
    )

    max_restarts: int = setting(
        5,
        "restarts of failed ranks, or of the scheduler, within restart_window, of which none brought a single step, "
        "before the engine gives up; 0 = it gives up at the first failure",
        minimum=0,
    )
    warm_spare: bool = setting(
        False, "keep spare ranks with their imports done, which take over from failed ones (memory: no model's)"
    )
    restart_window: float = setting(60.0, "seconds over which max_restarts counts", above=0, maximum=86400)

    @property
    def world_size(self) -> int:
        """Number of ranks in all."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size


@dataclasses.dataclass(frozen=True)
class ServerConfig(_Validated):
    """The HTTP front end."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on (0 = any free one, printed)", minimum=0, maximum=65535)
    served_model_name: str | None = setting(None, "the model's name in the API (default: as given to --model)")
    api_key: tuple[str, ...] = setting(
        (),
        "a key that clients may send as `Authorization: Bearer KEY`; may be given several times; `ps` shows it, so "
        "prefer api_key_file or the variable NANOENGINE_API_KEY",
        secret=True,
    )
    api_key_file: str | None = setting(None, "file with a key on each line; # begins a comment")
    insecure: bool = setting(False, "listen on an address that other machines can reach although there is no key")
    api_server_count: int = setting(1, "front-end processes that share the port", minimum=1, maximum=64)
    shutdown_timeout: float = setting(
        30.0, "seconds that open requests may go on after SIGTERM or SIGINT", minimum=0, maximum=86400
    )
    max_queued_requests: int = setting(
        4096, "requests that may wait for their first token before further ones are answered with 429", minimum=1
    )
    max_queued_tokens: int | None = setting(None, "tokens of their prompts, likewise (default: no limit)", minimum=1)
    request_timeout: float | None = setting(
        None, "seconds after which a request that is not complete ends with an error (default: never)", above=0
    )
    tool_call_parser: str = setting(
        "auto",
        "form in which the model writes tool calls: hermes = <tool_call>{…}</tool_call>; auto = hermes where the chat "
        "template teaches it; none = tools are refused",
        choices=("auto", "hermes", "none"),
    )
    reasoning_parser: str = setting(
        "auto",
        "what of an answer is reasoning: think = what stands in <think>…</think>; auto = think where tokenizer or "
        "chat template know the tag; none = nothing",
        choices=("auto", "think", "none"),
    )
    stream_resume_seconds: float = setting(
        30.0,
        "seconds for which a stream with the header X-Stream-Resume: 1 goes on without a reader and can be read again",
        above=0,
        maximum=3600,
    )
    exit_on_failure: bool = setting(
        True, "end the server when the engine can serve no more, with exit code 1; else it answers 503 until stopped"
    )
    log_level: str = setting("info", "least severe level that is logged", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "form of the log: lines of text, or of JSON", choices=("text", "json"))
    log_stats_interval: float | None = setting(
        None,
        "seconds of work between two status lines in the log, 0 for none (default: 10 for a server, else none)",
        minimum=0,
        maximum=86400,
    )
    access_log: bool = setting(True, "log each HTTP request when it is answered")

    def __post_init__(self) -> None:
        if isinstance(self.api_key, str | list):  # one key from Python, several from the pipe
            object.__setattr__(self, "api_key", (self.api_key,) if isinstance(self.api_key, str) else (*self.api_key,))
        super().__post_init__()
        if not all(self.api_key):
            raise ConfigError("api_key must not be empty", "api_key")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """All layers together. `checkpoint` is filled by `resolve`, which every process but the owner relies on."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    model_dir: str | None = None
    checkpoint: CheckpointConfig | None = None

    @classmethod
    def create(cls, **settings: Any) -> EngineConfig:
        """Build from flat keyword names (the CLI's, with underscores): `create(model="demo", block_size=4)`.

        Raises:
            ConfigError: an unknown name (the message lists the known ones) or a value outside its range.
        """
        owners = setting_owners()
        unknown = sorted(set(settings) - set(owners))
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(owners))}", unknown[0])
        layers: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            layers.setdefault(owners[name], {})[name] = value
        return cls(**{layer: LAYERS[layer](**values) for layer, values in layers.items()})

    def resolve(self) -> EngineConfig:
        """Find the model, read its config and make the layers agree; returns a new config, reads no weights.

        Raises:
            UnknownModelError, CheckpointError: the model cannot be found or used.
            ConfigError: a setting does not fit the model or another setting.
        """
        model_dir = load_model_path(self.model.model, allow_download=self.model.allow_download)
        checkpoint = load_checkpoint_config(model_dir, self.model.generation_config == "auto")
        max_model_len = self._agreed_max_model_len(checkpoint)
        self._check_split(checkpoint)
        if not self.scheduler.enable_chunked_prefill and self.scheduler.max_num_batched_tokens < max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens must be at least max_model_len ({max_model_len}) when "
                f"enable_chunked_prefill is off, got {self.scheduler.max_num_batched_tokens}", "max_num_batched_tokens",
            )  # fmt: skip
        if self.parallel.warm_spare and self.parallel.executor == "inprocess":
            raise ConfigError("warm_spare needs ranks that are processes, got executor inprocess", "warm_spare")
        if self.scheduler.preemption_mode == "swap" and not self.cache.swap_space:
            raise ConfigError(
                "preemption_mode swap needs a swap_space greater than 0 GiB, got 0; set --swap-space", "swap_space"
            )
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, max_model_len=max_model_len),
            scheduler=dataclasses.replace(self.scheduler, max_model_len=max_model_len),
            model_dir=str(model_dir),
            checkpoint=checkpoint,
        )

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json of a resolved config; None where there is none, or no tokenizer is wanted.

        Raises:
            UnknownModelError: the setting `tokenizer` names nothing.
        """
        if self.model.skip_tokenizer_init:
            return None
        directory = self.model_dir if self.model.tokenizer is None else load_model_path(self.model.tokenizer)
        assert directory is not None, "resolve() comes first"
        path = Path(directory) / "tokenizer.json"
        return path if path.is_file() else None

    def _agreed_max_model_len(self, checkpoint: CheckpointConfig) -> int:
        limit, why = checkpoint.max_position_embeddings, "the checkpoint's max_position_embeddings"
        if checkpoint.sliding_window is not None and checkpoint.sliding_window < limit:
            limit, why = (
                checkpoint.sliding_window,
                "the checkpoint's sliding_window, which is not implemented beyond one window",
            )
        asked = self.model.max_model_len
        if asked is not None and asked > limit:
            raise ConfigError(f"max_model_len must be at most {limit} ({why}), got {asked}", "max_model_len")
        return asked or limit

    def _check_split(self, checkpoint: CheckpointConfig) -> None:
        tp = self.parallel.tensor_parallel_size
        heads, kv_heads = checkpoint.num_attention_heads, checkpoint.num_key_value_heads
        sizes = [n for n in range(1, heads + 1) if splits(n, heads, kv_heads, checkpoint.intermediate_size)]
        if tp not in sizes:
            raise ConfigError(
                f"tensor_parallel_size must be one of {', '.join(map(str, sizes))} for a model with {heads} "
                f"attention heads, {kv_heads} K/V heads and an intermediate size of "
                f"{checkpoint.intermediate_size}, got {tp}",
                "tensor_parallel_size",
            )

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for the pipe to another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EngineConfig:
        """Inverse of `to_dict`; validates again."""
        layers = {layer: kind(**data[layer]) for layer, kind in LAYERS.items()}
        checkpoint = None if data["checkpoint"] is None else CheckpointConfig.from_dict(data["checkpoint"])
        return cls(**layers, model_dir=data["model_dir"], checkpoint=checkpoint)

    @property
    def resolved_checkpoint(self) -> CheckpointConfig:
        """The checkpoint's config; only after `resolve`."""
        assert self.checkpoint is not None, "resolve() comes first"
        return self.checkpoint

    @property
    def default_sampling(self) -> dict[str, Any]:
        """The checkpoint's defaults for fields of SamplingParams; only after `resolve`."""
        return dict(self.resolved_checkpoint.default_sampling)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output in tokens; only after `resolve`."""
        assert self.model.max_model_len is not None, "resolve() comes first"
        return self.model.max_model_len

    @property
    def served_model_name(self) -> str:
        """The name that clients use."""
        return self.server.served_model_name or self.model.model


LAYERS: dict[str, Any] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "parallel": ParallelConfig,
    "server": ServerConfig,
}


def setting_owners() -> dict[str, str]:
    """Map each setting's flat name to the layer that declares it."""
    return {
        field.name: layer
        for layer, kind in LAYERS.items()
        for field in dataclasses.fields(kind)
        if "help" in field.metadata
    }


def splits(tp: int, num_heads: int, num_kv_heads: int, intermediate_size: int) -> bool:
    """Whether `tp` ranks can share a layer; K/V heads fewer than ranks are replicated, the vocabulary is padded."""
    return num_heads % tp == 0 and (num_kv_heads % tp == 0 or tp % num_kv_heads == 0) and intermediate_size % tp == 0
