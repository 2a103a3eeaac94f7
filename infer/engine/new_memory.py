"""The memory that an engine's options ask for."""

import os
from typing import Any

import jax
import numpy as np

from configs.checks import require
from infer.engine.kept_states import STATE_GRID
from infer.engine.memory import Memory, PagedMemory, RowMemory
from infer.engine.options import EngineOptions
from infer.engine.reading import widths_of
from infer.engine.tiers import DiskTier, HostTier, Tiers
from infer.engine.units import take_row
from infer.steps import StateSize
from model.transformer import Transformer, Variables

SLOTS = 256
"""Dense states have a whole multiple of them: each size is compiled for itself."""


def state_size(model: Transformer, options: EngineOptions) -> StateSize:
    """Slots are rounded up: a conversation that grows is compiled anew only now and then."""
    drafted = options.draft.length if options.draft else 0
    needed = options.max_length + drafted
    slots = min(-(-needed // SLOTS) * SLOTS, max(needed, model.config.context_length))
    return StateSize(
        options.max_rows,
        slots,
        options.kv_dtype or model.execution.compute_dtype,
        max(drafted, widths_of(options)[-1] - 1),
        options.num_pages,
        options.page_size,
    )


def new_memory(model: Transformer, options: EngineOptions, size: StateSize) -> Memory:
    """
    Raises:
      UserError: options that the kind of memory does not have.
    """
    host = HostTier(options.host_cache_bytes) if options.host_cache_bytes else None
    disk = DiskTier(options.cache_dir, options.disk_cache_bytes) if options.cache_dir else None
    tiers = Tiers(host, disk)
    if options.num_pages is not None:
        return PagedMemory(
            model, size, options.prefix_cache, size.max_length, tiers, options.state_bytes
        )
    require(
        host is None,
        "host_cache_bytes is for pages, which this engine has none of: set num_pages, or "
        "state_bytes for whole states",
    )
    grid = -(-options.page_size // STATE_GRID) * STATE_GRID
    return RowMemory(model, size, options.prefix_cache, grid, options.state_bytes, tiers)


def kept_details(options: EngineOptions, size: StateSize, memory: Memory) -> tuple[object, ...]:
    """What a kept prefix depends on beside model, weights and tokens: how it is stored, and what
    the sums of the programs that read it depend on."""
    device = jax.devices()[0]
    machine = (jax.__version__, device.platform, device.device_kind, os.cpu_count())
    row = jax.eval_shape(take_row, memory.state, np.zeros(1, np.int32))
    return (
        size.dtype,
        options.page_size,
        tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(row)),
        widths_of(options)[-1],
        options.has_detour,  # whose layers may lie apart
        machine,
    )


def beside(variables: Variables, arrays: Any) -> Any:
    """Arrays on the one device that the variables were put on: as a program gives them back, which
    would otherwise be compiled twice."""
    first = next(iter(jax.tree.leaves(variables)), None)
    if isinstance(first, jax.Array) and first.committed and len(first.devices()) == 1:
        return jax.device_put(arrays, first.sharding)
    return arrays
