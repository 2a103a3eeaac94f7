"""The engine on layers that read the keys of others and embeddings for each layer, and on layers
that take another's choice of keys: a text is the same alone and among others, from slots and pages,
with keys in int8, and on a mesh.
"""

import dataclasses

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from infer.generate import generate
from infer.load import abstract_on_mesh
from infer.sampling import Sampling
from model.transformer import Transformer
from parallel.mesh import make_mesh
from tests import tiny
from tests.model import test_indexer, test_shared_keys
from tests.probes import drawn

SPARSE = dataclasses.replace(
    test_indexer.SPARSE,
    num_heads=4,
    indexer=dataclasses.replace(test_indexer.SPARSE.indexer, num_heads=4),
)
OWN, SHARING = (
    LayerSpec(attention=dataclasses.replace(SPARSE, shares_indexer=x), ffn=tiny.moe())
    for x in (False, True)
)
MODELS = {
    "keys": Transformer(dataclasses.replace(test_shared_keys.CONFIG, context_length=64)),
    "indexer": Transformer(
        tiny.model(pattern=(OWN, SHARING, SHARING), num_layers=6, context_length=64)
    ),
}
VARIABLES = {name: drawn(model.config, seed=3) for name, model in MODELS.items()}
START = [0, *range(100, 116)]
PROMPTS = [[0, 5, 17, 200], [*START, 4, 9], [0, 3], [*START, 4, 9, 30]]
NEW = 10


def run(kind, prompts, sampling, variables=None, **options):
    options = {"rows": 2, "piece": 16} | options
    model, variables = MODELS[kind], VARIABLES[kind] if variables is None else variables
    made = generate(model, variables, prompts, max_new_tokens=NEW, sampling=sampling, **options)
    return made.tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_texts_among_others_in_pages_and_from_a_kept_beginning(kind):
    hot = [Sampling(1.0, top_p=0.9, seed=i) for i in range(len(PROMPTS))]
    together = run(kind, PROMPTS, hot)
    assert run(kind, PROMPTS[1:2], hot[1]) == together[1:2]
    greedy = run(kind, PROMPTS, Sampling())
    assert run(kind, PROMPTS, Sampling(), num_pages=4) == greedy
    rounded = run(kind, PROMPTS, Sampling(), kv_dtype="int8")
    same = [a == b for x, y in zip(greedy, rounded, strict=True) for a, b in zip(x, y, strict=True)]
    assert np.mean(same) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes"), [("keys", (1, 4, 1)), ("keys", (1, 2, 2)), ("indexer", (1, 2, 2))]
)
def test_a_mesh_generates_what_one_device_does(kind, sizes):
    mesh = make_mesh(*sizes)
    abstract = abstract_on_mesh(MODELS[kind], mesh)
    variables = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), VARIABLES[kind], abstract)
    assert run(kind, PROMPTS, Sampling(), variables, mesh=mesh) == run(kind, PROMPTS, Sampling())
