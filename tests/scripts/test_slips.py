"""A user's slips at a prompt, an option or the disk: one sentence, nothing lost, no traceback."""

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.checks import UserError
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.tokenizer import train_tokenizer
from data.tokenizers.tokenizer_export import write_public_tokenizer
from infer.sampling import Sampling
from scripts import chat, command, convert, generate, score
from tests.checkpoint.cases import read_case
from tests.checkpoint.parity.weights import draw

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 257
"""Bytes and the end of text: every text is as many tokens as bytes."""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama in Hugging Face form that can chat."""
    folder = tmp_path_factory.mktemp("slips")
    config, shapes, _, _ = read_case("llama")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB}))
    sizes = {n: [VOCAB if x == config["vocab_size"] else x for x in s] for n, s in shapes.items()}
    tensors = {name: draw(name, tuple(shape)) for name, shape in sizes.items()}
    save_file(tensors, folder / "model.safetensors")
    tokenizer = train_tokenizer(["some text"], VOCAB)
    end = frozenset({0})
    whole = PublicTokenizer(tokenizer, 0, end, add_bos=True, chat_template=TEMPLATE)
    write_public_tokenizer(folder, whole)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Programs are kept where the session's tests keep theirs."""
    monkeypatch.setattr(command, "keep_compiled", lambda: None)


SURROGATE = os.fsdecode(b"caf\xe9")
"""As Python reads an argument in Latin-1."""

REFUSED = {
    "a seed of 64 bits": (["--seed", str(2**63)], "must be at least 0 and below 2**63"),
    "a negative seed": (["--seed", "-1"], "seed=-1 must be at least 0"),
    "temperature NaN": (["--temperature", "nan"], "'nan' must be a finite number"),
    "temperature infinite": (["--temperature", "inf"], "'inf' must be a finite number"),
    "top-p NaN": (["--temperature", "1", "--top-p", "nan"], "must be a finite number"),
    "threshold NaN": (["--exit-threshold", "nan"], "must be a finite number"),
    "a word for a number": (["--temperature", "warm"], "invalid number value: 'warm'"),
    "a prompt in Latin-1": (["--prompt", SURROGATE], "no UTF-8 at character 4"),
    "a draft beyond the context": (
        ["--draft-exit", "1", "--draft-length", "1000000000"],
        "must be below the model's context_length",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_generate_refuses_in_a_sentence(name, model):
    options, sentence = REFUSED[name]
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        generate.main([str(model), "--prompt", "x", "--max-new-tokens", "2", *options])
    assert "\n" not in str(refused.value)


def test_every_bit_of_a_seed_counts(model, capsys):
    """jax.random.key reads the lower 32 alone."""
    texts = set()
    for seed in (1, 1 + 2**32, 1 + 2**62):
        options = ["--max-new-tokens", "8", "--temperature", "1", "--seed", str(seed)]
        generate.main([str(model), "--prompt", "x", *options])
        texts.add(capsys.readouterr().out.partition("\n---")[0])
    assert len(texts) == 3


def test_several_prompts_are_each_continued_as_alone(model, capsys):
    """And a text that was cut off says so: random weights never end by themselves."""
    texts = []
    for prompts in (["one"], ["two, longer"], ["one", "two, longer"]):
        options = [part for prompt in prompts for part in ("--prompt", prompt)]
        generate.main([str(model), *options, "--max-new-tokens", "4", "--temperature", "0.8"])
        out = capsys.readouterr().out
        assert out.count("--- 4 tokens, cut off at --max-new-tokens 4; first after") == len(prompts)
        texts.append(re.sub(r"\n--- .*\n", "\n", out))
    assert texts[2] == texts[0] + texts[1]


@pytest.mark.parametrize("size", ["nan", "0", "-1", "inf", "1e-12"])
def test_a_shard_size_that_is_none_is_refused(model, tmp_path, size):
    with pytest.raises(UserError, match="must be"):
        convert.main(
            [str(model), str(tmp_path / "out"), "--to", "huggingface", "--max-shard-gb", size]
        )
    assert not list(tmp_path.iterdir())


# --- Conversations -------------------------------------------------------------------------------


def talk(model: Path, typed: bytes, monkeypatch, capsys, *options: str) -> str:
    """What a conversation shows."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    chat.main([str(model), "--max-new-tokens", "4", *options])
    return capsys.readouterr().out


def test_a_conversation_survives_what_it_cannot_answer(model, monkeypatch, capsys):
    """Between good messages, whose answers are those of a conversation without the bad ones."""
    long = b"word " * 4000
    good = talk(model, b"hi\nyou\n", monkeypatch, capsys)
    mixed = talk(model, b"caf\xe9\nhi\n" + long + b"\nyou\n", monkeypatch, capsys)
    assert "[not answered: the message is no UTF-8 at character 4" in mixed
    assert re.search(r"\[not answered: the message makes \d+ tokens, at most \d+ fit", mixed)
    assert "forgotten" not in mixed

    def answers(out: str) -> list[str]:
        return re.findall(r"> (.*?)\n\[\d+ tokens", re.sub(r"> \[not answered.*\n", "", out), re.S)

    assert len(answers(good)) == 2
    assert [text.lstrip("\n> ") for text in answers(mixed)] == answers(good)


def test_the_oldest_exchanges_make_room(model, monkeypatch, capsys):
    out = talk(model, b"a b c d e f g h\n" * 12, monkeypatch, capsys)
    assert out.count("tokens/s]") == 12
    assert "[the oldest exchanges no longer fit and are forgotten]" in out


def test_an_answer_longer_than_the_context_is_refused_before_loading(model):
    with pytest.raises(UserError, match="--max-new-tokens 999999 must lie between"):
        chat.main([str(model), "--max-new-tokens", "999999"])


# --- The machine ---------------------------------------------------------------------------------


@contextlib.contextmanager
def files_limited_to(num_bytes: int):
    """A disk that is full, to this process: no file grows beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_logits_on_a_full_disk_end_in_a_sentence_and_leave_nothing(tmp_path):
    logits = np.zeros((100, 1000), np.float32)
    with (
        files_limited_to(5000),
        pytest.raises(UserError, match=r"logits.npy can't be written: File"),
    ):
        score.write_logits(tmp_path / "logits.npy", logits)
    assert not list(tmp_path.iterdir())
    score.write_logits(tmp_path / "deep" / "logits.npy", logits + 1)
    np.testing.assert_array_equal(np.load(tmp_path / "deep" / "logits.npy"), logits + 1)


HOMELESS = """
import os
for name in ("HOME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
import pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
from scripts import command
command.keep_compiled()
print(command.jax.config.jax_compilation_cache_dir)
"""


def python(program: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_a_user_without_a_home_is_told_that_nothing_is_kept():
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    done = python(HOMELESS, env=environment)
    assert done.returncode == 0, done.stderr
    assert "compiled programs are not kept" in done.stderr
    assert "set XDG_CACHE_HOME" in done.stderr


def test_programs_are_not_kept_where_code_of_ones_own_may_shape_them(tmp_path):
    """A router score of the user's changes a program, and nothing that it is known by."""
    (tmp_path / "own.py").write_text("x = 1")
    program = (
        "from scripts import command; from configs import experiment_file; import pathlib, sys;"
        "[experiment_file.execute(pathlib.Path(x)) for x in sys.argv[1:]];"
        "from infer import kept_programs; command.keep_compiled(); print(kept_programs._folder)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for files, folder in (([], tmp_path / "moesaic" / "programs"), ([tmp_path / "own.py"], None)):
        command = [sys.executable, "-c", program, *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == str(folder), done.stderr


PIPED = """
import sys
from rich.console import Console
from scripts import command
from train.progress import ProgressBar
def main(argv):
    if "rich" in argv:
        Console().print("x")
    elif "exit" in argv:
        print("shown")
        sys.exit(0)
    elif "bar" in argv:
        with ProgressBar("run", total=3) as bar:
            for done in range(4):
                bar.update(done)
        print("worked to the end", file=sys.stderr)
        print("and says so")
    else:
        print("x" * 100_000)
command.execute(main)
"""


@pytest.mark.parametrize("kind", ["plain", "rich", "exit", "bar"])
def test_output_that_nobody_reads_is_no_error(kind):
    """As `| head` leaves it: the shell's code of SIGPIPE, and not a word."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", PIPED, kind], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr.decode() == ("worked to the end\n" if kind == "bar" else "")


def test_names_that_are_no_utf8_can_be_printed():
    program = f"from scripts import command; command.execute(lambda argv: print({SURROGATE!r}))"
    done = python(program)
    assert (done.returncode, done.stdout) == (0, "caf\\udce9\n"), done.stderr


# --- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 5e-324])
def test_the_coldest_temperatures_tend_to_greedy(temperature, model, capsys):
    """Their quotients overflow float32: the text was empty."""
    texts = []
    for value in (0.0, temperature):
        options = ["--max-new-tokens", "4", "--temperature", str(value)]
        generate.main([str(model), "--prompt", "x", *options])
        texts.append(capsys.readouterr().out.partition("\n---")[0])
    assert texts[0] == texts[1] != "x"


def test_the_smallest_top_p_keeps_the_best_token(model, capsys):
    texts = []
    for options in ([], ["--temperature", "1", "--top-p", "1e-300"]):
        generate.main([str(model), "--prompt", "x", "--max-new-tokens", "4", *options])
        texts.append(capsys.readouterr().out.partition("\n---")[0])
    assert texts[0] == texts[1] != "x"


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_temperatures_that_are_none_are_refused(temperature):
    with pytest.raises(UserError, match="temperature"):
        Sampling(temperature)
