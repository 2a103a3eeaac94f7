"""Fine-tuning on chats: the loss of packed rows is that of each chat alone, and what a run begins
with stays with it.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoint.provenance import read_provenance
from configs.base import InitConfig, UpcycleConfig
from configs.checks import UserError
from configs.models import of_source
from data.chats import loss_mask, render_chat
from data.packed_chats import PackedChats
from data.pipeline import prepare_corpus
from data.tokenizers.public_tokenizer import PublicTokenizer
from infer.convert import Conversion, convert
from infer.sources import open_source
from model.transformer import Transformer, output_weights, training_pass
from scripts.named_runs import with_source_model
from tests import tiny
from tests.data.test_chats import CHATML, chat_data
from tests.probes import drawn
from tests.train import record_sft
from train.fine_tuning import answer_loss, fine_tune
from train.loop import fit, mesh_of, to_devices
from train.metrics import read_lines
from train.state import init_state, make_train_setup
from train.step import make_train_step


def chat_run(tmp_path: Path, **changes):
    return tiny.run(
        tmp_path,
        data=chat_data(tmp_path),
        **{"steps": 4, "model": tiny.model(vocab_size=330), **changes},
    )


def batch_of(run) -> dict[str, np.ndarray]:
    rows = PackedChats(prepare_corpus(run.data, 330).training(), run.data.seq_len)
    made = [rows[i] for i in range(len(rows) - run.batch_size, len(rows))]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def alone(model, variables, file, chat: int, seq_len: int) -> tuple[float, int]:
    """The summed loss of one chat by itself, target by target, and how many those are."""
    begin, end = file.bounds(chat)
    end = min(end, begin + seq_len + 1)
    ids, mask = np.asarray(file.tokens[begin:end], np.int32), file.loss_mask[begin:end]
    tokens = np.zeros((1, seq_len), np.int32)
    positions = np.full((1, seq_len), -1, np.int32)
    tokens[0, : len(ids) - 1], positions[0, : len(ids) - 1] = ids[:-1], np.arange(len(ids) - 1)
    hidden, _, _ = training_pass(model, variables, tokens, positions, None, None)
    w_DV = np.asarray(output_weights(model, variables), np.float64)
    logits = np.asarray(hidden[0], np.float64) @ w_DV
    total, count = 0.0, 0
    for i in range(1, len(ids)):
        if mask[i]:
            row = logits[i - 1]
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[i]]
            count += 1
    return total, count


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.thinned(2)
def test_the_loss_is_the_mean_over_the_assistants_tokens_of_each_chat_alone(tmp_path, accumulation):
    run = chat_run(tmp_path, accumulation=accumulation)
    batch, mesh = batch_of(run), mesh_of(run)
    model = Transformer(run.model, run.execution)
    variables = drawn(run.model)
    file = prepare_corpus(run.data, 330).training()
    rows = PackedChats(file, run.data.seq_len).rows[-run.batch_size :]
    counts = [(batch["targets"][i : i + 2] >= 0).sum() for i in range(0, 8, 2)]
    assert len(set(counts)) > 1  # micro-batches of unequal numbers of targets
    sums = [alone(model, variables, file, i, run.data.seq_len) for row in rows for i in row]
    expected = sum(x for x, _ in sums) / sum(n for _, n in sums)
    setup = make_train_setup(run, mesh)
    with jax.set_mesh(mesh):
        state = init_state(setup, 0, variables)
        _, metrics = make_train_step(run, setup)(state, to_devices(batch, mesh))
    np.testing.assert_allclose(float(metrics["cross_entropy"]), expected, rtol=2e-5)


@pytest.mark.slow
def test_gradients_do_not_depend_on_how_unequal_targets_lie_in_micro_batches(tmp_path):
    """Dense, so that no router judges a part: to 1e-5 of the largest, sums in another order."""
    dense = tiny.model(vocab_size=330, pattern=tiny.model().pattern[1:], num_layers=1)
    first, moments = chat_run(tmp_path, model=dense), []
    for accumulation in (1, 4):
        run = dataclasses.replace(first, accumulation=accumulation)
        batch, mesh = batch_of(run), mesh_of(run)
        counts = (batch["targets"] >= 0).reshape(4, -1).sum(axis=1)
        assert len(set(counts.tolist())) > 1
        setup = make_train_setup(run, mesh)
        with jax.set_mesh(mesh):
            state = init_state(setup, 0)
            state, _ = make_train_step(run, setup)(state, to_devices(batch, mesh))
        moments.append([np.asarray(x) for x in jax.tree.leaves(state.opt_state) if x.ndim])
    for whole, parts in zip(*moments, strict=True):
        np.testing.assert_allclose(parts, whole, atol=1e-5 * np.abs(whole).max() + 1e-12)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run on chats, and one that was trained on from it by its folder's name alone."""
    tmp_path = tmp_path_factory.mktemp("tuned")
    run = chat_run(tmp_path)
    fine_tune(run, tmp_path / "first")
    init = InitConfig(source=str(tmp_path / "first"), architecture="source")
    data = dataclasses.replace(run.data, tokenizer=None, directory=str(tmp_path / "corpus2"))
    second = dataclasses.replace(run, model=of_source(), init=init, data=data, name="second")
    return tmp_path, run, second


def test_a_run_on_chats_keeps_the_template_and_the_ends_and_so_do_its_exports(tuned):
    tmp_path, _, _ = tuned
    known = read_provenance(tmp_path / "first")
    assert known is not None
    assert known.objective == "fine_tuning"
    lines = read_lines(tmp_path / "first" / "metrics.jsonl", ("accuracy", "loss"))
    assert all(0 <= line["accuracy"] <= 1 for line in lines)
    source = open_source(str(tmp_path / "first"))
    convert(source, tmp_path / "exported", Conversion(to="orbax"))
    for name in ("first", "exported"):
        kept = open_source(str(tmp_path / name)).tokenizer()
        assert kept.chat_template == CHATML
        assert (kept.bos_id, kept.eos_ids, kept.add_bos) == (0, {2}, False)


def test_the_architecture_is_the_sources(tuned):
    _, run, second = tuned
    resolved = with_source_model(second)
    assert resolved.model == run.model
    assert resolved.data.tokenizer == second.init.source
    assert resolved.init.architecture == "run"
    assert prepare_corpus(resolved.data, 330).training().sidecar.has_loss_mask
    with pytest.raises(UserError, match=r"takes the model from init.source, and this run states"):
        with_source_model(dataclasses.replace(second, model=run.model))
    with pytest.raises(UserError, match=r"needs init.source, whose model it is"):
        InitConfig(architecture="source")
    drawn = dataclasses.replace(second, init=dataclasses.replace(second.init, weights="drawn"))
    shaped = with_source_model(drawn)
    assert shaped.model == resolved.model
    assert shaped.data == resolved.data
    assert shaped.init == InitConfig()
    with pytest.raises(UserError, match=r"takes nothing from init.source but its architecture"):
        InitConfig(source="first", weights="drawn")
    assert with_source_model(run) is run
    for wrong, sentence in (
        ({"drop": 0.5}, r"set init\.upcycle, or leave init\.drop out"),
        (
            {"drop": 0.5, "weights": "drawn", "upcycle": UpcycleConfig(num_experts=4)},
            "init.drop=0.5 has no effect",
        ),
        (
            {"architecture": "run", "upcycle": UpcycleConfig(num_experts=4)},
            "init.upcycle puts experts into",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            InitConfig(**{"source": "first", "architecture": "source"} | wrong)
    with pytest.raises(UserError, match=r"has top_k=1 and every=1 without effect"):
        UpcycleConfig(top_k=1)


def test_another_objective_in_the_folder_and_text_are_refused(tuned):
    tmp_path, run, _ = tuned
    with pytest.raises(UserError, match=r"objective was fine_tuning .*, now next_token"):
        fit(run, tmp_path / "first")
    with pytest.raises(UserError, match=r"has data.form='text', fine-tuning needs chats"):
        fine_tune(tiny.run(tmp_path), tmp_path / "other")


def test_masks_and_loss_are_trls():
    """Its collator's labels are our masks, and of the same logits the loss is the same: the mean
    over the assistant's tokens of chats of unequal lengths. Float32 both: 1e-6."""
    recorded = json.loads((Path(__file__).parent / "recorded_sft.json").read_text())
    words = Tokenizer(models.WordLevel(record_sft.WORDS, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<pad>", "<end>"])
    tokenizer = PublicTokenizer(words, None, frozenset({1}), False, record_sft.TEMPLATE)
    labels_of = {}
    for chat in record_sft.CHATS:
        rendered = render_chat(record_sft.messages(chat), tokenizer, chat)
        encoding = words.encode(rendered.text)
        mask = loss_mask(encoding.ids, encoding.offsets, rendered.spans, tokenizer.eos_ids)
        labels_of[tuple(encoding.ids)] = np.where(mask, encoding.ids, -100)
    labels_BL = np.array(recorded["labels"])
    padded = zip(recorded["input_ids"], recorded["attention_mask"], labels_BL, strict=True)
    for ids, is_text, labels in padded:
        length = sum(is_text)
        np.testing.assert_array_equal(labels_of.pop(tuple(ids[:length])), labels[:length])
        assert (labels[length:] == -100).all()
    assert not labels_of
    targets_BL = np.where(labels_BL == -100, -1, labels_BL)[:, 1:]
    logits_BLV = np.array(recorded["logits"], np.float32)[:, :-1]
    loss, _ = answer_loss(jnp.asarray(logits_BLV), {"targets": jnp.asarray(targets_BL)})
    assert float(loss) / (targets_BL >= 0).sum() == pytest.approx(recorded["loss"], rel=1e-6)
