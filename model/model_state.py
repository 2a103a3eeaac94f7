"""A model's state: what each of its layers keeps, and what is done to all of it at once.

R rows (sequences), N rows taken.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import struct

from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError
from configs.feed_forward import MoEConfig
from model.attention.kinds import init_attention_memory, init_attention_state
from model.attention.none import EmptyState
from model.layer_state import (
    AnyKeyValueState,
    LayerState,
    PagesFirst,
    StateParts,
    StateShape,
)


class BlockState(StateParts):
    """What one layer of the pattern keeps."""

    attention: LayerState | StateParts
    router: AnyKeyValueState | None
    """Of a context router."""


class ModelState(struct.PyTreeNode):
    """What a model keeps."""

    prefix: tuple[BlockState, ...]
    periods: tuple[BlockState, ...]
    """One per layer of the pattern."""
    is_stacked: bool = struct.field(pytree_node=False, default=True)
    """Whether those of the pattern are stacked over its periods in dim 0. Where it runs once they
    are not: XLA would copy all of a state to take it out of a stack and put it back."""


def init_state(
    config: ModelConfig,
    num_rows: int,
    max_length: int,
    dtype: str,
    spare: int = 0,
    *,
    num_pages: int | None = None,
    page_size: int = 64,
) -> ModelState:
    """The state of so many sequences of at most max_length tokens, none of them begun.

    Args:
      dtype: of keys and values: float32, bfloat16 or int8.
      spare: see StateShape.
      num_pages: pages that the sequences share; None gives each slots of its own.
    Raises:
      UserError: pages for a kind of layer that can't lie in them.
    """

    def init_block(spec: LayerSpec, stack: tuple[int, ...]) -> BlockState:
        shape = StateShape(num_rows, max_length, dtype, spare, num_pages, page_size, stack)
        context = spec.ffn.router.context if isinstance(spec.ffn, MoEConfig) else None
        router = None
        if context is not None and context.kind == "causal":
            router = init_attention_state(context.attention(), shape._replace(dtype="float32"))
        return BlockState(init_attention_state(spec.attention, shape), router)

    reason = None if num_pages is None else unpageable_reason(config, page_size)
    if reason is not None:
        raise UserError(f"this model's state can't lie in pages: {reason}")
    return _of_layers(config, init_block, is_stacked=config.num_periods > 1)


def ahead_config(config: ModelConfig) -> ModelConfig:
    """A model of the first multi-token module's layer alone, whose state is the module's."""
    assert config.multi_token is not None
    pattern = (config.multi_token.layer,)
    alone = dataclasses.replace(config, multi_token=None, early_exit=None, exit_spacing=None)
    return dataclasses.replace(alone, prefix=(), pattern=pattern, num_layers=1)


def unpageable_reason(config: ModelConfig, page_size: int = 64) -> str | None:
    """Why the model's state can't lie in pages, in a sentence; None: it can, but for layers that
    keep as much of a short sequence as of a long one, and do so in rows."""
    specs = (*config.prefix, *config.pattern)
    if any(spec.depth is not None for spec in specs):
        return "a Mixture-of-Depths layer skips tokens, and pages hold every position"
    reasons = (state.unpageable_reason for state in _abstract_states(config))
    reason = next(filter(None, reasons), None)
    if reason is not None:
        return reason
    parts: list[LayerState] = []
    for state in _abstract_states(config, page_size):
        BlockState(state, None).map(parts.append)
    if any(map(_is_paged, parts)):
        return None
    return f"no layer keeps keys, or entries of blocks that fill pages of {page_size} positions"


def has_rows(state: ModelState) -> bool:
    """Whether some layer keeps its state in rows, all of them or beside the pages of others."""
    return bool(jax.tree.leaves(without_pages(state)))


def unrewindable_reason(config: ModelConfig) -> str | None:
    """Why tokens can't be taken back from the model's state, in a sentence; None: they can."""
    reasons = (state.unrewindable_reason for state in _abstract_states(config))
    return next(filter(None, reasons), None)


def unmixable_reason(config: ModelConfig) -> str | None:
    """Why a row of tokens must belong to one sequence, in a sentence; None: it may be shared."""
    reasons = (state.unmixable_reason for state in _abstract_states(config))
    return next(filter(None, reasons), None)


def _abstract_states(
    config: ModelConfig, page_size: int | None = None
) -> Iterator[LayerState | StateParts]:
    """Of each layer's attention; in pages, if their size is said."""
    shape = StateShape(1, 2, "float32")
    if page_size is not None:
        shape = shape._replace(num_pages=2, page_size=page_size)
    for spec in (*config.prefix, *config.pattern):
        yield _abstract_state(spec.attention, shape)


@functools.lru_cache(maxsize=256)
def _abstract_state(attention: Any, shape: StateShape) -> LayerState | StateParts:
    """Layers are alike, and several ask for all of them as a server begins."""
    return jax.eval_shape(lambda: init_attention_state(attention, shape))


def init_memory(config: ModelConfig, batch_size: int, dtype: str) -> ModelState | None:
    """Empty memories for a batch of streams; None for a model without memory."""
    if config.memory_length is None:
        return None

    def init_block(spec: LayerSpec, stack: tuple[int, ...]) -> BlockState:
        dims = (*stack, batch_size)
        return BlockState(init_attention_memory(spec.attention, dims, config.d_model, dtype), None)

    return _of_layers(config, init_block, is_stacked=True)


def _of_layers(
    config: ModelConfig,
    init_block: Callable[[LayerSpec, tuple[int, ...]], BlockState],
    *,
    is_stacked: bool,
) -> ModelState:
    stack = (config.num_periods,) if is_stacked else ()
    return ModelState(
        prefix=tuple(init_block(spec, ()) for spec in config.prefix),
        periods=tuple(init_block(spec, stack) for spec in config.pattern),
        is_stacked=is_stacked,
    )


def rewind(state: ModelState, length_R: jax.Array) -> ModelState:
    """The state without the tokens from these positions on, at most `spare` of which were written.

    Raises:
      ValueError: a layer's state that can't.
    """

    def shortened(layer: LayerState) -> LayerState:
        if layer.unrewindable_reason is not None:
            raise ValueError(f"this state can't be rewound: {layer.unrewindable_reason}")
        return layer.rewind(length_R)

    return _each(shortened, state)


def take_rows(state: ModelState, rows_N: jax.Array) -> ModelState:
    """The state of these sequences alone; pages stay where they are."""
    return _each(lambda layer: layer.take(rows_N), state)


def put_rows(state: ModelState, rows_N: jax.Array, taken: ModelState) -> ModelState:
    """The state with what `take_rows` gave for these sequences' rows; pages stay as they are."""
    return _each(lambda layer, new: layer.put(rows_N, new), state, taken)


def without_pages(state: ModelState) -> ModelState:
    """What lies in rows, alone."""
    return _each(lambda layer: EmptyState() if _is_paged(layer) else layer, state)


def with_pages_of(state: ModelState, other: ModelState) -> ModelState:
    """The state with the other's pages for its own; rows are as they were."""
    return _each(lambda layer, new: new if _is_paged(layer) else layer, state, other)


def copy_page(state: ModelState, source: jax.Array, target: jax.Array) -> ModelState:
    """One page of every layer that has them copied onto another, int32 []."""

    def copied(layer: LayerState) -> LayerState:
        return layer.copy_page(source, target) if isinstance(layer, PagesFirst) else layer

    return _each(copied, state)


def take_pages(state: ModelState, pages_N: jax.Array) -> tuple[jax.Array, ...]:
    """What lies in these pages, int32 [N], of each array of the state; N is dim 0 of each."""

    def taken(layer: LayerState) -> LayerState:
        return jax.tree.map(lambda pages: pages[pages_N], layer)

    made = _each(taken, _without_rows(state))
    if state.is_stacked:
        made = made.replace(periods=jax.tree.map(lambda x: x.swapaxes(0, 1), made.periods))
    return tuple(jax.tree.leaves(made))


def put_pages(state: ModelState, pages_N: jax.Array, arrays: tuple[jax.Array, ...]) -> ModelState:
    """The state with what `take_pages` gave in these pages."""
    given = jax.tree.unflatten(jax.tree.structure(_without_rows(state)), arrays)
    if state.is_stacked:
        given = given.replace(periods=jax.tree.map(lambda x: x.swapaxes(0, 1), given.periods))

    def put(layer: LayerState, new: LayerState) -> LayerState:
        if not _is_paged(layer):
            return layer
        return jax.tree.map(lambda pages, x: pages.at[pages_N].set(x), layer, new)

    return _each(put, state, given)


def _without_rows(state: ModelState) -> ModelState:
    """What lies in pages, alone."""
    return _each(lambda layer: layer if _is_paged(layer) else EmptyState(), state)


def _is_paged(layer: LayerState) -> bool:
    return isinstance(layer, PagesFirst)


def state_axes(state: ModelState) -> ModelState:
    """The logical axes of every array (parallel/sharding.py), in a tree like the state's."""

    def named(layer: LayerState, stack: tuple[str, ...]) -> Any:
        axes = layer.logical_axes()
        return jax.tree.map(lambda names: (*stack, *names), axes, is_leaf=_is_names)

    stack = ("layers",) if state.is_stacked else ()
    return state.replace(
        prefix=tuple(block.map(lambda x: named(x, ())) for block in state.prefix),
        periods=tuple(block.map(lambda x: named(x, stack)) for block in state.periods),
    )


def _is_names(x: Any) -> bool:
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def _each(fn: Callable[..., LayerState], *states: ModelState) -> ModelState:
    """fn of each layer's state, of all layers, one after the other or stacked."""
    prefixes = zip(*(s.prefix for s in states), strict=True)
    periods = zip(*(s.periods for s in states), strict=True)

    def over_periods(*layers: LayerState) -> LayerState:
        is_stacked = states[0].is_stacked and bool(jax.tree.leaves(layers[0]))
        return jax.vmap(fn)(*layers) if is_stacked else fn(*layers)

    return states[0].replace(
        prefix=tuple(first.map(fn, *rest) for first, *rest in prefixes),
        periods=tuple(first.map(over_periods, *rest) for first, *rest in periods),
    )
