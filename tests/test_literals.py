"""Settings with a list of values: every value is handled, and any other one is refused.

Chains over such settings end in assert_never, which the type checker proves unreachable; here are
the tables, whose keys it does not count, and what happens to a value from nowhere.
"""

import copy
import dataclasses
from typing import Any, get_args, get_type_hints

import jax.numpy as jnp
import pytest

from checkpoint import export_dtype, provenance
from checkpoint.families.base import PackedDtype
from configs import attention, feed_forward
from configs.base import ExecutionConfig
from configs.checks import UserError, choices_of, require_choices
from configs.optimizer import OptimizerConfig
from configs.runs import deepseek_v3_nano, v2_nano, v31_dynamic_nano
from formats.gguf import writer
from infer import certificate
from kernels.grouped_matmul import implementations, request
from kernels.quantize import formats, qtensor
from kernels.sparse_attention import api as sparse
from kernels.window_attention import api as window
from model import growth, router_scores
from model.attention import grouped_query, kinds
from model.balance import RouterStats, updated_state
from model.early_exit import exit_weights
from model.experts import activated
from model.router import initial_state
from parallel import expert
from planning.plan import useful_flops
from train.optim import make_optimizer, make_schedule

TABLES = {
    "group scores": (feed_forward.GroupScore, feed_forward.GROUP_MEMBERS),
    "norms of queries": (attention.QKNorm, grouped_query.NORMED_DIMS),
    "growth": (growth.Operator, growth.OPERATORS),
    "transports": (expert.Transport, expert.TRANSPORTS),
    "sparse attention": (sparse.Implementation, sparse.IMPLEMENTATIONS),
    "bounds": (certificate.Bound, certificate.BOUNDS),
    "formats of weights": (qtensor.Format, qtensor.FORMATS),
    "GGUF": (writer.Quantization, writer._FILE_TYPES),
    "objectives": (provenance.Objective, provenance.VERBS),
    "dtypes": (export_dtype.PlainDtype, export_dtype.DTYPES),
    "packed dtypes": (PackedDtype, export_dtype._METHODS),
    "attention": (attention.Attention, kinds.KINDS),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_a_row_for_each_value(name):
    values, table = TABLES[name]
    assert set(table) == set(get_args(values))


def test_router_scores_have_a_row_for_each_name():
    assert set(router_scores.SCORES) == feed_forward.SCORES


def test_grouped_products_have_a_kernel_or_a_plain_way_for_each_implementation():
    plain = {"auto", "reference", "xla"}
    assert set(get_args(request.Implementation)) == plain | set(implementations.KERNELS)
    assert set(get_args(formats.WeightFormat)) == {"float32", "bfloat16", *formats.QUANTIZED}
    assert set(formats.QUANTIZED.values()) == set(get_args(qtensor.Format))


def test_a_run_names_the_implementations_that_the_kernels_have():
    """But for Mosaic's grouped product, which fuses no SwiGLU of arrays, half of an expert."""
    settings = get_type_hints(ExecutionConfig)
    assert get_args(settings["window_attention"]) == get_args(window.Implementation)
    assert get_args(settings["sparse_attention"]) == get_args(sparse.Implementation)
    trained = set(get_args(request.Implementation)) - {"mosaic"}
    assert set(get_args(settings["grouped_matmul"])) == trained
    assert get_args(settings["transport"]) == get_args(expert.Transport)


def unknown(config: Any, **settings: Any) -> Any:
    """A copy with values that its checks never see."""
    changed = copy.copy(config)
    for name, value in settings.items():
        object.__setattr__(changed, name, value)
    return changed


OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2)
MODEL = v2_nano().model
ROUTER = feed_forward.RouterConfig(top_k=2, balance="loss_free", bias_rate=0.1)
STATS = RouterStats(*[jnp.zeros(4)] * len(RouterStats._fields))
MOE = feed_forward.MoEConfig(num_experts=4, d_ff=8, router=ROUTER)
CONTEXT = feed_forward.ContextConfig(kind="correlation")
CHAINS = {
    "schedule": lambda value: make_schedule(unknown(OPTIMIZER, schedule=value), 10),
    "optimizer": lambda value: make_optimizer(unknown(OPTIMIZER, kind=value), lambda _: 1.0, {}),
    "exits": lambda value: exit_weights(
        unknown(MODEL, early_exit=unknown(MODEL.early_exit, weighting=value))
    ),
    "activation": lambda value: activated(jnp.ones(2), jnp.ones(2), unknown(MOE, activation=value)),
    "balance": lambda value: updated_state(initial_state(4), STATS, unknown(ROUTER, balance=value)),
    "context": lambda value: unknown(CONTEXT, kind=value).num_parameters(8, 4),
    "step": lambda value: useful_flops(v2_nano(), value),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_no_branch_for_the_rest(name):
    with pytest.raises(AssertionError, match=r"unreachable.*'nonsense'"):
        CHAINS[name]("nonsense")


def places(config: Any, prefix: str = "") -> list[str]:
    """Where a config has settings with a list of values: "model.pattern.0.ffn.kind"."""
    if isinstance(config, tuple):
        return [x for i, item in enumerate(config) for x in places(item, f"{prefix}{i}.")]
    if not dataclasses.is_dataclass(config):
        return []
    found = [f"{prefix}{name}" for name in choices_of(type(config))]
    for field in dataclasses.fields(config):
        found += places(getattr(config, field.name), f"{prefix}{field.name}.")
    return found


def with_nonsense(config: Any, place: str) -> Any:
    name, _, rest = place.partition(".")
    if isinstance(config, tuple):
        items = list(config)
        items[int(name)] = with_nonsense(items[int(name)], rest)
        return tuple(items)
    value = with_nonsense(getattr(config, name), rest) if rest else "nonsense"
    return unknown(config, **{name: value})


@pytest.mark.parametrize("make", [v2_nano, v31_dynamic_nano, deepseek_v3_nano])
def test_every_setting_of_a_run_refuses_what_is_not_in_its_list(make):
    run = make()
    require_choices(run)
    assert len(places(run)) > 15
    for place in places(run):
        with pytest.raises(UserError, match=f"^{place}='nonsense' must be one of"):
            require_choices(with_nonsense(run, place))


def test_a_model_with_a_mistyped_setting_is_refused_when_it_is_made():
    """In Python, where nothing else reads the list."""
    model = v2_nano().model
    exits = dataclasses.replace(model.early_exit, weighting="quadratc")
    with pytest.raises(UserError, match=r"model\.early_exit\.weighting='quadratc' must be one of"):
        dataclasses.replace(model, early_exit=exits)
