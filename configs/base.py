"""Frozen configs: what a model is, how a run trains it, and how it is executed.

Standard library only. A config hashes, prints and lies as JSON beside its checkpoint. Settings that
contradict each other fail when the config is made, in a sentence that names both numbers; a setting
that would be ignored is an error.

`ModelConfig` says what is computed (the checkpoint depends on it). `ExecutionConfig` and
`MeshConfig` say how and where (a checkpoint may be resumed with other ones).
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

C = TypeVar("C")


class UserError(ValueError):
    """Bad input that its sender can mend: scripts print the sentence alone and exit with code 2."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{name}={value} must be greater than 0")


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention (Ainslie et al. 2023) with RoPE, a sliding window and sink tokens."""

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: int
    """Query heads, H."""
    num_kv_heads: int
    """Key/value heads, G; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head."""
    window_size: int | None = None
    """Tokens a query may see, itself included; None means all before it."""
    num_sinks: int = 0
    """First tokens of a document that stay visible beyond the window (StreamingLLM, 2023)."""
    rope_base: float = 10_000.0
    """Base of the rotary angles: theta_d = base^(-2d / head_dim)."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "num_kv_heads", "head_dim", "rope_base")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        _require(
            self.window_size is None or self.window_size > 0,
            f"window_size={self.window_size} must be at least 1 token, or None for all",
        )
        _require(self.num_sinks >= 0, f"num_sinks={self.num_sinks} must not be negative")
        _require(
            self.num_sinks == 0 or self.window_size is not None,
            f"num_sinks={self.num_sinks} has no effect with window_size=None: set a window_size "
            "or num_sinks=0",
        )

    def num_parameters(self, d_model: int) -> int:
        """Weights of one layer's attention: queries and output, keys and values."""
        return 2 * d_model * self.head_dim * (self.num_heads + self.num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """A dense SwiGLU feed-forward layer: W_down(silu(W_gate x) * W_up x)."""

    kind: Literal["dense"] = "dense"
    d_ff: int
    """Hidden width, F."""

    def __post_init__(self) -> None:
        _require_positive(self, "d_ff")

    def num_parameters(self, d_model: int) -> int:
        return 3 * d_model * self.d_ff

    def num_active_parameters(self, d_model: int) -> int:
        return self.num_parameters(d_model)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """A softmax top-k router and the weights of its two auxiliary losses."""

    top_k: int
    """Experts per token, K."""
    normalize_gates: bool = True
    """Whether the chosen gates are rescaled to sum to 1."""
    load_balance_weight: float = 1e-2
    """Weight of the Switch load-balance loss E * sum f_i P_i (Fedus et al. 2021)."""
    z_loss_weight: float = 1e-3
    """Weight of mean(logsumexp(router_logits)^2) (ST-MoE, 2022)."""

    def __post_init__(self) -> None:
        _require_positive(self, "top_k")
        for name in ("load_balance_weight", "z_loss_weight"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """SwiGLU experts, some routed and some shared by every token (DeepSeekMoE, 2024)."""

    kind: Literal["moe"] = "moe"
    num_experts: int
    """Routed experts, E."""
    d_ff: int
    """Hidden width of one expert, F."""
    num_shared_experts: int = 0
    """Experts that are always on, held as one dense layer of num_shared_experts * d_ff."""
    router: RouterConfig

    def __post_init__(self) -> None:
        _require_positive(self, "num_experts", "d_ff")
        _require(
            self.num_shared_experts >= 0,
            f"num_shared_experts={self.num_shared_experts} must not be negative",
        )
        _require(
            self.router.top_k <= self.num_experts,
            f"router.top_k={self.router.top_k} must not exceed num_experts={self.num_experts}",
        )

    def _num_parameters(self, d_model: int, experts: int) -> int:
        ffns = 3 * d_model * self.d_ff * (experts + self.num_shared_experts)
        return ffns + d_model * self.num_experts

    def num_parameters(self, d_model: int) -> int:
        return self._num_parameters(d_model, self.num_experts)

    def num_active_parameters(self, d_model: int) -> int:
        return self._num_parameters(d_model, self.router.top_k)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: which attention, which feed-forward."""

    attention: AttentionConfig
    ffn: DenseConfig | MoEConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model: `pattern` repeated until there are `num_layers` layers."""

    vocab_size: int
    d_model: int
    num_layers: int
    pattern: tuple[LayerSpec, ...]
    """The repeating period of layers, e.g. five local layers and a global one."""
    context_length: int
    """Longest sequence, in tokens, that the model is trained or asked to read."""
    tie_embeddings: bool = False
    """Whether the output layer is the transposed input embedding."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "d_model", "num_layers", "context_length", "norm_eps")
        _require(len(self.pattern) > 0, "pattern is empty: give at least one LayerSpec")
        _require(
            self.num_layers % len(self.pattern) == 0,
            f"num_layers={self.num_layers} must be a multiple of the pattern's "
            f"{len(self.pattern)} layers",
        )

    @property
    def num_periods(self) -> int:
        return self.num_layers // len(self.pattern)

    @property
    def num_parameters(self) -> int:
        """All weights, embeddings and norms included."""
        return self._count(lambda ffn: ffn.num_parameters(self.d_model))

    @property
    def num_active_parameters(self) -> int:
        """Weights one token meets: its top_k experts instead of all, embeddings included."""
        return self._count(lambda ffn: ffn.num_active_parameters(self.d_model))

    def _count(self, ffn_parameters: typing.Callable[[DenseConfig | MoEConfig], int]) -> int:
        norms_per_layer = 2 * self.d_model
        period = sum(
            spec.attention.num_parameters(self.d_model) + ffn_parameters(spec.ffn) + norms_per_layer
            for spec in self.pattern
        )
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_periods * period + embeddings + self.d_model


# --- how and where it runs ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """Choices that change speed and memory, not what is computed (beyond rounding)."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of the weights they meet; masters stay float32."""
    remat: Literal["none", "full"] = "none"
    """full: keep only each period's input for the backward pass and compute the rest again."""
    logits_chunks: int = 4
    """Pieces in which the [tokens, vocab] logits are made and consumed."""
    transport: Literal["gather", "all_to_all"] = "gather"
    """How tokens reach the experts of other devices."""
    capacity_factor: float | None = None
    """all_to_all: buffer rows per peer over the balanced load; a full buffer replays the step
    dropless.
    """
    grouped_matmul: Literal["auto", "reference", "xla"] = "auto"
    window_attention: Literal["auto", "reference", "xla"] = "auto"

    def __post_init__(self) -> None:
        _require_positive(self, "logits_chunks")
        if self.transport == "gather":
            _require(
                self.capacity_factor is None,
                f"capacity_factor={self.capacity_factor} has no effect with transport='gather': "
                "use transport='all_to_all' or leave it out",
            )
        else:
            _require(
                self.capacity_factor is not None and self.capacity_factor > 0,
                "transport='all_to_all' needs a capacity_factor greater than 0, got "
                f"{self.capacity_factor}",
            )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh: sizes of the axes data, expert and tensor."""

    data: int = 1
    """Shards of the batch; parameters and optimiser state are sharded over it too (FSDP)."""
    expert: int = 1
    """Shards of the experts; the batch is split over it as well."""
    tensor: int = 1
    """Shards of heads, feed-forward width and vocabulary."""

    def __post_init__(self) -> None:
        for name in ("data", "expert", "tensor"):
            _require(
                getattr(self, name) >= 1, f"mesh.{name}={getattr(self, name)} must be at least 1"
            )

    @property
    def num_devices(self) -> int:
        return self.data * self.expert * self.tensor


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is cut."""

    source: str = "stdlib"
    """'stdlib' (this Python's own library) or a folder of text files."""
    suffix: str = ".py"
    """Files of `source` to read."""
    directory: str = "runs/corpora/stdlib"
    """Where the tokenizer and the token files lie; made from `source` when missing."""
    seq_len: int = 256
    """Tokens a row feeds to the model, L."""
    holdout_fraction: float = 0.05
    """Share of modules held out, chosen by a hash of their names."""

    def __post_init__(self) -> None:
        _require_positive(self, "seq_len")
        _require(
            0 < self.holdout_fraction < 1,
            f"data.holdout_fraction={self.holdout_fraction} must lie between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon for the hidden matrices with AdamW for the rest; one schedule for both."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float
    """Peak learning rate. Muon's updates are scaled to AdamW's RMS (0.2), so it serves both."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: cosine decay, or stable then linear decay (warm-up-stable-decay)."""
    warmup_steps: int
    decay_fraction: float | None = None
    """wsd only: last share of the steps in which the rate falls."""
    final_ratio: float = 0.1
    """Learning rate at the last step over the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float | None = None
    """Muon only: its momentum."""
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms are left alone."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate", "clip_norm", "eps")
        _require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative")
        _require(
            (self.decay_fraction is not None) == (self.schedule == "wsd"),
            f"optimizer.decay_fraction={self.decay_fraction} goes with schedule='wsd' and only "
            "with it, "
            f"got schedule={self.schedule!r}",
        )
        _require(
            self.decay_fraction is None or 0 < self.decay_fraction <= 1,
            f"optimizer.decay_fraction={self.decay_fraction} must lie in (0, 1]",
        )
        _require(
            (self.momentum is not None) == (self.kind == "muon"),
            f"optimizer.momentum={self.momentum} goes with kind='muon' and only with it, got "
            f"kind={self.kind!r}",
        )
        for name in ("final_ratio", "beta1", "beta2", "momentum"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value < 1, f"optimizer.{name}={value} must lie in [0, 1)"
            )
        _require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        _require_positive(self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """When a run stops by itself. A loss or gradient that is not finite always stops it."""

    grace_steps: int = 100
    """Steps before the load alarms listen."""
    patience: int = 50
    """Steps in a row that a load alarm must hold."""
    dead_fraction: float = 0.5
    """Dead experts: share of a layer's experts below a tenth of the mean load."""
    collapse_fraction: float = 0.9
    """Collapse: load of one expert over the most it can get (one of every token's top_k)."""

    def __post_init__(self) -> None:
        _require_positive(self, "patience", "dead_fraction", "collapse_fraction")
        _require(self.grace_steps >= 0, f"grace_steps={self.grace_steps} must not be negative")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Forward KL from a frozen teacher plus cross-entropy on the data."""

    temperature: float = 1.0
    """Both distributions are softened by it; the KL term is multiplied by its square."""
    kl_weight: float = 0.9
    """Weight of the KL term; the cross-entropy has 1 - kl_weight."""
    top_k: int | None = None
    """Teacher tokens kept, the rest in one tail bin; None compares whole distributions."""
    cache: bool = False
    """Keep the teacher's top_k on disk and reuse them when a row of data comes again."""

    def __post_init__(self) -> None:
        _require_positive(self, "temperature")
        _require(0 <= self.kl_weight <= 1, f"distill.kl_weight={self.kl_weight} must lie in [0, 1]")
        _require(
            self.top_k is None or self.top_k > 0,
            f"distill.top_k={self.top_k} must be at least 1, or None for the whole vocabulary",
        )
        _require(
            not self.cache or self.top_k is not None,
            "distill.cache=True needs distill.top_k: whole distributions are too large to keep",
        )


# --- a run --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One experiment, whole."""

    name: str
    steps: int
    """Optimiser steps."""
    batch_size: int
    """Rows per optimiser step over all devices."""
    accumulation: int = 1
    """Micro-batches one step is split into."""
    seed: int = 0
    model: ModelConfig
    optimizer: OptimizerConfig
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionConfig = ExecutionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    alarms: AlarmConfig = AlarmConfig()
    distill: DistillConfig | None = None
    """Set for a student: how it learns from its teacher."""

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "batch_size", "accumulation")
        _require(
            self.batch_size % self.accumulation == 0,
            f"batch_size={self.batch_size} must be divisible by accumulation={self.accumulation}",
        )
        rows, shards = self.batch_size // self.accumulation, self.mesh.data * self.mesh.expert
        _require(
            rows % shards == 0,
            f"batch_size={self.batch_size} gives {rows} rows per micro-batch, which must be "
            "divisible by "
            f"mesh.data * mesh.expert = {shards}: change batch_size, accumulation or the mesh",
        )
        _require(
            self.data.seq_len <= self.model.context_length,
            f"data.seq_len={self.data.seq_len} must not exceed "
            f"model.context_length={self.model.context_length}",
        )
        _require(
            self.data.seq_len % self.execution.logits_chunks == 0,
            f"data.seq_len={self.data.seq_len} must be divisible by "
            f"execution.logits_chunks={self.execution.logits_chunks}",
        )
        _require(
            self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below "
            f"steps={self.steps}",
        )
        _require(
            self.distill is None
            or self.distill.top_k is None
            or self.distill.top_k < self.model.vocab_size,
            f"distill.top_k={self.distill and self.distill.top_k} must be below "
            f"model.vocab_size={self.model.vocab_size}: leave it out to compare whole "
            "distributions",
        )
        for spec in self.model.pattern:
            if isinstance(spec.ffn, MoEConfig):
                _require(
                    spec.ffn.num_experts % self.mesh.expert == 0,
                    f"num_experts={spec.ffn.num_experts} must be divisible by the 'expert' mesh "
                    "axis "
                    f"(size {self.mesh.expert}): change the mesh or num_experts",
                )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.seq_len


# --- JSON ---------------------------------------------------------------------------------------


def to_json(config: Any) -> str:
    """The config as indented JSON; `from_json` gives an equal config back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(cls: type[C], text: str, *, where: str) -> C:
    """Reads a config written by `to_json`.

    Args:
      cls: the config class, e.g. RunConfig.
      where: file name, for the error's sentence.
    Raises:
      UserError: not JSON, an unknown or missing setting, or a value of the wrong type.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON ({error}): restore it or start a new run"
        ) from error
    return _build(cls, tree, where)


def _build(annotation: Any, value: Any, where: str) -> Any:
    """The value as the annotated type: dataclasses, tuples, unions and plain values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(typing.cast(type, annotation), value, where)
    if origin is Literal:
        _require(value in arguments, f"{where} is {value!r}, expected one of {arguments}")
        return value
    if origin is tuple:
        _require(isinstance(value, list), f"{where} is {value!r}, expected a list")
        return tuple(_build(arguments[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, value, where)
    number = annotation is float and isinstance(value, int) and not isinstance(value, bool)
    right_type = number or type(value) is annotation
    _require(
        right_type, f"{where} is {value!r}, expected {getattr(annotation, '__name__', annotation)}"
    )
    _require(
        not isinstance(value, float) or math.isfinite(value),
        f"{where} is {value}, expected a number",
    )
    return annotation(value)


def _build_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [choice for choice in arguments if choice is not type(None)]
    if len(choices) > 1:
        kinds = {choice.__dataclass_fields__["kind"].default: choice for choice in choices}
        kind = value.get("kind") if isinstance(value, dict) else None
        _require(kind in kinds, f"{where}.kind is {kind!r}, expected one of {tuple(kinds)}")
        return _build(kinds[kind], value, where)
    return _build(choices[0], value, where)


def _build_dataclass(cls: type, value: Any, where: str) -> Any:
    _require(
        isinstance(value, dict), f"{where} is {value!r}, expected the settings of {cls.__name__}"
    )
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    _require(
        not unknown, f"{where} has unknown settings {unknown}; {cls.__name__} has {sorted(fields)}"
    )
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in value
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    )
    _require(not missing, f"{where} lacks the settings {missing} of {cls.__name__}")
    return cls(
        **{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    )


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Sentences naming each setting whose value differs, e.g. 'model.d_model was 128, now 256'."""
    if type(before) is not type(after) or not dataclasses.is_dataclass(before):
        if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
            pairs = enumerate(zip(before, after, strict=True))
            return [line for i, (a, b) in pairs for line in differences(a, b, f"{prefix}.{i}")]
        return [] if before == after else [f"{prefix} was {before!r}, now {after!r}"]
    lines = []
    for field in dataclasses.fields(before):
        name = f"{prefix}.{field.name}" if prefix else field.name
        lines += differences(getattr(before, field.name), getattr(after, field.name), name)
    return lines
