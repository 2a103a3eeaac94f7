"""The command line shared by all verbs: arguments, exit codes, and the process's setup.

Exit codes: 0 done; 1 the run stopped itself (an alarm, or another of its processes ended); 2 bad
input, said in one sentence; 3 a fault of the program, with its traceback; 128 + n stopped by signal
n after saving. Output that nobody reads any more (`| head`) ends like SIGPIPE.
"""

import argparse
import contextlib
import functools
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from configs import experiment_file
from configs.checks import UserError
from configs.experiment_file import ExperimentError, describe_file, parse_target
from configs.near_names import hint
from infer.kept_programs import keep_in
from parallel.distributed import (
    announce_failure,
    detected_launch,
    leave,
    lost_process,
    start,
    stated_launch,
)
from train.metrics import TrainingAlarm

PLUGINS = "jax._src.xla_bridge"
"""Whose log tells of a plugin that can't start, with a traceback."""

OWN_HELP = "a file of your own, executed first: for runs with router scores or objectives of it"
RUN_HELP = "a name in configs/runs.py, FILE.py:NAME in a file of your own, or a run's folder"

Main = Callable[[list[str]], int | None]


def execute(main: Main, *, huge_pages: bool = False) -> None:
    """Runs a verb on the command line's arguments and exits with its code.

    Args:
      huge_pages: for verbs that train: see _use_huge_pages.
    """
    if huge_pages:
        _use_huge_pages()
    logging.getLogger(PLUGINS).addFilter(_in_one_line)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold what no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _code_of(main)
        sys.stdout.flush()
        leave()
    except BrokenPipeError:
        announce_failure("nobody reads its output")
        os._exit(128 + signal.SIGPIPE)
    except BaseException as error:
        _leave(*_ending(error))
    else:
        sys.exit(code)


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code that an error means, and what is said of it."""
    lost = lost_process(error)
    if lost is not None:
        return 1, f"stopped: {lost}"
    match error:
        case ExperimentError():
            return 2, f"{error.trace}error: {error}"
        case UserError():
            return 2, f"error: {error}"
        case TrainingAlarm():
            return 1, f"stopped: {error}"
        case OSError() if error.filename is not None or error.errno is not None:
            where = error.filename or "a file"
            return 2, f"error: {where} can't be used: {error.strerror}"
        case KeyboardInterrupt():
            return 130, "interrupted"
        case _:
            return 3, "".join(traceback.format_exception(error))


def _code_of(main: Main) -> int:
    """The verb's exit code; that of --help and its like, too."""
    try:
        return main(sys.argv[1:]) or 0
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich makes an exit of it, with code 1
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 0


def _in_one_line(record: logging.LogRecord) -> bool:
    """Shortens what JAX says of a plugin without a device, such as CUDA's on a machine without a
    GPU; whatever else it logs stays as it is.
    """
    if record.exc_info and str(record.msg).startswith("Jax plugin configuration error"):
        module, error = "/".join(map(str, record.args or ())), record.exc_info[1]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        record.msg = (
            f"JAX's plugin {module} is installed and can't start, so its devices are not used: "
            f"{reason} (pip uninstall it where there are none)"
        )
        record.args, record.exc_info, record.exc_text = (), None, None
    return True


def parser(doc: str | None, *, run: bool = False) -> argparse.ArgumentParser:
    """A parser with the verb's documentation; with `run`, it takes a run's name and --run-dir."""
    made = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=not run,
        epilog=_runs() if run else None,
    )
    made.error = functools.partial(_raise_user_error, made)  # type: ignore[method-assign]
    made.add_argument("--experiment", type=Path, metavar="FILE.py", action=_Executed, help=OWN_HELP)
    if run:
        made.add_argument("run", nargs="?", metavar="RUN", help=RUN_HELP)
        made.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/NAME)")
    return made


class _Executed(argparse.Action):
    """Executes the file that an option names as soon as it is read: what it adds to the checkout's
    tables is there when the verb reads configs."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        experiment_file.execute(values)
        setattr(namespace, self.dest, values)


def _runs() -> str:
    from configs.cli import describe_runs  # what reads overrides is not everywhere: gpu_report

    return f"runs:\n{describe_runs()}\n\nRUN --help lists the settings of a run."


def split_run_arguments(
    made: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The verb's own arguments, and the rest: overrides of the run's settings. Among the former,
    `own_options` has their names.

    Raises:
      UserError: no run is named. Without one, --help prints the verb's help and exits.
    """
    asks_for_help = bool({"-h", "--help"} & set(argv))
    if asks_for_help and argv[0].startswith("-"):
        made.print_help()
        sys.exit(0)
    known, overrides = made.parse_known_args(argv)
    if known.run is None:
        raise UserError("name a run; --help lists them")
    target = parse_target(known.run)
    if asks_for_help and target is not None and target.name is None:
        print(f"runs of {target.path}:\n{describe_file(target)}")
        sys.exit(0)
    known.own_options = own_options(made)
    known.run_dir = known.run_dir or default_run_dir(known.run)
    return known, overrides


def default_run_dir(name: str) -> Path:
    """The folder of a run whose command names none: runs/NAME, or the folder that it names."""
    target = parse_target(name)
    if target is not None:
        return Path("runs") / (target.name or target.path.stem)
    return Path(name) if is_run_folder(name) else Path("runs") / name


def is_run_folder(name: str) -> bool:
    """Whether the name is the folder of a run; a name in configs/runs.py goes before it."""
    from configs.cli import known_runs  # see _runs

    return name not in known_runs() and (Path(name) / "config.json").exists()


def use_host_devices(count: int) -> None:
    """Gives the CPU this many devices; to be called before JAX touches any. GPUs are unaffected."""
    jax.config.update("jax_num_cpu_devices", count)


def add_process_options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the options of a verb that several processes can run together."""
    group = made.add_argument_group(
        "several processes", "found by themselves under SLURM, Open MPI, Kubernetes and on TPU pods"
    )
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="of the first process")
    group.add_argument("--num-processes", type=int, metavar="N", help="of the run")
    group.add_argument("--process-id", type=int, metavar="I", help="this one's, from 0")
    return made


def start_processes(arguments: argparse.Namespace, num_devices: int) -> None:
    """Joins the run's other processes, if it has any; to be called before JAX touches a device.

    Args:
      arguments: with those of `add_process_options`.
      num_devices: of the run's mesh; on the CPU they are made.
    Raises:
      UserError: options that don't go together, or processes that don't divide the devices.
    """
    stated = (arguments.coordinator_address, arguments.num_processes, arguments.process_id)
    launch = stated_launch(*stated) or detected_launch(num_devices)
    if launch is None or launch.num_processes == 1:
        use_host_devices(num_devices)
    else:
        start(launch, num_devices)


def cache_folder() -> Path:
    """The user's folder for what can be made again: ~/.cache/moesaic, or below $XDG_CACHE_HOME.

    Raises:
      OSError: the user has none.
    """
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(parent):  # "~" stays where there is no home
        raise OSError("there is no home folder")
    return Path(parent) / "moesaic"


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder: a second start is quicker.

    A user without a folder to write in (a container's, say) starts as slowly each time, and is told
    so.
    """
    try:
        cache, programs = (cache_folder() / name for name in ("xla", "programs"))
        cache.mkdir(parents=True, exist_ok=True)
        programs.mkdir(mode=0o700, exist_ok=True)  # they are run as they are read
    except OSError as error:
        print(
            f"compiled programs are not kept ({error}): set XDG_CACHE_HOME to a folder of yours",
            file=sys.stderr,
        )
        return
    if not experiment_file.has_executed():  # nobody knows what its code puts into programs
        keep_in(programs)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def own_options(made: argparse.ArgumentParser) -> list[str]:
    """The options of a verb itself: "--run-dir"."""
    return [x for action in made._actions for x in action.option_strings if x.startswith("--")]


def _raise_user_error(made: argparse.ArgumentParser, message: str) -> NoReturn:
    kind, _, unknown = message.partition(": ")
    if kind == "unrecognized arguments" and unknown.startswith("--"):
        option = unknown.split()[0].partition("=")[0]
        message = f"unknown option {option}{hint(option, {}, own_options(made))}"
    raise UserError(f"{message} (--help says more)")


def _leave(code: int, sentence: str) -> None:
    """Prints and exits at once: worker threads of a failed save or load would print on the way
    out.
    """
    with contextlib.suppress(OSError):  # where the output itself is what failed
        sys.stdout.flush()
    print(sentence, file=sys.stderr, flush=True)
    announce_failure(sentence)
    os._exit(code)


def _use_huge_pages() -> None:
    """Restarts the process once so that malloc asks Linux for huge pages.

    XLA's large buffers come fresh from the kernel at every step; with 4 KiB pages a fifth of a CPU
    training step goes into page faults (docs/experiments.md). The setting is read at process start.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or not switch.exists():
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
