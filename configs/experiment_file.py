"""A user's own file of experiments: `path/my_experiments.py:my_run` names a function in it that
returns a run.

The file is executed as a module of its own. It may import whatever the checkout has, and files that
lie beside it; of two with one name the checkout's is taken.
"""

import contextlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.checks import UserError, require

ENDING = ".py"
MODULE = "experiments_in_"
"""What the names of these modules begin with."""


class ExperimentError(UserError):
    """What a user's own code raised: the sentence, and the user's own traceback in `trace`."""

    def __init__(self, sentence: str, trace: str) -> None:
        super().__init__(sentence)
        self.trace = trace


@dataclass(frozen=True)
class Target:
    """A function in a file."""

    path: Path
    name: str | None
    """None: the command names the file alone."""

    def __str__(self) -> str:
        return str(self.path) if self.name is None else f"{self.path}:{self.name}"


def parse_target(text: str) -> Target | None:
    """The function that "FILE.py:NAME" names; None where the text names no file."""
    path, colon, name = text.rpartition(":")
    if colon and path.endswith(ENDING):
        return Target(Path(path).expanduser(), name or None)
    return Target(Path(text).expanduser(), None) if text.endswith(ENDING) else None


def read_source(target: Target) -> str:
    """The text of the file.

    Raises:
      UserError: it is not there, or is no UTF-8 text.
    """
    try:
        return target.path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{target.path} is no file: give FILE.py:NAME") from error
    except OSError as error:
        raise UserError(f"{target.path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{target.path} is no UTF-8 text: save it as UTF-8") from error


def call_target(target: Target) -> Any:
    """What the function returns.

    Raises:
      ExperimentError: the file or the function raised.
      UserError: no such file or function, or one that needs arguments.
    """
    module = _executed(target)
    functions = public_functions(module)
    there = f"it has {', '.join(functions)}" if functions else "it has none"
    require(
        target.name is not None,
        f"{target.path} is a file of experiments: name a function of it, as {target.path}:NAME; "
        f"{there}",
    )
    function = getattr(module, target.name or "", None)
    require(
        callable(function),
        f"{target.path} has no function {target.name!r} that returns a run: {there}",
    )
    assert callable(function)
    with users_code(target.path):
        needed = [
            name
            for name, x in inspect.signature(function).parameters.items()
            if x.default is x.empty and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
        ]
    require(
        not needed,
        f"{target} needs the arguments {', '.join(needed)}: a run's function takes none, give them "
        "default values",
    )
    with users_code(target.path):
        return function()


def object_of(target: Target) -> Any:
    """What has the name in the file; the file is executed.

    Raises:
      ExperimentError: the file raised.
      UserError: no such file or name.
    """
    module = _executed(target)
    require(
        hasattr(module, target.name or ""),
        f"{target.path} has no {target.name!r}: define or import it there",
    )
    return getattr(module, target.name or "")


def execute(path: Path) -> None:
    """Executes the file for what it adds to the checkout's tables, such as router scores.

    Raises:
      ExperimentError: the file raised.
      UserError: no such file.
    """
    _executed(Target(path, None))


def has_executed() -> bool:
    """Whether this process has executed any such file."""
    return any(name.startswith(MODULE) for name in sys.modules)


def describe_file(target: Target) -> str:
    """A line for each function of the file: its name and what its docstring begins with.

    Raises:
      UserError: as `call_target`.
    """
    functions = public_functions(_executed(target))
    width = max(map(len, functions), default=0)
    return "\n".join(
        f"  {name:<{width}}  {(inspect.getdoc(f) or '').split(chr(10))[0]}".rstrip()
        for name, f in functions.items()
    )


def public_functions(module: types.ModuleType) -> dict[str, Callable[..., Any]]:
    """The functions that a module defines itself, by name, without those of a leading "_"."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def _executed(target: Target) -> types.ModuleType:
    """The file as a module, executed anew."""
    text, path = read_source(target), target.path
    module = types.ModuleType(f"{MODULE}{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    with users_code(path):
        exec(compile(text, str(path), "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def users_code(path: Path) -> Iterator[None]:
    """Makes an ExperimentError of whatever the user's code in this file raises."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _explained(error, path) from error


def _explained(error: BaseException, path: Path) -> ExperimentError:
    """The error in a sentence, with the frames from the user's file on."""
    own = error.__traceback__
    while own is not None and own.tb_frame.f_code.co_filename != str(path):
        own = own.tb_next
    lines = [x.lineno for x in traceback.extract_tb(own) if x.filename == str(path)]
    where = f"{path} line {lines[-1]}" if lines else str(path)
    if isinstance(error, UserError):  # of our checks: whose frames say nothing to the user
        frames = [x for x in traceback.extract_tb(own) if x.filename == str(path)]
        return ExperimentError(f"{where}: {error}", "".join(traceback.format_list(frames)))
    trace = "".join(traceback.format_exception(type(error), error, own))
    what = type(error).__name__
    said = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
    return ExperimentError(
        f"{where} raised {said if said.startswith(what) else what}: mend the file", trace
    )
