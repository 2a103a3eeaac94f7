"""A model as it scores and generates: its execution, its abstract variables on a mesh."""

import dataclasses
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from configs.base import ExecutionConfig, RunConfig
from infer.weights import WeightFormat, sharding_for
from model.depth import with_threshold_selection
from model.transformer import Transformer, Variables, abstract_variables
from parallel.sharding import tree_shardings

Dtype = Literal["float32", "bfloat16"]
"""Of parameters and of the computation; routers stay float32."""


def inference_model(run: RunConfig) -> Transformer:
    """The run's model as it scores and generates: causal (its Mixture-of-Depths layers choose token
    by token), nothing kept for a backward pass, tokens gathered where the experts are.
    """
    return Transformer(with_threshold_selection(run.model), inference_execution(run.execution))


def inference_execution(execution: ExecutionConfig = ExecutionConfig()) -> ExecutionConfig:
    """Nothing kept for a backward pass, tokens gathered where the experts are."""
    return dataclasses.replace(execution, transport="gather", capacity_factor=None, remat="none")


def abstract_on_mesh(
    model: Transformer,
    mesh: Mesh | None,
    dtype: Dtype = "float32",
    weights: WeightFormat = "float32",
) -> Variables:
    """The model's abstract variables with shardings, its parameters in the dtype.

    Args:
      mesh: where they go; None is the first device of this process.
      weights: the format they get once they are there (infer/weights.py), which says how they can
        be split.
    Raises:
      UserError: the mesh does not divide a dimension it splits.
    """
    abstract, axes = abstract_variables(model)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), abstract)
    else:
        shardings = tree_shardings(mesh, axes, abstract)
        if weights != "float32":
            shardings = jax.tree_util.tree_map_with_path(
                sharding_for(model, weights, mesh), shardings
            )

    def abstract_leaf(path: Any, x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        kept = path[0].key != "params"
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype if kept else jnp.dtype(dtype), sharding=sharding
        )

    return cast(Any, jax.tree_util.tree_map_with_path(abstract_leaf, abstract, shardings))
