"""Learning from preferences: the loss is the published one and TRL's, pairs stay together, and the
reference is the model that the run began with.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.provenance import read_provenance
from configs.base import InitConfig
from configs.checks import UserError
from configs.monitoring import ValidationConfig
from configs.tuning import LoRAConfig, PreferenceConfig
from data.chats import render_chat
from data.pipeline import batches, prepare_corpus
from data.preferences import COUNTED, REJECTED, PreferencePairs
from data.tokenizers.tokenizer_export import write_public_tokenizer
from model.transformer import Transformer, init_variables
from scripts.data import show_document
from tests import tiny
from tests.data.test_chats import chat, make_tokenizer, reference_mask
from tests.train.record_dpo import BETA, PAIRS, drawn
from train.fine_tuning import fine_tune_on_preferences
from train.loop import mesh_of
from train.metrics import read_lines
from train.preference import log_probs, preference_loss, row_log_probs
from train.state import init_state, make_train_setup
from train.step import make_train_step

QUESTION = "what is it?"


def pair(i: int) -> dict:
    """A record: the same question twice, with a first exchange in every third."""
    before = chat("hi", "the answer is 4") if i % 3 == 0 else []
    begin = [*before, {"role": "user", "content": f"{QUESTION} {i}"}]
    good, bad = f"the answer is {i}", "of what? " * (1 + i % 4)
    return {
        "chosen": [*begin, {"role": "assistant", "content": good}],
        "rejected": [*begin, {"role": "assistant", "content": bad}],
    }


def pair_run(tmp_path: Path, **changes):
    tmp_path.mkdir(parents=True, exist_ok=True)
    if not (tmp_path / "tokenizer").exists():
        (tmp_path / "tokenizer").mkdir()
        write_public_tokenizer(tmp_path / "tokenizer", make_tokenizer())
    records = "".join(json.dumps(pair(i)) + "\n" for i in range(24))
    (tmp_path / "pairs.jsonl").write_text(records)
    base = tiny.run(tmp_path)
    data = dataclasses.replace(
        base.data,
        source=str(tmp_path / "pairs.jsonl"),
        form="preference",
        tokenizer=str(tmp_path / "tokenizer"),
        directory=str(tmp_path / "pairs"),
        seq_len=64,
    )
    model = tiny.model(vocab_size=330)
    return dataclasses.replace(
        base,
        **{
            "data": data,
            "model": model,
            "steps": 4,
            "preference": PreferenceConfig(beta=BETA),
            "init": InitConfig(source=str(tmp_path / "base")),
            **changes,
        },
    )


def test_loss_rewards_and_gradient_are_trls():
    """Its rows are all chosen ones first; ours lie in pairs. Float32 both: 1e-6."""
    made, expected = drawn(), json.loads((Path(__file__).parent / "recorded_dpo.json").read_text())
    order = np.arange(2 * PAIRS).reshape(2, PAIRS).T.reshape(-1)
    targets_BL = jnp.asarray(np.where(made["counts"], made["targets"], -1)[order])
    identity_VV = jnp.eye(made["logits"].shape[-1])

    def loss_of(logits_BLV):
        both = (
            row_log_probs(x, identity_VV, targets_BL, 7)
            for x in (logits_BLV, jnp.asarray(made["reference"][order]))
        )
        loss, sums = preference_loss(*both, PreferenceConfig(beta=BETA))
        return loss / PAIRS, sums

    logits_BLV = jnp.asarray(made["logits"][order])
    (loss, sums), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(logits_BLV)
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-6)
    names = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
    }
    for name, theirs in names.items():
        assert float(sums[name]) / PAIRS == pytest.approx(expected["metrics"][theirs], rel=1e-5)
    np.testing.assert_allclose(gradient, np.array(expected["gradient"])[order], atol=1e-6)


def test_the_loss_is_the_published_equation():
    """Eq. 7 in numpy, with a long margin on either side."""
    log_probs_B = np.array([-3.0, -90.0, -40.0, -1.0, -2.0, -2.0])
    reference_B = np.array([-5.0, -4.0, -1.0, -50.0, -2.0, -2.0])
    ratios = (log_probs_B - reference_B).reshape(-1, 2)
    expected = np.logaddexp(0, -0.5 * (ratios[:, 0] - ratios[:, 1])).sum()
    both = (jnp.asarray(x, jnp.float32) for x in (log_probs_B, reference_B))
    loss, sums = preference_loss(*both, PreferenceConfig(beta=0.5))
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(sums["accuracy"]) == 1


def test_answers_alone_count_and_a_pair_is_one_document(tmp_path):
    run, tokenizer = pair_run(tmp_path), make_tokenizer()
    corpus = prepare_corpus(run.data, 330)
    found = {}
    for file in (corpus.training(), corpus.held_out()):
        for i, (name, ids, _) in enumerate(file.documents()):
            begin, end = file.bounds(i)
            assert file.loss_mask is not None
            found[int(name.rpartition(":")[2])] = ids, np.asarray(file.loss_mask[begin:end])
    assert len(found) == 24
    for number, (ids, mask) in found.items():
        record = pair(number - 1)
        for side, bit in (("chosen", 0), ("rejected", REJECTED)):
            text, _ = render_chat(record[side], tokenizer, "here")
            (encoding,) = tokenizer.encode_rendered([text])
            own = (mask & REJECTED) == bit
            assert ids[own].tolist() == encoding.ids
            expected = np.array(reference_mask(encoding.ids, tokenizer))
            ends = np.flatnonzero(np.array(encoding.ids) == 2)
            earlier = ends[1] + 1 if len(record[side]) > 2 else 0
            expected[:earlier] = 0  # the first exchange
            assert (mask[own] & COUNTED).tolist() == expected.tolist()
    shown = "".join(show_document(corpus.training(), corpus.tokenizer(), 0, in_colour=False))
    assert shown.count(f"{QUESTION}") == 2
    assert "\nchosen:\n" in shown
    assert "[the answer is" in shown.split("rejected:")[0]


def test_pairs_stay_together_in_any_order_on_any_number_of_processes(tmp_path):
    run = pair_run(tmp_path)
    file = prepare_corpus(run.data, 330).training()
    pairs = PreferencePairs(file, 64)
    settings = {"seq_len": 64, "batch_size": 8, "seed": 1}
    whole = batches(file, **settings)
    halves = [batches(file, **settings, process_index=i, process_count=2) for i in range(2)]
    seen = []
    for _ in range(4):
        batch = next(whole)
        parts = [next(half) for half in halves]
        np.testing.assert_array_equal(batch["row"], np.concatenate([x["row"] for x in parts]))
        assert batch["tokens"].shape == (8, 64)
        rows = batch["row"].reshape(-1, 2)
        assert (rows[:, 0] % 2 == 0).all()
        assert (rows[:, 1] == rows[:, 0] + 1).all()
        for row in range(8):
            own = pairs[int(batch["row"][row]) // 2]
            np.testing.assert_array_equal(batch["targets"][row], own["targets"][row % 2])
        seen += rows[:, 0].tolist()
    assert len(set(seen[: len(pairs)])) == min(len(pairs), 16)
    with pytest.raises(UserError, match="a pair is two of them: make it even"):
        batches(file, **{**settings, "batch_size": 6}, process_count=2)


@pytest.fixture(scope="module")
def preferred(tmp_path_factory):
    """A source, and a run of adapters that learned from pairs on it."""
    tmp_path = tmp_path_factory.mktemp("preferred")
    run = pair_run(tmp_path, validation=ValidationConfig(every=2, max_rows=6))
    variables = init_variables(Transformer(run.model, run.execution), 5)
    optimizer = dataclasses.replace(run.optimizer, learning_rate=5e-3, weight_decay=0.0)
    run = dataclasses.replace(run, lora=LoRAConfig(rank=2), optimizer=optimizer)
    fine_tune_on_preferences(run, tmp_path / "run", variables=variables)
    return run, tmp_path, variables


@pytest.mark.slow
def test_a_run_moves_towards_the_chosen_answers(preferred):
    run, tmp_path, variables = preferred
    columns = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl", columns)
    assert lines[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)  # the model is its reference
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert lines[-1]["accuracy"] > 0.7
    assert lines[-1]["margin"] > 0.1
    assert 0 < lines[-1]["validation_loss"] < lines[1]["validation_loss"] < np.log(2)
    known = read_provenance(tmp_path / "run")
    assert known is not None
    assert known.objective == "preference"
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    fine_tune_on_preferences(run, tmp_path / "again", variables=variables)
    again = read_lines(tmp_path / "again" / "metrics.jsonl", columns)
    assert [x["loss"] for x in again] == [x["loss"] for x in lines]
    assert [x.get("validation_loss") for x in again] == [x.get("validation_loss") for x in lines]


@pytest.mark.slow
def test_all_weights_are_measured_against_what_they_were(preferred):
    """Three steps of full weights in two micro-batches: the rewards are those of numpy's sums."""
    run, _, variables = preferred
    full = dataclasses.replace(run, lora=None, accumulation=2)
    mesh = mesh_of(full)
    setup = make_train_setup(full, mesh)
    file = prepare_corpus(run.data, 330).training()
    batch = {k: jnp.asarray(x) for k, x in next(iter(batches_of(file))).items()}
    step = make_train_step(full, setup)
    with jax.set_mesh(mesh):
        state = init_state(setup, 0, variables)
        for _ in range(3):
            before = state.variables_alone
            before = jax.tree.map(jnp.copy, before)
            state, metrics = step(state, batch)
        model = Transformer(full.model, full.execution)
        both = [np.asarray(log_probs(model, x, batch)) for x in (before, variables)]
    rewards = BETA * (both[0] - both[1]).reshape(-1, 2)
    assert rewards.std() > 0.01
    np.testing.assert_allclose(float(metrics["chosen_reward"]), rewards[:, 0].mean(), rtol=1e-3)
    margin = rewards[:, 0] - rewards[:, 1]
    np.testing.assert_allclose(float(metrics["loss"]), np.logaddexp(0, -margin).mean(), rtol=1e-4)


def batches_of(file):
    return batches(file, seq_len=64, batch_size=8, seed=0)


def test_what_is_no_pair_is_refused_with_its_line(tmp_path):
    run = pair_run(tmp_path)
    path = tmp_path / "pairs.jsonl"
    for broken, sentence in (
        (pair(0) | {"rejected": pair(0)["chosen"]}, "line 1 has the same chosen and rejected"),
        ({"chosen": "yes", "rejected": "no"}, "must begin with the same messages"),
        ({"chosen": pair(0)["chosen"]}, "line 1 has no field 'rejected'"),
        (pair(0) | {"rejected": 3}, "expected a list of messages or text"),
    ):
        path.write_text(json.dumps(broken) + "\n")
        shutil.rmtree(tmp_path / "pairs.building", ignore_errors=True)
        with pytest.raises(UserError, match=sentence):
            prepare_corpus(run.data, 330)
    with pytest.raises(UserError, match="goes with preference settings and only with them"):
        dataclasses.replace(run, preference=None)
    with pytest.raises(UserError, match="gives 1 rows per micro-batch, and a pair is two"):
        dataclasses.replace(run, accumulation=8)
    with pytest.raises(UserError, match="has no preference settings"):
        fine_tune_on_preferences(tiny.run(tmp_path), tmp_path / "other")


def test_text_beside_a_prompt_is_a_pair_too(tmp_path):
    run = pair_run(tmp_path)
    records = [{"q": QUESTION, "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    data = dataclasses.replace(run.data, text_field="q", directory=str(tmp_path / "texts"))
    file = prepare_corpus(data, 330).training()
    shown = "".join(show_document(file, make_tokenizer().tokenizer, 0, in_colour=False))
    assert shown.count(QUESTION) == 2
    assert "[no<|im_end|>]" in shown
