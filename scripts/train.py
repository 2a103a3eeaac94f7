"""Trains a run, or goes on with it: the same command resumes where it stopped.

    python -m scripts.train v31_nano --steps 500 --mesh.expert 4
    python -m scripts.train path/to/my_experiments.py:my_run
    python -m scripts.train runs/v31_nano                      goes on, without its flags

A run whose init.source names a trained model begins with its weights, any other with weights drawn
from its seed. The run's folder receives config.json, metrics.jsonl, checkpoints/, pictures and
report.html.
"""

import argparse
import shlex
from pathlib import Path

from configs.base import RunConfig
from configs.checks import require
from configs.experiment_file import parse_target
from evals.results import write_run_report
from parallel.distributed import is_first
from planning.available import require_memory
from scripts import command
from scripts.named_runs import chosen_run, experiment_text, own_loss
from scripts.samples import sampler
from scripts.sources import consolidated_state, initial_weights
from train.fine_tuning import fine_tune, fine_tune_on_preferences
from train.loop import FitResult, fit
from train.losses import ChunkLoss
from train.profile import Profile, parse_profile

TRAIN = {"text": fit, "chat": fine_tune, "preference": fine_tune_on_preferences}
"""By the form of the data."""


def main(argv: list[str]) -> int:
    parser = command.add_process_options(command.parser(__doc__, run=True))
    parser.add_argument(
        "--profile", metavar="FIRST:LAST", help="trace these steps and print what took longest"
    )
    arguments, overrides = command.split_run_arguments(parser, argv)
    run = chosen_run(arguments, overrides)
    require(
        run.distill is None,
        f"{run.name} learns from a teacher, and scripts.train has none: python -m scripts.distill "
        f"{arguments.run} --teacher runs/TEACHER",
    )
    command.start_processes(arguments, run.mesh.num_devices)
    require_memory(run)
    describe(run)
    experiment = experiment_text(arguments)
    loss, profile = _own_loss(arguments, run), parse_profile(arguments.profile)
    return train_run(run, arguments.run_dir, experiment, profile, loss)


def _own_loss(arguments: argparse.Namespace, run: RunConfig) -> ChunkLoss | None:
    target, file = parse_target(arguments.run), arguments.experiment
    require(
        file is None or target is None,
        f"--experiment {file} is for the folder of a run, and {arguments.run} names its own file: "
        "leave it out",
    )
    return own_loss(run, file if target is None else target.path, arguments.run_dir)


def train_run(
    run: RunConfig,
    run_dir: Path,
    experiment: str | None,
    profile: Profile | None = None,
    loss: ChunkLoss | None = None,
) -> int:
    """Trains a run, with the weights that it begins with; its exit code.

    Args:
      loss: of the run's `objective`.
    """
    begin = initial_weights(run, run_dir)
    opt_state = None
    if run.further.consolidation and begin.variables is not None:
        opt_state = consolidated_state(run, begin.variables)
    result = TRAIN[run.data.form](
        run,
        run_dir,
        variables=begin.take(),
        opt_state=opt_state,
        initial=begin.origin,
        experiment=experiment,
        sample=sampler(run, run_dir),
        profile=profile,
        **({} if loss is None else {"chunk_loss": loss}),
    )
    return finish(run, run_dir, result)


def describe(run: RunConfig) -> None:
    """Says what is about to be trained, and on what; on the first process."""
    if not is_first():
        return
    total, active = run.model.num_parameters, run.model.num_active_parameters
    ahead = run.model.num_multi_token_parameters
    extra = f", {ahead / 1e6:.2f}M more to predict further ahead in training" if ahead else ""
    print(
        f"{run.name}: {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active per token{extra}; "
        f"mesh data={run.mesh.data} expert={run.mesh.expert} tensor={run.mesh.tensor}; "
        f"{run.steps} steps of {run.tokens_per_step:,} tokens"
    )
    if not Path(run.data.directory).exists():
        sources = ", ".join(part.source for part in run.data.parts)
        print(f"making the corpus {run.data.directory} from {sources} first", flush=True)


def finish(run: RunConfig, run_dir: Path, result: FitResult) -> int:
    """Draws the report and says where things are, on the first process; the run's exit code."""
    if not is_first():
        return 0 if result.interrupted is None else 128 + result.interrupted
    write_run_report(run_dir)
    if result.interrupted is not None:
        print(
            f"stopped at step {result.steps} of {run.steps}, saved; the same command goes on "
            "from there"
        )
        return 128 + result.interrupted
    done = "trained {} steps" if result.new_steps else "all {} steps were done before"
    print(f"{done.format(result.steps)}; {run_dir}/report.html shows them. Next:")
    typed = shlex.quote(str(run_dir))
    if run.data.form != "text":
        print(f"  python -m scripts.chat {typed}")
        return 0
    print(f"  python -m scripts.evaluate {typed}")
    print(f'  python -m scripts.generate {typed} --prompt "def parse_args("')
    return 0


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
