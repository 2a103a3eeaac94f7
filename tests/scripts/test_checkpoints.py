"""Public checkpoints through the verbs: convert, score, generate and chat, as a user types them."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.checks import UserError
from scripts import convert, score
from tests.checkpoint.cases import write_case
from tests.scripts.test_scripts import run, start


@pytest.fixture
def llama(tmp_path):
    """A folder in Hugging Face form, transformers' logits beside it."""
    tokens, logits = write_case("llama", tmp_path / "llama")
    np.savez(tmp_path / "llama" / "logits.npz", tokens=tokens, logits=logits)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    return tmp_path


def logits_of(source: Path, tokens: Path, out: Path) -> np.ndarray:
    score.main([str(source), "--tokens-file", str(tokens), "--logits", str(out)])
    return np.load(out)


def test_a_checkpoint_goes_through_every_form_and_back(llama, capsys):
    expected = np.load(llama / "llama" / "logits.npz")["logits"]
    tokens, out = llama / "tokens.json", llama / "logits.npy"
    first = logits_of(llama / "llama", tokens, out)
    assert first.dtype == np.float32
    np.testing.assert_allclose(first, expected, atol=1e-4)

    ours, gguf, back = llama / "ours", llama / "llama.gguf", llama / "back"
    assert convert.main([str(llama / "llama"), str(ours), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "recorded logits" in shown
    assert "not verified" not in shown
    np.testing.assert_allclose(logits_of(ours, tokens, out), expected, atol=1e-4)

    convert.main([str(ours), str(gguf)])
    np.testing.assert_allclose(logits_of(gguf, tokens, out), expected, atol=2e-2)  # float16

    assert convert.main([str(ours), str(back), "--to", "huggingface", "--verify"]) == 0
    before = load_file(llama / "llama" / "model.safetensors")
    after = load_file(back / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)


def test_a_conversion_that_nothing_can_verify_says_so(llama, capsys, monkeypatch):
    monkeypatch.setattr("infer.verify.has_transformers", lambda side: False)
    (llama / "llama" / "logits.npz").unlink()
    assert convert.main([str(llama / "llama"), str(llama / "ours"), "--verify"]) == 0
    assert "not verified independently" in capsys.readouterr().out


def test_recorded_logits_of_another_model_fail_the_verification(llama, capsys):
    path = llama / "llama" / "logits.npz"
    tokens, logits = np.load(path)["tokens"], np.load(path)["logits"]
    np.savez(path, tokens=tokens, logits=logits + 0.01 * np.arange(128, dtype=np.float32))
    assert convert.main([str(llama / "llama"), str(llama / "ours"), "--verify"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


REFUSALS = [
    (["no/such/place", "x"], "no/such/place is no folder and no file"),
    (["{llama}", "{llama}", "--to", "huggingface"], "exists already"),
    (["{llama}", "x.gguf", "--to", "orbax"], "don't go together"),
    (["{llama}", "x", "--to", "gguf"], "ends in .gguf"),
    (["{llama}", "x", "--quantization", "Q8_0"], "is of a GGUF, not of orbax"),
    (["{llama}", "x", "--family", "llama"], "orbax holds any model"),
    (["{llama}", "x.gguf", "--to", "gguf", "--dtype", "bfloat16"], "a GGUF has a quantization"),
    (["{llama}", "x", "--to", "huggingface", "--family", "mixtral"], "no layer with it"),
    (["{llama}", "x", "--to", "huggingface", "--family", "bert"], "there are llama, mixtral"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS)
def test_a_conversion_that_can_not_be_meant_is_refused(arguments, sentence, llama, monkeypatch):
    monkeypatch.chdir(llama)
    with pytest.raises(UserError, match=sentence):
        convert.main([part.format(llama=llama / "llama") for part in arguments])
    assert {path.name for path in llama.iterdir()} == {"llama", "tokens.json"}


TOKENS = [
    ("[1, 2", "is not valid JSON"),
    ('{"tokens": [1]}', "expected a list: write the token ids there, as a JSON list"),
    ("[1, 2.5]", "1 is 2.5, expected int: write the token ids there, as a JSON list"),
    ("[]", "there are no tokens"),
    ("[1, 128]", r"vocabulary is \[0, 128\)"),
    (json.dumps([1] * 300), "exceed the model's context_length=256"),
]


@pytest.mark.parametrize(("text", "sentence"), TOKENS)
def test_tokens_that_are_none_are_refused(text, sentence, llama):
    (llama / "tokens.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        logits_of(llama / "llama", llama / "tokens.json", llama / "out.npy")
    assert not (llama / "out.npy").exists()


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_under_the_name_and_goes_on(tmp_path):
    """Killed at some shard; what is whole stays and is not written again."""
    write_case("llama", tmp_path / "llama")
    target = tmp_path / "many"
    arguments = [str(tmp_path / "llama"), str(target), "--to", "huggingface"]
    arguments += ["--max-shard-gb", "0.00002"]
    partial = tmp_path / "many.partial"
    process = start(tmp_path, "convert", *arguments)
    while not list(partial.glob("model-00003-*.safetensors")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists() or process.returncode == 0
    written = {path: path.stat().st_mtime_ns for path in partial.glob("model-*.safetensors")}
    run(tmp_path, "convert", *arguments)
    assert not partial.exists()
    for path, time_ns in written.items():
        assert (target / path.name).stat().st_mtime_ns == time_ns
    tensors = {}
    for path in target.glob("model-*.safetensors"):
        tensors |= load_file(path)
    before = load_file(tmp_path / "llama" / "model.safetensors")
    assert {name: x.tobytes() for name, x in tensors.items()} == {
        name: x.tobytes() for name, x in before.items()
    }
