"""Damaged small files, of every kind that a verb reads: one sentence names file and cure."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.compile_checks import run as compile_checks
from benchmarks.gpu import report as gpu_report
from checkpoint.huggingface import open_checkpoint
from checkpoint.model_folder import read_model_config
from checkpoint.provenance import Provenance, read_provenance
from checkpoint.run_corpus import open_run_corpus
from checkpoint.run_directory import open_run_dir, read_run
from configs.base import DistillConfig
from configs.checks import UserError
from configs.serialization import to_json
from data.packing import PackedRows
from data.pipeline import Corpus, prepare_corpus
from data.tokenizers.public_tokenizer import read_public_tokenizer
from evals.expert_domains import read_domains, read_preference
from evals.results import read_results, write_results
from kernels import backend
from model.transformer import Transformer
from scripts.score import read_tokens
from tests import tiny
from tests.checkpoint.cases import write_case
from tests.evals import tiny_results
from train.distill import Teacher, TopKCache
from train.metrics import MetricsLog
from train.report import write_report

LINE = {
    "step": 1,
    "loss": 2.0,
    "cross_entropy": 2.0,
    "tokens_per_second": 9.0,
    "validation_loss": 2.0,
}
LABELS = {
    "domains": ["low", "high"],
    "threshold": 0.0,
    "layers": [
        {
            "layer": "layer_0",
            "period": 0,
            "experts": {"low": [0], "high": [1]},
            "npmi": [[0.5, -0.5, *[0.0] * 6], [-0.5, 0.5, *[0.0] * 6]],
        }
    ],
}
"""As earlier versions wrote them: of weights that nobody knows."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Every file as its writer leaves it, by its path; nothing is trained."""
    at = tmp_path_factory.mktemp("whole")
    tiny.write_sources(at)
    run = tiny.run(at)
    corpus = prepare_corpus(run.data, 300)
    (at / "run").mkdir()
    open_run_dir(run, at / "run", Provenance(corpus=corpus.fingerprints()), corpus)
    (at / "run" / "expert_domains.json").write_text(json.dumps(LABELS))
    write_results(at / "run" / "evals.json", tiny_results.tree())
    (at / "run" / "metrics.jsonl").write_text(2 * (json.dumps(LINE) + "\n"))
    cache(at)
    (at / "model").mkdir()
    (at / "model" / "model.json").write_text(to_json(run.model))
    (at / "domains.json").write_text('{"low": ["a"], "high": ["b"]}')
    (at / "tokens.json").write_text("[1, 2, 3]")
    (at / "report.json").write_text('{"kernels": {"card": "a card"}}')
    (at / "measured.json").write_text('{"90": {"swiglu": {"case": {"ours": 1.5}}}}')
    (at / "compiled.json").write_text('{"tools": {}, "cases": {}}')
    write_case("llama", at / "public")
    corpus.tokenizer().save(str(at / "public" / "tokenizer.json"))
    (at / "public" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (at / "public" / "special_tokens_map.json").write_text('{"bos_token": "<|endoftext|>"}')
    (at / "public" / "generation_config.json").write_text('{"eos_token_id": 0}')
    return {str(p.relative_to(at)): p.read_bytes() for p in at.rglob("*") if p.is_file()}


@pytest.fixture
def at(whole, tmp_path, monkeypatch) -> Path:
    """A copy of them all, to be damaged."""
    for name, content in whole.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(backend, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(compile_checks, "COMMITTED", tmp_path / "compiled.json")
    return tmp_path


def cache(at: Path) -> TopKCache:
    run = tiny.run(at)
    rows = PackedRows(Corpus(at / "corpus").training(), run.data.seq_len)
    teacher = Teacher(model=Transformer(run.model), variables={}, step=3)  # pyright: ignore
    return TopKCache(
        at / "run" / "teacher_cache", rows, DistillConfig(top_k=2, cache=True), teacher
    )


def read_corpus(at: Path):
    corpus = Corpus(at / "corpus")
    return corpus.left_out(), corpus.training(), corpus.held_out()


def resume_log(at: Path):
    MetricsLog(at / "run" / "metrics.jsonl", resume_step=2).close()
    write_report(at / "run")


READERS = {
    "run/config.json": lambda at: read_run(at / "run"),
    "run/provenance.json": lambda at: read_provenance(at / "run"),
    "run/tokenizer.json": lambda at: open_run_corpus(tiny.run(at), at / "run"),
    "run/held_out.json": lambda at: open_run_corpus(tiny.run(at), at / "run"),
    "run/token_counts.npy": lambda at: open_run_corpus(tiny.run(at), at / "run"),
    "run/metrics.jsonl": resume_log,
    "run/expert_domains.json": lambda at: read_preference(at / "run", "low"),
    "run/evals.json": lambda at: read_results(at / "run" / "evals.json"),
    "run/teacher_cache/cache.json": cache,
    "corpus/corpus.json": read_corpus,
    "corpus/train.json": read_corpus,
    "model/model.json": lambda at: read_model_config(at / "model"),
    "domains.json": lambda at: read_domains(at / "domains.json"),
    "tokens.json": lambda at: read_tokens(at / "tokens.json"),
    "report.json": gpu_report.read,
    "measured.json": lambda at: backend.measured.__wrapped__(),
    "compiled.json": lambda at: compile_checks.read_committed(),
    "public/config.json": lambda at: open_checkpoint(at / "public"),
    "public/tokenizer.json": lambda at: read_public_tokenizer(at / "public"),
    "public/tokenizer_config.json": lambda at: read_public_tokenizer(at / "public"),
    "public/special_tokens_map.json": lambda at: read_public_tokenizer(at / "public"),
    "public/generation_config.json": lambda at: read_public_tokenizer(at / "public"),
}


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": truncated,
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b'[{"a": 1}]\n',
    "a list of lists": lambda content: b"[[1, 2]]\n",
    "a text": lambda content: b'"text"\n',
    "null": lambda content: b"null\n",
    "other keys": lambda content: b'{"unknown": 1}\n',
    "too deep": lambda content: b"[" * 100_000 + b"\n" + content,
    "a folder": None,
}

HARMLESS = {
    "run/metrics.jsonl": {"empty", "truncated"},  # a log that begins; a last line cut by a kill
    "public/tokenizer_config.json": {"other keys"},
    "public/special_tokens_map.json": {"other keys"},
    "public/generation_config.json": {"other keys"},
}
"""What is no damage to its reader."""


def damage(path: Path, kind: str) -> None:
    if kind == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(DAMAGES[kind](path.read_bytes()))


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name, at):
    READERS[name](at)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_a_sentence(name, kind, at):
    damage(at / name, kind)
    if kind in HARMLESS.get(name, ()):
        READERS[name](at)
        return
    with pytest.raises(UserError) as refused:
        READERS[name](at)
    sentence = str(refused.value)
    assert Path(name).parent.name in sentence
    assert "\n" not in sentence.strip()
    assert re.search("[:;] ", sentence)
