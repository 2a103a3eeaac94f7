"""Exact-match completion of one line of held-out functions.

From each function of the held-out Python files one line of code is drawn by a hash of its place.
The model is given everything before the line and its indentation, as far back as its context
reaches, and must write the line, and nothing after it, by greedy decoding. Teacher forcing decides
that: greedy decoding writes the line exactly when the most likely token is right at every place of
it, and one that begins a new line follows.
"""

import ast
import bisect
import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from data.corpora import name_hash
from evals.samples import HeldOut, Load, Task, Tokens
from evals.scoring import EXACT_MATCH
from evals.tasks.base import NotApplicable
from evals.tasks.stdlib_bpb import required_held_out

MAX_EXAMPLES = 1000
"""Lines scored, those of the lowest hash: a standard error of at most 1.6 points."""


@dataclass(frozen=True)
class Example:
    window: np.ndarray
    """int32 tokens: context, the line, the token that begins the next line."""
    num_answer: int
    """Tokens of the line."""
    place: str
    """Module, function and line number."""


def load(settings: Load) -> Sequence[Tokens]:
    """The lines, each behind its context.

    Raises:
      NotApplicable: the held-out files have no Python function to draw a line from, or the
        tokenizer no token that begins a line, or it does not give a file's tokens again.
    """
    held_out = required_held_out(settings)
    newline_ids = begins_line(held_out.tokenizer)
    if not len(newline_ids):
        raise NotApplicable(
            "it needs a byte-level tokenizer, and this run's has no token for a line's end"
        )
    examples = draw_examples(held_out)
    if not examples:
        raise NotApplicable("it needs held-out Python functions, and this run's corpus has none")
    last_ids = tuple(newline_ids.tolist())
    return [
        Tokens(
            key=example.place,
            tokens=example.window,
            num_bytes=0,
            num_answer=example.num_answer + 1,
            last_ids=last_ids,
        )
        for example in examples[: settings.limit]
    ]


def begins_line(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the tokens whose text begins with a line break."""
    newline = "Ċ"  # how byte-level BPE writes byte 10
    return np.array(
        [i for text, i in tokenizer.get_vocab().items() if text.startswith(newline)], np.int32
    )


def draw_examples(held_out: HeldOut) -> list[Example]:
    """The examples, in an order that depends on their places alone."""
    examples = []
    for module, tokens, _ in held_out.tokens.documents():
        text = held_out.tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=False)
        encoding = held_out.tokenizer.encode(text)
        if encoding.ids != tokens[1:].tolist():
            raise NotApplicable(
                f"it needs a tokenizer that gives a text's tokens again, and this run's gives "
                f"others for {module}"
            )
        starts = [start for start, _ in encoding.offsets]
        for function, line_number, begin, end in function_lines(text):
            first = (
                bisect.bisect_right(starts, begin) - 1
            )  # the token that holds the first character
            after = bisect.bisect_left(starts, end)  # the token that begins the next line
            if after >= len(starts) or starts[after] != end:
                continue
            num_answer = after - first
            window = tokens[max(0, after + 2 - held_out.length) : after + 2]
            if num_answer + 2 <= len(window):
                place = f"{module}:{function}:{line_number}"
                examples.append(Example(np.asarray(window, np.int32), num_answer, place))
    examples.sort(key=lambda example: name_hash(example.place))
    return examples[:MAX_EXAMPLES]


def function_lines(text: str) -> Iterator[tuple[str, int, int, int]]:
    """(function, line number, begin, end) of one line of code per function, as text offsets."""
    try:
        tree, code_lines = ast.parse(text), _code_lines(text)
    except (SyntaxError, tokenize.TokenError):  # not Python, or of another version
        return
    lines = text.split("\n")
    offsets = np.concatenate([[0], np.cumsum([len(line) + 1 for line in lines])])
    functions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    for node in functions:
        first, last = node.body[0].lineno, node.end_lineno or node.lineno
        numbers = [n for n in range(first, last + 1) if n in code_lines]
        if not numbers:
            continue
        number = min(numbers, key=lambda n: name_hash(f"{node.name}:{n}"))
        line, begin = lines[number - 1], int(offsets[number - 1])
        yield node.name, number, begin + len(line) - len(line.lstrip()), begin + len(line)


def _code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold one whole logical line of code and nothing after it.

    Strings on their own (docstrings) are left out, and so are lines that end in a comment or
    blanks.
    """
    lines, found, logical = text.split("\n"), set(), []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NEWLINE:
            first, last = logical[0], logical[-1]
            is_whole = first.start[0] == last.end[0] and last.end[1] == len(lines[last.end[0] - 1])
            if is_whole and any(t.type != tokenize.STRING for t in logical):
                found.add(first.start[0])
            logical = []
        elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            logical.append(token)
    return found


LINE_COMPLETION = Task(
    name="line_completion",
    version=1,
    description="Lines of held-out Python functions, completed exactly by greedy decoding.",
    origin="held-out text of the run; for other models a share of this Python's library",
    license="as the text's",
    output_type="loglikelihood",
    metrics=(EXACT_MATCH,),
    load=load,
    needs_held_out=True,
    metadata={"unit": "share of lines"},
)
TASKS = (LINE_COMPLETION,)
