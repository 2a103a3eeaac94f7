"""Models of which a share of the experts is resident: the others lie in the host's memory, or in
files, and are brought when a token goes to them.

A layer runs with the experts that are in its slots and says which ones its tokens went to. Were all
of them there, its result stands; if not, they are brought and the layer runs again: what it wrote
to its state the first time is written again in the same places. A piece of a prompt that needs
more experts than there are slots is cut, layer by layer. So a text does not depend on the slots:
the same program multiplies the same rows by the same experts, wherever they lie.

Forecast: the router of the next layer reads this layer's result (Eliseev & Mazur 2023), and what it
names is brought before that layer runs.

E experts, R slots, L tokens of a piece, D d_model, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from configs.architecture import LayerSpec, ModelConfig
from configs.base import ExecutionConfig
from configs.feed_forward import MoEConfig
from infer.expert_cache import PagingCounts, SlotTable, belady, forecast_accuracy
from infer.expert_store import ExpertStore, Paging, check_paging, empty_slots, slots_of
from infer.sources import Progress, Source
from infer.weights import Convert, WeightFormat
from model.block import Block
from model.experts import WEIGHT_AXES
from model.layers import unembed
from model.model_state import BlockState, ModelState, init_state, unmixable_reason
from model.router import route
from model.step import Step, make_step
from model.transformer import Transformer, Variables, output_weights

WIDTH = 16
"""Tokens of a prompt that are read at once."""


def load_paged(
    source: Source,
    paging: Paging,
    *,
    weights: WeightFormat = "float32",
    progress: Progress = lambda done, total: None,
) -> "PagedModel":
    """The model with its experts outside: each leaves the device as soon as it is read and in its
    format. Of a run all variables are read first.

    Raises:
      UserError: as Source.load and check_paging; files that can't be written.
    """
    check_paging(source.config, paging)
    stores: dict[str, ExpertStore] = {}
    if paging.directory is not None:
        paging.directory.mkdir(parents=True, exist_ok=True)

    def with_convert(convert: Convert) -> Convert:
        def moved(path: Any, x: jax.Array) -> Any:
            found = convert(path, x)
            names = [getattr(key, "key", None) for key in path]
            layer, ffn, name = ["", "", "", *names][-3:]
            if names[:2] != ["params", "periods"] or ffn != "moe" or name not in WEIGHT_AXES:
                return found
            stores.setdefault(layer, ExpertStore()).put(name, found, paging.directory, layer)
            return empty_slots(found, slots_of(source.config, layer, paging))

        return moved

    model, variables = source.load(
        weights=weights, progress=progress, for_decoding=True, with_convert=with_convert
    )
    return PagedModel(model, variables, stores, paging)


def page(model: Transformer, variables: Variables, paging: Paging) -> "PagedModel":
    """A model in memory whose experts are moved out.

    Args:
      model: with all its layers once (model/unstacked.py), as `variables` have them.
    Raises:
      UserError: as check_paging.
    """
    check_paging(model.config, paging)
    stores, periods = {}, dict(variables["params"]["periods"])
    for name, tree in periods.items():
        if "moe" not in tree:
            continue
        store, moe = stores.setdefault(name, ExpertStore()), dict(tree["moe"])
        num = slots_of(model.config, name, paging)
        for key in [key for key in moe if key in WEIGHT_AXES]:
            store.put(key, moe[key], paging.directory, name)
            moe[key] = empty_slots(moe[key], num)
        periods[name] = {**tree, "moe": moe}
    params = {**variables["params"], "periods": periods}
    return PagedModel(model, {**variables, "params": params}, stores, paging)


# --- The model -----------------------------------------------------------------------------------


@dataclass
class PagedLayer:
    """A layer, its variables and, if it has experts, its slots."""

    block: Block
    variables: Variables
    store: ExpertStore | None = None
    table: SlotTable | None = None
    slot_E: np.ndarray | None = None
    trace: list[tuple[int, ...]] = field(default_factory=list)
    """The experts of each step."""
    forecasts: list[tuple[int, ...]] = field(default_factory=list)
    """Of each step, as made before it."""
    reruns: int = 0
    expected: tuple[int, ...] = ()

    def bring(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Puts experts into slots, as the table said."""
        assert self.store is not None
        assert self.table is not None
        assert self.slot_E is not None
        moe = self.variables["params"]["moe"]
        for expert, slot in pairs:
            held = {name: moe[name] for name in self.store.arrays}
            moe.update(_put(held, np.int32(slot), self.store.expert(expert)))
        if pairs:
            self.slot_E = np.full_like(self.slot_E, -1)
            for expert, slot in self.table.slots.items():
                self.slot_E[expert] = slot
            self.variables["expert_slots"] = {"moe": {"slot_E": jnp.asarray(self.slot_E)}}


@partial(jax.jit, donate_argnums=0)
def _put(slots: Any, slot: jax.Array, expert: Any) -> Any:
    return jax.tree.map(lambda held, new: held.at[slot].set(new), slots, expert)


@partial(jax.jit, static_argnums=0)
def _run_block(
    block: Block, variables: Variables, x_BLD: jax.Array, step: Step, state: BlockState
) -> tuple[jax.Array, BlockState, Any]:
    """The layer's result, its state, and the experts int32 [1, L, K]; None without experts."""
    outputs: Any = block.apply(variables, x_BLD, step, state, mutable=["experts"])
    (new_BLD, state, _), sown = outputs
    is_read = (step.positions_BL >= 0).reshape(*x_BLD.shape[:2], *[1] * (x_BLD.ndim - 2))
    ids = sown["experts"]["moe"]["ids"] if "experts" in sown else None
    return jnp.where(is_read, new_BLD, x_BLD), state, ids


@partial(jax.jit, static_argnums=0)
def _begin(model: Transformer, variables: Variables, step: Step, state: ModelState) -> Any:
    x_BLD, state, _ = cast(Any, model.apply(variables, step, state, method="begin"))
    return x_BLD, state


@partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, variables: Variables, x_BLD: jax.Array, at: jax.Array) -> jax.Array:
    """Of one token, float32 [1, V]."""
    hidden_BLD = cast(Any, model.apply(variables, x_BLD[:, at][:, None], method="finish"))
    return unembed(hidden_BLD[:, 0], output_weights(model, variables, as_stored=True))


@partial(jax.jit, static_argnums=(0, 1))
def _forecast(
    config: MoEConfig, norm_eps: float, variables: Any, x_BLD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Experts that a layer's router chooses for another's result, and their gates, [L, K] each."""
    x_LD = x_BLD[0].astype(jnp.float32)
    if variables["scale"] is not None:
        mean = jnp.mean(x_LD * x_LD, axis=-1, keepdims=True)
        x_LD = x_LD * jax.lax.rsqrt(mean + norm_eps) * variables["scale"]
    logits_LE = x_LD @ variables["router"]
    if variables["router_bias"] is not None:
        logits_LE += variables["router_bias"]
    routing = route(logits_LE, config.router, variables["state"])
    return routing.expert_ids_TK, routing.gates_TK


class PagedModel:
    """A model that reads one text at a time, layer by layer.

    Args:
      variables: of a model with all its layers once, the experts' with slots.
      stores: the experts, by layer.
    """

    def __init__(
        self,
        model: Transformer,
        variables: Variables,
        stores: dict[str, ExpertStore],
        paging: Paging,
    ) -> None:
        self.model, self.paging = model, paging
        config, execution = model.config, model.execution
        params = variables["params"]
        skipped = [name for name in params if name.startswith("multi_token")]
        rest = {k: v for k, v in params.items() if k not in ("periods", *skipped)}
        states = variables.get("router_state", {})
        self._outside = {"params": rest, "router_state": {}}
        self._outside["router_state"] = {k: v for k, v in states.items() if k.startswith("prefix")}
        self._is_mixed = unmixable_reason(config) is None
        self.width = WIDTH if self._is_mixed else 1
        """Tokens of a prompt that are read at once: recurrent layers read whole blocks, or one."""
        self.layers = [
            _layer(i, spec, config, execution, variables, stores, paging)
            for i, spec in enumerate(config.pattern)
        ]

    def new_state(self, length: int) -> ModelState:
        """Of one text of so many tokens at most; what was counted before begins anew."""
        for layer in self.layers:
            layer.expected = ()
        dtype = self.model.execution.compute_dtype
        return init_state(self.model.config, 1, length, dtype, max(self.width - 1, 0))

    def read(
        self, tokens: Sequence[int], begin: int, state: ModelState
    ) -> tuple[jax.Array, ModelState]:
        """Reads tokens at places from `begin` on: the logits after the last, [1, V], and the state.

        Args:
          tokens: one, or the width at most.
        """
        width = 1 if len(tokens) == 1 else self.width
        token_BL, position_BL = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
        token_BL[0, : len(tokens)] = tokens
        position_BL[0, : len(tokens)] = np.arange(begin, begin + len(tokens))
        step = self._step(token_BL, position_BL)
        x_BLD, state = _begin(self.model, self._outside, step, state)
        states = list(state.periods)
        for i, layer in enumerate(self.layers):
            x_BLD, states[i] = self._run(layer, x_BLD, token_BL, position_BL, states[i])
            self._look_ahead(i, x_BLD, len(tokens))
        last = np.int32(len(tokens) - 1)
        logits_RV = _logits(self.model, self._outside, x_BLD, last)
        return logits_RV, state.replace(periods=tuple(states))

    def counts(self) -> PagingCounts:
        """Of all layers."""
        tables = [layer.table.counts for layer in self.layers if layer.table]
        return sum(tables, PagingCounts())

    def belady(self) -> PagingCounts:
        """The least that could have been brought for what was asked."""
        paged = [layer for layer in self.layers if layer.table]
        found = [belady(x.trace, cast(SlotTable, x.table).num_slots) for x in paged]
        return sum(found, PagingCounts())

    @property
    def reruns(self) -> int:
        """Layers that ran once more."""
        return sum(layer.reruns for layer in self.layers)

    def accuracy(self) -> float | None:
        """The share of requests that forecasts named; None: there were none."""
        return accuracy_of(self.layers)

    def _step(self, token_BL: np.ndarray, position_BL: np.ndarray) -> Step:
        rows_BL = np.zeros_like(token_BL) if self._is_mixed and token_BL.shape[1] > 1 else None
        return make_step(cast(Any, token_BL), cast(Any, position_BL), rows_BL=cast(Any, rows_BL))

    def _run(
        self,
        layer: PagedLayer,
        x_BLD: jax.Array,
        token_BL: np.ndarray,
        position_BL: np.ndarray,
        state: BlockState,
    ) -> tuple[jax.Array, BlockState]:
        """One layer's result and state."""

        def run(x_BLD: jax.Array, position_BL: np.ndarray, state: BlockState) -> Any:
            step = self._step(token_BL, position_BL)
            return _run_block(layer.block, layer.variables, x_BLD, step, state)

        table = layer.table
        new_BLD, new_state, ids = run(x_BLD, position_BL, state)
        if table is None:
            return new_BLD, new_state
        ids_LK = np.where(position_BL[0, :, None] >= 0, np.asarray(ids)[0], -1)
        ranges = _ranges(ids_LK, table.num_slots)
        is_there = table.has(ids_LK[ids_LK >= 0].tolist())
        places = np.arange(len(ids_LK))
        for first, last, experts in ranges:
            layer.trace.append(experts)
            layer.forecasts.append(layer.expected)
            layer.bring(table.use(experts))
            if is_there:
                return new_BLD, new_state
            inside = (places >= first) & (places < last)
            layer.reruns += 1
            x_BLD, state, _ = run(x_BLD, np.where(inside[None], position_BL, -1), state)
        return x_BLD, state

    def _look_ahead(self, i: int, x_BLD: jax.Array, count: int) -> None:
        """Brings what the next layer will probably ask for, if it has experts."""
        later = self.layers[i + 1] if i + 1 < len(self.layers) else None
        if later is None or later.table is None or not self.paging.has_forecast:
            return
        made = _router_of(later)
        if made is None:
            return
        ffn, eps = later.block.spec.ffn, self.model.config.norm_eps
        ids_LK, gates_LK = jax.device_get(_forecast(cast(Any, ffn), eps, made, x_BLD))
        best: dict[int, float] = {}
        for expert, gate in zip(ids_LK[:count].ravel(), gates_LK[:count].ravel(), strict=True):
            if expert >= 0:
                best[int(expert)] = max(best.get(int(expert), 0.0), float(gate))
        later.expected = tuple(sorted(best, key=best.__getitem__, reverse=True))
        later.bring(later.table.expect(later.expected))


def accuracy_of(layers: Sequence[PagedLayer]) -> float | None:
    """Of the layers that had forecasts, the share of requests that these named; None: none had."""
    told = [layer for layer in layers if any(layer.forecasts)]
    if not told:
        return None
    traces = [step for layer in told for step in layer.trace]
    return forecast_accuracy(traces, [step for layer in told for step in layer.forecasts])


def _layer(
    i: int,
    spec: LayerSpec,
    config: ModelConfig,
    execution: ExecutionConfig,
    variables: Variables,
    stores: dict[str, ExpertStore],
    paging: Paging,
) -> PagedLayer:
    name = f"layer_{i}"
    own = {
        collection: jax.tree.map(lambda x: x[0], tree["periods"][name])
        for collection, tree in variables.items()
        if name in tree.get("periods", {})
    }
    block = Block(spec, config, execution)
    if not isinstance(spec.ffn, MoEConfig):
        return PagedLayer(block, own)
    own["expert_slots"] = {"moe": {"slot_E": jnp.full(spec.ffn.num_experts, -1, jnp.int32)}}
    table = SlotTable(paging.num_slots(spec.ffn), paging.policy)
    slot_E = np.full(spec.ffn.num_experts, -1, np.int32)
    return PagedLayer(block, own, stores[name], table, slot_E)


def _ranges(ids_LK: np.ndarray, num_slots: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """Tokens from `first` to before `last` whose experts have room together, and these experts."""
    found, first, experts = [], 0, dict[int, None]()
    for place, ids_K in enumerate(ids_LK):
        own = dict.fromkeys(int(e) for e in ids_K if e >= 0)
        if len(experts | own) > num_slots:
            found.append((first, place, tuple(experts)))
            first, experts = place, {}
        experts |= own
    return [*found, (first, len(ids_LK), tuple(experts))]


def _router_of(layer: PagedLayer) -> dict[str, Any] | None:
    """What forecasting takes of a layer's variables; None: its router sees more than one token, or
    what it reads is not what the layer before gives."""
    params, spec = layer.variables["params"], layer.block.spec
    moe = params["moe"]
    if "router" not in moe or layer.block.model.hyper_connections is not None:
        return None
    state = layer.variables.get("router_state", {}).get("moe", {}).get("state")
    return {
        "scale": None if spec.norms == "post" else params.get("ffn_norm", {}).get("scale"),
        "router": moe["router"],
        "router_bias": moe.get("router_bias"),
        "state": state,
    }
