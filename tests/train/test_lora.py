"""Training adapters, and experts alone: what is not trained stays bit for bit, checkpoints hold the
adapters alone, and a run of them is a source like any other.
"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.base import InitConfig
from configs.checks import UserError
from configs.optimizer import OptimizerConfig
from configs.tuning import LoRAConfig
from infer.adapters import export_adapter, with_adapter
from infer.convert import Conversion, convert
from infer.logits import full_logits
from infer.run_weights import load_model
from infer.sources import open_source
from model.adapters import adapted_matrices
from model.transformer import Transformer
from tests import tiny
from train.loop import fit, mesh_of
from train.metrics import read_lines
from train.state import make_train_setup

TOKENS = list(range(3, 30))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained run, its variables, and a run of adapters on it, unbroken and once gone on with
    from its checkpoint after four steps."""
    tmp_path = tmp_path_factory.mktemp("lora")
    tiny.write_sources(tmp_path)
    attention = tiny.attention(window_size=None, num_sink_tokens=0)
    layer = LayerSpec(attention=attention, ffn=tiny.moe(num_shared_experts=0))  # Mixtral's
    run = tiny.run(tmp_path, model=tiny.model(pattern=(layer,), num_layers=1))
    fit(run, tmp_path / "base")
    variables = load_model(run, tmp_path / "base")[1]
    lora = adapting(run, tmp_path)
    fit(lora, tmp_path / "unbroken", variables=variables)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "lora")
    shutil.rmtree(tmp_path / "lora" / "checkpoints" / "6")
    fit(lora, tmp_path / "lora", variables=variables)
    return run, tmp_path, variables


def adapting(run, tmp_path, **changes):
    optimizer = OptimizerConfig(
        learning_rate=1e-2, warmup_steps=1, schedule="wsd", decay_fraction=0.1
    )
    init = InitConfig(source=str(tmp_path / "base"))
    lora = LoRAConfig(rank=2, **changes)
    return dataclasses.replace(run, name="lora", init=init, lora=lora, optimizer=optimizer)


@pytest.mark.slow
def test_only_adapters_have_a_state_and_lie_in_the_checkpoints(base):
    run, tmp_path, _ = base
    lora = adapting(run, tmp_path)
    state = make_train_setup(lora, mesh_of(lora)).abstract_state
    count = sum(x.size for x in jax.tree.leaves(state.adapters))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * count < 0.5 * sum(x.size for x in jax.tree.leaves(state.params))
    assert set(state.to_dict()) == {"step", "opt_state", "adapters"}
    matrices = adapted_matrices(Transformer(run.model), ("experts",))
    assert {path[-1] for path in matrices} == {"gate_up", "down"}


@pytest.mark.slow
def test_a_run_of_adapters_is_a_source_and_resumes_bit_for_bit(base):
    run, tmp_path, _ = base
    lora = adapting(run, tmp_path)
    logged = [read_lines(tmp_path / n / "metrics.jsonl", ("loss",)) for n in ("lora", "unbroken")]
    assert [x["loss"] for x in logged[0]] == [x["loss"] for x in logged[1]]
    assert logged[1][-1]["loss"] < logged[1][0]["loss"]
    model, plain = open_source(str(tmp_path / "base")).load()
    source = open_source(str(tmp_path / "lora"))
    _, adapted = source.load()
    before, after = (full_logits(model, x, TOKENS) for x in (plain, adapted))
    assert np.abs(after - before).max() > 0.1
    assert source.tokenizer().tokenizer.get_vocab_size() > 0
    with pytest.raises(UserError, match=r"needed: train it by scripts.train"):
        fit(dataclasses.replace(lora, steps=7), tmp_path / "lora")


def test_pefts_form_of_a_runs_adapters_on_its_base_is_the_run(base):
    _, tmp_path, _ = base
    source = open_source(str(tmp_path / "lora"))
    convert(source, tmp_path / "peft", Conversion(to="peft"))
    model, adapted = source.load()
    again = with_adapter(open_source(str(tmp_path / "base")), tmp_path / "peft")
    expected = full_logits(model, adapted, TOKENS)
    np.testing.assert_allclose(full_logits(model, again.load()[1], TOKENS), expected, atol=1e-5)
    with pytest.raises(UserError, match="was trained without adapters"):
        export_adapter(tmp_path / "base", tmp_path / "none")
    with pytest.raises(UserError, match="is no run, and --to peft"):
        convert(again, tmp_path / "none", Conversion(to="peft"))


def test_experts_alone_leave_all_others_bit_for_bit(base):
    run, tmp_path, variables = base
    init = InitConfig(source=str(tmp_path / "base"))
    experts = dataclasses.replace(run, name="experts", init=init, trained="experts", steps=3)
    fit(experts, tmp_path / "experts", variables=variables)
    trained = load_model(experts, tmp_path / "experts")[1]
    for (path, old), new in zip(
        jax.tree.leaves_with_path(variables["params"]),
        jax.tree.leaves(trained["params"]),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        is_experts = name.endswith(("['moe']['gate_up']", "['moe']['down']"))
        assert bool((old == new).all()) != is_experts, name
    muon = OptimizerConfig(kind="muon", momentum=0.9, learning_rate=1e-3, warmup_steps=1)
    setup = make_train_setup(dataclasses.replace(experts, optimizer=muon), mesh_of(run))
    params = setup.abstract_state.params
    moe = params["periods"]["layer_0"]["moe"]
    kept = [x.size for x in jax.tree.leaves(setup.abstract_state.opt_state) if x.ndim > 1]
    assert sum(kept) == moe["gate_up"].size + moe["down"].size


def test_what_does_not_go_together_is_refused(base):
    run, tmp_path, _ = base
    lora = adapting(run, tmp_path)
    muon = OptimizerConfig(kind="muon", momentum=0.9, learning_rate=1e-3, warmup_steps=1)
    for changes, sentence in (
        ({"init": InitConfig()}, "lora needs init.source"),
        ({"optimizer": muon}, "lora goes with optimizer.kind='adamw', got 'muon'"),
        ({"trained": "experts"}, "has no effect with lora"),
    ):
        with pytest.raises(UserError, match=sentence):
            dataclasses.replace(lora, **changes)
    with pytest.raises(UserError, match=r"must be some of"):
        LoRAConfig(targets=("router",))  # type: ignore[arg-type]
    dense = tiny.model(pattern=tiny.model().pattern[1:])
    with pytest.raises(UserError, match="has 'experts', and the model has none"):
        adapted_matrices(Transformer(dense), ("experts",))
    with pytest.raises(UserError, match="needs a model with experts"):
        dataclasses.replace(run, model=dense, trained="experts")
