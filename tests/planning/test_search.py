"""The search: which candidates there are, and that estimates rank as compiled programs do."""

import dataclasses

import pytest

from configs.accelerators import H100
from configs.base import MeshConfig
from configs.checks import UserError
from parallel.mesh import make_mesh
from planning.memory import USABLE
from planning.plan import make_plan
from planning.search import candidates
from tests.planning.runs import moe_run


def small(accelerator_memory: float):
    """An H100 with less memory."""
    return dataclasses.replace(H100, memory=int(accelerator_memory))


def test_every_split_of_the_devices_that_divides_is_tried_once():
    found = [c.run for c in candidates(moe_run(data=8), H100)]
    tried = [(r.mesh.data, r.mesh.expert, r.mesh.tensor, r.execution.remat) for r in found]
    assert len(set(tried)) == len(tried)
    assert {data * expert * tensor for data, expert, tensor, _ in tried} == {8}
    # Two key/value heads: a tensor axis of 1 or 2. Four splits of 8 over data and expert, three
    # of 4; both ways of remat each.
    assert len(tried) == 2 * (4 + 3)


def test_what_fits_comes_before_what_is_faster():
    everything = candidates(moe_run(data=8), H100)
    sizes = sorted(c.estimate.memory for c in everything)
    tight = small(sizes[len(sizes) // 2] / USABLE)
    ranked = candidates(moe_run(data=8), tight)
    fits = [c.estimate.memory <= USABLE * tight.memory for c in ranked]
    assert fits == sorted(fits, reverse=True)
    times = [c.estimate.seconds for c, fit in zip(ranked, fits, strict=True) if fit]
    assert times == sorted(times)


@pytest.mark.slow
def test_recomputing_is_estimated_to_save_what_it_saves():
    """Both ways of remat on one mesh: the estimate's order is the compiled programs'."""
    ranked = {
        c.run.execution.remat: c for c in candidates(moe_run(data=2), H100) if c.run.mesh.data == 2
    }
    mesh = make_mesh(data=2)
    compiled = {
        remat: make_plan(c.run, "train", mesh, H100).memory.total for remat, c in ranked.items()
    }
    assert ranked["full"].estimate.memory < ranked["none"].estimate.memory
    assert compiled["full"] < compiled["none"]


def test_a_batch_that_nothing_divides_is_refused():
    odd = dataclasses.replace(moe_run(), batch_size=7, mesh=MeshConfig(tensor=7))
    with pytest.raises(UserError, match="no mesh of 7 devices divides"):
        candidates(odd, H100)
