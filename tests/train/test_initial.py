"""Runs that begin with a trained model: as it is, upcycled, or refused in a sentence."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from checkpoint.model_folder import write_model_folder
from configs.architecture import LayerSpec
from configs.base import InitConfig, MeshConfig, UpcycleConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from configs.models import of_source
from configs.optimizer import OptimizerConfig
from data.pipeline import batches, prepare_corpus
from infer.sources import open_source
from model.transformer import Transformer, hidden_states, output_weights
from model.upcycle import upcycled_config
from scripts import sources
from scripts.named_runs import with_source_model
from scripts.sources import InitialWeights, initial_weights
from tests import tiny
from tests.probes import drawn
from train.initial import initial_variables
from train.loop import fit

LAYER = LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=48))
DENSE = tiny.model(pattern=(LAYER,))
ONE_STEP = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
UPCYCLED = upcycled_config(DENSE, num_experts=4, top_k=2)


def small(variables):
    """Weights near those of a model that has learnt: of a loss below that of the uniform guess."""
    return jax.tree.map(lambda x: x * 0.3 if x.ndim > 2 else x, variables)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dense model folder and the corpus of a run beside it."""
    tmp_path = tmp_path_factory.mktemp("initial")
    tiny.write_sources(tmp_path)
    longer = dataclasses.replace(DENSE, context_length=128)
    write_model_folder(tmp_path / "dense", longer, small(drawn(DENSE)))
    return tmp_path


def a_run(source, model, **changes):
    init = InitConfig(source=str(source / "dense"), drop=changes.pop("drop", 0.0))
    return tiny.run(source, model=model, init=init, **changes)


def test_a_model_folder_is_read_as_it_was_written(source):
    found = open_source(str(source / "dense"))
    config, (_, variables) = found.config, found.load()
    assert config.context_length == 128
    taken = initial_variables(a_run(source, DENSE), config, variables)
    for ours, theirs in zip(
        jax.tree.leaves(taken), jax.tree.leaves(small(drawn(DENSE))), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UserError, match="is no folder and no file"):
        open_source(str(source / "nowhere"))


def test_a_run_of_any_verb_begins_as_its_sources_own_function_in_experts(source):
    """The model is named by the source alone: init.upcycle."""
    named = InitConfig(
        source=str(source / "dense"),
        architecture="source",
        upcycle=UpcycleConfig(num_experts=4, top_k=2),
    )
    run = with_source_model(tiny.run(source, model=of_source(), init=named))
    assert run.model == dataclasses.replace(UPCYCLED, context_length=128)
    assert run.init == InitConfig(source=named.source)
    began = initial_variables(run, DENSE, small(drawn(DENSE)))
    tokens = np.arange(3, 19)[None]
    after, before = (
        hidden_states(Transformer(config), variables, tokens, np.arange(16)[None])[0]
        for config, variables in ((run.model, began), (DENSE, small(drawn(DENSE))))
    )
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.slow
def test_the_upcycled_run_begins_with_the_dense_models_loss_and_is_a_source_itself(source):
    """Trained on expert shards; the dense model's loss on the same batch is computed here."""
    run = a_run(source, UPCYCLED, mesh=MeshConfig(expert=2), optimizer=ONE_STEP, steps=1)
    run_dir = source / "upcycled"
    begin = initial_weights(run, run_dir)
    fit(run, run_dir, variables=begin.take(), initial=begin.origin)
    logged = json.loads((run_dir / "metrics.jsonl").read_text())["cross_entropy"]
    assert logged == pytest.approx(dense_loss(run), abs=1e-5)
    gone = dataclasses.replace(run, init=InitConfig(source="gone"))
    assert initial_weights(gone, run_dir) == InitialWeights()  # a resumed run needs no source
    trained = dataclasses.replace(run, init=InitConfig(source=str(run_dir)))
    moe = sources.initial_variables(trained)["params"]["periods"]["layer_0"]["moe"]
    assert (np.asarray(moe["down"][:, 0]) != np.asarray(moe["down"][:, 1])).any()


def dense_loss(run):
    """Mean -log p of the run's first batch under the dense model."""
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    rows = batches(corpus.training(), seq_len=32, batch_size=8, seed=run.seed)
    batch, model = next(rows), Transformer(DENSE)
    variables = small(drawn(DENSE))
    hidden_BLD, _ = hidden_states(model, variables, batch["tokens"], batch["positions"])
    scores = jax.nn.log_softmax(hidden_BLD @ output_weights(model, variables))
    return -float(np.take_along_axis(np.asarray(scores), batch["targets"][..., None], -1).mean())


@pytest.mark.parametrize(
    ("model", "drop", "sentence"),
    [
        (tiny.model(pattern=(LAYER,), d_model=40), 0.0, "d_model was 32, now 40"),
        (DENSE, 0.5, "init.drop=0.5 goes with upcycling"),
        (
            upcycled_config(tiny.model(pattern=(LAYER,), vocab_size=400), num_experts=4, top_k=2),
            0.0,
            "vocab_size was 300, now 400",
        ),
    ],
)
def test_what_is_no_beginning_is_refused(source, model, drop, sentence):
    run = a_run(source, model, drop=drop)
    with pytest.raises(UserError, match=sentence):
        initial_weights(run, source / "new")


def test_a_source_that_nobody_read_is_refused(source):
    """Verbs that begin another way must not leave it unread in silence."""
    with pytest.raises(UserError, match=r"is read by scripts\.train"):
        fit(a_run(source, DENSE), source / "unread")
    with pytest.raises(UserError, match=r"no effect without init\.source"):
        InitConfig(drop=0.5)
    with pytest.raises(UserError, match="began with random weights"):
        sources.initial_variables(tiny.run(source))
