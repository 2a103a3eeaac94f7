"""Structured output: grammars that say which tokens may come next, followed to the end or not at
all.

V vocab.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from configs.checks import UserError
from infer.engine import ConstraintFailed
from infer.server.errors import invalid
from infer.server.schemas import ResponseFormat, SamplingFields
from infer.server.token_texts import TokenTexts

COMPILE_SECONDS = 10.0
"""A grammar that takes longer is refused; the library's own bounds on its size come first."""

LIMITS = LLParserLimits(verbose_errors=False)
"""The library's own, its errors without the state of its parser."""


class GrammarConstraint:
    """The engine's Constraint of one text (infer/engine/types.py)."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed_V(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed_V = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if not allowed_V.any():
            raise ConstraintFailed("the grammar allows no token here")
        return allowed_V

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            self._check()
            raise ConstraintFailed(f"the grammar does not allow token {token} here")

    def rollback(self, n: int) -> None:
        if n and not self._matcher.rollback(n):
            raise ConstraintFailed(f"the grammar can't go back {n} tokens")

    def copy(self) -> "GrammarConstraint":
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintFailed(f"the grammar failed: {_sentence(self._matcher.get_error())}")


@dataclass(frozen=True)
class Wanted:
    """A grammar, and the field that asked for it."""

    grammar: str
    param: str


def wanted_grammar(body: SamplingFields, form: ResponseFormat | None) -> Wanted | None:
    """The grammar that the body asks for; None: any text.

    Raises:
      ApiError: two of them, or one without its text.
    """
    found: list[Wanted] = []
    if form is not None and form.type != "text":
        found.append(Wanted(_of_format(form), "response_format"))
    if body.guided_json is not None:
        found.append(Wanted(json_grammar(body.guided_json, "guided_json"), "guided_json"))
    if body.guided_regex is not None:
        found.append(Wanted(LLMatcher.grammar_from_regex(body.guided_regex), "guided_regex"))
    if body.guided_grammar is not None:
        found.append(Wanted(LLMatcher.grammar_from_lark(body.guided_grammar), "guided_grammar"))
    if len(found) > 1:
        names = " and ".join(each.param for each in found)
        raise invalid(f"{names} can't go together: leave one out", found[1].param)
    if found and body.ignore_eos:
        raise invalid(f"ignore_eos and {found[0].param} can't go together: a structure has an end")
    return found[0] if found else None


def _of_format(form: ResponseFormat) -> str:
    fields = {"json_schema": form.json_schema, "regex": form.pattern, "grammar": form.grammar}
    name = {"regex": "pattern"}.get(form.type, form.type)
    if form.type != "json_object" and fields[form.type] is None:
        raise invalid(f"response_format of type {form.type} needs {name}", "response_format")
    if form.type == "json_object":
        return json_grammar({"type": "object"}, "response_format")
    if form.json_schema is not None:
        return json_grammar(form.json_schema.schema_, "response_format")
    if form.type == "regex":
        return LLMatcher.grammar_from_regex(form.pattern or "")
    return LLMatcher.grammar_from_lark(form.grammar or "")


def json_grammar(schema: dict[str, Any] | str | bool, param: str) -> str:
    """The grammar of texts that this JSON schema allows."""
    if isinstance(schema, bool):
        if not schema:
            raise invalid("the schema false allows nothing: give another", param)
        schema = {}
    try:
        return LLMatcher.grammar_from_json_schema(schema)
    except ValueError as error:
        raise invalid(f"{param} is no JSON schema: {_sentence(str(error))}", param) from error


async def compiled(texts: TokenTexts, wanted: Wanted) -> GrammarConstraint:
    """A constraint of this grammar, made on another thread.

    Raises:
      ApiError: a grammar that is malformed, too large or takes too long.
    """

    def compile_it() -> LLMatcher:
        matcher = LLMatcher(texts.guide, wanted.grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some fail only here
        return matcher

    try:
        matcher = await asyncio.wait_for(asyncio.to_thread(compile_it), COMPILE_SECONDS)
    except TimeoutError as error:
        raise invalid(
            f"{wanted.param} took more than {COMPILE_SECONDS:g} s to compile: make it simpler",
            wanted.param,
        ) from error
    except UserError as error:
        raise invalid(str(error), wanted.param) from error
    if matcher.is_error():
        reason = _sentence(matcher.get_error())
        raise invalid(f"{wanted.param} can't be followed: {reason}", wanted.param, "bad_grammar")
    return GrammarConstraint(matcher, texts.vocab_size)


def tool_grammar(tools: list[dict[str, Any]], name: str | None, *, is_tagged: bool) -> str:
    """The grammar of one call of a function, as tool_calls.py reads it.

    Args:
      tools: declarations; with `name` of that function alone.
      is_tagged: whether the model's template writes calls in tool_call tags.
    """
    functions = [t["function"] for t in tools if name in (None, t["function"]["name"])]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": _arguments(function.get("parameters")),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema = json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})
    if not is_tagged:
        return json_grammar(schema, "tools")
    return LLMatcher.grammar_from_lark(
        f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {schema}\n'
    )


def _arguments(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a call's arguments: those that are declared and no others."""
    if not parameters:
        return {"type": "object"}
    is_open = "properties" not in parameters or "additionalProperties" in parameters
    return parameters if is_open else parameters | {"additionalProperties": False}


def _sentence(text: str) -> str:
    """The beginning of a library's message, in one line."""
    return " ".join(text.split())[:300]
