"""The command line of a run: its name and overrides. The only file that knows tyro."""

import contextlib
import difflib
import inspect
import io
import re
import sys
from collections.abc import Callable, Sequence

import tyro

from configs import runs
from configs.base import RunConfig
from configs.checks import UserError, require
from configs.serialization import differences


def known_runs() -> dict[str, Callable[[], RunConfig]]:
    """The public functions of configs/runs.py by name."""
    return {
        name: function
        for name, function in inspect.getmembers(runs, inspect.isfunction)
        if function.__module__ == runs.__name__ and not name.startswith("_")
    }


def load_run(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The named run with overrides such as ["--steps", "500", "--mesh.expert", "4"].

    With --help among them, prints every setting of the run and exits.

    Raises:
      UserError: no such run, no such setting, or a value that is impossible.
    """
    functions = known_runs()
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown run {name!r}: {hint}There are {', '.join(functions)}")
    return with_overrides(functions[name](), overrides, name)


def with_overrides(
    run: RunConfig, overrides: Sequence[str], name: str, fixed: Sequence[str] = ()
) -> RunConfig:
    """The run with overrides as on the command line, see `load_run`.

    Args:
      name: of the command, for its help.
      fixed: settings that must stay, such as "model".
    Raises:
      UserError: no such setting, a value that is impossible, or an override of what must stay.
    """
    changed = _with_overrides(run, overrides, name)
    for setting in fixed:
        lines = differences(getattr(run, setting), getattr(changed, setting), setting)
        require(
            not lines,
            f"{name} decides {setting}, which can't be overridden ({'; '.join(lines)}): leave "
            f"--{setting}.* out",
        )
    return changed


def _with_overrides(run: RunConfig, overrides: Sequence[str], name: str) -> RunConfig:
    printed, complained = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
            return tyro.cli(
                RunConfig,
                prog=name,
                default=run,
                args=list(overrides),
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_sentence(complained.getvalue())) from None
        sys.stdout.write(printed.getvalue())
        raise


def describe_runs() -> str:
    """One line per run: its name and what its docstring begins with."""
    functions = known_runs()
    width = max(map(len, functions))
    summaries = {name: (inspect.getdoc(f) or "").split("\n")[0] for name, f in functions.items()}
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in summaries.items())


def _sentence(box: str) -> str:
    """One line from tyro's framed message: its first part, and the suggestion if there is one."""
    lines = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.search(r"[-─]{4,}", line):  # a rule of the frame, with or without a title
            parts.append([])
        elif line:
            parts[-1].append(line)
    texts = [" ".join(part) for part in parts if part]
    if "╭" not in box:  # without Unicode the frame's title stands on a line of its own
        texts = texts[1:]
    message = re.sub(
        r"^Error parsing RunConfig[\w. ]*: ", "", texts[0] if texts else "bad arguments"
    )
    suggestions = [text for text in texts[1:] if text.startswith("Perhaps you meant")]
    options = re.findall(r"--[\w.\-]+", suggestions[0]) if suggestions else []
    if options:
        message += f"; did you mean {options[0]}?"
    return f"{message} (--help lists every setting)"
