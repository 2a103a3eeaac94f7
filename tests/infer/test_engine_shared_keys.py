"""The engine on layers that read the keys of others and embeddings for each layer: a text is the
same alone and among others, from slots and pages, with keys in int8, and on a mesh.
"""

import dataclasses

import jax
import numpy as np
import pytest

from infer.generate import generate
from infer.load import abstract_on_mesh
from infer.sampling import Sampling
from model.transformer import Transformer
from parallel.mesh import make_mesh
from tests.model.test_shared_keys import CONFIG
from tests.probes import drawn

MODEL = Transformer(dataclasses.replace(CONFIG, context_length=64))
VARIABLES = drawn(MODEL.config, seed=3)
START = [0, *range(100, 116)]
PROMPTS = [[0, 5, 17, 200], [*START, 4, 9], [0, 3], [*START, 4, 9, 30]]
NEW = 10


def run(prompts, sampling, variables=VARIABLES, **options):
    options = {"rows": 2, "piece": 16} | options
    made = generate(MODEL, variables, prompts, max_new_tokens=NEW, sampling=sampling, **options)
    return made.tokens


@pytest.mark.slow
def test_texts_among_others_in_pages_and_from_a_kept_beginning():
    hot = [Sampling(1.0, top_p=0.9, seed=i) for i in range(len(PROMPTS))]
    together = run(PROMPTS, hot)
    assert run(PROMPTS[1:2], hot[1]) == together[1:2]
    greedy = run(PROMPTS, Sampling())
    assert run(PROMPTS, Sampling(), num_pages=4) == greedy
    rounded = run(PROMPTS, Sampling(), kv_dtype="int8")
    same = [a == b for x, y in zip(greedy, rounded, strict=True) for a, b in zip(x, y, strict=True)]
    assert np.mean(same) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("data", "expert", "tensor"), [(1, 4, 1), (1, 2, 2)])
def test_a_mesh_generates_what_one_device_does(data, expert, tensor):
    mesh = make_mesh(data, expert, tensor)
    abstract = abstract_on_mesh(MODEL, mesh)
    variables = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), VARIABLES, abstract)
    assert run(PROMPTS, Sampling(), variables, mesh=mesh) == run(PROMPTS, Sampling())
