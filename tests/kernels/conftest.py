"""What the tests of the native kernels share."""

from collections.abc import Iterator

import pytest

from kernels import native

ISAS = ("avx512", "avx2", "baseline")


def in_use(name: str) -> Iterator[str]:
    before = native.isa()
    if not native.use_isa(name):
        pytest.skip(f"this processor, this system or this build has no {name}")
    yield name
    native.use_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine, one after the other."""
    yield from in_use(request.param)


@pytest.fixture(params=("amx", *ISAS))
def isa_or_tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """And tiles (AMX), which only products with weights of fewer bits take."""
    yield from in_use(request.param)
