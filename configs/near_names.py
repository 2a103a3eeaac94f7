"""Suggestions for mistyped settings: abbreviations and prefixes before spelling."""

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

LIKENESS = 0.7
"""Below it a name is no guess but noise."""
SYNONYMS = {
    "hidden-size": "d-model",
    "hidden-dim": "d-model",
    "intermediate-size": "d-ff",
}
"""What other frameworks call ours."""


def setting_names(config: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Each setting of a config as the command line spells it, with its value: "--data.seq-len"."""
    if dataclasses.is_dataclass(config):
        pairs = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    elif isinstance(config, tuple) and any(map(dataclasses.is_dataclass, config)):
        pairs = [(str(i), member) for i, member in enumerate(config)]
    else:
        yield prefix.removesuffix("."), config
        return
    for name, value in pairs:
        yield from setting_names(value, f"{prefix}{name.replace('_', '-')}.")


def hint(wanted: str, settings: dict[str, Any], own: Iterable[str] = ()) -> str:
    """What to say beside "unknown option --optimizer.lr": "; did you mean ...?", or nothing.

    Args:
      settings: of the run, by name, with their values.
      own: the verb's further options, such as "--run-dir".
    """
    wanted = wanted.partition("=")[0].replace("_", "-").lower()
    for name, value in settings.items():
        if value is None and wanted.startswith(f"{name}."):
            return f": {name.removeprefix('--')} is None in this run, so it has no settings"
    names = [*settings, *own]
    best = max(names, key=lambda name: likeness(wanted, name), default="")
    if best and likeness(wanted, best) >= LIKENESS:
        return f": did you mean {best}?"
    section = wanted.rpartition(".")[0]
    members = [name for name in settings if section and name.rpartition(".")[0] == section]
    return f": there are {', '.join(members)}" if members else ""


def likeness(wanted: str, name: str) -> float:
    """How much an option looks like what was typed, 0 to 1; a little less in another section."""
    (*section, typed), (*home, leaf) = (x.removeprefix("--").split(".") for x in (wanted, name))
    alike = difflib.SequenceMatcher(None, ".".join(section), ".".join(home)).ratio()
    distance = 0.02 * len(home) if not section else 0.15 * (1 - alike)
    return _leaf_likeness(SYNONYMS.get(typed, typed), leaf) - distance


def _leaf_likeness(typed: str, leaf: str) -> float:
    words, parts = typed.split("-"), leaf.split("-")
    if typed.replace("-", "") == leaf.replace("-", ""):
        return 1.0
    if len(parts) > 1 and typed == "".join(part[0] for part in parts):
        return 0.98  # "lr" of learning-rate
    short, long = sorted((words, parts), key=len)
    if _abbreviates(short, long):
        return 0.94 - 0.02 * (len(long) - len(short))
    return 0.92 * difflib.SequenceMatcher(None, typed, leaf).ratio()


def _abbreviates(words: list[str], parts: list[str]) -> bool:
    """Whether each word shares its beginning with one of the parts, in order: "seq-length" and
    "seq-len", "layers" and "num-layers"."""
    return any(
        all(map(_begin_alike, words, chosen))
        for chosen in itertools.combinations(parts, len(words))
    )


def _begin_alike(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    return a == b or (len(short) > 1 and long.startswith(short))
