"""Distillation end to end by other ways: rows of the student's own, matched layers, several
teachers, caches made ahead."""

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import DistillConfig
from configs.checks import UserError
from configs.data import MixturePart
from configs.distill import LossTerm, OnPolicyConfig, TeacherShare
from data.packing import packed_rows
from data.pipeline import prepare_corpus
from infer.run_weights import load_model
from model.transformer import Transformer, hidden_states, output_weights
from scripts.teachers import cache_ahead, make_writer
from tests import tiny
from tests.probes import drawn
from tests.train.test_distill import loader, student, tokenizer_of
from tests.train.test_loop import losses
from train.distill import distill, distill_from_cache, make_chunk_loss
from train.loop import fit
from train.losses import chunked_loss
from train.matching import make_matching, matching_loss
from train.metrics import read_lines
from train.offline_cache import OfflineCache
from train.teachers import TeacherSource, teacher_shares


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("ways")
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path, steps=20, name="teacher")  # as test_distill's: one program
    fit(run, tmp_path / "teacher")
    return run, tmp_path


def source(teacher) -> TeacherSource:
    run, tmp_path = teacher
    return TeacherSource(run.model, loader(run, tmp_path / "teacher"), tokenizer_of(run))


@pytest.mark.parametrize("replay", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_student_marked_on_what_it_wrote(teacher, replay, tmp_path):
    """Half of the rows; the run that was stopped writes and learns the same, bit for bit."""
    settings = OnPolicyConfig(share=0.5, prompt_length=20, replay=replay)
    run = student(teacher, divergence="reverse_kl", kl_weight=1.0, on_policy=settings)
    run = dataclasses.replace(run, steps=4)
    writer = make_writer(run)
    distill(run, tmp_path / "whole", *source(teacher), make_writer=writer)
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert all(line["routing_changed"] == 0 for line in lines)  # one program's choices
    assert all(np.isfinite(line["loss"]) for line in lines)
    if not replay:
        return
    first, load, tokenizer = source(teacher)

    def stopping(mesh):
        signal.raise_signal(signal.SIGINT)
        return load(mesh)

    halves = tmp_path / "halves"
    assert distill(run, halves, first, stopping, tokenizer, make_writer=writer).steps < 4
    distill(run, halves, *source(teacher), make_writer=writer)
    assert losses(halves) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_layers_that_are_matched_come_nearer(teacher, tmp_path):
    """With a schedule of terms; the projections go on when the run does."""
    terms = (
        LossTerm(kind="hidden", weight=2.0),
        LossTerm(kind="attention", layers=(0,)),
        LossTerm(kind="forward_kl", weight=0.0, final_weight=1.0),
    )
    run = student(teacher, losses=terms)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, d_model=24))
    distill(run, tmp_path / "whole", *source(teacher))
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert lines[-1]["hidden"] < lines[0]["hidden"]
    assert lines[-1]["attention"] < lines[0]["attention"]
    first = 2 * lines[0]["hidden"] + lines[0]["attention"]  # kl has no weight yet
    assert lines[0]["loss"] == pytest.approx(first, rel=1e-5)
    last = 2 * lines[-1]["hidden"] + lines[-1]["attention"] + lines[-1]["kl"]
    assert lines[-1]["loss"] == pytest.approx(last, rel=1e-5)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "6")
    distill(run, tmp_path / "half", *source(teacher))
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def test_matched_layers_of_the_teacher_itself_are_0():
    config = DistillConfig(losses=(LossTerm(kind="hidden"), LossTerm(kind="attention")))
    model = tiny.model()
    matching = make_matching(config, model, model)
    rng = np.random.RandomState(0)
    layers = {f"layer_{i}": _sown(rng, model) for i in range(len(model.pattern))}
    sown = {"periods": layers}
    names = {"hidden": "hidden", "attention": "attended"}
    teacher = {
        f"{kind}_{i}": layers[f"layer_{i}"][names[kind]][0]
        for kind in names
        for i in range(len(model.pattern))
    }
    projections = matching.init(0)
    targets = np.array([[1, 2, -1]])

    @jax.jit
    def loss(projections, sown, teacher):
        return matching_loss(matching, [1, 1], projections, sown, model, teacher, targets)[0]

    whole = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, gradients = whole(projections, sown, teacher)
    assert value == 0
    assert max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(gradients)) == 0
    teacher["hidden_0"] = 3 * teacher["hidden_0"]  # a third of what it should be: (2/3)^2
    assert loss(projections, sown, teacher) == pytest.approx(2 * (2 / 3) ** 2 / 2, rel=1e-5)
    config = DistillConfig(losses=(LossTerm(kind="hidden", layers=(5,)),))
    with pytest.raises(UserError, match=r"layers=\(5,\) must be below the 2 layers"):
        make_matching(config, model, model)


def _sown(rng, model):
    return {k: jnp.float32(rng.randn(1, 1, 3, model.d_model)) for k in ("hidden", "attended")}


def test_packed_documents_are_taught_as_if_each_were_alone():
    """Two documents in a row, and each in a row of its own: the same sums, whatever the loss."""
    teacher = pupil = Transformer(tiny.model(pattern=tiny.model().pattern[:1], num_layers=1))
    weights = [drawn(teacher.config, 1), drawn(pupil.config, 2)]
    terms = tuple(
        LossTerm(kind=kind) for kind in ("forward_kl", "reverse_kl", "jsd", "cross_entropy")
    )
    chunk_loss = make_chunk_loss(DistillConfig(losses=terms))

    @jax.jit
    def sums(tokens, positions, targets):
        (hidden, _), (teacher_hidden, _) = (
            hidden_states(m, v, tokens, positions)
            for m, v in zip((pupil, teacher), reversed(weights), strict=True)
        )
        inputs = {"targets": targets, "teacher_hidden": (teacher_hidden,)}
        shared = {"teacher_output": (output_weights(teacher, weights[0]),)}
        w = output_weights(pupil, weights[1])
        return chunked_loss(chunk_loss, hidden, w, inputs, shared, 2)

    rng = np.random.RandomState(3)
    documents = [rng.randint(0, 300, 7), rng.randint(0, 300, 9)]

    def rows(*lists):
        found = [np.full((2, 16), fill) for fill in (0, -1, -1)]
        for row, chosen in enumerate(lists):
            place = 0
            for document in chosen:
                own = slice(place, place + len(document) - 1)
                found[0][row, own], found[2][row, own] = document[:-1], document[1:]
                found[1][row, own] = np.arange(len(document) - 1)
                place += len(document) - 1
        return found

    packed, apart = sums(*rows(documents, [])), sums(*rows(*([d] for d in documents)))
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(apart), strict=True):
        assert a == pytest.approx(float(b), rel=1e-5)  # float32 sums in another order


@pytest.mark.slow
def test_teachers_of_one_mind_are_one_teacher(teacher, tmp_path):
    run = dataclasses.replace(student(teacher, top_k=8), steps=3)
    distill(run, tmp_path / "one", *source(teacher))
    config = DistillConfig(top_k=8, teachers=(TeacherShare(weight=3.0), TeacherShare()))
    both = dataclasses.replace(run, distill=config)
    distill(both, tmp_path / "two", *source(teacher), source(teacher))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    with pytest.raises(UserError, match="2 entries for 1 teachers"):
        distill(both, tmp_path / "three", *source(teacher))
    named = dataclasses.replace(config, teachers=(TeacherShare(sources=("x",)), TeacherShare()))
    with pytest.raises(UserError, match=r"name x, which data\.mixture has not"):
        distill(
            dataclasses.replace(run, distill=named),
            tmp_path / "four",
            *source(teacher),
            source(teacher),
        )


def test_teachers_of_a_source_each(tmp_path):
    """Rows of one source are the first teacher's alone; the second shares the others with it."""
    sources = [str(tiny.write_sources(tmp_path / name, word=name)) for name in ("prose", "code")]
    parts = tuple(MixturePart(source=source, weight=1.0) for source in sources)
    base = tiny.run(tmp_path).data
    data = dataclasses.replace(base, source="stdlib", mixture=parts)
    shares = (TeacherShare(weight=3.0), TeacherShare(sources=(sources[1],)))
    run = tiny.run(tmp_path, data=data, distill=DistillConfig(teachers=shares))
    file = prepare_corpus(run.data, run.model.vocab_size).training()
    of_rows = teacher_shares(run, file, 2)
    assert of_rows is not None
    seen = dict.fromkeys(sources, 0)
    for part in file.sidecar.parts:
        first = -(-part.first_token // 32)
        rows = jnp.arange(first, (part.first_token + part.num_tokens - 1) // 32)
        expected = [[1, 0]] if part.name == sources[0] else [[0.75, 0.25]]
        np.testing.assert_allclose(of_rows(rows), np.repeat(expected, len(rows), axis=0))
        seen[part.name] += len(rows)
    assert min(seen.values()) > 3
    lonely = (TeacherShare(sources=(sources[0],)), TeacherShare(sources=(sources[0],)))
    run = dataclasses.replace(run, distill=DistillConfig(teachers=lonely))
    with pytest.raises(UserError, match=r"leave the source .*code.* without a teacher"):
        teacher_shares(run, file, 2)


@pytest.fixture(scope="module")
def cached(teacher):
    """A cache of a student's rows, 16 tokens each, in shards of three rows."""
    run, directory = student(teacher, top_k=16), teacher[1] / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.offline_cache.SHARD_BYTES", 3 * 32 * (16 * 4 + 2))
        cache_ahead(run, directory, [source(teacher)])
        yield run, directory


def test_a_cache_holds_what_the_teacher_says(teacher, cached):
    """To what float16 rounds; of fewer tokens the others are in the tail."""
    run, directory = cached
    corpus, rows = prepare_corpus(run.data, run.model.vocab_size), np.load(directory / "rows.npy")
    less = dataclasses.replace(run.distill, top_k=4, cache_directory=str(directory))
    seen = [
        OfflineCache(directory, x, corpus).read(rows[5:6])
        for x in (run, dataclasses.replace(run, distill=less))
    ]
    model, variables = load_model(teacher[0], teacher[1] / "teacher")
    row = packed_rows(corpus.training(), 32)[int(rows[5])]
    look = jax.jit(hidden_states, static_argnums=0)
    hidden, _ = look(model, variables, row["tokens"][None], row["positions"][None])
    p = np.asarray(jax.nn.softmax(hidden @ output_weights(model, variables)))
    for x, kept in zip(seen, (16, 4), strict=True):
        best = np.take_along_axis(p, x["teacher_ids"], axis=-1)
        np.testing.assert_allclose(best, -np.sort(-p, axis=-1)[..., :kept], rtol=1e-6)
        np.testing.assert_allclose(np.exp(x["teacher_log_probs"]), best, rtol=4e-3)
        np.testing.assert_allclose(np.exp(x["teacher_tail"]), 1 - best.sum(-1), rtol=4e-3)
        total = np.exp(x["teacher_log_probs"]).sum(-1) + np.exp(x["teacher_tail"])
        np.testing.assert_allclose(total, 1, rtol=1e-5)


@pytest.mark.slow
def test_students_of_a_cache_learn_as_beside_the_teacher(teacher, cached, tmp_path):
    """With fewer tokens than it keeps; float16 rounds what is read."""
    _, directory = cached
    run = student(teacher, top_k=4)
    distill(run, tmp_path / "live", *source(teacher))
    config = dataclasses.replace(run.distill, cache_directory=str(directory))
    read = dataclasses.replace(run, distill=config, name="reader")
    distill_from_cache(read, tmp_path / "read")
    np.testing.assert_allclose(losses(tmp_path / "read"), losses(tmp_path / "live"), rtol=2e-3)


def test_a_cache_that_was_half_made_goes_on(teacher, cached, capsys):
    run, directory = cached
    shards = sorted(directory.glob("shard_*.bin"))
    before = [path.read_bytes() for path in shards]
    times = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    with pytest.raises(UserError, match=r"half made, shard_00001.bin is missing"):
        OfflineCache(directory, run, corpus)
    cache_ahead(run, directory, [source(teacher)])
    assert [path.read_bytes() for path in shards] == before
    changed = [a != b.stat().st_mtime_ns for a, b in zip(times, shards, strict=True)]
    assert changed == [i == 1 for i in range(len(shards))]
    assert "MB before compression" in capsys.readouterr().out


def test_a_cache_of_something_else_is_refused(teacher, cached, tmp_path):
    run, directory = cached
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    config = dataclasses.replace(run.distill, top_k=17)
    with pytest.raises(UserError, match=r"keeps 16 tokens, distill.top_k=17"):
        OfflineCache(directory, dataclasses.replace(run, distill=config), corpus)
    config = dataclasses.replace(run.distill, temperature=2.0)
    with pytest.raises(UserError, match=r"distill.temperature 1.0 there, 2.0 here"):
        OfflineCache(directory, dataclasses.replace(run, distill=config), corpus)
    longer = dataclasses.replace(run, batch_size=16, seed=5)
    with pytest.raises(UserError, match=r"lacks \d+ rows that student will read"):
        OfflineCache(directory, longer, corpus)
    with pytest.raises(UserError, match="a cache of another teacher, of other data"):
        cache_ahead(longer, directory, [source(teacher)])
    with pytest.raises(UserError, match="there is no cache in"):
        OfflineCache(tmp_path / "none", run, corpus)
    shutil.copytree(directory, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "shard_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    damaged = OfflineCache(tmp_path / "damaged", run, corpus)
    with pytest.raises(UserError, match=r"shard_00000\.bin is damaged"):
        damaged.read(np.load(directory / "rows.npy")[2:3])
