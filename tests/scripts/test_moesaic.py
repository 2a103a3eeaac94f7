"""The console command: the verbs and exit codes of `python -m scripts.VERB`, from any folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic

ROOT = Path(__file__).resolve().parents[2]
VERBS = moesaic.find_verbs(ROOT)


def run(*arguments: str, code: str = "moesaic.main()", cwd: Path = ROOT):
    """A process of the command, as a console script starts it: its folder is not on the path."""
    program = f"import sys; sys.path[0] = {str(ROOT)!r}; import moesaic; {code}"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_verbs_are_the_modules_that_execute_a_main():
    verbs = {
        path.stem
        for path in (ROOT / "scripts").glob("*.py")
        if re.search(r"^    command\.execute\(main", path.read_text(), re.MULTILINE)
    }
    assert set(VERBS) == verbs
    assert all(purpose.endswith(".") for purpose in VERBS.values())


@pytest.mark.parametrize(
    ("words", "name", "rest"),
    [
        ("train v31_nano", "train", ["v31_nano"]),
        ("gpu-report --write", "gpu_report", ["--write"]),
        ("gpu_report", "gpu_report", []),
        ("bench cpu grouped", "bench_cpu", ["grouped"]),
        ("bench-scaling", "bench_scaling", []),
        ("bench", None, ["bench"]),
        ("command", None, ["command"]),
        ("", None, []),
    ],
)
def test_words_name_a_module(words, name, rest):
    assert moesaic.split_verb(words.split(), VERBS) == (name, rest)


def test_help_imports_nothing_and_names_every_verb():
    heavy = "assert not {'jax', 'numpy', 'tyro', 'scripts'} & set(sys.modules)"
    done = run("--help", code=f"moesaic.main(); {heavy}")
    assert done.returncode == 0, done.stderr
    assert all(f"  {moesaic.shown(name)} " in done.stdout for name in VERBS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name a verb (moesaic --help lists them)"),
        (["trian", "v31_nano"], "unknown verb trian: did you mean train? (moesaic --help"),
        (["gpu-reprot"], "unknown verb gpu-reprot: did you mean gpu-report? (moesaic --help"),
        (["bench", "cup"], "unknown verb bench cup: did you mean bench cpu? (moesaic --help"),
        (["xyz"], "unknown verb xyz (moesaic --help"),
    ],
)
def test_a_slip_is_a_sentence(monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["moesaic", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        moesaic.main()
    assert left.value.code == 2
    assert f"error: {sentence}" in capsys.readouterr().err


def test_a_verb_gets_its_arguments_and_its_code_comes_back(tmp_path):
    """From a folder with packages of the same names, as a notebook's may be."""
    (tmp_path / "data").mkdir()
    (tmp_path / "scripts").mkdir()
    wrong = run("bench", "cpu", "gruoped", cwd=tmp_path)  # which starts itself again
    assert wrong.returncode == 2
    assert "error: " in wrong.stderr
    assert "grouped" in wrong.stderr
    helped = run("bench", "data", "--help", cwd=tmp_path)  # which imports our `data`
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: moesaic bench data ")


def test_the_checkout_one_stands_in_comes_first(tmp_path):
    assert moesaic.find_checkout(tmp_path, ROOT) == ROOT
    assert moesaic.find_checkout(tmp_path) is None
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "command.py").touch()
    assert moesaic.find_checkout(tmp_path, ROOT) == tmp_path
