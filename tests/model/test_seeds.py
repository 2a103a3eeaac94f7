"""Keys of seeds: all bits count, and small seeds give what they always gave."""

import jax
import pytest

from model.seeds import seed_key


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1])
def test_small_seeds_have_jaxs_own_keys(seed):
    assert (jax.random.key_data(seed_key(seed)) == jax.random.key_data(jax.random.key(seed))).all()


def test_every_bit_counts():
    seeds = [0, 1, *(2**bit for bit in range(1, 63)), 2**63 - 1]
    keys = {tuple(jax.random.key_data(seed_key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
