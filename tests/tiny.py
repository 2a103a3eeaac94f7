"""Small models and runs that the tests share."""

import dataclasses
from pathlib import Path

from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig, RelativeAttentionConfig
from configs.base import CheckpointConfig, DataConfig, ExecutionConfig, MeshConfig, RunConfig
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig
from configs.monitoring import ValidationConfig
from configs.optimizer import OptimizerConfig


def attention(**changes) -> AttentionConfig:
    return dataclasses.replace(
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window_size=12, num_sink_tokens=2),
        **changes,
    )


def moe(**changes) -> MoEConfig:
    return dataclasses.replace(
        MoEConfig(num_experts=8, d_ff=16, num_shared_experts=1, router=RouterConfig(top_k=2)),
        **changes,
    )


def model(**changes) -> ModelConfig:
    """A windowed MoE layer and a global dense one."""
    pattern = (
        LayerSpec(attention=attention(), ffn=moe()),
        LayerSpec(
            attention=attention(window_size=None, num_sink_tokens=0), ffn=DenseConfig(d_ff=48)
        ),
    )
    base = ModelConfig(vocab_size=300, d_model=32, num_layers=2, pattern=pattern, context_length=64)
    return dataclasses.replace(base, **changes)


def memory_model(memory_length: int = 24, **changes) -> ModelConfig:
    """Two dense layers with relative attention."""
    attention = RelativeAttentionConfig(num_heads=2, head_dim=8, memory_length=memory_length)
    pattern = (LayerSpec(attention=attention, ffn=DenseConfig(d_ff=48)),)
    return model(pattern=pattern, **changes)


def run(tmp_path: Path, **changes) -> RunConfig:
    """A run on the tiny corpus that `write_sources` makes under tmp_path; without validation."""
    base = RunConfig(
        name="tiny",
        steps=6,
        batch_size=8,
        model=model(),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        data=DataConfig(
            source=str(tmp_path / "sources"),
            directory=str(tmp_path / "corpus"),
            seq_len=32,
            holdout_fraction=0.3,
        ),
        mesh=MeshConfig(),
        execution=ExecutionConfig(logits_chunks=2),
        checkpoint=CheckpointConfig(every=2, keep=2),
        validation=ValidationConfig(every=None),
    )
    return dataclasses.replace(base, **changes)


def memory_run(tmp_path: Path, **changes) -> RunConfig:
    """A run of `memory_model` on streams of the same corpus."""
    base = run(tmp_path)
    data = dataclasses.replace(base.data, order="streams")
    return dataclasses.replace(base, **{"model": memory_model(), "data": data, **changes})


def write_sources(tmp_path: Path, files: int = 12, word: str = "total") -> Path:
    """Python files with enough text for the tiny vocabulary."""
    folder = tmp_path / "sources"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        body = "\n\n\n".join(
            f"def function_{i}_{j}(argument, other={j}):\n"
            f'    """Adds {j} to the argument."""\n'
            f"    {word} = argument + other * {i}\n"
            f"    return {word} - {j}"
            for j in range(12)
        )
        (folder / f"module_{i}.py").write_text(body + "\n")
    return folder
