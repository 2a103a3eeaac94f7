"""The program of a step of a run, compiled for a mesh whose devices need not exist.

Arguments are shapes with shardings; nothing is allocated. The three steps are those that training
and generation run: train/step.py, and a prompt or a token of each row through infer/generate.py.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.base import RunConfig
from configs.checks import UserError
from infer.generate import decode_step, prefill_step
from infer.load import inference_model
from infer.sampling import Sampling
from model.cache import Cache, init_cache
from model.transformer import abstract_variables
from parallel.sharding import named_sharding, tree_shardings
from train.state import make_train_setup
from train.step import make_train_step

Step = Literal["train", "prefill", "decode"]

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_backend_optimization_level": 0}
"""Without a device nothing can be tuned: matrix products become calls of NVIDIA's library, and
machine code, which only running needs, is made in the quickest way.
"""


@dataclass(frozen=True)
class Program:
    """A compiled step."""

    run: RunConfig
    """As the step executes it: inference has its own transport."""
    step: Step
    mesh: Mesh
    compiled: Any
    arguments: dict[str, int]
    """Bytes on one device of what goes in, by what it is; from shapes and shardings."""
    num_tokens: int
    """That go through the model at once, on all devices: of a micro-batch."""
    trace_seconds: float
    compile_seconds: float
    cpu_seconds: float
    """Of both together, on all cores, without child processes (ptxas): other work on the machine
    doesn't change it.
    """


def compile_step(run: RunConfig, step: Step, mesh: Mesh) -> Program:
    """
    Raises:
      UserError: the mesh does not divide what it splits, or a student, whose step has a teacher's.
    """
    made = {"train": _train, "prefill": _prefill, "decode": _decode}[step](run, mesh)
    device = mesh.devices.flat[0]
    platform = _lowering_platform(device.platform)
    began, cpu_began = time.monotonic(), time.process_time()
    # By the default device the run would choose its kernels (kernels/backend.py).
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_device(device):
        traced = made.function.trace(*made.arguments.values())
    lowered = traced.lower(lowering_platforms=(platform,))
    traced_at = time.monotonic()
    compiled = lowered.compile(compiler_options=GPU_OPTIONS if platform == "cuda" else None)
    return Program(
        run=made.run,
        step=step,
        mesh=mesh,
        compiled=compiled,
        arguments=_bytes_by_name(made.arguments),
        num_tokens=made.num_tokens,
        trace_seconds=traced_at - began,
        compile_seconds=time.monotonic() - traced_at,
        cpu_seconds=time.process_time() - cpu_began,
    )


@dataclass(frozen=True)
class _Made:
    """A jitted function and its arguments by name, in their order."""

    run: RunConfig
    function: Any
    arguments: dict[str, Any]
    num_tokens: int


def _train(run: RunConfig, mesh: Mesh) -> _Made:
    if run.distill is not None:
        raise UserError(
            f"{run.name} learns from a teacher, whose part of the step is not planned: plan the "
            "teacher's run, and the student's with --distill None"
        )
    setup = make_train_setup(run, mesh)
    state = _placed(setup.abstract_state, setup.shardings)
    rows = _rows(mesh, (run.batch_size, run.data.seq_len), "the batch")
    batch = dict.fromkeys(("tokens", "targets", "positions"), rows)
    tokens = run.tokens_per_step // run.accumulation
    return _Made(run, make_train_step(run, setup), {"state": state, "batch": batch}, tokens)


def _prefill(run: RunConfig, mesh: Mesh) -> _Made:
    shape = (run.batch_size, run.data.seq_len)
    rows = _rows(mesh, shape, "the prompts")
    return _inference(run, mesh, prefill_step, rows, math.prod(shape))


def _decode(run: RunConfig, mesh: Mesh) -> _Made:
    rows = _rows(mesh, (run.batch_size,), "the rows")
    return _inference(run, mesh, decode_step, rows, run.batch_size)


def _inference(
    run: RunConfig, mesh: Mesh, step: Callable, rows: jax.ShapeDtypeStruct, num_tokens: int
) -> _Made:
    """A step through caches of data.seq_len tokens, greedy; the cache's buffers are reused."""
    model = inference_model(run)
    abstract, logical_axes = abstract_variables(model)
    variables = _placed(abstract, tree_shardings(mesh, logical_axes, abstract))
    sizes = (run.batch_size, run.data.seq_len, model.execution.compute_dtype)
    is_prefill = step is prefill_step
    cache = jax.eval_shape(lambda: init_cache(model.config, *sizes, for_prompt=is_prefill))
    written = jax.eval_shape(lambda: init_cache(model.config, *sizes))
    cache_shardings = _cache_shardings(mesh, written)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def run_step(variables, tokens, positions, cache, key):
        return step(model, Sampling(), variables, tokens, positions, cache, key, None)

    arguments = {
        "variables": variables,
        "tokens": rows,
        "positions": rows,
        "cache": _placed(cache, _cache_shardings(mesh, cache)),
        "key": _placed(key, NamedSharding(mesh, PartitionSpec())),
    }
    function = jax.jit(run_step, donate_argnums=3, out_shardings=(None, cache_shardings))
    run = dataclasses.replace(run, execution=model.execution)
    return _Made(run, function, arguments, num_tokens)


def _rows(mesh: Mesh, shape: tuple[int, ...], name: str) -> jax.ShapeDtypeStruct:
    axes = ("batch", *[None] * (len(shape) - 1))
    sharding = named_sharding(mesh, axes, shape, name)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def _cache_shardings(mesh: Mesh, cache: Cache) -> Any:
    """Rows lie where the batch's do, and keys and values of a head where its weights are."""

    def shard(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> NamedSharding:
        stack = ("layers",) if path[0] == jax.tree_util.GetAttrKey("periods") else ()
        rest: list[str | None] = [None] * (x.ndim - len(stack) - 1)
        holds_heads = path[-1] in map(jax.tree_util.GetAttrKey, ("k_BSGC", "v_BSGC"))
        if holds_heads and x.shape[-2] % mesh.shape["tensor"] == 0:
            rest[-2] = "kv_heads"
        return named_sharding(mesh, (*stack, "batch", *rest), x.shape, "the cache")

    return jax.tree_util.tree_map_with_path(shard, cache)


def _placed(abstract: Any, shardings: Any) -> Any:
    def place(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, abstract, shardings)


def _bytes_by_name(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes on one device of parameters, optimiser and whatever else goes in."""
    found: dict[str, int] = {}
    for name, tree in arguments.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            kind = _kind(name, path)
            size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            found[kind] = found.get(kind, 0) + size
    return found


def _kind(name: str, path: tuple[Any, ...]) -> str:
    keys = {str(getattr(key, "name", getattr(key, "key", ""))) for key in path[:1]}
    if "params" in keys:
        return "parameters"
    if "opt_state" in keys:
        return "optimiser"
    if name == "cache" or "memory" in keys:
        return "cache"
    return "inputs and routers"


def _lowering_platform(platform: str) -> str:
    """JAX's name of a device's platform where it lowers for it."""
    return "cuda" if platform in ("gpu", "cuda") else platform
