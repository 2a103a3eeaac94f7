"""Low-rank adapters (LoRA, Hu et al. 2021): which matrices have one, their arrays, and the sum.

They are a collection of their own, "adapters", in a tree like the parameters, with {"a", "b"} in
place of each matrix that has one:

    w [S..., I..., P..., O...]    a [S..., I..., P..., r]    b [S..., P..., r, O...]

S stacks matrices (layers, experts), I are inputs and O outputs; P are the parts that lie side by
side in one parameter, keys and values, gate and up: each has its own adapter, as each is a matrix
of its own in public checkpoints. The model multiplies by both (model/layers.py: project); `merge`
adds the product to the matrix, which gives the same function.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from configs.checks import require
from configs.tuning import ADAPTER_TARGETS, AdapterTarget, LoRAConfig
from kernels.quantize import MatrixDims
from model.seeds import seed_key
from model.transformer import Transformer, Variables, abstract_variables, weight_dims
from parallel.sharding import LogicalAxes

ABSORBED = {"kv_up": MatrixDims(1, 2)}
"""Matrices that stay in floats, since decoding multiplies queries by them (latent attention)."""

EXPERT_MATRICES = ("gate_up", "down")

Path = tuple[str, ...]
"""Keys that lead to a parameter."""


class AdaptedMatrix(NamedTuple):
    """A parameter that can have an adapter, and how many of its dimensions are of each kind."""

    shape: tuple[int, ...]
    axes: LogicalAxes
    stack: int
    inputs: int
    parts: int

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Of the stack, the inputs, the parts and the outputs."""
        ends = (0, self.stack, self.stack + self.inputs, self.stack + self.inputs + self.parts)
        return tuple(self.shape[a:b] for a, b in zip(ends, (*ends[1:], None), strict=True))

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        stack, inputs, parts, outputs = self.sizes()
        return {"a": (*stack, *inputs, *parts, rank), "b": (*stack, *parts, rank, *outputs)}

    def logical_axes(self) -> dict[str, LogicalAxes]:
        """As `shapes`; the rank is never split."""
        first = self.stack + self.inputs
        stack, outputs = self.axes[: self.stack], self.axes[first + self.parts :]
        parts = (None,) * self.parts
        return {
            "a": (*self.axes[:first], *parts, None),
            "b": (*stack, *parts, None, *outputs),
        }

    def product(self, adapter: dict[str, jax.Array]) -> jax.Array:
        """a @ b in the shape of the parameter, float32."""
        stack, inputs, parts, outputs = (math.prod(sizes) for sizes in self.sizes())
        a_SIPr = adapter["a"].reshape(stack, inputs, parts, -1).astype(jnp.float32)
        b_SPrO = adapter["b"].reshape(stack, parts, -1, outputs).astype(jnp.float32)
        return jnp.einsum("sipr,spro->sipo", a_SIPr, b_SPrO).reshape(self.shape)


def adapted_matrices(
    model: Transformer, targets: Iterable[AdapterTarget] = ()
) -> dict[Path, AdaptedMatrix]:
    """The parameters that get an adapter.

    Args:
      targets: see LoRAConfig.
    Raises:
      UserError: the model has none of a kind that is named.
    """
    abstract, axes = abstract_variables(model)
    dims = _flat(weight_dims(model), is_leaf=lambda x: x is None or isinstance(x, MatrixDims))
    axes_of = _flat(axes["params"], is_leaf=lambda x: isinstance(x, tuple))
    found: dict[AdapterTarget, dict[Path, AdaptedMatrix]] = {name: {} for name in ADAPTER_TARGETS}
    for path, x in _flat(abstract["params"]).items():
        target, own = target_of(path), dims[path] or ABSORBED.get(path[-1])
        if target is not None and own is not None:
            found[target][path] = _matrix(x.shape, axes_of[path], own)
    wanted = tuple(targets) or tuple(name for name in ADAPTER_TARGETS if found[name])
    for name in wanted:
        require(
            bool(found[name]), f"lora.targets has {name!r}, and the model has none: leave it out"
        )
    return {path: matrix for name in wanted for path, matrix in found[name].items()}


def target_of(path: Path) -> AdapterTarget | None:
    """What a layer's parameter is a matrix of; None of what gets no adapter, such as routers."""
    layer = path[2:] if path[0] == "periods" else path[1:]
    if len(path) < 2 or not (path[0] == "periods" or path[0].startswith("prefix_")):
        return None
    match layer:
        case ("attention", _):
            return "attention"
        case ("ffn", _) | ("moe", "shared", _):
            return "dense"
        case ("moe", name) if name in EXPERT_MATRICES:
            return "experts"
    return None


def _matrix(shape: tuple[int, ...], axes: LogicalAxes, dims: MatrixDims) -> AdaptedMatrix:
    stack = len(shape) - dims.inputs - dims.outputs
    outputs = axes[stack + dims.inputs :]
    # Outputs without a name stack matrices (model/layers.py: weight), if others have one.
    parts = sum(name is None for name in outputs) if any(outputs) else 0
    return AdaptedMatrix(shape, axes, stack, dims.inputs, parts)


def abstract_adapters(model: Transformer, config: LoRAConfig) -> tuple[Any, Any]:
    """The adapters as ShapeDtypeStructs, and the tree of their logical axes."""
    matrices = adapted_matrices(model, config.targets)

    def arrays(matrix: AdaptedMatrix) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = matrix.shapes(config.rank)
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    return _tree(matrices, arrays), _tree(matrices, AdaptedMatrix.logical_axes)


def init_adapters(model: Transformer, config: LoRAConfig, seed: int) -> Any:
    """Fresh adapters: A from a normal distribution of variance 1 / inputs, B zero, so that the
    model is what it was.
    """
    matrices = adapted_matrices(model, config.targets)
    keys = dict(zip(matrices, jax.random.split(seed_key(seed), len(matrices)), strict=True))
    drawn = {}
    for path, matrix in matrices.items():
        shapes, num_inputs = matrix.shapes(config.rank), math.prod(matrix.sizes()[1])
        a = jax.random.normal(keys[path], shapes["a"], jnp.float32) * num_inputs**-0.5
        drawn[path] = {"a": a, "b": jnp.zeros(shapes["b"], jnp.float32)}
    return _tree(drawn, lambda x: x)


def scaled(adapters: Any, scale: float) -> Any:
    """The collection as the model takes it: the factor alpha / rank is in B."""

    def walk(tree: Any) -> Any:
        if "b" in tree and not isinstance(tree["b"], dict):
            return tree | {"b": scale * tree["b"]}
        return {name: walk(part) for name, part in tree.items()}

    return walk(adapters)


def merge(model: Transformer, variables: Variables) -> Variables:
    """Variables without adapters that compute the same: each product is added to its matrix.

    Args:
      variables: with the collection "adapters", scaled; parameters in floats.
    """
    held = _flat(variables["adapters"])
    matrices = adapted_matrices(model)

    def add(path: Any, x: jax.Array) -> jax.Array:
        own = tuple(key.key for key in path)
        if (*own, "a") not in held:
            return x
        product = matrices[own].product({name: held[(*own, name)] for name in ("a", "b")})
        return (x.astype(jnp.float32) + product).astype(x.dtype)

    merged = jax.tree_util.tree_map_with_path(add, variables["params"])
    others = {name: part for name, part in variables.items() if name != "adapters"}
    return others | {"params": merged}


def _flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _tree(by_path: dict[Path, Any], make: Callable[[Any], Any]) -> Any:
    """Nested dicts from paths."""
    tree: dict[str, Any] = {}
    for path, value in by_path.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = make(value)
    return tree
