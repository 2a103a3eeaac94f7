"""Nothing here uses what jax 0.11 and 0.12 removed or deprecated: the project runs on 0.10 to 0.12.

The lists are what the changelogs of jax and of Pallas say up to 0.11 (July 2026), and what the
modules of 0.10.2 have and those of 0.12.0.1 lack or warn of.
"""

import ast
import functools
import importlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]

REMOVED = {
    "jax": "cloud_tpu_init device_put_replicated device_put_sharded",
    "jax.core": """CallPrimitive DebugInfo DropVar Effect Effects InconclusiveDimensionOperation
        JaxprPpContext JaxprPpSettings JaxprTypeError OutputType abstract_token
        aval_mapping_handlers call check_jaxpr concrete_or_error concretization_function_error
        custom_typechecks
        find_top_trace gensym get_opaque_trace_state is_concrete is_constant_dim is_constant_shape
        jaxprs_in_params literalable_types new_jaxpr_eqn no_axis_name no_effects
        nonempty_axis_env_DO_NOT_USE primal_dtype_to_tangent_dtype trace_ctx
        unsafe_am_i_under_a_jit_DO_NOT_USE unsafe_am_i_under_a_vmap_DO_NOT_USE
        unsafe_get_axis_names_DO_NOT_USE valid_jaxtype""",
    "jax.experimental": "cur_qdd",
    "jax.experimental.hijax": "AvalMutableQDD AvalQDD HiPrimitive MutableHiType VJPHiPrimitive",
    "jax.experimental.pallas": "debug_checks_enabled dot",
    "jax.experimental.pallas.mosaic_gpu": "transform_ref",
    "jax.extend.core": "CallPrimitive call_impl",
    "jax.interpreters.pxla": """ArrayMapping Index MeshAxisName MeshExecutable _UNSPECIFIED
        are_hlo_shardings_equal array_mapping_to_axis_resources global_aval_to_result_handler
        global_result_handlers is_hlo_sharding_replicated op_sharding_to_indices""",
}
DEPRECATED = {
    "jax.core": "pytype_aval_mappings",
    "jax.experimental.pallas": "DeviceIdType core_map ops.gpu reciprocal",
    "jax.experimental.pallas.mosaic_gpu": "transpose_ref",
    "jax.experimental.pjit": "pjit",
    "jax.experimental.shard_map": "shard_map",
    "jax.interpreters.pxla": """MeshComputation global_avals_to_results_handler
        thread_resources""",
    "jax.lax": "precv psend",
    "jax.scipy.special": "lpmn lpmn_values",
}
CHANGED = {"jax.numpy": "empty empty_like"}
"""Zeros up to 0.10, whatever was in memory from 0.11 on."""
TRITON = "jax.experimental.pallas.triton"
"""Deprecated as a whole, and needed: one module may name it."""


def dotted(names: dict[str, str]) -> set[str]:
    return {f"{module}.{name}" for module, listed in names.items() for name in listed.split()}


FORBIDDEN = dotted(REMOVED) | dotted(DEPRECATED) | dotted(CHANGED)


def names_of(source: str) -> Iterator[str]:
    """Every dotted name that the source imports, or reaches through what it imports."""
    tree, imported = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                root = alias.name.split(".")[0]
                imported[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *rest = reversed(list(reached(node)))
            if root in imported:
                yield ".".join((imported[root], *rest))


def reached(node: ast.expr) -> Iterator[str]:
    """The names of a.b.c, the last first; of others only what is reached through them."""
    while isinstance(node, ast.Attribute):
        yield node.attr
        node = node.value
    yield node.id if isinstance(node, ast.Name) else ""


def is_under(name: str, others: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


FILES = [
    path
    for folder in sorted(ROOT.iterdir())
    if (folder / "__init__.py").exists() or folder.name == "tests"
    for path in sorted(folder.rglob("*.py"))
]


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Of jax, those that the file uses: several tests ask for them."""
    return frozenset(name for name in names_of(path.read_text()) if is_under(name, {"jax"}))


def test_nothing_uses_names_that_go():
    for path in FILES:
        used = {name for name in names_in(path) if is_under(name, FORBIDDEN)}
        assert not used, f"{path.relative_to(ROOT)} uses {sorted(used)}"


def test_one_module_names_the_compiler_that_jax_deprecates():
    users = [path for path in FILES if any(is_under(name, {TRITON}) for name in names_in(path))]
    assert [str(path.relative_to(ROOT)) for path in users] == ["kernels/backend.py"]


def private_at_import(source: str) -> set[str]:
    """The private modules of jax that importing the source imports, not what its functions do."""
    if "_src" not in source:
        return set()
    tree = WithoutFunctions().visit(ast.parse(source))
    return {name for name in names_of(ast.unparse(tree)) if is_under(name, {"jax._src"})}


class WithoutFunctions(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.Pass:
        return ast.Pass()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


REACHING = [
    path
    for path in FILES
    if path.relative_to(ROOT).parts[0] != "tests" and private_at_import(path.read_text())
]


def test_private_modules_of_jax_are_imported_where_they_are_needed():
    """By one kernel's product of fp8, where Pallas' interpreter of Mosaic's kernels runs, and where
    several processes are started."""
    assert [module_name(path) for path in REACHING] == ["kernels.fp8_dot"]
    users = [
        module_name(path)
        for path in FILES
        if any(is_under(name, {"jax._src"}) for name in names_in(path))
        and path.relative_to(ROOT).parts[0] != "tests"
    ]
    assert users == ["kernels.backend", "kernels.fp8_dot", "parallel.distributed"]


@pytest.mark.parametrize(
    "source",
    [
        "from jax._src.lib import xla_client",
        "import jax\nVERSION = jax._src.lib.version",
        "try:\n    import jax._src.core\nexcept ImportError:\n    pass",
    ],
)
def test_a_private_import_is_found(source):
    assert private_at_import(source)
    assert not private_at_import("def late():\n" + textwrap.indent(source, "    "))


@pytest.mark.parametrize(
    "source",
    [
        "from jax.experimental import pallas as pl\ny = pl.dot(a, b)",
        "import jax\nif jax.core.is_concrete(x): pass",
        "from jax.core import gensym",
        "import jax.numpy as jnp\nx = jnp.empty((3,)).sum()",
        "from jax.experimental.pallas.ops.gpu import attention",
        "import jax.cloud_tpu_init",
    ],
)
def test_a_use_is_found(source):
    assert any(is_under(name, FORBIDDEN) for name in names_of(source))


def test_a_like_named_one_is_not():
    source = "import numpy as np\nimport jax.numpy as jnp\nx = np.empty(3), jnp.dot, jnp.empties"
    assert not any(is_under(name, FORBIDDEN) for name in names_of(source))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the names are there until jax 0.12")
def test_removed_names_are_gone():
    for module, listed in REMOVED.items():
        present = [n for n in listed.split() if hasattr(importlib.import_module(module), n)]
        assert not present, f"{module} still has {present}"
