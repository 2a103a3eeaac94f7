"""The mixture-of-experts layer: router, routed experts, shared experts.

B batch, L length, T tokens (B * L), D d_model, E experts, K experts per token.
"""

from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.base import ExecutionConfig
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig
from kernels.quantize import MatrixDims
from model.attention.grouped_query import GroupedQueryAttention
from model.balance import router_stats
from model.experts import KEPT, expert_function, expert_weights, has_few_bits, weight_axes
from model.layer_state import AnyKeyValueState
from model.layers import (
    RMSNorm,
    SwiGLU,
    in_dtype,
    newest,
    one_weight,
    project,
    weight,
    zero_weight,
)
from model.router import (
    TOKEN_EXPERTS,
    RouterState,
    Routing,
    changed_share,
    initial_state,
    needs_state,
    route,
    score_deviation,
    token_experts,
    with_chosen,
)
from model.step import Step
from model.warmup import initial_warmup, warmup_stats
from parallel.expert import ExpertStats, apply_experts


class MoE(nn.Module):
    """sum over the chosen experts of gate * expert(x), plus the shared experts.

    Sows "stats" (RouterStats) into the collection "router"; the losses live in train/losses.py.
    """

    config: MoEConfig
    execution: ExecutionConfig
    norm_eps: float
    out_stddev: float
    vocab_size: int = 0
    """Rows of the table of a router that goes by token."""

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        step: Step,
        context_state: AnyKeyValueState | None,
        preference_BE: jax.Array | None = None,
        chosen_BLK: jax.Array | None = None,
        residual_BLD: jax.Array | None = None,
    ) -> tuple[jax.Array, AnyKeyValueState | None]:
        """The state is the context router's; other routers have none.

        chosen_BLK: the experts of each token where they are given (model/step.py); then "changed",
        the share of them that the router would have chosen otherwise, is sown, too.
        preference_BE: float32 [B, E] or [1, E], what a request adds to the choice, never to the
        gates, in standard deviations of the token's scores; [R, E] for a step with rows.
        residual_BLD: what a router with a norm of its own reads (router.input_norm).
        """
        c, (batch, length, d_model) = self.config, x_BLD.shape
        read_BLD = self._router_input(x_BLD, residual_BLD)
        router_logits_BLE, context_state = self._router_logits(
            read_BLD.astype(jnp.float32), step, context_state
        )
        slot_E, num_held = self._resident()
        width = c.latent_width or d_model
        weights = expert_weights(self, c, width, self.out_stddev, num_held)
        state = None
        if needs_state(c.router):
            state = self.variable("router_state", "state", initial_state, c.num_experts).value
        x_TD, is_token_BL = x_BLD.reshape(batch * length, d_model), step.positions_BL >= 0
        router_logits_TE = router_logits_BLE.reshape(batch * length, c.num_experts)
        routing = self._routing(
            router_logits_TE, is_token_BL, step, state, preference_BE, chosen_BLK
        )
        ids_TK, gates_TK = routing.expert_ids_TK, routing.gates_TK
        if c.router.expert_scales:
            scales_E = one_weight(self, "expert_scales", (c.num_experts,), (None,))
            gates_TK *= scales_E[jnp.maximum(ids_TK, 0)]
        x_TD = x_TD if c.latent_width is None else self._latent("latent_in", x_TD, width)
        out_TD, moved = self._applied(x_TD, ids_TK, gates_TK, weights, slot_E, num_held)
        out_TD = out_TD if c.latent_width is None else self._latent("latent_out", out_TD, d_model)
        stats = router_stats(
            router_logits_TE,
            routing,
            is_token_BL,
            c.router,
            overflow_rows=moved.overflow_rows,
            bytes_moved=moved.bytes_moved,
        )
        if c.router.warmup is not None:
            stats = stats._replace(warmup=self._warmup_stats(routing, is_token_BL, state))
        self.sow("router", "stats", stats, init_fn=lambda: None, reduce_fn=newest)
        out_BLD = out_TD.reshape(batch, length, d_model)
        return out_BLD + self._shared(x_BLD) if c.num_shared_experts else out_BLD, context_state

    def _routing(
        self,
        router_logits_TE: jax.Array,
        is_token_BL: jax.Array,
        step: Step,
        state: RouterState | None,
        preference_BE: jax.Array | None,
        chosen_BLK: jax.Array | None,
    ) -> Routing:
        """Each token's experts and gates: by the router's scores, by its table, or as given."""
        router, (batch, length) = self.config.router, is_token_BL.shape
        routing = route(
            router_logits_TE,
            router,
            state,
            is_token_T=is_token_BL.reshape(-1),
            preference_E=_bias(preference_BE, step, router_logits_TE, router),
        )
        if router.choice == "token":
            routing = with_chosen(routing, self._of_tokens(step), router)
        ids_BLK = routing.expert_ids_TK.reshape(batch, length, -1)
        self.sow("experts", "ids", ids_BLK, init_fn=lambda: None, reduce_fn=newest)
        if chosen_BLK is not None:
            changed = changed_share(ids_BLK, chosen_BLK)
            self.sow("router", "changed", changed, init_fn=lambda: None, reduce_fn=newest)
            if step.is_replayed:
                chosen_TK = chosen_BLK.reshape(batch * length, -1)
                routing = with_chosen(routing, chosen_TK, router)
        return routing

    def _applied(
        self,
        x_TD: jax.Array,
        ids_TK: jax.Array,
        gates_TK: jax.Array,
        weights: dict[str, Any],
        slot_E: jax.Array | None,
        num_held: int,
    ) -> tuple[jax.Array, ExpertStats]:
        """What the routed experts give, [T, D], and what it took to bring the tokens to them.

        Args:
          slot_E, num_held: see `_resident`.
        """
        c, (num_tokens, d_model) = self.config, x_TD.shape
        is_on_inputs = c.router.gates_on == "inputs"
        is_apart = is_on_inputs or slot_E is not None
        held_TK = ids_TK if slot_E is None else _slots(ids_TK, slot_E)
        own_TK, own_gates_TK = held_TK, gates_TK
        if is_apart:
            x_TD = _by_choice(x_TD, gates_TK if is_on_inputs else None, ids_TK.shape[1])
            own_TK, own_gates_TK = (x.reshape(-1, 1) for x in (held_TK, jnp.ones_like(gates_TK)))
        out_TD, moved = apply_experts(
            x_TD,
            own_TK,
            own_gates_TK,
            {name: in_dtype(w, x_TD.dtype) for name, w in weights.items()},
            grouped_fn=expert_function(
                c,
                self.execution.grouped_matmul,
                weights,
                # Whose tokens a pass works on may differ; kernels of float32 need not be asked.
                fixed_order=slot_E is not None and has_few_bits(weights),
            ),
            num_experts=num_held,
            weight_axes=weight_axes(weights),
            transport=self.execution.transport,
            capacity_factor=self.execution.capacity_factor,
            kept=KEPT,
        )
        if is_apart:
            out_TKD = out_TD.reshape(num_tokens, -1, d_model)
            if slot_E is not None:
                out_TKD = self._with_earlier(out_TKD, held_TK)
                out_TKD = out_TKD if is_on_inputs else _gated_choices(out_TKD, gates_TK)
            out_TD = out_TKD.sum(axis=1).astype(x_TD.dtype)
        return out_TD, moved

    def _with_earlier(self, out_TKD: jax.Array, held_TK: jax.Array) -> jax.Array:
        """What each choice gives, of experts that are not held as it was made when they were: a
        layer whose tokens go to more experts than it holds runs once for each set of them.

        Sows "choices", the same [T, K, D].
        """
        earlier_TKD = self.get_variable("expert_slots", "choices_TKD")
        out_TKD = jnp.where(held_TK[:, :, None] >= 0, out_TKD, earlier_TKD)
        self.sow("experts", "choices", out_TKD, init_fn=lambda: None, reduce_fn=newest)
        return out_TKD

    def _latent(self, name: str, x_TD: jax.Array, width: int) -> jax.Array:
        """[T, width]: tokens to what experts read, or from what they give."""
        shape = (x_TD.shape[-1], width)
        axes = ("embed", None) if name == "latent_in" else (None, "embed")
        w = weight(self, name, shape, axes, shape[0] ** -0.5, MatrixDims(1, 1))
        return project("TI,IO->TO", x_TD, w)

    def _of_tokens(self, step: Step) -> jax.Array:
        """The experts that the table names for each token, int32 [T, K]; -1 for padding."""
        sizes = (self.vocab_size, self.config.num_experts, self.config.router.top_k)
        table_VK = self.variable("router_state", TOKEN_EXPERTS, token_experts, *sizes).value
        ids_BLK = jnp.where(step.positions_BL[:, :, None] >= 0, table_VK[step.tokens_BL], -1)
        return ids_BLK.reshape(-1, sizes[-1])

    def _shared(self, x_BLD: jax.Array) -> jax.Array:
        """What the experts give that all tokens go to."""
        c = self.config
        is_bounded = c.shared_activation == "bounded_swiglu"
        shared = DenseConfig(
            d_ff=c.shared_width,
            activation=c.shared_activation,
            swiglu_limit=c.swiglu_limit if is_bounded else None,
        )
        shared_BLD = SwiGLU(shared, self.out_stddev, name="shared")(x_BLD)
        return self._gated(shared_BLD, x_BLD) if c.shared_gate else shared_BLD

    def _resident(self) -> tuple[jax.Array | None, int]:
        """Where only some experts lie in memory (infer/expert_paging.py): the slot of each expert,
        int32 [E], -1 for those that are not there (see `_with_earlier`); and how many are held.
        """
        if not self.has_variable("expert_slots", "slot_E"):
            return None, self.config.num_experts
        num_slots = self.get_variable("params", "gate_up").shape[0]
        return self.get_variable("expert_slots", "slot_E"), num_slots

    def _router_input(self, x_BLD: jax.Array, residual_BLD: jax.Array | None) -> jax.Array:
        """What the router reads: as the experts, or the residual stream through its own norm."""
        if not self.config.router.input_norm:
            return x_BLD
        assert residual_BLD is not None
        normed_BLD = RMSNorm(self.norm_eps, name="router_norm")(residual_BLD)
        return normed_BLD * residual_BLD.shape[-1] ** -0.5

    def _gated(self, shared_BLD: jax.Array, x_BLD: jax.Array) -> jax.Array:
        """The shared experts' result times the token's gate, computed in float32."""
        width = x_BLD.shape[-1]
        w_D = weight(self, "shared_gate", (width,), ("embed",), width**-0.5)
        gate_BL = jax.nn.sigmoid(jnp.einsum("BLD,D->BL", x_BLD.astype(jnp.float32), w_D))
        return (gate_BL[:, :, None] * shared_BLD.astype(jnp.float32)).astype(shared_BLD.dtype)

    def _warmup_stats(self, routing, is_token_BL, state):
        num_experts, config = self.config.num_experts, self.config.router.warmup
        assert config is not None
        warmup = self.variable("router_state", "warmup", initial_warmup, num_experts, config).value
        return warmup_stats(routing, is_token_BL.reshape(-1), state, warmup, config)

    def _router_logits(self, x_BLD, step, context_state):
        """Float32 [B, L, E], and the context router's state."""
        num_experts, context = self.config.num_experts, self.config.router.context
        if context is None:
            logits_BLE = self._own_logits(x_BLD)
        elif context.kind == "correlation":
            logits_BLE = ExpertCorrelation(num_experts, name="correlation")(x_BLD)
        elif context.kind == "causal":
            logits_BLE = self._own_logits(x_BLD)
            attention = GroupedQueryAttention(
                context.attention(), self.execution, self.norm_eps, 0.0, num_experts, name="context"
            )
            update_BLE, context_state, _ = attention(x_BLD, step, context_state)
            logits_BLE += update_BLE
        else:
            assert_never(context.kind)
        if self.config.router.bias:
            bias_E = zero_weight(self, "router_bias", (num_experts,), (None,))
            logits_BLE += bias_E[None, None]
        return logits_BLE, context_state

    def _own_logits(self, x_BLD):
        """Of each token by itself, float32 [B, L, E]."""
        d_model, num_experts = x_BLD.shape[-1], self.config.num_experts
        shape, axes = (d_model, num_experts), ("embed", None)
        w_router_DE = weight(self, "router", shape, axes, d_model**-0.5)
        return jnp.einsum("BLD,DE->BLE", x_BLD, w_router_DE)


def _slots(expert_ids_TK: jax.Array, slot_E: jax.Array) -> jax.Array:
    """The slots of chosen experts; -1 stays -1."""
    return jnp.where(expert_ids_TK >= 0, slot_E[jnp.maximum(expert_ids_TK, 0)], -1)


def _by_choice(x_TD: jax.Array, gates_TK: jax.Array | None, top_k: int) -> jax.Array:
    """Each choice as a token of its own, [T K, D], multiplied by its gate where there are gates."""
    x_TKD = jnp.broadcast_to(x_TD[:, None], (len(x_TD), top_k, x_TD.shape[1]))
    if gates_TK is not None:
        x_TKD = (gates_TK[:, :, None] * x_TKD.astype(jnp.float32)).astype(x_TD.dtype)
    return x_TKD.reshape(-1, x_TD.shape[1])


def _gated_choices(out_TKD: jax.Array, gates_TK: jax.Array) -> jax.Array:
    return out_TKD.astype(jnp.float32) * gates_TK[:, :, None].astype(jnp.float32)


def _bias(
    preference_BE: jax.Array | None,
    step: Step,
    router_logits_TE: jax.Array,
    config: RouterConfig,
) -> jax.Array | None:
    """The preference of each token's request in units of its scores, [T, E]."""
    if preference_BE is None:
        return None
    num_experts = router_logits_TE.shape[1]
    if step.rows_BL is not None and len(preference_BE) > 1:
        wanted_BLE = preference_BE[step.rows_BL]
    else:
        dims = (*step.positions_BL.shape, num_experts)
        wanted_BLE = jnp.broadcast_to(preference_BE[:, None], dims)
    return wanted_BLE.reshape(-1, num_experts) * score_deviation(router_logits_TE, config)


class ExpertCorrelation(nn.Module):
    """Router logits in which the experts attend to each other, token by token (Yuan 2.0-M32, 2024).

    q, k, v = x W_q, x W_k, x W_v in R^E; logits_i = sum_j softmax_j(q_i k_j) v_j. The published
    code contracts over a chunk of the sequence instead, future included; this form sees one token.
    """

    num_experts: int

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        shape = (x_BLD.shape[-1], 3, self.num_experts)
        w_D3E = weight(self, "qkv", shape, ("embed", None, None), x_BLD.shape[-1] ** -0.5)
        qkv_BL3E = jnp.einsum("BLD,DiE->BLiE", x_BLD, w_D3E)
        q_BLE, k_BLE, v_BLE = qkv_BL3E[:, :, 0], qkv_BL3E[:, :, 1], qkv_BL3E[:, :, 2]
        affinity_BLEE = jax.nn.softmax(q_BLE[..., :, None] * k_BLE[..., None, :], axis=-1)
        return jnp.einsum("BLij,BLj->BLi", affinity_BLEE, v_BLE)
