"""What a task asks of a model, sample by sample, and what the model answers.

Three verbs stand under every task: the log-likelihoods of continuations given a context, the
log-likelihood of a text (rolling), and the text that a model generates for a prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from data.packing import TokenFile

JSON = Any
"""A value that JSON can hold."""


@dataclass(frozen=True)
class Choices:
    """A question whose answer is one of several continuations of a context."""

    key: str
    """Unique in its task, and the same on every machine: results are resumed by it."""
    context: str
    choices: tuple[str, ...]
    """Appended to the context exactly as they are written: a leading space is theirs."""
    answer: int
    """Index of the right one."""
    group: str = ""
    """A language or subject that is reported by itself, too; empty is none."""


@dataclass(frozen=True)
class Text:
    """A text whose bits per byte are measured."""

    key: str
    text: str
    group: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered by generated text."""

    key: str
    prompt: str | tuple[Mapping[str, JSON], ...]
    """Text that is continued, or the messages of a chat (role, content), which need the model's
    chat template."""
    reference: JSON
    """What the scorer compares with."""
    stops: tuple[str, ...] = ()
    """Strings that end the answer and are no part of it."""
    max_new_tokens: int = 256
    num_answers: int = 1
    """More than one are sampled with seeds 0, 1, 2, ..."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    tools: JSON = None
    """Declarations of functions for the chat template."""
    group: str = ""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text in the model's own tokens, of a run's held-out text; only local models score it."""

    key: str
    tokens: np.ndarray
    """int32 [n], n >= 2, the end-of-text token or other context first."""
    num_bytes: int
    """Of the text after its first token."""
    num_answer: int = 0
    """Last tokens that must each be the most likely one in its place."""
    last_ids: tuple[int, ...] = ()
    """Any of which may be the most likely one in the last place; empty: the token itself."""
    group: str = ""


Sample = Choices | Text | Prompt | Tokens


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation given its context."""

    nats: float
    """log p(continuation | context), a sum over tokens."""
    is_greedy: bool
    """Whether each token is the most likely one in its place."""
    num_tokens: int
    num_dropped: int = 0
    """Tokens of the context left out on the left, as the whole exceeded the model's context."""


@dataclass(frozen=True)
class Rolling:
    """Of a whole text, each token given those before it."""

    nats: float
    """log p(text)."""
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class Answer:
    """A generated text and why it ended."""

    text: str
    ended: Literal["stop", "end", "length"]
    """By a stop string, by the model's end of text, or cut at max_new_tokens or the model's
    context."""
    num_tokens: int
    num_dropped: int = 0
    """Tokens of the prompt left out on the left, as it did not fit the model's context."""


class EvaluatedModel(Protocol):
    """The three verbs; answers come in the order of what was asked, batched as the model likes.

    on_answer is called with the index of what was asked and its answer as soon as it is there: that
    is kept when the rest is interrupted.
    """

    def log_likelihoods(
        self,
        pairs: Sequence[tuple[str, str]],
        on_answer: Callable[[int, Likelihood], None] = ...,
    ) -> list[Likelihood]:
        """Of each (context, continuation); both may be empty, not at once."""
        ...

    def rolling(
        self, texts: Sequence[str], on_answer: Callable[[int, Rolling], None] = ...
    ) -> list[Rolling]: ...

    def generate(
        self, prompts: Sequence[Prompt], on_answer: Callable[[int, list[Answer]], None] = ...
    ) -> list[list[Answer]]:
        """num_answers of each prompt."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """A run's held-out text in its own tokens, for the tasks that are made of it."""

    tokenizer: Tokenizer
    tokens: TokenFile
    token_counts_V: Any
    """Occurrences of each token in the training text, int64 [V]."""
    length: int = 1024
    """Tokens that the model reads at once."""


@dataclass(frozen=True)
class Load:
    """How a task's samples are to be made."""

    num_fewshot: int
    seed: int = 0
    """Of the draw of few-shot examples."""
    limit: int | None = None
    """Samples at most, the first ones in the task's own order; a task may stop reading there."""
    held_out: HeldOut | None = None


Aggregation = Literal["mean", "bits_per_byte", "weighted_perplexity", "f1", "mcc"]
"""How samples' values become one, as lm-evaluation-harness names it: by evals/aggregation.py."""


@dataclass(frozen=True)
class Metric:
    """A number of a task."""

    name: str
    """As lm-evaluation-harness writes it: acc, acc_norm, exact_match, pass@1, ..."""
    higher_is_better: bool = True
    filter: str = "none"
    """What was done to the answer first: strict-match, flexible-extract, ..."""
    aggregation: Aggregation = "mean"


OutputType = Literal["multiple_choice", "loglikelihood_rolling", "generate_until", "loglikelihood"]
"""As lm-evaluation-harness names them; the last asks for the most likely tokens (Tokens)."""


@dataclass(frozen=True)
class Task:
    """A benchmark; each file under evals/tasks/ has TASKS, a tuple of tasks and families."""

    name: str
    version: int
    """Raised whenever a change of the task changes its numbers."""
    description: str
    """One line: what is asked, and how it is scored."""
    origin: str
    """Where the data come from: package and file, and the benchmark's publication."""
    license: str
    """Of the data, as their package says it."""
    output_type: OutputType
    metrics: tuple[Metric, ...]
    load: Callable[[Load], Sequence[Sample]]
    """
    Raises:
      NotApplicable: it has nothing to ask of this model.
      UserError: its data are not there and can't be fetched.
    """
    score: Callable[[Prompt, Sequence[Answer]], Mapping[Metric, float]] | None = None
    """Of a generated sample; the other output types are scored by evals/scoring.py. Pure, and the
    same on every machine."""
    num_fewshot: int = 0
    """By default; --num-fewshot overrides it where the task can."""
    runs_code: bool = False
    """Its scorer runs what the model wrote: in the sandbox, or, where it is called with
    unprotected=True, with the rights of this process."""
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    """unit: what the first metric is called in words; num_samples: how many there are without a
    limit; generation_kwargs: how answers are generated, for the results file."""
    needs_held_out: bool = False
    """Load.held_out is given to such tasks alone: it may take a while to make."""
    baselines: Callable[[Load], Mapping[str, float]] | None = None
    """Figures of the same data without a model, such as a compressor's."""


@dataclass(frozen=True)
class Family:
    """Tasks made by name: `bigbench:NAME`."""

    form: str
    """As a user types one: what stands before the colon is the family's name."""
    description: str
    make: Callable[[str], Task]
    """Of what stands after the colon.

    Raises:
      UserError: it names none.
    """

    @property
    def name(self) -> str:
        return self.form.partition(":")[0]
