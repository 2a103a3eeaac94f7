"""Runs a Python program in the sandbox: no network, no files of yours, bounded memory and time.

    python -m scripts.sandbox FILE.py
    python -m scripts.sandbox FILE.py --seconds 60 --memory-mib 2048

The program has the standard library, a scratch of its own as its folder, and nothing on stdin; what
it writes is printed when it has ended. The exit code is the program's, 128 + n where signal n ended
it, and 1 where the sandbox did, which says why.
"""

import argparse
import sys
from pathlib import Path

from configs.checks import UserError
from evals.sandbox import run_program
from evals.sandbox_command import MIB, Limits
from scripts import command

DEFAULT = Limits()


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("file", type=Path, help="a Python program")
    parser.add_argument("--seconds", type=float, default=DEFAULT.seconds, help="from start to end")
    in_mib = {
        "memory": DEFAULT.memory_bytes,
        "scratch": DEFAULT.scratch_bytes,
        "output": DEFAULT.output_bytes,
    }
    for name, default in in_mib.items():
        parser.add_argument(f"--{name}-mib", type=int, default=default // MIB)
    parser.add_argument("--processes", type=int, default=DEFAULT.processes, help="at once")
    parser.add_argument(
        "--unprotected", action="store_true", help="without bubblewrap, with your own rights"
    )
    arguments = parser.parse_args(argv)
    limits = _limits(arguments)
    outcome = run_program(_read(arguments.file), limits, unprotected=arguments.unprotected)
    sys.stdout.write(outcome.stdout)
    sys.stdout.flush()
    sys.stderr.write(outcome.stderr)
    match outcome.ended:
        case "exit":
            return outcome.code
        case "signal":
            return 128 + outcome.code
        case _:
            print(f"stopped: {outcome.reason()}", file=sys.stderr)
            return 1


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(
        seconds=arguments.seconds,
        memory_bytes=arguments.memory_mib * MIB,
        processes=arguments.processes,
        scratch_bytes=arguments.scratch_mib * MIB,
        output_bytes=arguments.output_mib * MIB,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no Python program in UTF-8: {error.reason}") from error


if __name__ == "__main__":
    command.execute(main)
