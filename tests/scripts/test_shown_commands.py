"""Commands that the verbs show, as a shell would read them; and those of their help."""

import shlex
from pathlib import Path

import pytest

from checkpoint.export_dtype import choose_storage
from checkpoint.public import export_family
from configs.checks import UserError
from configs.cli import load_run
from evals.compare import print_story
from evals.expert_domains import read_preference
from scripts import convert, train
from scripts.train import finish
from train.loop import FitResult

ODD = Path("runs/my run's $HOME")


def shown(text: str) -> list[list[str]]:
    """The words of each command."""
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("python -m scripts.")]


def test_what_training_suggests(capsys, monkeypatch):
    monkeypatch.setattr(train, "write_run_report", lambda run_dir: None)  # nothing was trained
    result = FitResult(steps=3, interrupted=None, train_seconds=1.0)
    assert finish(load_run("v31_nano", ()), ODD, result) == 0
    commands = shown(capsys.readouterr().out)
    assert [command[3] for command in commands] == [str(ODD)] * 2
    assert commands[1][4:] == ["--prompt", "def parse_args("]
    assert finish(load_run("fine_tune", ()), ODD, result) == 0
    assert shown(capsys.readouterr().out) == [["python", "-m", "scripts.chat", str(ODD)]]


def test_what_the_quickstart_suggests(capsys: pytest.CaptureFixture[str]):
    names = ("teacher_bpb", "student_bpb", "unigram_bpb", "gzip_bpb", "xz_bpb")
    print_story(ODD, dict.fromkeys((*names, "student_share_of_gain"), 1.0), {})
    assert shown(capsys.readouterr().out)[0][3] == str(ODD / "teacher")


def test_what_a_missing_label_suggests(tmp_path: Path):
    folder = tmp_path / "my run"
    folder.mkdir()
    with pytest.raises(UserError) as caught:
        read_preference(folder, "code")
    command = str(caught.value).split(": ")[1].removesuffix(" labels them")
    assert shlex.split(command) == ["python", "-m", "scripts.label_experts", str(folder)]


def test_the_helps_conversions_can_be_made():
    """Each run that convert's help names is one, and of a family that the form holds."""
    of_runs = [words for words in shown(convert.__doc__ or "") if words[3].startswith("runs/")]
    examples = [words for words in of_runs if "--dtype" in words]
    assert len(examples) == 2
    assert all(load_run(Path(words[3]).name, ()) for words in of_runs)
    for words in examples:
        run = load_run(Path(words[3]).name, ())
        family = export_family(run.model)
        choose_storage(family, words[words.index("--dtype") + 1])  # pyright: ignore
