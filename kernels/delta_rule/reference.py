"""The gated delta rule token by token: the definition of correct. Letters as in api.py."""

import jax
import jax.numpy as jnp


def delta_rule(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    log_decay_BLHK: jax.Array,
    beta_BLH: jax.Array,
    is_start_BL: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See api.py; padding has a beta and a decay that change nothing. All float32."""

    def read(s_BHKV: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_BHK, k_BHK, v_BHV, log_decay_BHK, beta_BH, is_start_B = token
        s_BHKV = jnp.where(is_start_B[:, None, None, None], 0.0, s_BHKV)
        s_BHKV = jnp.exp(log_decay_BHK)[..., None] * s_BHKV
        known_BHV = jnp.einsum("BHKV,BHK->BHV", s_BHKV, k_BHK)
        change_BHV = beta_BH[..., None] * (v_BHV - known_BHV)
        s_BHKV += k_BHK[..., None] * change_BHV[:, :, None]
        return s_BHKV, jnp.einsum("BHKV,BHK->BHV", s_BHKV, q_BHK)

    tokens = (q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, beta_BLH, is_start_BL)
    state_BHKV, out_LBHV = jax.lax.scan(
        read, state_BHKV, tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
    )
    return jnp.moveaxis(out_LBHV, 0, 1), state_BHKV
