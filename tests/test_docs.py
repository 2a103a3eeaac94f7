"""What the pages promise exists: links, make targets, verbs, runs and settings."""

import re
import shlex
from pathlib import Path

import pytest

import moesaic
from configs.cli import known_runs, load_run
from configs.experiment_file import call_target, parse_target
from scripts.sweep import runs_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [f"examples/width_transfer.py:{name}" for name in ("base_width", "one_rate")]
PROCESS_OPTIONS = ("--coordinator-address", "--num-processes", "--process-id")
COMMAND = re.compile(r"python -m scripts\.(\w+)((?:(?!: )[^`#\n])*)")


def _joined(page: Path) -> str:
    """The page's text with continued lines made one."""
    return page.read_text().replace("\\\n", " ")


def commands() -> list[tuple[str, tuple[str, ...]]]:
    found = {m.groups() for page in PAGES for m in COMMAND.finditer(_joined(page))}
    return sorted((verb, tuple(shlex.split(rest))) for verb, rest in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_return_runs_as_the_pages_name_them(example):
    runs = runs_of(call_target(parse_target(str(ROOT / "docs" / example))))
    assert len(runs) == 15


def test_files_that_additions_touch_exist():
    """Those that the page names whole; NAME, OP and TARGET stand for the reader's."""
    paths = re.findall(
        r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|json))`", _joined(ROOT / "docs/extending.md")
    )
    assert len(paths) > 15
    assert not [path for path in set(paths) if not (ROOT / path).exists()]


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"^ {4}make ([\w.-]+)|`make ([\w.-]+)`", page.read_text(), re.MULTILINE)
        assert {a or b for a, b in named} <= targets, page.name


def test_verbs_of_the_console_command_exist():
    verbs = moesaic.find_verbs(ROOT)
    for page in PAGES:
        for words in re.findall(r"(?:^ {4}|`)moesaic ([^`#\n]+)", _joined(page), re.MULTILINE):
            named = shlex.split(words)
            is_general = named[0] == "VERB" or named[0] in moesaic.HELP
            assert is_general or moesaic.split_verb(named, verbs)[0], f"{page.name}: {words}"


@pytest.mark.parametrize(("verb", "arguments"), commands(), ids=lambda value: str(value))
def test_commands_name_verbs_runs_and_settings_that_exist(verb, arguments):
    assert (ROOT / "scripts" / f"{verb}.py").exists()
    if verb not in ("train", "distill") or not arguments or arguments[0].startswith("-"):
        return
    run, *rest = arguments
    if run == "my_run":  # the page says how to write it
        return
    assert run in known_runs()
    pairs = zip(rest[::2], rest[1::2], strict=False)
    own = ("--run-dir", "--teacher", "--make-cache", "--help", *PROCESS_OPTIONS)
    overrides = [part for pair in pairs if pair[0] not in own for part in pair]
    load_run(run, overrides)
