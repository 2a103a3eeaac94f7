"""Whole experiments: each public function returns a RunConfig; its docstring says how to run it."""

import dataclasses

from configs import family_models, models
from configs.base import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    ExecutionConfig,
    InitConfig,
    MeshConfig,
    RunConfig,
)
from configs.monitoring import ValidationConfig
from configs.optimizer import OptimizerConfig
from configs.tuning import LoRAConfig, PreferenceConfig


def _nano_optimizer() -> OptimizerConfig:
    """Muon with a long decay: found by trials of 200 steps (docs/experiments.md)."""
    return OptimizerConfig(
        kind="muon",
        momentum=0.95,
        learning_rate=1.5e-2,
        schedule="wsd",
        warmup_steps=20,
        decay_fraction=0.7,
        final_ratio=0.05,
        beta2=0.99,
    )


def v1_nano() -> RunConfig:
    """V1's form in 2.2M parameters: relative attention, memory from row to row.

    python -m scripts.train v1_nano: less than 5 minutes on two CPU cores; 1.70 bits per byte.
    """
    return RunConfig(
        name="v1_nano",
        steps=250,
        batch_size=16,
        model=models.v1_nano(),
        optimizer=_nano_optimizer(),
        data=DataConfig(order="streams"),
        mesh=MeshConfig(expert=2),
    )


def v1() -> RunConfig:
    """V1 at full size, on 8 devices.

    python -m scripts.train v1: needs 8 accelerators; its shapes and shardings are checked
    without allocating anything (tests/configs/test_runs.py).
    """
    return RunConfig(
        name="v1",
        steps=100_000,
        batch_size=128,
        model=models.v1_1b(),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        data=DataConfig(directory="runs/corpora/large", seq_len=1024, order="streams"),
        mesh=MeshConfig(data=8),
        execution=ExecutionConfig(compute_dtype="bfloat16", remat="full", logits_chunks=8),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )


def v2_nano() -> RunConfig:
    """V2's form at nano size: sparse attention, layers that choose their tokens, exits.

    python -m scripts.train v2_nano: less than 5 minutes on two CPU cores; 1.58 bits per byte.
    """
    return dataclasses.replace(v31_nano(), name="v2_nano", model=models.v2_nano())


def v2() -> RunConfig:
    """V2 at full size, 3.5B parameters, on 16 devices.

    python -m scripts.train v2: needs 16 accelerators; its shapes and shardings are checked
    without allocating anything (tests/configs/test_runs.py).
    """
    return dataclasses.replace(
        v1(),
        name="v2",
        model=models.v2_3b(),
        data=DataConfig(directory="runs/corpora/large", seq_len=16_384),
        mesh=MeshConfig(data=16),
        batch_size=64,
        execution=ExecutionConfig(compute_dtype="bfloat16", remat="full", logits_chunks=64),
    )


def v31_nano() -> RunConfig:
    """V3.1's form in 4.6M parameters on the standard library: the quickstart's teacher.

    python -m scripts.train v31_nano: 3 minutes on two CPU cores; 1.53 bits per byte on held-out
    files, where gzip -9 takes 2.04.
    """
    return RunConfig(
        name="v31_nano",
        steps=250,
        batch_size=16,
        model=models.v31_nano(),
        optimizer=_nano_optimizer(),
        mesh=MeshConfig(expert=2),
    )


def delta_nano() -> RunConfig:
    """Gated delta nets and attention, three to one, with v31_nano's experts, data and steps.

    python -m scripts.train delta_nano: for two CPU cores; python -m scripts.ablations delta_net
    measures it beside v31_nano.
    """
    return dataclasses.replace(v31_nano(), name="delta_nano", model=models.delta_nano())


def v31_nano_student() -> RunConfig:
    """A dense student with a quarter of v31_nano's parameters.

    python -m scripts.distill v31_nano_student --teacher runs/v31_nano: 2 minutes on two CPU cores;
    1.58 bits per byte, 95% of the teacher's gain over unigrams.
    """
    return RunConfig(
        name="v31_nano_student",
        steps=180,
        batch_size=16,
        model=models.v31_nano_student(),
        optimizer=_nano_optimizer(),
        mesh=MeshConfig(expert=2),
        distill=DistillConfig(),
    )


def v31_small() -> RunConfig:
    """V3.1's form in 32.5M parameters, 512 tokens a row: the longer run.

    python -m scripts.train v31_small: half an hour on two CPU cores; 1.28 bits per byte on
    held-out files, where xz -9e takes 1.94.
    """
    return RunConfig(
        name="v31_small",
        steps=400,
        batch_size=16,
        model=models.v31_small(),
        optimizer=dataclasses.replace(_nano_optimizer(), learning_rate=1e-2, warmup_steps=50),
        data=DataConfig(seq_len=512),
        mesh=MeshConfig(expert=2),
        execution=ExecutionConfig(logits_chunks=8),
        checkpoint=CheckpointConfig(every=100),
    )


def v31_dynamic_nano() -> RunConfig:
    """V3.1's whole router at nano size: context, one to three experts per token.

    python -m scripts.train v31_dynamic_nano: less than 4 minutes on two CPU cores; 1.54 bits per
    byte.
    """
    return dataclasses.replace(v31_nano(), name="v31_dynamic_nano", model=models.v31_dynamic_nano())


def v3_nano() -> RunConfig:
    """V3's form at nano size: windows with learned sinks, one to three experts per token.

    python -m scripts.train v3_nano: less than 5 minutes on two CPU cores; 1.54 bits per byte.
    """
    return dataclasses.replace(v31_nano(), name="v3_nano", model=models.v3_nano())


def deepseek_v3_nano() -> RunConfig:
    """DeepSeek-V3's form at nano size: latent attention, sigmoid gates, balance by bias.

    python -m scripts.train deepseek_v3_nano: less than 5 minutes on two CPU cores; 1.56 bits per
    byte.
    """
    return dataclasses.replace(v31_nano(), name="deepseek_v3_nano", model=models.deepseek_v3_nano())


def glm4_nano() -> RunConfig:
    """GLM-4.5's form at nano size: a part of each head turned, balance by bias.

    python -m scripts.train glm4_nano: minutes on two CPU cores.
    """
    return dataclasses.replace(v31_nano(), name="glm4_nano", model=family_models.glm4_nano())


def nope_nano() -> RunConfig:
    """Layers without positions, norms after them, a gated shared expert, at nano size.

    python -m scripts.train nope_nano: minutes on two CPU cores.
    """
    return dataclasses.replace(v31_nano(), name="nope_nano", model=family_models.nope_nano())


def nemotron_h_nano() -> RunConfig:
    """v31_nano's run with Nemotron 3's layers: Mamba-2, attention or experts, each alone.

    python -m scripts.train nemotron_h_nano: minutes on two CPU cores.
    """
    model = family_models.nemotron_h_nano()
    return dataclasses.replace(v31_nano(), name="nemotron_h_nano", model=model)


def gemma4_nano() -> RunConfig:
    """v31_nano's run with Gemma 4's layers: shared keys, experts beside a dense layer, embeddings
    for each layer.

    python -m scripts.train gemma4_nano: minutes on two CPU cores.
    """
    model = family_models.gemma4_nano()
    return dataclasses.replace(v31_nano(), name="gemma4_nano", model=model)


def qwen3_next_nano() -> RunConfig:
    """Gated delta nets and gated attention, three to one, as Qwen3-Next and Qwen3.5 have them.

    python -m scripts.train qwen3_next_nano: minutes on two CPU cores.
    """
    model = family_models.qwen3_next_nano()
    return dataclasses.replace(v31_nano(), name="qwen3_next_nano", model=model)


def kimi_linear_nano() -> RunConfig:
    """Kimi delta nets and latent attention without positions, three to one.

    python -m scripts.train kimi_linear_nano: minutes on two CPU cores.
    """
    model = family_models.kimi_linear_nano()
    return dataclasses.replace(v31_nano(), name="kimi_linear_nano", model=model)


def deepseek_v4_nano() -> RunConfig:
    """Compressed attention, four residual streams, experts by token, as DeepSeek-V4 has them.

    python -m scripts.train deepseek_v4_nano: minutes on two CPU cores.
    """
    model = family_models.deepseek_v4_nano()
    return dataclasses.replace(v31_nano(), name="deepseek_v4_nano", model=model)


def v3_7b() -> RunConfig:
    """V3 at full size, on 64 devices.

    python -m scripts.train v3_7b: needs 64 accelerators; its shapes and shardings are checked
    without allocating anything (tests/configs/test_runs.py).
    """
    return RunConfig(
        name="v3_7b",
        steps=100_000,
        batch_size=128,
        model=models.v3_7b(),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        data=DataConfig(directory="runs/corpora/large", seq_len=32_768),
        mesh=MeshConfig(data=8, expert=8),
        execution=ExecutionConfig(
            compute_dtype="bfloat16",
            remat="full",
            logits_chunks=64,
            transport="all_to_all",
            capacity_factor=1.5,
        ),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )


def v31() -> RunConfig:
    """V3.1 at full size, 128 experts, on 128 devices.

    python -m scripts.train v31: needs 128 accelerators; its shapes and shardings are checked
    without allocating anything (tests/configs/test_runs.py).
    """
    return dataclasses.replace(
        v3_7b(), name="v31", model=models.v31(), mesh=MeshConfig(data=8, expert=16)
    )


def deepseek_v3() -> RunConfig:
    """DeepSeek-V3 at full size, on 512 devices.

    python -m scripts.train deepseek_v3: needs 512 accelerators; its shapes and shardings are
    checked without allocating anything (tests/configs/test_runs.py).
    """
    base = v3_7b()
    return dataclasses.replace(
        base,
        name="deepseek_v3",
        batch_size=512,
        model=models.deepseek_v3(),
        data=dataclasses.replace(base.data, seq_len=4096),
        mesh=MeshConfig(data=16, expert=32),
    )


def mixtral_8x7b() -> RunConfig:
    """Mixtral 8x7B at full size, on 64 devices.

    python -m scripts.train mixtral_8x7b: needs 64 accelerators; its shapes and shardings are
    checked without allocating anything (tests/configs/test_runs.py).
    """
    base = v3_7b()
    return dataclasses.replace(
        base,
        name="mixtral_8x7b",
        batch_size=64,
        model=models.mixtral_8x7b(),
        data=dataclasses.replace(base.data, seq_len=4096),
        execution=dataclasses.replace(base.execution, logits_chunks=8),
    )


def smollm2_code() -> RunConfig:
    """SmolLM2-135M trained further on the standard library: what upcycling is compared with.

    python -m scripts.train smollm2_code: less than half an hour on two CPU cores.
    """
    return RunConfig(
        name="smollm2_code",
        steps=100,
        batch_size=8,
        model=models.smollm2_135m(),
        init=InitConfig(source="smollm2"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="wsd", warmup_steps=10, decay_fraction=0.5
        ),
        data=DataConfig(
            tokenizer="smollm2", directory="runs/corpora/stdlib_smollm2", holdout_fraction=0.02
        ),
        mesh=MeshConfig(expert=2),
        execution=ExecutionConfig(remat="full", logits_chunks=8),
    )


def smollm2_upcycled_code() -> RunConfig:
    """SmolLM2-135M upcycled to four experts and trained as smollm2_code: the same steps and tokens.

    python -m scripts.train smollm2_upcycled_code: half an hour on two CPU cores, 11 GB.
    """
    return dataclasses.replace(
        smollm2_code(), name="smollm2_upcycled_code", model=models.smollm2_4x135m()
    )


def fine_tune() -> RunConfig:
    """A trained model trained further on chats; architecture, tokenizer and template are its own.

    python -m scripts.train fine_tune --data.source chats.jsonl --data.directory runs/corpora/chats
    --run-dir runs/chats: of SmolLM2-135M, on two CPU cores, a few seconds a step;
    --init.source names another model.
    """
    return RunConfig(
        name="fine_tune",
        steps=100,
        batch_size=8,
        model=models.of_source(),
        init=InitConfig(source="smollm2", architecture="source"),
        optimizer=OptimizerConfig(
            learning_rate=2e-5, schedule="wsd", warmup_steps=5, decay_fraction=0.5
        ),
        data=DataConfig(form="chat", directory="runs/corpora/chats"),
        execution=ExecutionConfig(remat="full", logits_chunks=8),
        validation=ValidationConfig(every=25),
    )


def fine_tune_lora() -> RunConfig:
    """As fine_tune, by low-rank adapters on every matrix; the source's weights stay as they are.

    python -m scripts.train fine_tune_lora --data.source chats.jsonl --data.directory
    runs/corpora/chats --run-dir runs/adapted: of SmolLM2-135M, on two CPU cores, 15 s a step;
    --lora.targets experts is for the experts alone.
    """
    base = fine_tune()
    optimizer = dataclasses.replace(base.optimizer, learning_rate=2e-4, weight_decay=0.0)
    return dataclasses.replace(base, name="fine_tune_lora", lora=LoRAConfig(), optimizer=optimizer)


def prefer() -> RunConfig:
    """A trained model trained further on pairs of answers (DPO), by adapters.

    python -m scripts.train prefer --data.source pairs.jsonl --data.directory runs/corpora/pairs
    --run-dir runs/preferred: of SmolLM2-135M, on two CPU cores (not yet timed).
    """
    base = fine_tune_lora()
    return dataclasses.replace(
        base,
        name="prefer",
        data=DataConfig(form="preference", directory="runs/corpora/pairs"),
        preference=PreferenceConfig(),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=5e-5),
    )


def pruned_alone() -> RunConfig:
    """A pruned model that trains on without a teacher: what pruned_recovery is compared with.

    python -m scripts.train pruned_alone --init.source pruned --run-dir runs/alone: of
    SmolLM2-135M, on two CPU cores, a few seconds a step.
    """
    return dataclasses.replace(pruned_recovery(), name="pruned_alone", distill=None)


def pruned_recovery() -> RunConfig:
    """A pruned model that learns from the one it was: what makes good what pruning cost.

    python -m scripts.distill pruned_recovery --init.source pruned --teacher smollm2
    --run-dir runs/recovered: of SmolLM2-135M, on two CPU cores, a few seconds a step.
    """
    return RunConfig(
        name="pruned_recovery",
        steps=600,
        batch_size=8,
        model=models.of_source(),
        init=InitConfig(source="smollm2", architecture="source"),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="wsd", warmup_steps=20, decay_fraction=0.5
        ),
        data=DataConfig(directory="runs/corpora/pruned_recovery", holdout_fraction=0.02),
        execution=ExecutionConfig(remat="full", logits_chunks=8),
        validation=ValidationConfig(every=100),
        distill=DistillConfig(),
    )
