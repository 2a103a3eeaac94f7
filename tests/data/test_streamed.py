"""Corpora of records and mixtures: the same tokens in one go or in pieces, exact shares, and
nothing lost where a line is broken.
"""

import functools
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.base import DataConfig
from configs.checks import UserError
from configs.data import LaterWeight, MixturePart, MixturePhase
from data import encoding, records, streamed
from data.inventory import inventory
from data.packing import PackedRows
from data.pipeline import Corpus, batches, prepare_corpus
from data.tokenizers.tokenizer import plain
from tests import tiny

TEXTS = [f"the {i}th text of a corpus, " * (1 + i % 7) + "and its end ☕" for i in range(300)]


def write(path: Path, texts=TEXTS, field="text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def config(tmp_path: Path, **changes) -> DataConfig:
    own = {"source": str(tmp_path / "a.jsonl"), "directory": str(tmp_path / "corpus")}
    return DataConfig(**{"seq_len": 32, "holdout_fraction": 0.2, **own, **changes})


def texts_of(corpus: Corpus) -> dict[str, str]:
    """Each document's text by its name, decoded."""
    decode = corpus.tokenizer().decode
    return {
        name: decode(ids[1:].tolist())
        for file in (corpus.training(), corpus.held_out())
        for name, ids, _ in file.documents()
    }


def test_records_are_documents_named_by_file_and_line(tmp_path):
    write(tmp_path / "a.jsonl")
    corpus = prepare_corpus(config(tmp_path), 400)
    assert texts_of(corpus) == {f"a.jsonl:{i + 1}": text for i, text in enumerate(TEXTS)}
    for file in (corpus.training(), corpus.held_out()):
        sizes = [size for _, _, size in file.documents()]
        assert sizes == [len(texts_of(corpus)[n].encode()) for n in file.sidecar.names]
        assert sum(sizes) == file.sidecar.num_bytes
        assert (np.asarray(file.tokens)[list(file.sidecar.starts)] == 0).all()
    assert 30 < len(corpus.held_out().sidecar.names) < 90


def test_empty_records_are_left_out_and_counted(tmp_path):
    write(tmp_path / "a.jsonl", ["", *TEXTS, None])
    run = tiny.run(tmp_path, data=config(tmp_path), model=tiny.model(vocab_size=400))
    sentence, *_ = inventory(prepare_corpus(run.data, 400), run)
    assert ": 300 documents, 1 left out (1 empty: 2 records), " in sentence


def test_a_folder_of_several_forms_and_of_datasets(tmp_path):
    whole = prepare_corpus(config(tmp_path, source=str(write(tmp_path / "a.jsonl"))), 400)
    packed = tmp_path / "f"
    packed.mkdir()
    for name, part in (("1.jsonl.gz", TEXTS[:100]), ("2.jsonl.gz", TEXTS[100:])):
        lines = "".join(json.dumps({"content": text}) + "\n" for text in part)
        (packed / name).write_bytes(gzip.compress(lines.encode()))
    data = config(tmp_path, source=str(packed), suffix=".jsonl.gz", text_field="content")
    other = prepare_corpus(replace(data, directory=str(tmp_path / "c2")), 400)
    assert sorted(texts_of(other).values()) == sorted(texts_of(whole).values())
    assert len([n for n in texts_of(other) if n.startswith("2.jsonl.gz:")]) == 200


def write_dataset(folder: Path, texts: list[str]) -> None:
    """As Dataset.save_to_disk of Hugging Face's datasets."""
    arrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    folder.mkdir(parents=True)
    table = arrow.table({"text": texts, "label": list(range(len(texts)))})
    with ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_indices_files": None}))


def test_datasets_on_disk_with_a_split_of_their_own(tmp_path):
    write_dataset(tmp_path / "d" / "train", TEXTS[:200])
    write_dataset(tmp_path / "d" / "test", TEXTS[200:])
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    own = {"directory": str(tmp_path / "corpus"), "seq_len": 32}
    with pytest.raises(UserError, match=r"is a dictionary of datasets \(train, test\): name one"):
        prepare_corpus(DataConfig(source=str(tmp_path / "d"), **own), 400)
    own["held_out"] = str(tmp_path / "d" / "test")
    corpus = prepare_corpus(DataConfig(source=str(tmp_path / "d" / "train"), **own), 400)
    held_out = [corpus.tokenizer().decode(x[1:]) for _, x, _ in corpus.held_out().documents()]
    assert held_out == TEXTS[200:]
    assert len(corpus.training().sidecar.names) == 200


def test_tokens_of_others_become_a_corpus_of_their_tokenizer(tmp_path):
    made = prepare_corpus(config(tmp_path, source=str(write(tmp_path / "a.jsonl"))), 400)
    np.save(tmp_path / "t.npy", np.asarray(made.training().tokens, np.int32))
    data = config(tmp_path, source=str(tmp_path / "t.npy"), directory=str(tmp_path / "c2"))
    with pytest.raises(UserError, match="has tokens, and no tokenizer is named"):
        prepare_corpus(data, 400)
    named = replace(data, tokenizer=str(made.tokenizer_path))
    again = prepare_corpus(named, 400)
    expected = [texts_of(made)[name] for name in made.training().sidecar.names]
    assert sorted(texts_of(again).values()) == sorted(expected)
    sizes = sum(f.sidecar.num_bytes for f in (again.training(), again.held_out()))
    assert sizes == made.training().sidecar.num_bytes
    np.save(tmp_path / "t.npy", np.array([0, 5, 40_000]))
    with pytest.raises(UserError, match=r"t.npy document 1 has the token 40000, the tokenizer"):
        prepare_corpus(replace(named, directory=str(tmp_path / "c3")), 400)


@pytest.fixture
def in_small_steps(monkeypatch):
    monkeypatch.setattr(streamed, "SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(encoding.in_batches, "__defaults__", (200,))


def files_of(corpus: Corpus) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in corpus.directory.iterdir()
        if path.name != "corpus.json"
    }


def test_a_broken_line_is_named_and_what_was_made_by_then_is_kept(
    tmp_path, in_small_steps, capsys, monkeypatch
):
    """Mended, the corpus is the one that an unbroken build makes; read files are not read again."""
    whole = tmp_path / "whole"
    write(whole / "1.jsonl", TEXTS[:120])
    write(whole / "2.jsonl", TEXTS[120:])
    tokenizer = prepare_corpus(
        config(tmp_path, source=str(whole / "1.jsonl"), directory=str(tmp_path / "t")), 400
    ).tokenizer_path
    own = {"suffix": ".jsonl", "tokenizer": str(tokenizer)}
    expected = prepare_corpus(config(tmp_path, source=str(whole), **own), 400)

    source = tmp_path / "broken"
    write(source / "1.jsonl", TEXTS[:120])
    good = write(source / "2.jsonl", TEXTS[120:]).read_text()
    (source / "2.jsonl").write_text(good.replace('{"text": "the 200th', '{"text: "the 200th'))
    data = config(tmp_path, source=str(source), directory=str(tmp_path / "c2"), **own)
    for _ in range(2):
        with pytest.raises(UserError, match=r"2\.jsonl line 81 is no JSON"):
            prepare_corpus(data, 400)
        assert not Path(data.directory).exists()
    assert "going on with the corpus after" in capsys.readouterr().out
    (source / "2.jsonl").write_text(good)

    read = []
    monkeypatch.setattr(records, "_object", spy(records._object, read))
    made = prepare_corpus(data, 400)
    found = {name: x.replace(b"/broken", b"/whole") for name, x in files_of(made).items()}
    assert found == files_of(expected)
    assert {path.name for path in read} == {"2.jsonl"}
    assert len(read) == 180


def spy(function, calls):
    def called(path, *arguments):
        calls.append(path)
        return function(path, *arguments)

    return called


@pytest.mark.parametrize("stop_after", [1, 7, 40])
def test_a_build_that_was_stopped_goes_on_to_the_same_corpus(
    tmp_path, in_small_steps, monkeypatch, stop_after
):
    write(tmp_path / "a.jsonl")
    expected = prepare_corpus(config(tmp_path), 400)
    data = config(tmp_path, directory=str(tmp_path / "c2"))
    counts = iter(range(stop_after))
    note = streamed._Work.note

    def stopping(work):
        note(work)
        if next(counts, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(streamed._Work, "note", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(data, 400)
    building = tmp_path / "c2.building" / "train.bin"
    before = building.stat().st_size
    with building.open("ab") as file:
        file.write(b"what was not noted any more")
    assert files_of(prepare_corpus(data, 400)) == files_of(expected)
    assert 0 < before < (expected.directory / "train.bin").stat().st_size


def test_a_source_that_has_changed_is_read_again(tmp_path, in_small_steps, capsys):
    path = write(tmp_path / "a.jsonl", [*TEXTS[:200]])
    broken = path.read_text() + "{\n"
    path.write_text(broken)
    with pytest.raises(UserError, match="line 201 is no JSON"):
        prepare_corpus(config(tmp_path), 400)
    write(path, [text.upper() for text in TEXTS])
    corpus = prepare_corpus(config(tmp_path), 400)
    assert texts_of(corpus)["a.jsonl:1"] == TEXTS[0].upper()
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    run = tiny.run(tmp_path, data=config(tmp_path), model=tiny.model(vocab_size=400))
    *_, told = inventory(prepare_corpus(run.data, 400), run)
    assert "has changed since (files 1 of another size)" in told


def test_another_field_is_another_corpus(tmp_path):
    write(tmp_path / "a.jsonl")
    prepare_corpus(config(tmp_path), 400)
    with pytest.raises(UserError, match="was made with text_field=None, this run asks for 'body'"):
        prepare_corpus(config(tmp_path, text_field="body"), 400)


def test_batches_of_texts_are_encoded_as_each_alone(tmp_path):
    corpus = prepare_corpus(config(tmp_path, source=str(write(tmp_path / "a.jsonl"))), 400)
    tokenizer = plain(corpus.tokenizer())
    for name, ids, _ in corpus.training().documents():
        text = TEXTS[int(name.split(":")[1]) - 1]
        assert ids[1:].tolist() == tokenizer.encode(text).ids


WEIGHTS = (0.62, 0.31, 0.07)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("mixture")
    tiny.write_sources(tmp_path, files=30)
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", [text.upper() for text in TEXTS[:90]], field="content")
    sources = (
        MixturePart(source=str(tmp_path / "a.jsonl"), weight=WEIGHTS[0]),
        MixturePart(source=str(tmp_path / "sources"), weight=WEIGHTS[1]),
        MixturePart(source=str(tmp_path / "b.jsonl"), weight=WEIGHTS[2], text_field="content"),
    )
    data = DataConfig(
        mixture=sources, directory=str(tmp_path / "m"), seq_len=32, holdout_fraction=0.2
    )
    return data, prepare_corpus(data, 400)


def mixed_batches(corpus: Corpus, batch_size=8, **options):
    phases = options.pop("phases", (MixturePhase(0, WEIGHTS),))
    own = {"seq_len": 32, "batch_size": batch_size, "seed": 3, "phases": phases}
    return batches(corpus.training(), **own, **options)


def part_of_rows(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """The source of each row, found token by token: of all its tokens and targets."""
    ends = np.cumsum([part.num_tokens for part in corpus.training().sidecar.parts])
    first, last = (np.searchsorted(ends, x, side="right") for x in (rows * 32, rows * 32 + 32))
    np.testing.assert_array_equal(first, last)
    return first


def test_shares_are_the_weights_over_ten_thousand_rows_and_over_any_part_of_them(mixture):
    _, corpus = mixture
    iterator = mixed_batches(corpus, batch_size=500)
    rows = np.concatenate([next(iterator)["row"] for _ in range(20)])
    parts = part_of_rows(corpus, rows)
    shares = np.bincount(parts, minlength=3) / len(rows)
    np.testing.assert_allclose(shares, WEIGHTS, rtol=0.01)
    for begin in range(0, 10_000, 1000):
        count = np.bincount(parts[begin : begin + 1000], minlength=3)
        np.testing.assert_allclose(count, 1000 * np.array(WEIGHTS), atol=6)


def test_each_source_is_read_whole_before_any_row_comes_again(mixture):
    _, corpus = mixture
    iterator = mixed_batches(corpus, batch_size=100)
    rows = np.concatenate([next(iterator)["row"] for _ in range(60)])
    parts = part_of_rows(corpus, rows)
    for i, part in enumerate(PackedRows(corpus.training(), 32).parts()):
        own = rows[parts == i][: 2 * len(part)]
        assert len(set(own[: len(part)])) == min(len(part), len(own))
        second = own[len(part) :]
        assert len(set(second)) == len(second)
        assert not len(second) or not np.array_equal(second, own[: len(second)])


def later(*weights: tuple[int, float]) -> tuple[LaterWeight, ...]:
    return tuple(LaterWeight(step=step, weight=weight) for step, weight in weights)


def with_later_weights(data: DataConfig) -> DataConfig:
    """The first source fades, the second comes after 20 steps, the last one ends after 40."""
    changes = [
        {"later": later((40, 0.1))},
        {"weight": 0.0, "later": later((20, 0.3))},
        {"later": later((40, 0.0))},
    ]
    parts = [replace(part, **own) for part, own in zip(data.mixture, changes, strict=True)]
    return replace(data, mixture=tuple(parts))


def test_weights_that_change_are_the_shares_of_the_rows_after_their_step(mixture):
    data, corpus = mixture
    phases = with_later_weights(data).phases
    assert [phase.first_step for phase in phases] == [0, 20, 40]
    iterator = mixed_batches(corpus, batch_size=100, phases=phases)
    rows = np.concatenate([next(iterator)["row"] for _ in range(60)])
    parts = part_of_rows(corpus, rows)
    for first, weights in {0: (0.62, 0, 0.07), 20: (0.62, 0.3, 0.07), 40: (0.1, 0.3, 0)}.items():
        counts = np.bincount(parts[100 * first : 100 * first + 2000], minlength=3)
        np.testing.assert_allclose(counts, 2000 * np.array(weights) / sum(weights), atol=6)
    for i, part in enumerate(PackedRows(corpus.training(), 32).parts()):
        own = rows[parts == i]
        assert len(own) > len(part)
        for begin in range(0, len(own), len(part)):  # no epoch has a row twice
            epoch = own[begin : begin + len(part)]
            assert len(set(epoch)) == len(epoch)


@pytest.mark.parametrize("is_changing", [False, True])
def test_a_mixture_resumes_with_the_same_batches_on_any_number_of_processes(mixture, is_changing):
    data, corpus = mixture
    phases = (with_later_weights(data) if is_changing else data).phases
    mixed = functools.partial(mixed_batches, phases=phases)
    one = mixed(corpus)
    before = [next(one) for _ in range(25)]
    halves = [mixed(corpus, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.set_state(one.get_state())
    fresh = mixed(corpus)
    fresh.set_state(one.get_state())
    for _ in range(20):
        whole, again, parts = next(one), next(fresh), [next(half) for half in halves]
        for name in whole:
            np.testing.assert_array_equal(again[name], whole[name])
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])
    begun = mixed(corpus)
    for batch in before:
        np.testing.assert_array_equal(next(begun)["tokens"], batch["tokens"])


def test_weights_are_no_part_of_the_corpus_and_are_told(mixture):
    data, corpus = mixture
    parts = tuple(replace(part, weight=1.0) for part in data.mixture)
    other = replace(data, mixture=parts)
    assert prepare_corpus(other, 400) == corpus
    run = tiny.run(corpus.directory, data=other, model=tiny.model(vocab_size=400), steps=30)
    _, *shares = inventory(corpus, run)
    assert len(shares) == 3
    assert all(sentence.startswith("  33.3% ") for sentence in shares)
    rows = len(PackedRows(corpus.training(), 32).parts()[0])
    assert shares[0].endswith(f"{rows:,} rows, {80 / rows:.2g} epochs")

    changing = with_later_weights(data)
    assert prepare_corpus(changing, 400) == corpus
    run = replace(run, data=changing)
    _, *shares = inventory(corpus, run)
    assert shares[0].startswith("  89.9%, 62.6% after 20 steps, 25.0% after 40 steps /")
    assert shares[1].startswith("  0.0%, 30.3% after 20 steps, 75.0% after 40 steps /")
    of_b = 8 * (20 * 0.07 / 0.69 + 10 * 0.07 / 0.99)  # of 30 steps
    rows = len(PackedRows(corpus.training(), 32).parts()[2])
    assert shares[2].endswith(f" {rows:,} rows, {of_b / rows:.2g} epochs")


def test_a_source_of_a_mixture_that_is_all_held_out_is_named(tmp_path):
    names = {"a.jsonl": TEXTS, "one.jsonl": TEXTS[:1]}
    sources = [write(tmp_path / name, texts) for name, texts in names.items()]
    data = DataConfig(
        mixture=tuple(MixturePart(source=str(path), weight=1.0) for path in sources),
        directory=str(tmp_path / "corpus"),
        seq_len=32,
        holdout_fraction=0.8,
    )
    corpus = prepare_corpus(data, 400)
    assert corpus.training().sidecar.parts[1].num_tokens == 0
    with pytest.raises(UserError, match=r"one.jsonl of data.mixture has no document in train.bin"):
        batches(corpus.training(), seq_len=32, batch_size=8, seed=0, phases=data.phases)


def test_settings_of_a_mixture_that_contradict_each_other():
    part = MixturePart(source="a.jsonl", weight=1)
    for weight, following in ((0, ()), (1, later((3, -1)))):
        with pytest.raises(UserError, match="must be greater than 0"):
            MixturePart(source="a.jsonl", weight=weight, later=following)
    with pytest.raises(UserError, match=r"from the steps \[9, 3\] on: name each step once"):
        replace(part, later=later((9, 1), (3, 2)))
    with pytest.raises(UserError, match="must be at least 1, the weight to begin with"):
        later((0, 1))
    with pytest.raises(UserError, match=r"all weights of data.mixture are 0 from step 7 on"):
        DataConfig(mixture=(replace(part, later=later((7, 0))),))
    with pytest.raises(UserError, match=r"data.source='x' has no effect beside data.mixture"):
        DataConfig(source="x", mixture=(part,))
    with pytest.raises(UserError, match=r"data.mixture names a.jsonl more than once"):
        DataConfig(mixture=(part, part))
    with pytest.raises(UserError, match="a mixture's rows are shuffled"):
        DataConfig(mixture=(part,), order="streams")
    with pytest.raises(UserError, match=r"holdout_fraction=0.1 has no effect beside data.held_out"):
        DataConfig(source="a.jsonl", held_out="b.jsonl", holdout_fraction=0.1)
