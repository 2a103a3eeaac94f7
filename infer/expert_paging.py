"""Models of which a share of the experts is resident: the others lie in the host's memory, or in
files, and are brought when a token goes to them.

A layer runs with the experts that are in its slots and says which ones its tokens went to, and what
each choice gave. Were all of them there, its result stands; if not, those that are missing are
brought, as many at a time as there are slots, and the layer runs again with what the choices before
gave: what it wrote to its state the first time is written again in the same places. So a text does
not depend on the slots: the same program multiplies the same rows by the same experts, wherever
they lie.

Forecast: the router of the next layer reads this layer's result (Eliseev & Mazur 2023), and what it
names is brought before that layer runs.

E experts, R slots, T tokens of a step, D d_model, K experts per token.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from configs.feed_forward import MoEConfig
from infer.engine.new_memory import beside
from infer.expert_cache import PagingCounts, SlotTable, belady
from infer.expert_store import ExpertStore, Paging, check_paging, empty_slots, slots_of
from infer.sources import Progress, Source
from infer.weights import Convert, WeightFormat
from model.block import Block
from model.experts import WEIGHT_AXES
from model.model_state import BlockState, ModelState, unrewindable_reason
from model.router import route
from model.step import ChosenExperts, Step
from model.transformer import Transformer, Variables


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


# --- Layers --------------------------------------------------------------------------------------


@dataclass
class PagedLayer:
    """A layer, its variables and, if it has experts, its slots."""

    block: Block
    variables: Variables
    is_rewritable: bool
    """Whether what was written to its state can be written again; if not, as of recurrent layers,
    it begins once more with the state as it was."""
    store: ExpertStore | None = None
    table: SlotTable | None = None
    records: bool = False
    """Whether `trace` and `forecasts` are kept."""
    trace: list[tuple[int, ...]] = field(default_factory=list)
    """The experts of each step; of one that has no room for all, of each of its runs."""
    forecasts: list[tuple[int, ...]] = field(default_factory=list)
    """Of each of these, as made before it."""
    reruns: int = 0
    _expected: tuple[int, ...] = ()

    def run(
        self, x_BLD: jax.Array, step: Step, state: BlockState | None, preference_1BE: Any
    ) -> tuple[jax.Array, BlockState | None, jax.Array | None]:
        """The layer's result, its state, and where it has experts those of each token, int32
        [1, B, L, K]."""
        run = _run_block if self.is_rewritable else _run_block_anew
        if self.table is None:
            return run(self.block, self.variables, x_BLD, step, state, preference_1BE)[:3]
        given = self._with_choices(self._no_choices(step.positions_BL.size))
        made = run(self.block, given, x_BLD, step, state, preference_1BE)
        ids = np.asarray(made.ids_1BLK)
        for experts in self.table.groups(_distinct(ids, len(self.slot_E))):
            if self._use(experts):
                self.reruns += 1
                own = made.state if self.is_rewritable else state
                given = self._with_choices(made.choices_TKD)
                made = run(self.block, given, x_BLD, step, own, preference_1BE)
        return made[:3]

    def expect(self, experts: tuple[int, ...]) -> None:
        """What the next step will probably ask for, the surest first: it is brought."""
        assert self.table is not None
        self._expected = experts
        self.bring(self.table.expect(experts))

    def bring(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Puts experts into slots, as the table said."""
        assert self.store is not None
        moe = self.variables["params"]["moe"]
        for expert, slot in pairs:
            held = {name: moe[name] for name in self.store.arrays}
            moe.update(_put(held, np.int32(slot), self.store.expert(expert)))

    @property
    def slot_E(self) -> np.ndarray:
        """The slot of each expert, int32; -1: it is not there."""
        assert self.table is not None
        slot_E = np.full(cast(MoEConfig, self.block.spec.ffn).num_experts, -1, np.int32)
        slot_E[list(self.table.slots)] = list(self.table.slots.values())
        return slot_E

    def _use(self, experts: list[int]) -> bool:
        """Brings what is missing of these; whether something was."""
        assert self.table is not None
        pairs = self.table.use(experts)
        self.bring(pairs)
        if self.records:
            self.trace.append(tuple(experts))
            self.forecasts.append(self._expected)
        return bool(pairs)

    def _with_choices(self, choices_TKD: jax.Array) -> Variables:
        """The variables, with what choices gave whose experts are not there (model/moe.py)."""
        slots = {"slot_E": self.slot_E, "choices_TKD": choices_TKD}
        return {**self.variables, "expert_slots": {"moe": slots}}

    @functools.cached_property
    def _no_choices(self) -> Any:
        """By the number of tokens: zeros, made once."""
        ffn, block = cast(MoEConfig, self.block.spec.ffn), self.block
        dims = (ffn.router.top_k, ffn.latent_width or block.model.d_model)

        @functools.cache
        def none(num_tokens: int) -> jax.Array:
            zeros_TKD = jnp.zeros((num_tokens, *dims), block.execution.compute_dtype)
            return beside(self.variables["params"], zeros_TKD)

        return none


def _distinct(ids: np.ndarray, num_experts: int) -> list[int]:
    """The experts that tokens went to."""
    return np.flatnonzero(np.bincount(ids[ids >= 0], minlength=num_experts)).tolist()


@partial(jax.jit, donate_argnums=0)
def _put(slots: Any, slot: jax.Array, expert: Any) -> Any:
    return jax.tree.map(lambda held, new: held.at[slot].set(new), slots, expert)


class _Ran(NamedTuple):
    x_BLD: jax.Array
    state: BlockState | None
    ids_1BLK: jax.Array | None
    """Of a layer with experts."""
    choices_TKD: jax.Array | None


def _block(
    block: Block,
    variables: Variables,
    x_BLD: jax.Array,
    step: Step,
    state: BlockState | None,
    preference_1BE: jax.Array | None,
) -> _Ran:
    wanted_BE = None if preference_1BE is None else preference_1BE[0]
    outputs: Any = block.apply(variables, x_BLD, step, state, wanted_BE, mutable=["experts"])
    (x_BLD, state, _), sown = outputs
    if "experts" not in sown:
        return _Ran(x_BLD, state, None, None)
    moe = sown["experts"]["moe"]
    return _Ran(x_BLD, state, moe["ids"][None], moe["choices"])


_run_block = jax.jit(_block, static_argnums=0, donate_argnums=4)
_run_block_anew = jax.jit(_block, static_argnums=0)
"""The same, which leaves the state that it was given as it was."""


@jax.jit
def _of_one_period(layer: Any) -> Any:
    """A layer's arrays without the dimension of periods, by one program for all."""
    return jax.tree.map(lambda x: x[0], layer)


def _layers(
    model: Transformer, variables: Variables, stores: dict[str, ExpertStore], paging: Paging
) -> list[PagedLayer]:
    """The pattern's, with their own of the variables."""
    layers, is_rewritable = [], unrewindable_reason(model.config) is None
    for i, spec in enumerate(model.config.pattern):
        name = f"layer_{i}"
        own = {
            collection: _of_one_period(tree["periods"][name])
            for collection, tree in variables.items()
            if name in tree.get("periods", {})
        }
        layer = PagedLayer(Block(spec, model.config, model.execution), own, is_rewritable)
        if isinstance(spec.ffn, MoEConfig):
            layer.store, layer.records = stores[name], paging.records
            layer.table = SlotTable(paging.num_slots(spec.ffn), paging.policy)
        layers.append(layer)
    return layers


# --- The model -----------------------------------------------------------------------------------


class PagedModel:
    """A model that runs layer by layer.

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
        params = variables["params"]
        skipped = [name for name in params if name.startswith("multi_token")]
        rest = {k: v for k, v in params.items() if k not in ("periods", *skipped)}
        states = variables.get("router_state", {})
        self.outside: Variables = {"params": rest, "router_state": {}}
        """What does not belong to the pattern's layers."""
        self.outside["router_state"] = {k: v for k, v in states.items() if k.startswith("prefix")}
        self.layers = _layers(model, variables, stores, paging)

    def run(
        self, step: Step, state: ModelState | None, with_experts: bool = False
    ) -> tuple[jax.Array, Any, ChosenExperts | None]:
        """As infer.steps.run, whose arguments lie on the device; the state given is used up."""
        wanted = step.preference or {}
        step = step.replace(preference=None)
        x_BLD, state = _begin(self.model, self.outside, step, state)
        states: list[Any] = [None] * len(self.layers) if state is None else list(state.periods)
        chosen = {}
        for i, layer in enumerate(self.layers):
            name = f"layer_{i}"
            x_BLD, states[i], ids_1BLK = layer.run(x_BLD, step, states[i], wanted.get(name))
            if ids_1BLK is not None:
                chosen[name] = ids_1BLK
            self._look_ahead(i, x_BLD, step)
        hidden_BLD = _finish(self.model, self.outside, x_BLD)
        state = None if state is None else state.replace(periods=tuple(states))
        return hidden_BLD, state, chosen if with_experts else None

    def fill(self) -> None:
        """Puts some experts into slots that are all empty."""
        for layer in self._paged:
            layer.bring(layer.table.fill())

    def weights(self) -> Any:
        """All that there is, where it lies: not what happens to be in slots."""
        found: list[Any] = [self.outside]
        for layer in self.layers:
            params, store = dict(layer.variables["params"]), layer.store
            if store is not None:
                held = {k: x for k, x in params["moe"].items() if k not in store.arrays}
                params["moe"] = {**held, **store.arrays}
            found.append({**layer.variables, "params": params})
        return found

    @property
    def _paged(self) -> list[Any]:
        return [layer for layer in self.layers if layer.table is not None]

    def counts(self) -> PagingCounts:
        """Of all layers."""
        return sum((layer.table.counts for layer in self._paged), PagingCounts())

    def belady(self) -> PagingCounts:
        """The least that could have been brought for what was asked, of a model that records."""
        found = [belady(layer.trace, layer.table.num_slots) for layer in self._paged]
        return sum(found, PagingCounts())

    @property
    def reruns(self) -> int:
        """Layers that ran once more."""
        return sum(layer.reruns for layer in self.layers)

    def _look_ahead(self, i: int, x_BLD: jax.Array, step: Step) -> None:
        """Brings what the next layer will probably ask for, if it has experts."""
        later = self.layers[i + 1] if i + 1 < len(self.layers) else None
        if later is None or later.table is None or not self.paging.has_forecast:
            return
        made = _router_of(later)
        if made is None:
            return
        ffn, eps = later.block.spec.ffn, self.model.config.norm_eps
        gates_E = np.asarray(_forecast(cast(Any, ffn), eps, made, x_BLD, step.positions_BL))
        order_E = np.argsort(-gates_E, kind="stable")
        later.expect(tuple(order_E[np.isfinite(gates_E[order_E])].tolist()))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _begin(model: Transformer, variables: Variables, step: Step, state: ModelState | None) -> Any:
    x_BLD, state, _ = cast(Any, model.apply(variables, step, state, method="begin"))
    return x_BLD, state


@partial(jax.jit, static_argnums=0)
def _finish(model: Transformer, variables: Variables, x_BLD: jax.Array) -> jax.Array:
    return cast(Any, model.apply(variables, x_BLD, method="finish"))


@partial(jax.jit, static_argnums=(0, 1))
def _forecast(
    config: MoEConfig, norm_eps: float, variables: Any, x_BLD: jax.Array, positions_BL: jax.Array
) -> jax.Array:
    """Of each expert, the largest gate that a layer's router gives it for another's result,
    float32 [E]; -inf: no token would go to it."""
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1]).astype(jnp.float32)
    if variables["scale"] is not None:
        mean = jnp.mean(x_TD * x_TD, axis=-1, keepdims=True)
        x_TD = x_TD * jax.lax.rsqrt(mean + norm_eps) * variables["scale"]
    logits_TE = x_TD @ variables["router"]
    if variables["router_bias"] is not None:
        logits_TE += variables["router_bias"]
    is_token_T = positions_BL.reshape(-1) >= 0
    routing = route(logits_TE, config.router, variables["state"], is_token_T=is_token_T)
    ids_TK = routing.expert_ids_TK
    best_E = jnp.full(config.num_experts + 1, -jnp.inf)
    place_TK = jnp.where(ids_TK >= 0, ids_TK, config.num_experts)
    return best_E.at[place_TK].max(routing.gates_TK)[:-1]


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
