"""A user's own file: its runs are runs, and what it raises is told with its own traceback."""

import dataclasses
from pathlib import Path

import pytest

from configs import runs
from configs.checks import UserError
from configs.cli import load_run, named_run
from configs.experiment_file import ExperimentError, describe_file, parse_target
from scripts import command

FILE = '''
import dataclasses

from configs.runs import v31_nano

from {helper} import STEPS


@dataclasses.dataclass(frozen=True)
class Own:
    steps: int


def my_run():
    """Short.

    More of it.
    """
    return dataclasses.replace(v31_nano(), name="my_run", steps=Own(STEPS).steps)


def _hidden():
    return None


def mistaken():
    return dataclasses.replace(v31_nano(), batch_size=17)


def raises():
    return {{}}["nothing"]


def leaves():
    raise SystemExit(0)


def sweep():
    return {{"a": my_run()}}


def no_run():
    return "v31_nano"


def asks(steps):
    return my_run()
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    helper = f"helper_in_{tmp_path.name}"
    (tmp_path / f"{helper}.py").write_text("STEPS = 77\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(helper=helper))
    return path


def line_of(path: Path, text: str) -> int:
    return path.read_text().splitlines().index(text) + 1


def test_a_function_of_a_file_is_a_run_with_the_same_overrides(file):
    expected = dataclasses.replace(runs.v31_nano(), name="my_run", steps=77, seed=3)
    assert load_run(f"{file}:my_run", ["--seed", "3"]) == expected
    with pytest.raises(UserError, match=r"unknown option --lr: did you mean --optimizer.learning-"):
        load_run(f"{file}:my_run", ["--lr", "1"])


def test_a_file_is_read_anew(file):
    before = named_run(f"{file}:my_run")
    file.write_text(file.read_text().replace("steps=Own(STEPS).steps", "steps=33"))
    assert (before.steps, named_run(f"{file}:my_run").steps) == (77, 33)


def test_its_own_functions_are_listed_alone(file):
    listed = describe_file(parse_target(str(file)))
    assert [line.split()[0] for line in listed.splitlines()] == [
        *("asks", "leaves", "mistaken", "my_run", "no_run", "raises", "sweep")
    ]
    assert "  my_run    Short." in listed.splitlines()


@pytest.mark.parametrize("name", ["raises", "mistaken"])
def test_what_it_raises_is_said_with_its_own_frames_alone(file, name):
    with pytest.raises(ExperimentError) as raised:
        named_run(f"{file}:{name}")
    line = {
        "raises": '    return {}["nothing"]',
        "mistaken": "    return dataclasses.replace(v31_nano(), batch_size=17)",
    }[name]
    where = f"{file} line {line_of(file, line)}"
    sentence = {
        "raises": f"{where} raised KeyError: 'nothing': mend the file",
        "mistaken": f"{where}: batch_size=17 gives 17 rows",
    }[name]
    assert str(raised.value).startswith(sentence)
    assert line.strip() in raised.value.trace
    assert "experiment_file.py" not in raised.value.trace
    assert "base.py" not in raised.value.trace


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def f(:\n", "raised SyntaxError"),
        ("import no_such_module\n", "line 1 raised ModuleNotFoundError: No module named"),
        ("raise ValueError('two\\nlines')\n", "line 1 raised ValueError: mend the file"),
    ],
)
def test_a_file_that_cannot_be_executed(tmp_path, text, sentence):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ExperimentError, match=sentence) as raised:
        named_run(f"{path}:f")
    assert str(path) in raised.value.trace


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("leaves", "raised SystemExit"),
        ("sweep", "returned several runs, not one run: moesaic sweep"),
        ("no_run", "returned str 'v31_nano', not one run: return a RunConfig"),
        ("asks", "needs the arguments steps"),
        ("gone", "has no function 'gone' that returns a run: it has asks, leaves"),
        ("FILE", "has no function 'FILE'"),
    ],
)
def test_what_is_no_run_is_refused(file, name, sentence):
    with pytest.raises(UserError, match=sentence):
        named_run(f"{file}:{name}")


def test_a_file_without_a_name_and_a_missing_one(file):
    with pytest.raises(UserError, match=r"mine.py:NAME; it has asks, leaves, mistaken, my_run"):
        named_run(str(file))
    with pytest.raises(UserError, match=r"none.py is no file: give FILE.py:NAME"):
        named_run("none.py:my_run")
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        named_run(f"{file}:my_run")


def test_names_that_are_no_files():
    assert parse_target("v31_nano") is None
    assert parse_target("runs/v31_nano") is None
    target = parse_target("a:b/c.py:my_run")
    assert target is not None
    assert (str(target.path), target.name) == ("a:b/c.py", "my_run")
    assert str(target) == "a:b/c.py:my_run"


def test_the_folder_of_a_run_of_ones_own(tmp_path, monkeypatch):
    assert command.default_run_dir("v31_nano") == Path("runs/v31_nano")
    assert command.default_run_dir("x/mine.py:my_run") == Path("runs/my_run")
    folder = tmp_path / "somewhere"
    folder.mkdir()
    assert command.default_run_dir(str(folder)) == Path("runs") / folder
    (folder / "config.json").touch()
    assert command.default_run_dir(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "v31_nano")
    assert command.default_run_dir("v31_nano") == Path("runs/v31_nano")


def test_the_verb_ends_with_the_users_traceback_and_code_2():
    error = ExperimentError("mine.py line 3 raised ValueError: no", "Traceback ...\n")
    assert command._ending(error) == (
        2,
        "Traceback ...\nerror: mine.py line 3 raised ValueError: no",
    )
