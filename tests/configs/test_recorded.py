"""Configs as an earlier version wrote them beside its runs: read today, with nothing lost.

Recorded by configs.serialization.to_json at commit 022a5bc, before a run had mixtures, chats or an
architecture of its source; those of LATER in November 2026, with what had come by then. Where a
setting is renamed, RENAMED in configs/serialization.py gets a row; these files stay.
"""

import json
from pathlib import Path

import pytest

from configs.base import DataConfig, RunConfig
from configs.serialization import RENAMED, from_json, to_json

FILES = sorted((Path(__file__).parent / "recorded").glob("*.json"))
LATER = ("last_answers", "mixed")
NEW_NAMES = {old: new for renamed in RENAMED.values() for old, new in renamed.items()}


def settings(tree, path=()):
    """Each value of a JSON tree by the names that lead to it, in today's words."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from settings(value, (*path, NEW_NAMES.get(name, name)))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from settings(value, (*path, i))
    else:
        yield path, tree


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recorded_config_is_read_with_each_of_its_values(file):
    text = file.read_text()
    config = from_json(RunConfig, text, where=file.name)
    now = dict(settings(json.loads(to_json(config))))
    recorded = dict(settings(json.loads(text)))
    assert len(recorded) > 60
    assert {path: now.get(path, "lost") for path in recorded} == recorded
    assert from_json(RunConfig, to_json(config), where="again") == config


def test_what_is_new_since_has_the_value_that_means_what_was():
    files = [file for file in FILES if file.stem not in LATER]
    configs = [from_json(RunConfig, file.read_text(), where=file.name) for file in files]
    assert len(configs) == 4
    for config in configs:
        assert config.init.architecture == "run"
        assert (config.objective, config.data.answers) == (None, "each")
        assert (config.data.form, config.data.mixture, config.data.held_out) == ("text", (), None)
        assert config.data.text_field == DataConfig().text_field
