"""The folder of a run: config.json, metrics.jsonl, checkpoints/ and pictures."""

from pathlib import Path

from checkpoint.store import latest_step
from configs.base import RunConfig
from configs.checks import UserError
from configs.serialization import differences, from_json, to_json

MAY_CHANGE = ("steps", "mesh.", "execution.", "checkpoint.", "alarms.")
"""Settings that may differ when a run goes on; anything else would make it another experiment."""


def open_run_dir(run: RunConfig, run_dir: Path) -> None:
    """Makes the folder and writes config.json, or checks that it holds the same experiment.

    A folder without a checkpoint has nothing to lose, and takes the new config.

    Raises:
      UserError: another experiment, or a folder that can't be written.
    """
    path = run_dir / "config.json"
    if path.exists() and latest_step(run_dir / "checkpoints") is not None:
        changed = differences(read_run(run_dir), run)
        changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
        if changed:
            raise UserError(
                f"{run_dir} holds a run with another config ({'; '.join(changed)}): "
                "choose another --run-dir, or give the settings it was started with"
            )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(run))
    except OSError as error:
        raise UserError(f"{run_dir} can't be written: {error.strerror}") from error


def runs_inside(folder: Path) -> str:
    """Advice to who names a folder of runs in place of one; empty for any other folder."""
    names = sorted(str(path.parent) for path in folder.glob("*/checkpoints"))
    if not names:
        return ""
    more = ", ..." if len(names) > 5 else ""
    return f"it holds the runs {', '.join(names[:5])}{more}: name one of them"


def read_run(run_dir: Path) -> RunConfig:
    """The config a run directory was trained with.

    Raises:
      UserError: the folder is no run directory.
    """
    path = run_dir / "config.json"
    if not path.exists():
        advice = runs_inside(run_dir) or "it has no config.json"
        raise UserError(f"{run_dir} is no run directory: {advice}")
    return from_json(RunConfig, path.read_text(), where=str(path))
