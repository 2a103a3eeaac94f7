"""The command `moesaic VERB ...`: what `python -m scripts.VERB ...` does, from any folder.

In the root of a checkout it takes that checkout's verbs, as `python -m` would; anywhere else those
of the checkout that was installed editable (`make .venv`, `pip install -e .`).
"""

import ast
import os
import runpy
import signal
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

HELP = ("-h", "--help", "help")


def main() -> None:
    """Runs the verb that the command line names, and exits with its code; 2: there is none."""
    root = find_checkout(Path.cwd(), Path(__file__).parent)
    if root is None:
        _refuse(
            "moesaic needs the checkout it was installed from: go to its root, or install it "
            "editable (pip install -e CHECKOUT)"
        )
    sys.path.insert(0, str(root))
    verbs, arguments = find_verbs(root), sys.argv[1:]
    if arguments and arguments[0] in HELP:
        _print(describe(verbs))
        return
    name, rest = split_verb(arguments, verbs)
    if name is None:
        _refuse(_unknown(arguments, verbs))
    sys.argv = [f"moesaic {shown(name)}", *rest]
    runpy.run_module(f"scripts.{name}", run_name="__main__")


def find_checkout(*folders: Path) -> Path | None:
    """The first of the folders that is the root of a checkout."""
    return next((f for f in folders if (f / "scripts" / "command.py").is_file()), None)


def find_verbs(root: Path) -> dict[str, str]:
    """The modules of scripts/ with a `main`, and what each is for: its docstring's beginning.

    They are read, not imported: most import JAX.
    """
    verbs = {}
    for path in sorted((root / "scripts").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            paragraph = (ast.get_docstring(tree) or "").partition("\n\n")[0]
            verbs[path.stem] = " ".join(paragraph.split())
    return verbs


def split_verb(arguments: list[str], verbs: dict[str, str]) -> tuple[str | None, list[str]]:
    """The module that the first words name, and the arguments after them; None: none is named.

    "gpu-report" is gpu_report, and "bench cpu" is bench_cpu.
    """
    for count in (1, 2):
        name = "_".join(arguments[:count]).replace("-", "_")
        if len(arguments) >= count and name in verbs:
            return name, arguments[count:]
    return None, arguments


def shown(name: str) -> str:
    """A verb as one types it: "gpu-report", "bench cpu"."""
    return name.replace("_", " " if name.startswith("bench_") else "-")


def describe(verbs: dict[str, str]) -> str:
    """The list of the verbs, each with its purpose."""
    width = max(map(len, verbs)) + 4
    lines = ["usage: moesaic VERB ...", "", "moesaic VERB --help says more of each:", ""]
    for name, purpose in verbs.items():
        first, others = f"  {shown(name)}".ljust(width), " " * width
        lines += textwrap.wrap(purpose, 98, initial_indent=first, subsequent_indent=others)
    return "\n".join(lines)


def _unknown(arguments: list[str], verbs: dict[str, str]) -> str:
    if not arguments:
        return "name a verb (moesaic --help lists them)"
    from configs.near_names import hint  # of the checkout

    names = list(map(shown, verbs))
    words = " ".join(arguments[:2] if arguments[0] == "bench" else arguments[:1])
    return f"unknown verb {words}{hint(words, {}, names)} (moesaic --help lists them)"


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nobody reads on: ends like SIGPIPE, as the verbs do
        os._exit(128 + signal.SIGPIPE)


def _refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
