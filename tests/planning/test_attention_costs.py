"""What a long text costs with each kind of attention, against sums by hand."""

import pytest

from docs.examples.attention_costs import kept_bytes, main, models
from model.flops import attention_flops_per_token

TOKENS = 100_000


@pytest.fixture(scope="module")
def made():
    return models()


def test_bytes_are_those_of_the_parts(made):
    """In bfloat16; a position is an int32, values and gates for the next entry are float32."""
    multi_head = 43 * TOKENS * (2 * 64 * 128 * 2 + 4)
    latent = 43 * TOKENS * ((512 + 64) * 2 + 4)
    windows = 43 * 128 * (512 * 2 + 4)
    sparse = 21 * (25_000 * (512 + 128) * 2 + 8 * 2 * 2 * (512 + 128) * 4)
    heavy = 20 * (781 * 512 * 2 + 128 * 2 * 512 * 4)
    assert kept_bytes(made["multi-head"], TOKENS) == multi_head
    assert kept_bytes(made["latent (MLA)"], TOKENS) == latent
    assert kept_bytes(made["compressed (CSA and HCA)"], TOKENS) == windows + sparse + heavy


def test_flops_are_those_of_the_parts(made):
    """Two a product: scores and values of what is seen, the indexer's scores, a token's share of an
    entry."""
    seen = 43 * 128 + 21 * 512 + 20 * 781
    entries = 21 * (64 * 25_000 + 2) * 128 + 21 * 2 * 512 + 20 * 512
    expected = 2 * (seen * 64 * 2 * 512 + entries)
    found = attention_flops_per_token(made["compressed (CSA and HCA)"], TOKENS)
    assert found == expected
    assert attention_flops_per_token(made["multi-head"], TOKENS) == 2 * 43 * TOKENS * 64 * 2 * 128


def test_the_table_names_every_kind(capsys):
    main(["1000"])
    assert "compressed" in capsys.readouterr().out
