"""Whether the calls of functions in a model's answer are those that were wanted.

The rules are those by which the Berkeley Function-Calling Leaderboard matches calls: names exactly,
required arguments all there and no others than are listed, types as declared, texts without case,
blanks and some punctuation, and each value one of those that are listed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from infer.function_calls import Call

TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "float": (float, int),
    "number": (float, int),
    "boolean": (bool,),
    "array": (list,),
    "tuple": (list,),
    "dict": (dict,),
    "object": (dict,),
}
"""Of Python for the types that functions declare; others take anything."""


def are_wanted(
    calls: Sequence[Call],
    wanted: Sequence[Mapping[str, Mapping[str, Any]]],
    declared: Sequence[Mapping[str, Any]],
) -> bool:
    """Whether each wanted call is there once and no other, in any order.

    Args:
      wanted: for each call its name, and for each argument the values that will do; "" among them
        means that it may be left out.
      declared: the functions, with name and parameters.
    """
    left = list(calls)
    for each in wanted:
        match = next((call for call in left if is_wanted(call, each, declared)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def is_wanted(
    call: Call, wanted: Mapping[str, Mapping[str, Any]], declared: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether one call is the wanted one."""
    ((name, values),) = wanted.items()
    function = next((f for f in declared if f["name"] == name), None)
    if function is None or call[0] != name:
        return False
    arguments, parameters = call[1], function["parameters"]
    properties = parameters["properties"]
    if not set(parameters.get("required", ())) <= set(arguments):
        return False
    given = all(
        argument in properties
        and argument in values
        and _is_of_type(value, properties[argument], values[argument])
        and _is_one_of(value, values[argument])
        for argument, value in arguments.items()
    )
    return given and all("" in values[name] for name in values if name not in arguments)


def _is_of_type(value: Any, declared: Mapping[str, Any], accepted: Sequence[Any] = ()) -> bool:
    """As declared; or as the first accepted value, where that is of another type."""
    types = TYPES.get(declared.get("type", "any"))
    first = next((each for each in accepted if each != ""), "")
    if types is None or (first != "" and type(value) is type(first)):
        return True
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, bool):
        return bool in types
    inner = declared.get("items")
    if isinstance(value, list) and isinstance(inner, Mapping):
        return list in types and all(_is_of_type(item, inner) for item in value)
    return isinstance(value, types)


def _is_one_of(value: Any, accepted: Sequence[Any]) -> bool:
    return any(_is_same(value, each) for each in accepted)


def _is_same(value: Any, accepted: Any) -> bool:
    """Of dictionaries, accepted has a list of values for each key."""
    if isinstance(value, str):
        return isinstance(accepted, str) and _plain(value) == _plain(accepted)
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    if isinstance(value, dict):
        return (
            isinstance(accepted, dict)
            and all(key in accepted and _is_one_of(x, accepted[key]) for key, x in value.items())
            and all("" in accepted[key] for key in accepted if key not in value)
        )
    if isinstance(value, list | tuple):
        return (
            isinstance(accepted, list)
            and len(value) == len(accepted)
            and all(_is_same(a, b) for a, b in zip(value, accepted, strict=True))
        )
    return value == accepted


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
