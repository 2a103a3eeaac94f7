"""Calls of functions in a model's answer, in the forms that models write them in."""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

Call = tuple[str, Mapping[str, Any]]
"""A function's name and its arguments."""


def read_calls(text: str) -> list[Call]:
    """The calls in an answer: a list as Python writes it, [name(argument=value), ...], or JSON
    objects with name and arguments, in tool_call tags, a list or alone. Empty where it has none.
    """
    text = re.sub(r"```(?:json|python|tool_code)?", "", text).strip()
    tagged = re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL)
    for part in ("\n".join(tagged), text) if tagged else (text,):
        for read in (_read_json, _read_python):
            calls = read(part.strip())
            if calls:
                return calls
    return []


def _read_json(text: str) -> list[Call]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            return []
    calls = []
    for row in found if isinstance(found, list) else [found]:
        row = row.get("function", row) if isinstance(row, dict) else row
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            return []
        arguments = row.get("arguments", row.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                return []
        if not isinstance(arguments, dict):
            return []
        calls.append((row["name"], arguments))
    return calls


def _read_python(text: str) -> list[Call]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    calls = []
    for node in nodes:
        if not isinstance(node, ast.Call) or node.args:
            return []
        try:
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        except (ValueError, TypeError):
            return []
        calls.append((ast.unparse(node.func), arguments))
    return calls
