"""The state space recurrence token by token: the definition of correct. Letters as in api.py."""

import jax
import jax.numpy as jnp


def state_space(
    q_BLGK: jax.Array,
    k_BLGK: jax.Array,
    v_BLHV: jax.Array,
    log_decay_BLH: jax.Array,
    is_start_BL: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See api.py; padding has values and a decay that change nothing. All float32."""
    shared = v_BLHV.shape[2] // k_BLGK.shape[2]

    def read(s_BHKV: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_BGK, k_BGK, v_BHV, log_decay_BH, is_start_B = token
        q_BHK, k_BHK = (jnp.repeat(x, shared, axis=1) for x in (q_BGK, k_BGK))
        s_BHKV = jnp.where(is_start_B[:, None, None, None], 0.0, s_BHKV)
        s_BHKV = jnp.exp(log_decay_BH)[..., None, None] * s_BHKV
        s_BHKV += k_BHK[..., None] * v_BHV[:, :, None]
        return s_BHKV, jnp.einsum("BHKV,BHK->BHV", s_BHKV, q_BHK)

    tokens = (q_BLGK, k_BLGK, v_BLHV, log_decay_BLH, is_start_BL)
    state_BHKV, out_LBHV = jax.lax.scan(
        read, state_BHKV, tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
    )
    return jnp.moveaxis(out_LBHV, 0, 1), state_BHKV
