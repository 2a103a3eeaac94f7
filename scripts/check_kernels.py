"""Compiles the GPU kernels for sm_80 and sm_90a without a GPU, and holds them to limits.

    make kernels                            what changed since compiled.json, and a sample
    make kernels ARGS=--all                 every case
    make kernels ARGS="--all --write"       and keep the results
    make kernels ARGS=grouped_matmul/int8   the cases whose name begins so

A case fails that spills, asks for too much shared memory, lacks the tensor-core instructions it
should have, loads its operands synchronously, widens quantised weights in memory, moves more than
1.15 times the least bytes (1.2 where the case says so), or got worse than the committed results.
"""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from benchmarks.compile_checks import gate, run
from benchmarks.compile_checks.facts import Facts, compile_case
from configs.checks import UserError
from scripts import command


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("prefix", nargs="?", help="beginning of the names of the cases")
    parser.add_argument("--all", action="store_true", help="cases that did not change, too")
    parser.add_argument("--write", action="store_true", help="keep the results of sound cases")
    parser.add_argument("--child", type=Path, metavar="DUMP", help="compile PREFIX in this process")
    arguments = parser.parse_args(argv)
    if arguments.child:
        facts = compile_case(*run.split(arguments.prefix), arguments.child)
        print(json.dumps(asdict(facts)))
        return 0
    keys, sound, failed = _keys(arguments), {}, 0
    for key, result in run.compile_all(keys):
        wrong = [result] if isinstance(result, str) else _wrong(key, result, arguments.write)
        failed += bool(wrong)
        print(_line(key, result, wrong), flush=True)
        if isinstance(result, Facts) and not wrong:
            sound[key] = result
    if arguments.write:
        run.write(sound)
    print(f"{len(keys) - failed} of {len(keys)} cases are sound")
    return 1 if failed else 0


def _keys(arguments: Namespace) -> list[str]:
    if arguments.prefix is None and not arguments.all:
        return run.chosen()
    keys = [key for key in run.KEYS if key.startswith(arguments.prefix or "")]
    if not keys:
        raise UserError(f"no case begins with {arguments.prefix!r}: they are {', '.join(run.KEYS)}")
    return keys


def _wrong(key: str, facts: Facts, is_written: bool) -> list[str]:
    """Faults, and what got worse, where the same compiler made the committed results."""
    found, committed = gate.faults(*run.split(key), facts), run.read_committed()
    is_comparable = committed["tools"] == run.tool_versions() and not is_written
    if is_comparable and key in committed["cases"]:
        found += gate.regressions(facts, committed["cases"][key])
    return found


def _line(key: str, result: Facts | str, wrong: list[str]) -> str:
    figures = ""
    if isinstance(result, Facts):
        figures = (
            f"{result.registers} registers, {result.shared_bytes} bytes shared, "
            f"{result.instructions} instructions"
        )
    return f"{key}: {figures}" + "".join(f"\n  FAILS: {sentence}" for sentence in wrong)


if __name__ == "__main__":
    command.execute(main)
