"""Random small models of each family: the logits that transformers computed (recorded by
parity/record_fuzz.py), or a sentence that names what is not built; never others.

Tolerance 1e-5 of the largest logit, float32 both: what is left is the order of sums.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.checks import UserError
from infer.logits import full_logits
from infer.sources import open_source
from tests.checkpoint.cases import PARITY
from tests.checkpoint.parity.weights import draw

FAMILIES = sorted(path.stem for path in (PARITY / "fuzz").glob("*.npz"))
TOLERANCE = 1e-5
LENGTH = 24
LEAST = 6
"""Of 12 models that must agree, so that refusing is not all there is."""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sampled
def test_agrees_with_transformers_or_is_refused(family: str, tmp_path: Path):
    with np.load(PARITY / "fuzz" / f"{family}.npz") as recorded:
        cases, logits = json.loads(recorded["cases"].tobytes()), recorded["logits"]
    assert len(cases) >= 10
    agreed = 0
    for number, (config, shapes) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        expected = logits[number]
        tokens = np.random.RandomState(1).randint(0, config["vocab_size"], LENGTH)
        try:
            source = open_source(str(folder))
            model, variables = source.load()
        except UserError as error:
            assert len(str(error)) < 600  # noqa: PT017
            print(f"{family} {number}: {error}")
            continue
        found = full_logits(model, variables, tokens.tolist())[-len(expected) :]
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max(), config
        agreed += 1
    print(f"{family}: {agreed} of {len(cases)} agree")
    assert agreed >= LEAST
