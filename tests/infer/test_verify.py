"""Comparisons of next tokens: measures against their formulas, and what they are made on."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from infer import verify
from infer.convert import Conversion, convert, rounding
from infer.sources import open_source
from infer.verify import TEXT, Comparison, Unreadable, choose_probe, compare
from scripts import convert as verb
from tests.checkpoint.cases import write_case
from tests.checkpoint.tiny_folder import byte_level, sentencepiece, write_llama, write_tokenizer


def test_divergence_and_agreement_by_their_formulas():
    """KL(p || q) = sum p log (p / q) in nats, in the order expected, found."""
    p = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    q = np.array([[0.2, 0.4, 0.4], [0.1, 0.8, 0.1]])
    found = compare("x", np.log(p) + 3, np.log(q) - 7, is_independent=True, divergence=1.0)
    assert found.divergence == pytest.approx(0.5 * (p[0] * np.log(p[0] / q[0])).sum(), rel=1e-12)
    back = compare("x", np.log(q), np.log(p), is_independent=True, divergence=1.0)
    assert back.divergence == pytest.approx(0.5 * (q[0] * np.log(q[0] / p[0])).sum(), rel=1e-12)
    assert found.agreement == 0.5
    assert found.difference == pytest.approx(np.abs(np.log(p) - np.log(q) + 10).max())


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    found = compare("x", logits, logits, is_independent=True)
    assert (found.divergence, found.agreement, found.is_good) == (0.0, 1.0, True)


@pytest.mark.parametrize(("divergence", "is_good"), [(None, False), (1e-3, True), (1e-6, False)])
def test_a_form_that_rounds_is_judged_by_its_divergence(divergence: float | None, is_good: bool):
    logits = np.random.default_rng(0).standard_normal((20, 50)) * 3
    other = logits + 0.02 * np.random.default_rng(1).standard_normal(logits.shape)
    found = compare("x", logits, other, is_independent=False, divergence=divergence)
    assert 1e-5 < found.divergence < 1e-3
    assert found.is_good == is_good


def test_models_with_a_tokenizer_are_compared_on_text(tmp_path: Path):
    write_llama(tmp_path)
    write_tokenizer(tmp_path, byte_level())
    probe = choose_probe(open_source(str(tmp_path)))
    assert probe.what == "64 tokens of a text"  # the model's context
    assert TEXT.startswith(open_source(str(tmp_path)).tokenizer().decode(probe.tokens))


def test_models_without_one_are_compared_on_random_tokens(tmp_path: Path):
    write_llama(tmp_path)
    assert choose_probe(open_source(str(tmp_path))).what == "48 random tokens (no tokenizer)"
    (tmp_path / "tokenizer.json").write_text("{}")
    probe = choose_probe(open_source(str(tmp_path)))
    assert "random tokens" in probe.what
    assert "is no tokenizer" in probe.what


def test_a_tokenizer_larger_than_the_model(tmp_path: Path):
    write_llama(tmp_path, vocab_size=60)
    write_tokenizer(tmp_path, byte_level())
    assert "more tokens than the model" in choose_probe(open_source(str(tmp_path))).what


ROUNDING = [
    (Conversion(to="gguf"), "F16"),
    (Conversion(to="gguf", quantization="Q8_0"), "Q8_0"),
    (Conversion(to="huggingface"), None),
    (Conversion(to="huggingface", dtype="float32"), None),
    (Conversion(to="huggingface", dtype="float16"), "float16"),
    (Conversion(to="orbax"), None),
    (Conversion(to="orbax", dtype="bfloat16"), "bfloat16"),
]


@pytest.mark.parametrize(("conversion", "kind"), ROUNDING)
def test_what_a_conversion_rounds_to(conversion: Conversion, kind: str | None, tmp_path: Path):
    write_llama(tmp_path)
    assert rounding(open_source(str(tmp_path)), conversion) == kind


def test_a_source_in_small_floats_is_rounded_by_default(tmp_path: Path):
    """Its values times their scales are not bfloat16's, which is what it is written in."""
    write_case("deepseek_v3", tmp_path / "it")
    there = Conversion(to="huggingface", dtype="float8")
    convert(open_source(str(tmp_path / "it")), tmp_path / "packed", there)
    source = open_source(str(tmp_path / "packed"))
    assert rounding(source, Conversion(to="huggingface")) == "bfloat16"
    assert rounding(source, Conversion(to="huggingface", dtype="float32")) is None


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_the_verb_shows_divergence_and_agreement(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "has_transformers", lambda side: False)
    write_llama(tmp_path / "it")
    write_tokenizer(tmp_path / "it", sentencepiece())
    arguments = [str(tmp_path / "it"), str(tmp_path / "out.gguf"), "--to", "gguf", "--verify"]
    assert verb.main(arguments) == 0
    text = shown(capsys)
    assert "next tokens on 64 tokens of a text:" in text
    assert "good: " in text
    assert "nats (up to 1.0e-04), same top token 100.0%" in text
    assert "pip install -c constraints.txt" in text


def test_a_gguf_that_transformers_can_not_read_is_told(tmp_path: Path, capsys, monkeypatch):
    """It reads some architectures' only: the rest is compared all the same."""
    monkeypatch.setattr(verify, "has_transformers", lambda side: True)
    write_llama(tmp_path / "it")

    def peer(path: Path, tokens: list[int]) -> np.ndarray:
        if path.suffix == ".gguf":
            raise verify.UserError(f"transformers can't read {path}: not supported yet")
        source = open_source(str(path))
        return verify.full_logits(*source.load(), tokens)

    monkeypatch.setattr(verify, "transformers_logits", peer)
    arguments = [str(tmp_path / "it"), str(tmp_path / "out.gguf"), "--to", "gguf", "--verify"]
    assert verb.main(arguments) == 0
    text = shown(capsys)
    assert "not compared: " in text
    assert "not supported yet" in text
    assert "not verified" not in text
    source, target = open_source(arguments[0]), open_source(arguments[1])
    made = list(verify.verify(source, target, choose_probe(source), divergence=1e-4))
    assert [type(found) for found in made] == [Comparison, Comparison, Unreadable]


def test_a_folder_that_transformers_can_not_read_fails(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(verify, "has_transformers", lambda side: True)

    def peer(path: Path, tokens: list[int]) -> np.ndarray:
        raise verify.UserError(f"transformers can't read {path}")

    monkeypatch.setattr(verify, "transformers_logits", peer)
    write_llama(tmp_path / "it")
    with pytest.raises(verify.UserError, match="transformers can't read"):
        verb.main([str(tmp_path / "it"), str(tmp_path / "out"), "--verify"])


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is missing: pip install -c constraints.txt '.[parity]'",
)


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_transformers_reads_the_gguf_as_we_do(quantization: str, tmp_path: Path, capsys):
    write_llama(tmp_path / "it")
    write_tokenizer(tmp_path / "it", byte_level())
    arguments = [str(tmp_path / "it"), str(tmp_path / "out.gguf"), "--to", "gguf", "--verify"]
    assert verb.main([*arguments, "--quantization", quantization]) == 0
    assert shown(capsys).count("and transformers on it: KL") == 2


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": LLAMA3 | {"rope_theta": 5e5}, "max_position_embeddings": 128},
    ],
)
def test_what_transformers_leaves_out_of_a_gguf_is_told(changes, tmp_path: Path, capsys):
    """It passes over rotary scaling (5.24): its logits are of another model."""
    write_llama(tmp_path / "it", **changes)
    arguments = [str(tmp_path / "it"), str(tmp_path / "out.gguf"), "--to", "gguf", "--verify"]
    assert verb.main(arguments) == 0
    text = shown(capsys)
    assert text.count("and transformers on it: KL") == 1
    assert "it reads no rotary scaling from this file" in text
