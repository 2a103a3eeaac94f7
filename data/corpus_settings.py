"""Settings that a corpus was made with, in its corpus.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath

from configs.base import DataConfig
from configs.checks import UserError, require
from data.corpora import LeftOut
from data.tokenizers.tokenizer import fingerprint
from formats.small_files import read_record

SETTINGS = "corpus.json"


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What a corpus was made with and of."""

    source: str
    suffix: str
    holdout_fraction: float
    vocab_size: int
    tokenizer: str | None = None
    form: str = "text"
    text_field: str | None = None
    answers: str = "each"
    held_out: str | None = None
    mixture: list[list[str | None]] = field(default_factory=list)
    """Source, suffix and text field of each part; weights are the run's."""
    infill_rate: float = 0.0
    max_similarity: float | None = None
    tokenizer_sha256: str | None = None
    left_out: list[list[str]] | None = None
    """Pairs of a file and why it could not be read; None in a corpus of before that was noted."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that was read, where the sidecars don't list files."""


MADE_WITH = (
    "source",
    "suffix",
    "holdout_fraction",
    "vocab_size",
    "tokenizer",
    "form",
    "text_field",
    "answers",
    "held_out",
    "mixture",
    "infill_rate",
    "max_similarity",
)
"""Fields that a run asks for."""


def settings_of(config: DataConfig, vocab_size: int) -> dict[str, object]:
    """Settings that a corpus is made with, as its corpus.json lists them."""
    values = asdict(config) | {
        "vocab_size": vocab_size,
        "mixture": [[part.source, part.suffix, part.text_field] for part in config.mixture],
    }
    return {name: values[name] for name in MADE_WITH}


def write_settings(
    directory: Path,
    config: DataConfig,
    vocab_size: int,
    tokenizer_sha256: str,
    left_out: Sequence[LeftOut],
    sizes: dict[str, int],
) -> None:
    """Writes corpus.json."""
    made_of = {"tokenizer_sha256": tokenizer_sha256, "left_out": left_out, "sizes": sizes}
    text = json.dumps(settings_of(config, vocab_size) | made_of)
    (directory / SETTINGS).write_text(text)


def check_settings(
    directory: Path, config: DataConfig, vocab_size: int, tokenizer_path: Path
) -> None:
    """
    Raises:
      UserError: the corpus was made with other settings, or has another tokenizer now.
    """
    found = read_settings(directory)
    for name, wanted in settings_of(config, vocab_size).items():
        made_with = getattr(found, name)
        if _plain(name, made_with) != wanted:
            raise UserError(
                f"the corpus in {directory} was made with {name}={made_with!r}, this run asks for "
                f"{wanted!r}: set --data.directory to another folder"
            )
    if tokenizer_path.exists() and found.tokenizer_sha256 not in (
        None,
        fingerprint(tokenizer_path),
    ):
        raise UserError(
            f"{tokenizer_path} is not the tokenizer that the token files beside it were made with: "
            f"delete the folder {directory}, it will be made again"
        )


def read_settings(directory: Path) -> CorpusSettings:
    """
    Raises:
      UserError: the folder holds no corpus, or its corpus.json is damaged.
    """
    mend = f"delete {directory}, it will be made again, or set --data.directory"
    try:
        found = read_record(CorpusSettings, directory / SETTINGS, mend)
    except FileNotFoundError as error:
        raise UserError(f"{directory} is there but holds no corpus ({error}): {mend}") from error
    require(
        all(len(pair) == 2 for pair in found.left_out or ()),
        f"{directory / SETTINGS} has a left_out that is no list of files and reasons: {mend}",
    )
    return found


def _plain(name: str, value: object) -> object:
    """A setting as configs spell it today: "text/" is the folder "text"."""
    if name in ("source", "tokenizer") and isinstance(value, str):
        return str(PurePath(value))
    return value
