"""Collectives: a compiled program's against counts by hand, and times against arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from configs.accelerators import H100
from parallel.mesh import make_mesh
from planning.collectives import Collective, collectives, grouped
from planning.groups import groups_by_axes
from planning.hlo import parse
from planning.work import executed

LAYERS = 5


@pytest.fixture(scope="module")
def found():
    """A loop of five layers, each with the four collectives, on data=2 x expert=4."""
    mesh = make_mesh(data=2, expert=4)

    def layer(x_TD, _):
        gathered_TD = jnp.sin(lax.all_gather(x_TD, "expert", tiled=True))
        x_TD = jnp.sin(lax.psum_scatter(gathered_TD, "expert", tiled=True))
        x_TD = jnp.sin(lax.all_to_all(x_TD, "expert", 0, 0, tiled=True))
        return jnp.sin(lax.psum(x_TD, "data")), None

    def step(x_TD):
        return lax.scan(layer, x_TD, length=LAYERS)[0]

    spec = PartitionSpec(("data", "expert"))
    with jax.set_mesh(mesh):
        sharded = jax.jit(jax.shard_map(step, in_specs=spec, out_specs=spec, check_vma=False))
        text = sharded.lower(jnp.zeros((64, 16))).compile().as_text()
    return collectives(executed(parse(text), lambda _: 1.0), mesh)


PART = 8 * 16 * 4
"""Bytes of x on one device."""


@pytest.mark.parametrize(
    ("kind", "axes", "payload", "sent"),
    [
        ("all-gather", ("expert",), PART, 3 * PART),
        ("reduce-scatter", ("expert",), 4 * PART, 3 * PART),
        ("all-to-all", ("expert",), PART, PART * 3 // 4),
        ("all-reduce", ("data",), PART, PART),
    ],
)
def test_kinds_bytes_and_counts_are_those_of_the_program(found, kind, axes, payload, sent):
    members = grouped(tuple(found))[kind, axes]
    assert sum(c.times for c in members) == LAYERS
    assert sum(c.times * c.payload for c in members) == LAYERS * payload
    assert sum(c.times * c.bytes_sent for c in members) == LAYERS * sent


def test_nothing_else_is_found(found):
    assert len(grouped(tuple(found))) == 4


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("expert",)),
        ("replica_groups=[2,4]<=[8]", ("expert",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("expert",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("expert",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=1] {'a','b'}", ("data", "expert")),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("expert",)),
        ("replica_groups={}", ("data", "expert")),
        ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", ()),
    ],
)
def test_groups_are_read_in_every_way_they_are_written(written, axes):
    text = f"""HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x), channel_id=1, {written}, use_global_device_ids=true
}}
"""
    program = executed(parse(text), lambda _: 1.0)
    (collective,) = collectives(program, make_mesh(data=2, expert=4))
    assert collective.axes == axes


def one(kind: str, axis: str, payload: int) -> Collective:
    """On a mesh of 16 devices, two nodes: data=2 lies across them, expert=4 and tensor=2 inside."""
    mesh = jax.sharding.AbstractMesh((2, 4, 2), ("data", "expert", "tensor"))
    return Collective(kind, "", payload, groups_by_axes(mesh)[axis,], (axis,), 1.0)


def test_times_are_the_slowest_links():
    # Four devices of a node over NVLink: each sends three parts of 450 MB at 450 GB/s.
    inside = one("all-gather", "expert", 450_000_000)
    assert inside.seconds(H100) == pytest.approx(3e-3)
    # Two devices of different nodes: each has one network card of 50 GB/s.
    across = one("all-gather", "data", 50_000_000)
    assert across.seconds(H100) == pytest.approx(1e-3)


def test_a_node_shares_its_cards_in_a_ring_but_not_in_an_exchange():
    mesh = jax.sharding.AbstractMesh((2, 8, 1), ("data", "expert", "tensor"))
    everyone = groups_by_axes(mesh)["data", "expert"]
    ring = Collective("all-gather", "", 400_000_000, everyone, ("data", "expert"), 1.0)
    assert ring.seconds(H100) == pytest.approx(15 * 400e6 / 400e9)  # eight cards of 50 GB/s
    exchange = Collective("all-to-all", "", 400_000_000, everyone, ("data", "expert"), 1.0)
    assert exchange.seconds(H100) == pytest.approx(200e6 / 50e9)  # half of it leaves the node
