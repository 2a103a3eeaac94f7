"""Configs: impossible settings say so, JSON gives the same config back."""

import dataclasses
import json
import math

import pytest

from configs import runs
from configs.architecture import EarlyExitConfig, LayerSpec, MixtureOfDepthsConfig
from configs.attention import AttentionConfig, RelativeAttentionConfig
from configs.base import DistillConfig, ExecutionConfig, MeshConfig, RunConfig
from configs.checks import UserError
from configs.cli import describe_runs, known_runs, load_run
from configs.feed_forward import ContextConfig, MoEConfig, RouterConfig
from configs.optimizer import OptimizerConfig
from configs.rope import LinearRopeConfig, Llama3RopeConfig, YarnConfig
from configs.serialization import differences, from_json, to_json
from model.growth import grown_config
from tests import tiny


def replace(path: str, value):
    """The tiny run with one nested setting changed."""

    def build(tmp_path):
        return changed(tiny.run(tmp_path), path.split("."), value)

    return build


def changed(config, names, value):
    """The config with another value at the place that the names lead to."""
    if not names:
        return value
    if isinstance(config, tuple):
        index = int(names[0])
        inner = changed(config[index], names[1:], value)
        return (*config[:index], inner, *config[index + 1 :])
    inner = changed(getattr(config, names[0]), names[1:], value)
    return dataclasses.replace(config, **{names[0]: inner})


ROUTER = "model.pattern.0.ffn.router."
IMPOSSIBLE = {
    ("steps", 0): "steps=0 must be greater than 0",
    ("batch_size", -1): "batch_size=-1 must be greater than 0",
    ("accumulation", 3): "batch_size=8 must be divisible by accumulation=3",
    ("mesh.expert", 3): r"mesh.data \* mesh.expert = 3",
    ("mesh.data", 0): "mesh.data=0 must be at least 1",
    ("data.seq_len", 100): "data.seq_len=100 must not exceed model.context_length=64",
    ("execution.logits_chunks", 5): "must be divisible by execution.logits_chunks=5",
    ("optimizer.warmup_steps", 6): "warmup_steps=6 must be below steps=6",
    ("optimizer.final_ratio", 1.5): r"final_ratio=1.5 must lie in \[0, 1\)",
    ("optimizer.decay_fraction", 0.2): "goes with schedule='wsd'",
    ("optimizer.momentum", 0.9): "goes with kind='muon'",
    ("optimizer.kind", "muon"): "goes with kind='muon'",
    ("execution.capacity_factor", 2.0): "has no effect with transport='gather'",
    ("execution.transport", "all_to_all"): "needs a capacity_factor",
    ("model.num_layers", 5): "num_layers=5 must be the prefix's 0 layers and a multiple of the "
    "pattern's 2",
    ("model.pattern", ()): "pattern is empty",
    (
        "model.pattern.0.attention.num_kv_heads",
        3,
    ): "num_heads=4 must be divisible by num_kv_heads=3",
    ("model.pattern.0.attention.head_dim", 7): "head_dim=7 must be even",
    ("model.pattern.0.attention.window_size", None): "num_sink_tokens=2 has no effect",
    ("model.pattern.0.attention.window_size", 0): "at least 1 token",
    ("model.pattern.0.ffn.router.top_k", 9): "router.top_k=9 must not exceed num_experts=8",
    (ROUTER + "num_null_experts", 2): "num_null_experts=2 must be below top_k=2",
    (ROUTER + "num_null_experts", 1): "target_k=None goes with null experts",
    (ROUTER + "target_k", 1.5): "target_k=1.5 goes with null experts",
    (ROUTER + "num_groups", 4): "top_groups=None go together",
    (ROUTER + "bias_rate", 0.1): "bias_rate=0.1 goes with balance",
    (ROUTER + "balance", "loss_free"): "bias_rate=None goes with balance",
    (ROUTER + "entropy_weight", -1.0): "entropy_weight=-1.0 must not be negative",
    ("model.prefix", (tiny.model().pattern[0],)): "num_layers=2 must be the prefix's 1 layers",
    ("model.pattern.0.ffn.num_shared_experts", -1): "must not be negative",
    ("model.exit_spacing", 3): "exit_spacing=3 must divide the 2 layers after the prefix",
    ("model.exit_spacing", 1): "exit_spacing=1 is for decoding",
    ("data.holdout_fraction", 1.0): "must lie between 0 and 1",
    ("distill", DistillConfig(top_k=300)): "top_k=300 must be below model.vocab_size=300",
}


@pytest.mark.parametrize(("path", "value"), IMPOSSIBLE)
def test_impossible_settings_fail_with_both_sides(tmp_path, path, value):
    with pytest.raises(UserError, match=IMPOSSIBLE[path, value]):
        replace(path, value)(tmp_path)


def test_experts_that_the_mesh_does_not_divide():
    with pytest.raises(UserError, match=r"num_experts=16 must be divisible .* \(size 3\)"):
        dataclasses.replace(runs.v31_nano(), batch_size=48, mesh=MeshConfig(expert=3))


def llama3(**changes) -> Llama3RopeConfig:
    base = Llama3RopeConfig(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    "scaling",
    [YarnConfig(factor=4.0, original_length=64), llama3(), LinearRopeConfig(factor=4.0)],
)
def test_the_kind_of_rope_scaling_survives_the_file(tmp_path, scaling):
    pattern = tiny.model().pattern
    layer = dataclasses.replace(pattern[0], attention=tiny.attention(rope_scaling=scaling))
    run = tiny.run(tmp_path, model=tiny.model(pattern=(layer, pattern[1])))
    assert from_json(RunConfig, to_json(run), where="config.json") == run


def test_experts_that_contradict_themselves():
    with pytest.raises(UserError, match="swiglu_limit=None goes with activation='clamped_swiglu'"):
        tiny.moe(activation="clamped_swiglu", swiglu_alpha=1.702)
    with pytest.raises(UserError, match=r"swiglu_alpha=1.702 goes with .*got activation='swiglu'"):
        tiny.moe(swiglu_alpha=1.702)
    with pytest.raises(UserError, match=r"clip_qkv=0.0 must be greater than 0"):
        tiny.attention(clip_qkv=0.0)
    with pytest.raises(UserError, match="group_score='best' has no effect without"):
        RouterConfig(top_k=2, group_score="best")
    grouped = RouterConfig(top_k=2, num_groups=8, top_groups=3)
    with pytest.raises(UserError, match=r"router.num_groups=8 groups of at least 2"):
        tiny.moe(router=grouped)
    tiny.moe(router=dataclasses.replace(grouped, group_score="best"))


def test_routers_that_contradict_themselves():
    with pytest.raises(UserError, match="window_size=None goes with kind='causal'"):
        ContextConfig(kind="causal")
    with pytest.raises(UserError, match="window_size=8 goes with kind='causal'"):
        ContextConfig(kind="correlation", window_size=8)
    with pytest.raises(UserError, match="must be below top_k=1"):
        RouterConfig(top_k=1, num_null_experts=1, target_k=0.5)
    with pytest.raises(UserError, match=r"target_k=3.5 must lie between 1 and top_k=3"):
        RouterConfig(top_k=3, num_null_experts=2, target_k=3.5)
    grouped = RouterConfig(top_k=4, num_groups=8, top_groups=1)
    with pytest.raises(UserError, match=r"must not exceed the 2 experts of router.top_groups=1"):
        MoEConfig(num_experts=16, d_ff=8, router=grouped)
    with pytest.raises(UserError, match="num_experts=12 must be divisible into"):
        MoEConfig(num_experts=12, d_ff=8, router=grouped)
    with pytest.raises(UserError, match=r"yarn.factor=0.5 must be at least 1"):
        YarnConfig(factor=0.5, original_length=4096)
    with pytest.raises(
        UserError, match=r"yarn.mscale=-8.0 makes .*ln.factor. . 1 = -0.109 of factor=4.0"
    ):
        YarnConfig(factor=4.0, original_length=4096, mscale=-8.0)
    with pytest.raises(UserError, match=r"rotary_scale=0.0 must be greater than 0"):
        YarnConfig(factor=4.0, original_length=4096, rotary_scale=0.0)
    with pytest.raises(UserError, match=r"linear.factor=0.5 must be at least 1"):
        LinearRopeConfig(factor=0.5)
    with pytest.raises(UserError, match=r"low_freq_factor=4.0 must be below .*high_freq_factor=4"):
        llama3(low_freq_factor=4.0)
    moe = LayerSpec(attention=tiny.attention(), ffn=tiny.moe())
    with pytest.raises(UserError, match="layers before the pattern must be dense"):
        tiny.model(prefix=(moe,), num_layers=3)


def test_memory_is_in_every_layer_alike():
    with pytest.raises(UserError, match="memory_length=0 must be at least 1 token"):
        tiny.memory_model(memory_length=0)
    own, other = tiny.memory_model().pattern[0], tiny.memory_model(12).pattern[0]
    local = LayerSpec(attention=tiny.attention(), ffn=own.ffn)
    with pytest.raises(UserError, match="1 of 2 layers of prefix and pattern have relative"):
        tiny.model(pattern=(own, local))
    with pytest.raises(UserError, match="1 of 2 layers of prefix and pattern have relative"):
        tiny.model(prefix=(local,), pattern=(own,))
    with pytest.raises(UserError, match=r"memory_length=\[12, 24\]: give all of them the same"):
        tiny.model(pattern=(own, other))
    with pytest.raises(UserError, match="d_model=33 must be even"):
        tiny.memory_model(d_model=33)
    router = RouterConfig(top_k=2, context=ContextConfig(kind="causal", window_size=4))
    with pytest.raises(UserError, match="kind='causal' has no memory of earlier segments"):
        tiny.model(pattern=(dataclasses.replace(own, ffn=tiny.moe(router=router)),))


def test_memory_needs_streams_of_whole_steps(tmp_path):
    run = tiny.memory_run(tmp_path)
    shuffled = dataclasses.replace(run.data, order="shuffled")
    with pytest.raises(UserError, match=r"order='shuffled' with memory_length=24: 'streams' goes"):
        dataclasses.replace(run, data=shuffled)
    with pytest.raises(UserError, match=r"order='streams' with memory_length=None: 'streams'"):
        dataclasses.replace(run, model=tiny.model())
    with pytest.raises(UserError, match="accumulation=2 must be 1 for a model with memory"):
        dataclasses.replace(run, accumulation=2)
    reference = ExecutionConfig(logits_chunks=2, window_attention="reference")
    with pytest.raises(UserError, match="window_attention='reference' has no effect"):
        dataclasses.replace(run, execution=reference)
    with pytest.raises(UserError, match="distill is set for a model with memory_length=24"):
        dataclasses.replace(run, distill=DistillConfig())


def test_relative_attention_counts_two_biases():
    config = RelativeAttentionConfig(num_heads=2, head_dim=4, memory_length=8)
    assert config.num_parameters(16) == 5 * 16 * 2 * 4 + 2 * 2 * 4
    assert config.window_size == 9


def test_depths_that_contradict_themselves():
    with pytest.raises(UserError, match=r"depth.capacity=1.5 must lie in \(0, 1\]"):
        MixtureOfDepthsConfig(capacity=1.5)
    dense = tiny.model().pattern[1]
    routed = dataclasses.replace(dense, depth=MixtureOfDepthsConfig(capacity=0.5))
    with pytest.raises(UserError, match="layers before the pattern work on every token"):
        tiny.model(prefix=(routed,), num_layers=3)
    with pytest.raises(UserError, match=r"early_exit.dropout=1.0 must lie in \[0, 1\)"):
        EarlyExitConfig(dropout=1.0, loss_scale=1.0, rotation=1)
    early = EarlyExitConfig(dropout=0.1, loss_scale=1.0, rotation=1)
    with pytest.raises(UserError, match="needs at least 2 periods"):
        tiny.model(early_exit=early)
    with pytest.raises(UserError, match="early_exit would train nothing"):
        tiny.model(pattern=(dense,), num_layers=2, early_exit=early)


def test_json_keeps_depth_and_early_exit(tmp_path):
    spec = dataclasses.replace(tiny.model().pattern[1], depth=MixtureOfDepthsConfig(capacity=0.125))
    early = EarlyExitConfig(dropout=0.1, loss_scale=0.2, rotation=3)
    run = tiny.run(tmp_path, model=tiny.model(pattern=(spec,), num_layers=4, early_exit=early))
    assert from_json(RunConfig, to_json(run), where="config.json") == run


def test_a_cache_needs_a_top_k():
    with pytest.raises(UserError, match="needs distill"):
        DistillConfig(cache=True)
    with pytest.raises(UserError, match="decay_fraction=None goes with"):
        OptimizerConfig(learning_rate=1.0, warmup_steps=1, schedule="wsd")


@pytest.mark.parametrize("name", known_runs())
def test_json_gives_the_same_config_back(name):
    run = known_runs()[name]()
    again = from_json(RunConfig, to_json(run), where="config.json")
    assert again == run
    assert hash(again) == hash(run)
    assert run.name == name


def tamper(**changes):
    tree = json.loads(to_json(runs.v31_nano()))
    tree.update(changes)
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        (tamper(speed=3), r"unknown settings \['speed'\]"),
        (tamper(steps="many"), "steps is 'many', expected int"),
        (tamper(steps=True), "steps is True, expected int"),
        (tamper(mesh={"data": 1.5}), "mesh.data is 1.5, expected int"),
        (tamper(model={}), "lacks the settings"),
        (tamper(execution={"transport": "pigeon"}), "transport is 'pigeon', expected one of"),
        ("[]", "expected the settings of RunConfig"),
    ],
)
def test_a_config_file_that_was_changed_is_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        from_json(RunConfig, text, where="config.json")


@pytest.mark.parametrize("name", ["v3_nano", "v2_nano"])
def test_files_with_older_names_of_settings_are_read(name):
    run = runs.__dict__[name]()
    new = to_json(run)
    old = new.replace('"num_sink_tokens"', '"num_sinks"').replace(
        '"sink_logits"', '"learned_sinks"'
    )
    assert '"num_sinks"' in old
    assert from_json(RunConfig, old, where="config.json") == run
    both = new.replace('"num_sink_tokens"', '"num_sinks": 1, "num_sink_tokens"')
    with pytest.raises(UserError, match="has both num_sinks and num_sink_tokens"):
        from_json(RunConfig, both, where="config.json")
    elsewhere = new.replace('"steps"', '"num_sinks": 1, "steps"')
    with pytest.raises(UserError, match=r"unknown settings \['num_sinks'\]"):
        from_json(RunConfig, elsewhere, where="config.json")


def test_overrides_by_older_names_are_read():
    """v3_nano has learned sinks, and no sink tokens unless it is told."""
    layer = "--model.pattern.0.attention"
    run = load_run("v3_nano", [f"{layer}.num-sinks", "3", f"{layer}.learned_sinks=False"])
    assert run == load_run("v3_nano", [f"{layer}.num-sink-tokens=3", f"{layer}.sink-logits=False"])
    attention = run.model.pattern[0].attention
    assert isinstance(attention, AttentionConfig)
    assert (attention.num_sink_tokens, attention.sink_logits) == (3, False)


def test_differences_name_settings():
    before = runs.v31_nano()
    after = dataclasses.replace(
        before, seed=1, mesh=MeshConfig(expert=8), execution=ExecutionConfig(remat="full")
    )
    assert differences(before, before) == []
    assert differences(before, after) == [
        "seed was 0, now 1",
        f"mesh.expert was {before.mesh.expert}, now 8",
        "execution.remat was 'none', now 'full'",
    ]


def test_overrides():
    run = load_run("v31_nano", ["--steps", "77", "--mesh.expert", "4", "--data.seq-len", "128"])
    assert (run.steps, run.mesh.expert, run.data.seq_len) == (77, 4, 128)
    assert (
        load_run("v31_nano", ["--model.pattern.0.ffn.d-ff", "64"]).model.pattern[0].ffn.d_ff == 64
    )


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("v31_nanoo", [], "unknown run 'v31_nanoo': did you mean 'v31_nano'"),
        ("zzz", [], "unknown run 'zzz': There are"),
        ("v31_nano", ["--steps", "many"], "^--steps.*'many'"),
        ("v31_nano", ["--stepps", "3"], "--stepps.*did you mean --steps"),
        ("v31_nano", ["--mesh.expert", "4.5"], "--mesh.expert.*'4.5'"),
        ("v31_nano", ["--steps", "0"], "^steps=0 must be greater than 0"),
        ("v31_nano", ["--optimizer.beta2", "2"], "^optimizer.beta2=2.0 must lie in"),
        ("v31_nano", ["--optimizer.kind", "sgd"], "'sgd'.*'adamw', 'muon'"),
        ("v31_nano", ["--mesh.expert", "3"], "must be divisible by"),
    ],
)
def test_bad_command_lines_end_in_one_sentence(name, overrides, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        load_run(name, overrides)
    assert "\n" not in str(raised.value)


def test_help_lists_settings_and_runs(capsys):
    with pytest.raises(SystemExit) as stop:
        load_run("v31_nano", ["--help"])
    assert stop.value.code == 0
    assert "--mesh.expert" in capsys.readouterr().out
    assert all(name in describe_runs() for name in known_runs())


def test_every_run_says_how_to_run_it():
    for name, function in known_runs().items():
        doc = function.__doc__ or ""
        assert f"scripts.{'distill' if function().distill else 'train'} {name}" in doc, name
        assert "two CPU cores" in doc or "without allocating" in doc, name


def test_sinks_beyond_a_window_are_a_setting():
    config = AttentionConfig(
        num_heads=2, num_kv_heads=1, head_dim=4, window_size=8, num_sink_tokens=3
    )
    assert config.num_parameters(16) == 16 * 4 * (2 + 2 + 1 + 1)


def test_settings_that_contradict_each_other_fail_when_the_config_is_made():
    with pytest.raises(UserError, match=r"router.context.window_size=None goes with kind='causal'"):
        ContextConfig(kind="causal")
    with pytest.raises(UserError, match="num_null_experts=1 must be below top_k=1"):
        RouterConfig(top_k=1, num_null_experts=1, target_k=0.5)
    with pytest.raises(UserError, match="memory_length=0 must be at least 1 token"):
        RelativeAttentionConfig(num_heads=2, head_dim=4, memory_length=0)
    with pytest.raises(UserError, match="must be an integer of at least 2"):
        grown_config(tiny.model(), "copy", 1.5)  # type: ignore[arg-type]
    dense = tiny.model().pattern[1]
    every_third = dataclasses.replace(dense, depth=MixtureOfDepthsConfig(capacity=0.5))
    with pytest.raises(UserError, match=r"num_layers=4 must be .* a multiple of the pattern's 3"):
        tiny.model(pattern=(dense, dense, every_third), num_layers=4)


def test_hoppers_attention_has_no_float32():
    with pytest.raises(UserError, match="window_attention='mosaic' computes in bfloat16 only"):
        ExecutionConfig(window_attention="mosaic")
    assert ExecutionConfig(window_attention="mosaic", compute_dtype="bfloat16")


def float_settings(config, path=()):
    """Places of all float settings that have a value."""
    if isinstance(config, float):
        yield path
    elif isinstance(config, tuple):
        for i, item in enumerate(config):
            yield from float_settings(item, (*path, i))
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from float_settings(getattr(config, field.name), (*path, field.name))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["v2_nano", "v31_dynamic_nano", "v31_nano_student", "deepseek_v3"])
def test_every_float_setting_is_finite(name, value):
    """Or nothing could read the run again."""
    run = known_runs()[name]()
    paths = list(float_settings(run))
    assert ("optimizer", "clip_norm") in paths
    assert len(paths) > 15
    for path in paths:
        with pytest.raises(UserError, match=str(path[-1])):
            changed(run, path, value)


def test_gradients_may_be_left_unclipped():
    run = load_run("v31_nano", ["--optimizer.clip-norm", "None"])
    assert run.optimizer.clip_norm is None
    assert from_json(RunConfig, to_json(run), where="config.json") == run
    with pytest.raises(UserError, match="clip_norm=inf must be a finite number"):
        load_run("v31_nano", ["--optimizer.clip-norm", "inf"])


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_seeds_beyond_63_bits_are_refused(seed):
    with pytest.raises(UserError, match=f"seed={seed} must be at least 0 and below 2"):
        load_run("v31_nano", ["--seed", str(seed)])
    assert load_run("v31_nano", ["--seed", str(2**63 - 1)]).seed == 2**63 - 1
