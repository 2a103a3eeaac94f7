"""The Makefile's environments: brought up to date, never emptied; with a Python that only notes."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
if [ "$1 $2" = "-m venv" ]; then
  shift 2
  if [ "$1" = --clear ]; then shift; rm -rf "$1"; fi
  mkdir -p "$1/bin"
  cp "$0" "$1/bin/python"
fi
"""


def write_program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """The Makefile with what it depends on, and programs of its own in the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "kernels/native/src").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "setup.py", "kernels/native/src/a.cc"):
            (folder / name).touch()
            self.age(name, 100)
        for name in ("sh", "mkdir", "cp", "rm", "cmp", "touch", "awk"):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).symlink_to(str(shutil.which(name)))
        write_program(folder / "bin" / "python3", PYTHON)

    def make(self, *arguments: str) -> str:
        """Its output; what the programs were called with is in `calls`."""
        self.log.write_text("")
        done = subprocess.run(
            [str(shutil.which("make")), *arguments],
            cwd=self.folder,
            env={"PATH": str(self.folder / "bin"), "LOG": str(self.log)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def calls(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line != "-c "]

    def installs(self) -> list[str]:
        return [call for call in self.calls if "pip install" in call]

    def age(self, name: str, seconds: float) -> None:
        """Makes a file that old: stamps of one test would all be of the same second."""
        when = time.time() - seconds
        os.utime(self.folder / name, (when, when))


@pytest.fixture
def checkout(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    made = Checkout(tmp_path)
    made.make(".venv")
    assert made.calls[0].startswith("-m venv")
    assert ["--editable .[dev,data,serve]" in call for call in made.installs()] == [True]
    made.age(".venv/installed", 50)
    if (tmp_path / "build/compilers").exists():
        made.age("build/compilers", 60)
    return made


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "constraints.txt", "setup.py", "kernels/native/src/a.cc"]
)
def test_what_the_user_installed_stays(checkout, name):
    mine = checkout.folder / ".venv" / "lib" / "mine.py"
    mine.parent.mkdir()
    mine.touch()
    checkout.make(".venv")
    assert checkout.calls == []  # nothing has changed
    checkout.age(name, 0)
    checkout.make(".venv")
    assert mine.exists()
    assert len(checkout.installs()) == 1
    assert not [call for call in checkout.calls if "venv --clear" in call]


def test_an_environment_whose_python_is_gone_is_made_anew(checkout):
    (checkout.folder / ".venv/bin/python").unlink()
    checkout.age("pyproject.toml", 0)
    checkout.make(".venv")
    assert checkout.calls[0] == "-m venv --clear .venv"


def test_a_compiler_that_came_later_builds_the_kernels(checkout):
    write_program(checkout.folder / "bin" / "g++")
    checkout.make(".venv")
    assert len(checkout.installs()) == 1
    checkout.make(".venv")
    assert checkout.calls == []


def test_the_planner_has_an_environment_of_its_own(checkout):
    checkout.make("plan", "ARGS=v31 --device h100")
    assert [".[deviceless]" in call for call in checkout.installs()] == [True]
    assert checkout.calls[-1] == "-m scripts.plan v31 --device h100"
    assert (checkout.folder / ".venv-kernels/bin/python").exists()


def test_help_lists_every_target(checkout):
    shown = checkout.make("help")
    targets = [line.split()[1] for line in shown.splitlines() if line.startswith("  make ")]
    phony = next(
        line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY")
    )
    assert sorted(targets) == sorted(set(phony.split()[1:]) - {"FORCE"})
