"""Labels of experts: NPMI by hand, domains that can't be, and the road to a preference."""

import json

import numpy as np
import pytest

from configs.checks import UserError
from evals.expert_domains import (
    FILE,
    STDLIB_DOMAINS,
    _batches,
    label_experts,
    npmi,
    read_domains,
    read_preference,
    sort_documents,
)
from infer.generate import generate
from infer.run_weights import load_model
from infer.score import score_documents
from tests import tiny
from train.loop import fit
from train.report import draw_domains


def test_npmi_by_hand():
    """Two domains, three experts; the second domain has ten times the text of the first."""
    counts = np.array([[6, 2, 0], [20, 40, 20]])
    # Shares 3/4 1/4 0 and 1/4 1/2 1/4; joint halves of them; experts 1/2, 3/8, 1/8.
    expected = [
        [np.log(1.5) / -np.log(3 / 8), np.log(2 / 3) / -np.log(1 / 8), -1.0],
        [np.log(0.5) / -np.log(1 / 8), np.log(4 / 3) / -np.log(1 / 4), np.log(2) / np.log(8)],
    ]
    np.testing.assert_allclose(npmi(counts), expected, rtol=1e-12)
    assert npmi(np.array([[5, 0], [0, 5]]))[0].tolist() == [1.0, -1.0]
    unweighted = np.log(6 / 88 / (8 / 88 * 26 / 88)) / -np.log(6 / 88)  # by amount of text: wrong
    assert abs(npmi(counts)[0, 0] - unweighted) > 0.01


def test_domains_that_cant_be_are_refused(tmp_path):
    names = ["xml.dom", "xml", "email.errors", "xmlrpc", "notes/xml.txt"]
    found = sort_documents(names, {"markup": ["xml"], "mail": ["email"]})
    assert found == {"markup": [0, 1], "mail": [2]}  # xmlrpc is another package
    with pytest.raises(UserError, match=r"markup and dom overlap: both have the document xml\.dom"):
        sort_documents(names, {"markup": ["xml"], "dom": ["xml.dom"]})
    with pytest.raises(UserError, match="no held-out document belongs to the domains music"):
        sort_documents(names, {"markup": ["xml"], "music": ["wave"]})
    with pytest.raises(UserError, match="give at least two"):
        sort_documents(names, {"markup": ["xml"]})
    path = tmp_path / "domains.json"
    for text, sentence in (("{", "is not valid JSON"), ('{"a": "xml"}', "write it like")):
        path.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_domains(path)
    path.write_text('{"a": ["xml"], "b": ["email"]}')
    assert read_domains(path) == {"a": ["xml"], "b": ["email"]}


def test_the_built_in_domains_do_not_overlap():
    starts = [start for starts in STDLIB_DOMAINS.values() for start in starts]
    assert len(set(starts)) == len(starts)
    sort_documents(starts, STDLIB_DOMAINS)


def test_rows_hold_every_token_once():
    stream = np.arange(1, 10_001, dtype=np.int32)
    rows = [(t[p >= 0], p) for t, p in _batches(stream, 64, 0)]
    np.testing.assert_array_equal(np.concatenate([t for t, _ in rows]), stream)
    assert all(p.shape == (64, 64) for _, p in rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("domains")
    tiny.write_sources(tmp_path, files=24)
    run = tiny.run(tmp_path, steps=3)
    fit(run, tmp_path / "run")
    return run, tmp_path / "run"


@pytest.mark.slow
def test_the_road_from_labels_to_a_preference(trained):
    run, run_dir = trained
    with pytest.raises(UserError, match=r"python -m scripts.label_experts .* labels them"):
        read_preference(run_dir, "low")
    names = {f"module_{i}" for i in range(24)}
    low = sorted(n for n in names if len(n) == 8)
    domains = {"low": low, "high": sorted(names - set(low))}
    matrices = label_experts(run_dir, domains, threshold=0.0)
    assert [m.shape for m in matrices.values()] == [(2, 8)]
    tree = json.loads((run_dir / FILE).read_text())
    assert tree["domains"] == ["low", "high"]
    label = tree["layers"][0]
    assert label["experts"]["low"] == [e for e, x in enumerate(label["npmi"][0]) if x > 0]
    assert draw_domains(matrices, list(domains)).png.startswith(b"\x89PNG")

    with pytest.raises(UserError, match=r"unknown domain 'middle': .* knows low, high"):
        read_preference(run_dir, "middle")
    with pytest.raises(UserError, match="beta='much'"):
        read_preference(run_dir, "low:much")
    preference = read_preference(run_dir, "low:50")
    wanted = np.asarray(preference["layer_0"])
    assert wanted.shape == (1, 1, 8)
    assert np.flatnonzero(wanted[0, 0]).tolist() == label["experts"]["low"]
    assert wanted.max() == 50

    model, variables = load_model(run, run_dir)
    none = read_preference(run_dir, "low:0")
    scores = [
        score_documents(
            model, variables, [np.arange(60, dtype=np.int32)], length=32, batch_size=2, preference=p
        )[0].nats
        for p in (None, none, preference)
    ]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).any()
    texts = [
        generate(model, variables, [[0, 5, 9]], max_new_tokens=4, preference=p).tokens
        for p in (None, none)
    ]
    assert texts[0] == texts[1]
