"""The program of a step of a run, compiled for a mesh whose devices need not exist.

Arguments are shapes with shardings; nothing is allocated. The three steps are those that training
and generation run: train/step.py, and a prompt or a token of each row through infer/steps.py.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from configs.base import RunConfig
from configs.checks import UserError
from infer.load import inference_model
from infer.steps import StateSize, decode, empty_state, read_prompts
from model.model_state import state_axes
from model.transformer import Transformer, abstract_variables
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
    """Whole prompts side by side, into a state of data.seq_len tokens each."""
    model, variables, size = _inference(run, mesh)
    rows = _rows(mesh, (run.batch_size, run.data.seq_len), "the prompts")

    shardings = _state_shardings(mesh, model, size)
    state = _placed(jax.eval_shape(lambda: empty_state(model, size)), shardings)

    def run_step(variables, tokens, positions, state):
        return read_prompts(model, variables, tokens, positions, state)

    function = jax.jit(run_step, donate_argnums=3, out_shardings=(None, shardings))
    arguments = {"variables": variables, "tokens": rows, "positions": rows, "cache": state}
    run = dataclasses.replace(run, execution=model.execution)
    return _Made(run, function, arguments, run.batch_size * run.data.seq_len)


def _decode(run: RunConfig, mesh: Mesh) -> _Made:
    """A token of each row, through a state of data.seq_len tokens, whose buffers are reused."""
    model, variables, size = _inference(run, mesh)
    shardings = _state_shardings(mesh, model, size)
    state = _placed(jax.eval_shape(lambda: empty_state(model, size)), shardings)
    batch = run.batch_size
    rows = _rows(mesh, (batch,), "the rows")

    def run_step(variables, token, position, state):
        return decode(model, variables, token, position, state, None, None)[:2]

    arguments = {"variables": variables, "tokens": rows, "positions": rows, "cache": state}
    function = jax.jit(run_step, donate_argnums=3, out_shardings=(None, shardings))
    run = dataclasses.replace(run, execution=model.execution)
    return _Made(run, function, arguments, batch)


def _inference(run: RunConfig, mesh: Mesh) -> tuple[Transformer, Any, StateSize]:
    """The run's model, its abstract variables, and the size of a state for its batch."""
    model = inference_model(run)
    abstract, logical_axes = abstract_variables(model)
    variables = _placed(abstract, tree_shardings(mesh, logical_axes, abstract))
    size = StateSize(run.batch_size, run.data.seq_len, model.execution.compute_dtype)
    return model, variables, size


def _rows(mesh: Mesh, shape: tuple[int, ...], name: str) -> jax.ShapeDtypeStruct:
    axes = ("batch", *[None] * (len(shape) - 1))
    sharding = named_sharding(mesh, axes, shape, name)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def _state_shardings(mesh: Mesh, model: Transformer, size: StateSize) -> Any:
    """Rows lie where the batch's do, and keys and values of a head where its weights are."""
    state = jax.eval_shape(lambda: empty_state(model, size))
    flat, tree = jax.tree.flatten(state)
    axes = tree.flatten_up_to(state_axes(state))

    def sharding(x: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        is_split = (
            "kv_heads" not in names or x.shape[names.index("kv_heads")] % mesh.shape["tensor"]
        )
        kept = tuple(None if n == "kv_heads" and is_split else n for n in names)
        return named_sharding(mesh, kept, x.shape, "the state")

    return jax.tree.unflatten(tree, [sharding(x, n) for x, n in zip(flat, axes, strict=True)])


def _placed(abstract: Any, shardings: Any) -> Any:
    def one(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, abstract, shardings)


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
