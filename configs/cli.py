"""The command line of a run: its name and overrides. The only file that knows tyro.

A run is named by its function in configs/runs.py, or as FILE.py:NAME in a file of the user's own.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence

import tyro

from configs import runs
from configs.base import RunConfig
from configs.checks import UserError, require
from configs.experiment_file import call_target, parse_target, public_functions
from configs.near_names import hint, setting_names
from configs.serialization import RENAMED, differences


def known_runs() -> dict[str, Callable[[], RunConfig]]:
    """The public functions of configs/runs.py by name."""
    return public_functions(runs)


DEPENDENT = {
    ("optimizer", "kind", "adamw"): "momentum",
    ("optimizer", "schedule", "cosine"): "decay_fraction",
    ("execution", "transport", "gather"): "capacity_factor",
}
"""(section, setting, value) -> what has no meaning with it: cleared by who chooses the value."""
_NEW_NAMES = {old: new for renamed in RENAMED.values() for old, new in renamed.items()}


def load_run(
    name: str, overrides: Sequence[str] = (), own_options: Sequence[str] = ()
) -> RunConfig:
    """The named run with overrides such as ["--steps", "500", "--mesh.expert", "4"].

    With --help among them, prints every setting of the run and exits.

    Args:
      own_options: of the verb, to be thought of where an unknown one is near.
    Raises:
      UserError: no such run, no such setting, or a value that is impossible.
    """
    return with_overrides(named_run(name), overrides, name, own_options=own_options)


def named_run(name: str) -> RunConfig:
    """The run of that name without overrides.

    Args:
      name: of a function in configs/runs.py, or FILE.py:NAME.
    Raises:
      UserError: no such run, or a function that returns something else.
      ExperimentError: the user's own file raised.
    """
    target = parse_target(name)
    if target is not None:
        made = call_target(target)
        several = isinstance(made, dict | list | tuple)
        advice = f"moesaic sweep {target} trains them" if several else "return a RunConfig"
        what = "several runs" if several else f"{type(made).__name__} {made!r:.60}"
        require(isinstance(made, RunConfig), f"{target} returned {what}, not one run: {advice}")
        return made
    functions = known_runs()
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"unknown run {name!r}: {guess}There are {', '.join(functions)}; a run of your own is "
            "FILE.py:NAME, and one to go on with its folder"
        )
    return functions[name]()


def with_overrides(
    run: RunConfig,
    overrides: Sequence[str],
    name: str,
    fixed: Sequence[str] = (),
    own_options: Sequence[str] = (),
) -> RunConfig:
    """The run with overrides as on the command line, see `load_run`.

    Args:
      name: of the command, for its help.
      fixed: settings that must stay, such as "model".
      own_options: of the verb, to be thought of where an unknown one is near.
    Raises:
      UserError: no such setting, a value that is impossible, or an override of what must stay.
    """
    changed = _with_overrides(run, overrides, name, own_options)
    for setting in fixed:
        lines = differences(getattr(run, setting), getattr(changed, setting), setting)
        require(
            not lines,
            f"{name} decides {setting}, which can't be overridden ({'; '.join(lines)}): leave "
            f"--{setting}.* out",
        )
    return changed


def _with_overrides(
    run: RunConfig, overrides: Sequence[str], name: str, own_options: Sequence[str]
) -> RunConfig:
    overrides = [_with_new_name(word) for word in overrides]
    default = _without_dependents(run, overrides)
    parse = functools.partial(
        tyro.cli,
        RunConfig,
        prog=name,
        default=default,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    printed, complained = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
            changed, unknown = parse(args=list(overrides), return_unknown_args=True)
    except SystemExit as stop:
        if stop.code:
            raise UserError(_sentence(complained.getvalue())) from None
        sys.stdout.write(printed.getvalue())
        raise
    if unknown:
        raise UserError(_unknown_sentence(unknown, default, own_options))
    return changed


def _with_new_name(word: str) -> str:
    """An option by the name that its setting has now: see RENAMED."""
    option, equals, value = word.partition("=")
    section, _, setting = option.rpartition(".")
    new = _NEW_NAMES.get(setting.replace("-", "_"))
    if new is None or not section.startswith("--"):
        return word
    return f"{section}.{new.replace('_', '-')}{equals}{value}"


def _without_dependents(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run as it was before the overrides, less the settings that they make meaningless.

    So AdamW with a cosine schedule is two words for a run that has Muon's momentum and another's
    decay fraction; what the overrides name themselves stays, to be refused.
    """
    words = [word for text in overrides for word in text.split("=", 1)]
    given = {
        word.replace("_", "-"): value
        for word, value in itertools.pairwise(words)
        if word.startswith("--")
    }
    for section in ("optimizer", "execution"):
        changes = {}
        for (home, setting, value), dependent in DEPENDENT.items():
            option = f"--{section}.{dependent}".replace("_", "-")
            chosen = given.get(f"--{section}.{setting}") == value
            if home == section and chosen and option not in given:
                changes |= {setting: value, dependent: None}
        part = dataclasses.replace(getattr(run, section), **changes)
        run = dataclasses.replace(run, **{section: part})
    return run


def _unknown_sentence(unknown: Sequence[str], run: RunConfig, own_options: Sequence[str]) -> str:
    options = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    if not options:
        return f"unexpected {unknown[0]!r}: settings are given as --name value (--help lists them)"
    settings = dict(setting_names(run))
    sentences = [
        f"unknown option {option}{hint(option, settings, own_options)}" for option in options
    ]
    return f"{'; '.join(sentences)} (--help lists every setting)"


def describe_runs() -> str:
    """One line per run: its name and what its docstring begins with."""
    functions = known_runs()
    width = max(map(len, functions))
    summaries = {name: (inspect.getdoc(f) or "").split("\n")[0] for name, f in functions.items()}
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in summaries.items())


def _sentence(box: str) -> str:
    """One line from tyro's framed message: its first part."""
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
    told = texts[0] if texts else "bad arguments"
    message = re.sub(r"^Error parsing ([A-Za-z][\w. ]*: )?", "", told)
    return f"{message} (--help lists every setting)"
