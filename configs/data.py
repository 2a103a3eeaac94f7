"""Settings of what a run reads: one source or a mixture, how it is cut, what is held out."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, NamedTuple

from configs.checks import require, require_positive

Form = Literal["text", "chat", "preference"]


@dataclass(frozen=True, kw_only=True)
class LaterWeight:
    """What a source's weight becomes."""

    step: int
    """Steps before it counts."""
    weight: float
    """0: the source is read no more."""

    def __post_init__(self) -> None:
        require(
            self.step > 0,
            f"data.mixture has a later weight from step={self.step}: it must be at least 1, the "
            "weight to begin with is `weight`",
        )


class MixturePhase(NamedTuple):
    """Steps of a run in which the weights of its mixture stay what they are."""

    first_step: int
    """Steps before it."""
    weights: tuple[float, ...]
    """Of each source."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the rows, for each source."""
        return tuple(weight / sum(self.weights) for weight in self.weights)


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One source of a mixture."""

    source: str
    """As data.source."""
    weight: float
    """Its share of the rows is this over the sum of all weights; 0 of a source that comes later."""
    later: tuple[LaterWeight, ...] = ()
    """Weights that take the place of `weight` after so many steps, and of each other."""
    suffix: str = ".py"
    """As data.suffix."""
    text_field: str | None = None
    """As data.text_field."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", str(PurePath(self.source)))
        weights = [self.weight, *(each.weight for each in self.later)]
        require(
            min(weights) >= 0 and max(weights) > 0,
            f"the weight {min(weights)} of {self.source} in data.mixture must be greater than 0, "
            "at least in some steps: leave the source out",
        )
        steps = [each.step for each in self.later]
        require(
            steps == sorted(set(steps)),
            f"the later weights of {self.source} in data.mixture are from the steps {steps} on: "
            "name each step once, in their order",
        )

    def weight_at(self, step: int) -> float:
        """The weight in step `step`, from 0."""
        begun = [each.weight for each in self.later if each.step <= step]
        return begun[-1] if begun else self.weight


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is cut."""

    source: str = "stdlib"
    """'stdlib' (this Python's own library), a folder of files, or one file: of text (of a single
    one the last lines are held out), of records (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, a folder
    of Hugging Face's datasets), or of tokens (.npy, Megatron's .bin with its .idx, our own)."""
    suffix: str = ".py"
    """Files of a folder to read."""
    form: Form = "text"
    """What a record holds: text, a chat's messages with their roles, or a preferred and a rejected
    answer to the same messages (docs/data.md)."""
    text_field: str | None = None
    """Of records: the field with the text ("text" if None), or of chats with the list of messages
    ("messages")."""
    answers: Literal["each", "last"] = "each"
    """Of chats: the assistant's turns that the loss counts, each of them or the last one alone."""
    mixture: tuple[MixturePart, ...] = ()
    """Several sources, of which each has its share of the rows; empty: source alone."""
    held_out: str | None = None
    """A source of its own to measure on, as `source`; None holds out a share of `source`."""
    tokenizer: str | None = None
    """A public one: "smollm2", a GGUF file, a tokenizer.json or its folder; None trains one on the
    corpus."""
    directory: str = "runs/corpora/stdlib"
    """Where the tokenizer and the token files lie; made from `source` when missing."""
    seq_len: int = 256
    """Tokens a row feeds to the model, L."""
    order: Literal["shuffled", "streams"] = "shuffled"
    """Of the rows: drawn anew each epoch, or batch_size streams in which each row goes on where the
    one of the step before ended (for models with memory)."""
    holdout_fraction: float = 0.05
    """Share of files or records held out, chosen by a hash of their names."""
    infill_rate: float = 0.0
    """Share of the training documents whose middle stands behind their end, between tokens that say
    so: fill-in-the-middle (data/infilling.py)."""
    max_similarity: float | None = None
    """Leaves out held-out documents whose words, in runs of five, are to more than this share those
    of a training document (MinHash, data/near_duplicates.py). None: none is looked for."""

    def __post_init__(self) -> None:
        for name in ("source", "held_out", "tokenizer", "directory"):
            value = getattr(self, name)
            if value is not None:  # "text/" and "./text" are the folder "text"
                object.__setattr__(self, name, str(PurePath(value)))
        require_positive(self, "seq_len")
        require(
            0 < self.holdout_fraction < 1,
            f"data.holdout_fraction={self.holdout_fraction} must lie between 0 and 1",
        )
        require(
            0 <= self.infill_rate <= 1,
            f"data.infill_rate={self.infill_rate} must lie in [0, 1]",
        )
        require(
            self.form == "text" or not self.infill_rate,
            f"data.infill_rate={self.infill_rate} is for text, data.form is {self.form!r}: leave "
            "it out",
        )
        require(
            self.form == "chat" or self.answers == "each",
            f"data.answers={self.answers!r} is for chats, data.form is {self.form!r}: leave it out",
        )
        require(
            self.max_similarity is None or 0 < self.max_similarity < 1,
            f"data.max_similarity={self.max_similarity} must lie between 0 and 1, or None to look "
            "for no duplicates",
        )
        self._check_mixture()
        require(
            self.held_out is None or self.holdout_fraction == DataConfig.holdout_fraction,
            f"data.holdout_fraction={self.holdout_fraction} has no effect beside data.held_out="
            f"{self.held_out!r}, a source of its own: leave one out",
        )
        require(
            self.form == "text" or self.order == "shuffled",
            f"data.form={self.form!r} needs data.order='shuffled', got {self.order!r}: rows hold "
            "whole chats or answers",
        )

    def _check_mixture(self) -> None:
        if not self.mixture:
            return
        for name in ("source", "suffix", "text_field", "held_out"):
            value, default = getattr(self, name), getattr(DataConfig, name)
            require(
                value == default,
                f"data.{name}={value!r} has no effect beside data.mixture, whose sources have "
                "their own: leave it out",
            )
        sources = [(part.source, part.suffix, part.text_field) for part in self.mixture]
        twice = sorted({source[0] for source in sources if sources.count(source) > 1})
        require(not twice, f"data.mixture names {', '.join(twice)} more than once: add the weights")
        require(
            self.order == "shuffled",
            f"data.order={self.order!r} goes with one source: a mixture's rows are shuffled",
        )
        for phase in self.phases:
            require(
                sum(phase.weights) > 0,
                f"all weights of data.mixture are 0 from step {phase.first_step} on: leave one",
            )

    @property
    def phases(self) -> tuple[MixturePhase, ...]:
        """The weights of the mixture from step to step; none where there is no mixture."""
        steps = sorted({0, *(later.step for part in self.mixture for later in part.later)})
        weights = [tuple(part.weight_at(step) for part in self.mixture) for step in steps]
        return tuple(map(MixturePhase, steps, weights)) if self.mixture else ()

    @property
    def is_mixed(self) -> bool:
        """Whether there is more than one source, or one to measure on."""
        return bool(self.mixture) or self.held_out is not None

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The sources as of a mixture; a single one has all of the rows."""
        single = MixturePart(
            source=self.source, weight=1.0, suffix=self.suffix, text_field=self.text_field
        )
        return self.mixture or (single,)
