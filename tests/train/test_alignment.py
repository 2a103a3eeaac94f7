"""Other vocabularies: borders by a loop over bytes, one vocabulary as the plain divergence, chunks
against products of probabilities."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import DistillConfig
from configs.checks import UserError
from configs.distill import LossTerm
from data.tokenizers.tokenizer import end_of_text_id, train_tokenizer
from model.transformer import Transformer, hidden_states, init_variables, output_weights
from tests import tiny
from tests.train.test_distill import loader, tokenizer_of
from tests.train.test_divergences import kl, softmax
from train.alignment import EXACT, MERGED, NONE, Alignment, token_strings
from train.byte_distillation import aligned_view, byte_loss, make_byte_loss
from train.distill import distill
from train.loop import fit, mesh_of
from train.metrics import read_lines
from train.teachers import Teacher, TeacherSource

TEXTS = ["def total(first, second):\n    return first + second  # naïve café\n" * 5]
OTHERS = ["the first and the second were total strangers in a café of second rate\n" * 5]


@pytest.fixture(scope="module")
def tokenizers():
    return train_tokenizer(TEXTS, 280), train_tokenizer([*OTHERS, *TEXTS], 300)


def rows(tokenizer, text: str, length: int, cut: int = 0):
    """A document, another one behind it, and padding; the first without its first tokens."""
    end = end_of_text_id(tokenizer)
    ids = [[end, *tokenizer.encode(text).ids][cut:], [end, *tokenizer.encode(text[::-1]).ids]]
    flat = [i for document in ids for i in document][: length + 1]
    places = [i for document in ids for i in range(len(document))][:length]
    tokens, targets, positions = (np.full(length, x, np.int32) for x in (0, -1, -1))
    tokens[: len(flat) - 1], targets[: len(flat) - 1] = flat[:-1], flat[1:]
    positions[: len(flat) - 1] = places[: len(flat) - 1]
    return tokens, targets, positions


@pytest.mark.parametrize("cut", [0, 2])
def test_borders_are_where_both_have_read_the_same_bytes(tokenizers, cut):
    ours, theirs = tokenizers
    strings = [token_strings(t, "") for t in tokenizers]
    tokens, _, positions = rows(ours, "first total 'naïve' second", 40, cut)
    row = Alignment(ours, theirs, (280, 300)).align(tokens, positions, 160, 40)
    kinds = set()
    for t in np.flatnonzero(row.kind_L):
        u = row.place_L[t]
        kinds.add(int(row.kind_L[t]))
        begin, start = t - positions[t], u - row.positions_U[u]
        read = b"".join(strings[0][i] for i in tokens[begin : t + 1])
        assert read == b"".join(strings[1][i] for i in row.tokens_U[start : u + 1])
        if row.kind_L[t] == MERGED:
            group = np.flatnonzero(row.group_L == t)
            chunk = b"".join(strings[0][tokens[i + 1]] for i in group)
            their = b"".join(strings[1][i] for i in row.targets_U[u : row.end_L[t]])
            assert chunk == their
            assert len(group) > 1 or row.end_L[t] - u > 1
    assert kinds == {EXACT, MERGED}
    assert (row.kind_L[positions < 0] == NONE).all()


@pytest.mark.slow
def test_one_vocabulary_is_the_divergence_itself(tokenizers):
    """Every place with a target is a border, and the loss the KL of the whole vocabulary."""
    ours, _ = tokenizers
    config = tiny.model(vocab_size=280, pattern=tiny.model().pattern[1:], num_layers=1)
    model = Transformer(config)
    teacher = Teacher(model, jax.jit(init_variables, static_argnums=(0, 1))(model, 1), None)
    settings = DistillConfig(vocabulary="bytes", kl_weight=1.0, temperature=2.0)
    run = tiny.run(Path("x"), model=config, distill=settings, batch_size=2)
    made = [rows(ours, "first second total naïve", 32, cut) for cut in (0, 2)]
    tokens, targets, positions = (jnp.asarray(np.stack(x)) for x in zip(*made, strict=True))
    batch = {"tokens": tokens, "targets": targets, "positions": positions}
    with jax.set_mesh(mesh_of(run)):
        seen = aligned_view(run, teacher, (ours, ours), mesh_of(run))(batch)
        logits = jnp.asarray(np.random.RandomState(2).randn(2, 32, 280), jnp.float32)
        inputs = {k: v for k, v in seen.items() if k not in ("tokens", "positions", "shared")}
        loss, sums = make_byte_loss(settings)(logits, inputs, seen["shared"])
        look = jax.jit(hidden_states, static_argnums=0)
        states, _ = look(model, teacher.variables, tokens, positions)
        p = softmax(states @ output_weights(model, teacher.variables) / 2.0)
    expected = 4 * (kl(p, softmax(logits / 2.0)) * (np.asarray(targets) >= 0)).sum()
    assert sums["aligned"] == (targets >= 0).sum()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_chunks_and_what_one_vocabulary_lacks_are_the_equations():
    """One place whose chunk is two of the student's tokens, and one of the same token in both."""
    rng = np.random.RandomState(0)
    logits, teacher = rng.randn(1, 3, 6).astype(np.float32), rng.randn(1, 3, 5).astype(np.float32)
    shared = {
        "teacher_output": jnp.eye(5),
        "common": (np.array([0, 2, 4]), np.array([1, 0, 3])),
        "unmatched": (np.array([1, 3, 5]), np.array([2, 4])),
    }
    inputs = {
        "targets": np.array([[3, 5, 2]]),
        "teacher_hidden": teacher,
        "kind": np.array([[MERGED, NONE, EXACT]]),
        "group": np.array([[0, 0, 2]]),
        "teacher_chunk": np.log(np.float32([[0.3, 1 - 1e-6, 1 - 1e-6]])),
    }
    config = DistillConfig(vocabulary="bytes", losses=(LossTerm(kind="reverse_kl"),))
    made = jax.jit(lambda logits: byte_loss(logits, inputs, shared, config=config))
    loss, sums = made(jnp.asarray(logits))
    q, p = softmax(logits)[0], softmax(teacher)[0]
    chunk = np.array([q[0, 3] * q[1, 5], 1 - q[0, 3] * q[1, 5]])
    by_chunk = kl(chunk, np.array([0.3, 0.7]))
    bins = [
        np.append(x[ids], x[rest].sum())
        for x, ids, rest in ((q[2], [0, 2, 4], [1, 3, 5]), (p[2], [1, 0, 3], [2, 4]))
    ]
    assert sums["reverse_kl"] == pytest.approx(by_chunk + kl(*bins), rel=1e-5)
    distance = 0.0
    for place in (0, 2):
        ours = sorted(q[place, [1, 3, 5]], reverse=True)
        theirs = [*sorted(p[place, [2, 4]], reverse=True), 0.0]
        distance += sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert sums["unmatched"] == pytest.approx(distance, rel=1e-5)
    assert loss == pytest.approx(float(sums["reverse_kl"] + sums["unmatched"]), rel=1e-6)


@pytest.mark.slow
def test_a_teacher_with_another_vocabulary_teaches(tmp_path):
    tiny.write_sources(tmp_path / "theirs", word="result")
    theirs = tiny.run(tmp_path / "theirs", steps=20, name="teacher")
    theirs = dataclasses.replace(theirs, model=tiny.model(vocab_size=290))
    fit(theirs, tmp_path / "teacher")
    source = TeacherSource(theirs.model, loader(theirs, tmp_path / "teacher"), tokenizer_of(theirs))
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path, name="student", distill=DistillConfig())
    with pytest.raises(UserError, match=r"or set distill\.vocabulary='bytes'"):
        distill(run, tmp_path / "refused", *source)
    run = dataclasses.replace(run, steps=20, distill=DistillConfig(vocabulary="bytes", kl_weight=1))
    distill(run, tmp_path / "student", *source)
    lines = read_lines(tmp_path / "student" / "metrics.jsonl")
    assert lines[-1]["kl"] < 0.8 * lines[0]["kl"]
    assert min(line["aligned"] for line in lines) > 0.3
