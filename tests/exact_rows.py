"""Products with few bits that take rows as they are, which models don't do by themselves."""

import functools
from collections.abc import Callable

import jax
import pytest

from infer import logits
from model import experts, layers


def own_programs():
    """`logits._full` without the programs that it has made."""
    return jax.jit(logits._full.__wrapped__, static_argnums=0)


def wrap_products(monkeypatch, wrap: Callable, full):
    """Replaces all functions by which the model multiplies by weights, in the programs of `full`,
    with which logits are made."""
    monkeypatch.setattr(logits, "_full", full)
    for module, name in (
        (layers, "matmul"),
        (experts, "grouped_matmul"),
        (experts, "grouped_swiglu"),
    ):
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))


of_exact_rows = own_programs()


@pytest.fixture
def exact_rows(monkeypatch):
    """Products take rows as they are; on a CPU those that meet few bits are rounded else."""
    as_they_are = functools.partial(functools.partial, activations="float")
    wrap_products(monkeypatch, as_they_are, of_exact_rows)
