"""Frozen configs: how a run trains a model, and how and where that is executed.

Standard library only. A config hashes, prints and lies as JSON beside its checkpoint. Settings that
contradict each other fail when the config is made, in a sentence that names both numbers; a setting
that would be ignored is an error.

`ModelConfig` (configs/architecture.py) says what is computed; the checkpoint depends on it.
`ExecutionConfig` and `MeshConfig` say how and where; a checkpoint may be resumed with other ones.
"""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from configs.architecture import ModelConfig
from configs.checks import (
    require,
    require_choices,
    require_finite,
    require_positive,
    require_seed,
)
from configs.data import DataConfig
from configs.distill import DistillConfig
from configs.feed_forward import MoEConfig
from configs.further import FurtherConfig
from configs.monitoring import MetricsConfig, SamplesConfig, ValidationConfig
from configs.optimizer import OptimizerConfig
from configs.tuning import LoRAConfig, PreferenceConfig, QuantizationAwareConfig


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
    grouped_matmul: Literal["auto", "reference", "xla", "cpu", "triton"] = "auto"
    window_attention: Literal["auto", "reference", "xla", "cpu", "triton", "mosaic"] = "auto"
    sparse_attention: Literal["auto", "reference", "xla"] = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "logits_chunks")
        require(
            self.window_attention != "mosaic" or self.compute_dtype == "bfloat16",
            f"window_attention='mosaic' computes in bfloat16 only, compute_dtype is "
            f"{self.compute_dtype!r}: use compute_dtype='bfloat16' or window_attention='auto'",
        )
        if self.transport == "gather":
            require(
                self.capacity_factor is None,
                f"capacity_factor={self.capacity_factor} has no effect with transport='gather': "
                "use transport='all_to_all' or leave it out",
            )
        else:
            require(
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
            require(
                getattr(self, name) >= 1, f"mesh.{name}={getattr(self, name)} must be at least 1"
            )

    @property
    def num_devices(self) -> int:
        return self.data * self.expert * self.tensor


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    best: bool = False
    """Keep the weights of the lowest validation loss, too: the source RUN@best."""

    def __post_init__(self) -> None:
        require_positive(self, "every", "keep")


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
        require_positive(self, "patience", "dead_fraction", "collapse_fraction")
        require(self.grace_steps >= 0, f"grace_steps={self.grace_steps} must not be negative")


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Experts in the place of a dense model's layers, each a copy of its layer
    (model/upcycle.py)."""

    num_experts: int = 0
    """0: the model stays as it is."""
    top_k: int = 2
    every: int = 1
    """Only the last of so many layers of the pattern gets experts."""

    def __post_init__(self) -> None:
        require(
            bool(self) or (self.top_k, self.every) == (2, 1),
            f"init.upcycle has top_k={self.top_k} and every={self.every} without effect: set its "
            "num_experts",
        )

    def __bool__(self) -> bool:
        return self.num_experts > 0


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The weights a run begins with."""

    source: str | None = None
    """A trained model: "smollm2", a folder of Hugging Face's form, a GGUF file, a model folder of
    ours or a run's. Dense, where the run's model has experts, it is upcycled (model/upcycle.py).
    None: weights drawn from the run's seed."""
    architecture: Literal["run", "source"] = "run"
    """source: the run's model is the one that init.source has, and so is its tokenizer where
    data.tokenizer names none; `model` is left as configs.models.of_source() makes it."""
    weights: Literal["source", "drawn"] = "source"
    """drawn: of init.source only architecture and tokenizer are taken; the weights are drawn from
    the run's seed."""
    upcycle: UpcycleConfig = UpcycleConfig()
    """With architecture="source": the run's model has experts in the place of the source's dense
    layers."""
    drop: float = 0.0
    """Upcycled only: share of each expert's hidden units that are drawn anew; 0 begins as the same
    function."""

    def __post_init__(self) -> None:
        if self.source is not None:
            object.__setattr__(self, "source", str(PurePath(self.source)))  # "run/" is "run"
        require(0 <= self.drop < 1, f"init.drop={self.drop} must lie in [0, 1)")
        require(
            self.source is not None or not self.drop,
            f"init.drop={self.drop} has no effect without init.source: name a dense model there",
        )
        require(
            self.architecture == "run" or self.source is not None,
            f"init.architecture={self.architecture!r} needs init.source, whose model it is",
        )
        require(
            self.architecture == "source" or not self.upcycle,
            "init.upcycle puts experts into the model that init.source has: set "
            "init.architecture='source', or give the run a model with experts and leave it out",
        )
        require(
            self.architecture == "run" or not self.drop or bool(self.upcycle),
            f"init.drop={self.drop} draws units of experts anew, and the run takes init.source's "
            "model as it is: set init.upcycle, or leave init.drop out",
        )
        require(
            self.weights == "source" or self.architecture == "source",
            f"init.weights={self.weights!r} takes nothing from init.source but its architecture: "
            "set init.architecture='source', or leave init out",
        )
        require(
            self.weights == "source" or not self.drop,
            f"init.drop={self.drop} has no effect with init.weights='drawn': leave it out",
        )


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
    init: InitConfig = InitConfig()
    optimizer: OptimizerConfig
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionConfig = ExecutionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    alarms: AlarmConfig = AlarmConfig()
    metrics: MetricsConfig = MetricsConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    distill: DistillConfig | None = None
    """Set for a student: how it learns from its teacher."""
    lora: LoRAConfig | None = None
    """Set to train adapters beside the weights of init.source, which stay as they are."""
    preference: PreferenceConfig | None = None
    """Set to learn from pairs of answers, of which one is preferred (data.form="preference")."""
    objective: str | None = None
    """Of a run in a file of one's own: what is minimised, by its name in that file, a ChunkLoss
    (train/losses.py). None: what goes with the form of the data."""
    trained: Literal["all", "experts"] = "all"
    """experts: the routed experts' weights alone; all others stay what they are."""
    further: FurtherConfig = FurtherConfig()
    quantization_aware: QuantizationAwareConfig = QuantizationAwareConfig()

    def __post_init__(self) -> None:
        require_finite(self)
        require_choices(self)
        require_positive(self, "steps", "batch_size", "accumulation")
        require_seed(self.seed)
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size={self.batch_size} must be divisible by accumulation={self.accumulation}",
        )
        rows, shards = self.batch_size // self.accumulation, self.mesh.data * self.mesh.expert
        require(
            rows % shards == 0,
            f"batch_size={self.batch_size} gives {rows} rows per micro-batch, which must be "
            "divisible by "
            f"mesh.data * mesh.expert = {shards}: change batch_size, accumulation or the mesh",
        )
        require(
            self.data.seq_len <= self.model.context_length,
            f"data.seq_len={self.data.seq_len} must not exceed "
            f"model.context_length={self.model.context_length}",
        )
        require(
            self.data.seq_len % self.execution.logits_chunks == 0,
            f"data.seq_len={self.data.seq_len} must be divisible by "
            f"execution.logits_chunks={self.execution.logits_chunks}",
        )
        require(
            self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below "
            f"steps={self.steps}",
        )
        require(
            self.distill is None
            or self.distill.top_k is None
            or self.distill.top_k < self.model.vocab_size,
            f"distill.top_k={self.distill and self.distill.top_k} must be below "
            f"model.vocab_size={self.model.vocab_size}: leave it out to compare whole "
            "distributions",
        )
        require(
            self.model.exit_spacing is None,
            f"model.exit_spacing={self.model.exit_spacing} is for decoding: training's exits lie "
            "after each period of the pattern, leave it out",
        )
        ahead = self.model.multi_token
        require(
            ahead is None or ahead.depth < self.data.seq_len,
            f"model.multi_token.depth={ahead and ahead.depth} must be below "
            f"data.seq_len={self.data.seq_len}",
        )
        require(
            not self.checkpoint.best or self.validation.every is not None,
            "checkpoint.best=True needs validation.every, by whose loss the best is known",
        )
        self._check_further()
        self._check_memory()
        self._check_layers()
        self._check_tuning()

    @property
    def keeps_initial(self) -> bool:
        """Whether the weights that the run begins with are needed as long as it trains: under
        adapters, or as the reference of preferences."""
        return self.lora is not None or self.preference is not None

    def _check_further(self) -> None:
        frozen = self.further.frozen_experts
        counts = [s.ffn.num_experts for s in self.model.pattern if isinstance(s.ffn, MoEConfig)]
        require(
            not frozen or (bool(counts) and frozen < min(counts)),
            f"further.frozen_experts={frozen} must be below the experts of every MoE layer "
            f"({', '.join(map(str, counts)) or 'there is none'})",
        )
        for name, value in (
            ("consolidation", self.further.consolidation),
            ("frozen_experts", frozen),
        ):
            require(
                not value or (self.lora is None and self.trained == "all"),
                f"further.{name}={value} says what stays of the weights, and with lora or "
                f"trained={self.trained!r} that is settled: leave one out",
            )

    def _check_layers(self) -> None:
        for spec in self.model.layer_kinds:
            require(
                spec.depth is None or spec.depth.selection == "top_capacity",
                "depth.selection='threshold' is for scoring and generating, which choose it by "
                "themselves: a run is trained with depth.selection='top_capacity'",
            )
            if isinstance(spec.ffn, MoEConfig):
                require(
                    spec.ffn.num_experts % self.mesh.expert == 0,
                    f"num_experts={spec.ffn.num_experts} must be divisible by the 'expert' mesh "
                    "axis "
                    f"(size {self.mesh.expert}): change the mesh or num_experts",
                )

    def _check_memory(self) -> None:
        memory, order = self.model.memory_length, self.data.order
        require(
            (memory is not None) == (order == "streams"),
            f"data.order={order!r} with memory_length={memory}: 'streams' goes with a model that "
            "has a memory and only with it, 'shuffled' with all others",
        )
        require(
            memory is None or self.accumulation == 1,
            f"accumulation={self.accumulation} must be 1 for a model with memory: a row's memory "
            "goes from one step to the next",
        )
        kernel = self.execution.window_attention
        require(
            memory is None or kernel == "auto",
            f"execution.window_attention={kernel!r} has no effect on relative attention, which "
            "brings its own: leave it at 'auto'",
        )
        require(
            memory is None or self.distill is None,
            f"distill is set for a model with memory_length={memory}: distillation shows a row "
            "without the ones before it; train the model by itself",
        )

    def _check_tuning(self) -> None:
        for name in ("lora", "preference"):
            require(
                getattr(self, name) is None or self.init.source is not None,
                f"{name} needs init.source, the trained model to begin with: name it",
            )
            require(
                getattr(self, name) is None or self.distill is None,
                f"{name} and distill are both set: a student learns from its teacher alone, leave "
                "one out",
            )
        require(
            self.lora is None or self.optimizer.kind == "adamw",
            f"lora goes with optimizer.kind='adamw', got {self.optimizer.kind!r}",
        )
        require(
            self.optimizer.base_width is None
            or not (self.model.tie_embeddings or self.lora is not None),
            f"optimizer.base_width={self.optimizer.base_width} scales the rates of a whole model "
            "with an output layer of its own: leave it out with lora or model.tie_embeddings",
        )
        require(
            self.quantization_aware.weights == "none" or self.lora is None,
            "quantization_aware rounds the weights that are trained, and with lora they stay as "
            "they are: leave one out",
        )
        require(
            self.lora is None or self.trained == "all",
            f"trained={self.trained!r} has no effect with lora, whose adapters alone are trained: "
            "choose the experts' by lora.targets",
        )
        require(
            self.trained == "all" or any(isinstance(x.ffn, MoEConfig) for x in self.model.pattern),
            f"trained={self.trained!r} needs a model with experts, and this one has none",
        )
        require(
            (self.preference is not None) == (self.data.form == "preference"),
            f"data.form={self.data.form!r} goes with preference settings and only with them "
            f"(--preference.beta), got preference={self.preference}",
        )
        require(
            self.objective is None or (self.preference is None and self.distill is None),
            f"objective={self.objective!r} is of the next token or of chats, and this run has "
            "preference or distill settings, which state another: leave one out",
        )
        if self.preference is None:
            return
        rows = self.batch_size // self.accumulation
        require(
            rows % 2 == 0,
            f"batch_size={self.batch_size} gives {rows} rows per micro-batch, and a pair is two of "
            "them: make it even",
        )
        for name in ("multi_token", "early_exit", "memory_length"):
            require(
                getattr(self.model, name) is None,
                f"model.{name}={getattr(self.model, name)} can't be trained on preferences: take a "
                "model without it",
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.seq_len
