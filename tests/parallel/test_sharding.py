"""The sharding table: names to mesh axes, collisions and sizes that don't divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from configs.checks import UserError
from parallel import sharding
from parallel.mesh import AXES, axis_sizes, make_mesh
from parallel.sharding import constrain, named_sharding, on_shards, partition_spec


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def test_an_expert_matrix_uses_every_axis_once():
    spec = partition_spec(("layers", "expert", "embed", None, "mlp"))
    assert spec == PartitionSpec(None, "expert", "data", None, "tensor")


def test_two_dims_on_one_mesh_axis_collide(monkeypatch):
    with pytest.raises(
        ValueError, match=r"'heads' and 'mlp' .* both map to the mesh axis 'tensor'"
    ):
        partition_spec(("heads", "mlp"))
    monkeypatch.setitem(sharding.RULES, "embed", "expert")
    with pytest.raises(ValueError, match="'expert'"):
        partition_spec(("expert", "embed", "mlp"))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown logical axis 'hidden'"):
        partition_spec(("hidden",))


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(UserError, match=r"w has 6 along 'mlp'.*size 4"):
        named_sharding(abstract_mesh(1, 1, 4), ("embed", "mlp"), (8, 6), "w")


def test_constrain_leaves_what_does_not_divide_whole():
    x = jnp.arange(6.0).reshape(3, 2)
    with jax.set_mesh(make_mesh(2, 2, 1)):
        np.testing.assert_array_equal(jax.jit(lambda x: constrain(x, "batch", None))(x), x)


def test_too_many_devices_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="needs 16 devices, found 8"):
        make_mesh(4, 4, 1)


def test_axis_sizes_without_a_mesh_are_one():
    assert axis_sizes() == {"data": 1, "expert": 1, "tensor": 1}
    with jax.set_mesh(make_mesh(2, 4, 1)):
        assert axis_sizes() == {"data": 2, "expert": 4, "tensor": 1}


@pytest.mark.parametrize(("batch", "seen"), [(8, (2, 6, 2)), (3, (3, 6, 4))])
def test_on_shards_gives_each_device_its_part_or_all_of_what_does_not_divide(batch, seen):
    x = jnp.arange(batch * 6 * 4, dtype=jnp.float32).reshape(batch, 6, 4)
    shapes = []

    def double(x):
        shapes.append(x.shape)
        return 2 * x

    axes = ("batch", "length", "heads")
    with jax.set_mesh(make_mesh(2, 2, 2)):
        y = jax.jit(lambda x: on_shards(double, [x], [axes], axes))(x)
    np.testing.assert_array_equal(y, 2 * x)
    assert shapes == [seen]


def test_on_shards_without_a_mesh_is_a_call():
    assert on_shards(lambda x: x + 1, [jnp.zeros((2,))], [("batch",)], ("batch",)).shape == (2,)
