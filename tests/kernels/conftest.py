"""What the tests of the native kernels share."""

from collections.abc import Iterator

import pytest

from kernels import native


@pytest.fixture(params=["amx", "avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine, one after the other."""
    before = native.isa()
    if not native.use_isa(request.param):
        pytest.skip(f"this processor or this build has no {request.param}")
    yield request.param
    native.use_isa(before)
