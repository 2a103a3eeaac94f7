"""Trains the runs of a sweep, some at a time: a function of your own file that returns a dict or a
list of runs.

    moesaic sweep path/to/my_experiments.py:rates --jobs 2

Each run has a folder in runs/NAME (or --dir), like any other. The same command goes on: what is
trained stays, what was stopped resumes, new runs of the function join. At the end stand a table,
and report.html with the runs' curves beside each other.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoint.orbax_store import latest_step
from checkpoint.run_directory import EXPERIMENT, MAY_CHANGE, has_checkpoint, read_run
from configs.base import RunConfig
from configs.checks import require
from configs.experiment_file import call_target, parse_target, read_source
from configs.serialization import differences, to_json
from formats.atomic_folder import replace_text
from scripts import command
from scripts.named_runs import with_source_model
from train.compare import as_text, last_numbers, read_runs, write_comparison
from train.sweep import draw_sweep

LOG = "train.log"


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("sweep", metavar="FILE.py:NAME", help="a function that returns runs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--dir", type=Path, help="folder of the runs (runs/NAME)")
    arguments = parser.parse_args(argv)
    require(arguments.jobs > 0, f"--jobs {arguments.jobs} must be at least 1")
    target = parse_target(arguments.sweep)
    require(
        target is not None and target.name is not None,
        f"{arguments.sweep} names no function of a file: give FILE.py:NAME",
    )
    assert target is not None
    directory = arguments.dir or Path("runs") / str(target.name)
    runs = {name: with_source_model(run) for name, run in runs_of(call_target(target)).items()}
    text = read_source(target)
    for name, run in runs.items():
        prepare(directory / name, run, text)
    failed, stopped = train_all(
        [directory / name for name, run in runs.items() if not is_done(directory / name, run)],
        arguments.jobs,
    )
    trained = [directory / name for name in runs if (directory / name / "metrics.jsonl").exists()]
    if trained:
        compared = read_runs(trained)
        page = write_comparison(directory, str(target.name), compared, draw_sweep(compared))
        print(as_text([run.name for run in compared], last_numbers(compared)))
        print(f"page: {page}")
    for folder in failed:
        print(f"failed: {folder}: {_last_line(folder / LOG)} ({folder / LOG} says more)")
    return 128 + stopped if stopped else int(bool(failed))


def runs_of(made: Any) -> dict[str, RunConfig]:
    """The runs that a sweep's function returned, by name.

    Raises:
      UserError: anything else, two of one name, or a run that learns from a teacher.
    """
    pairs: list[tuple[Any, Any]] = []
    if isinstance(made, dict):
        pairs = list(made.items())
    elif isinstance(made, list | tuple):
        pairs = [(getattr(run, "name", None), run) for run in made]
    require(
        bool(pairs) and all(isinstance(run, RunConfig) for _, run in pairs),
        f"the sweep's function returned {made!r:.60}, expected a dict or a list of RunConfigs",
    )
    names = [str(name) for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"several runs are named {', '.join(twice)}: give each a name of its own")
    for name, (_, run) in zip(names, pairs, strict=True):
        is_name = Path(name).name == name and name not in ("", ".", "..")
        require(is_name, f"{name!r} is no name of a folder: name the run otherwise")
        require(
            run.distill is None,
            f"{name} learns from a teacher, and a sweep has none: train it by scripts.distill",
        )
    return dict(zip(names, (run for _, run in pairs), strict=True))


def prepare(run_dir: Path, run: RunConfig, experiment: str) -> None:
    """Writes the config that the run's own process reads.

    Raises:
      UserError: the folder holds another experiment.
    """
    if has_checkpoint(run_dir):
        changed = [
            line for line in differences(read_run(run_dir), run) if not line.startswith(MAY_CHANGE)
        ]
        require(
            not changed,
            f"{run_dir} holds a run with another config ({'; '.join(changed)}): choose another "
            "--dir, or another name for the run",
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / "config.json", to_json(run))
    replace_text(run_dir / EXPERIMENT, experiment)


def is_done(run_dir: Path, run: RunConfig) -> bool:
    """Whether all of its steps are behind it."""
    return (latest_step(run_dir / "checkpoints") or 0) >= run.steps


def train_all(folders: Sequence[Path], jobs: int) -> tuple[list[Path], int]:
    """Trains the runs, so many at a time; returns those that failed, and the signal that stopped
    the sweep, 0 for none. A signal is handed to the runs at work, which save and end.
    """
    waiting, failed = list(folders), []
    at_work: dict[Path, subprocess.Popen[bytes]] = {}
    with _noted_signals() as received:
        while at_work or (waiting and not received):
            while waiting and len(at_work) < jobs and not received:
                folder = waiting.pop(0)
                at_work[folder] = _start(folder)
                print(f"{folder}: at work, {len(waiting)} wait", flush=True)
            time.sleep(0.1)
            if received:
                for process in at_work.values():
                    process.send_signal(received[0])
                for process in at_work.values():
                    process.wait()
            for folder in [f for f, process in at_work.items() if process.poll() is not None]:
                code = at_work.pop(folder).returncode
                print(f"{folder}: {'trained' if code == 0 else f'ended with code {code}'}")
                if code and not received:
                    failed.append(folder)
    return failed, received[0] if received else 0


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TRAIN = (sys.executable, "-m", "scripts.train")


def _start(folder: Path) -> subprocess.Popen[bytes]:
    """The run's own process; signals of the terminal reach it through us alone."""
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH")) if x)
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [*TRAIN, str(folder), "--experiment", str(folder / EXPERIMENT)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    command.execute(main)
