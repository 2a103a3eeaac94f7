"""The tokens of one forward pass, and how each finds the state that layers keep for it.

Training's packed documents, a batch of prompts and a server's mixed requests are the same thing:
rows of tokens in which segments lie one after the other. B rows, L tokens of a row, R rows of the
state (sequences), N pages of a sequence, E experts.
"""

import jax
import jax.numpy as jnp
from flax import struct

Preference = dict[str, jax.Array]
"""By MoE layer of the pattern ("layer_0", ...), float32 [periods, B, E]: what each row of the batch
adds to the choice of experts, in standard deviations of a token's scores; B may be 1 for all rows,
and is R for a step whose tokens name their rows of the state. Gates don't see it."""

ChosenExperts = dict[str, jax.Array]
"""By MoE layer of the pattern, int32 [periods, B, L, K]: the experts that each token goes to; -1 is
no expert, OWN_CHOICE leaves the choice to the router."""
OWN_CHOICE = -2


class Step(struct.PyTreeNode):
    """One forward pass: tokens, positions, documents, and for inference rows of state."""

    tokens_BL: jax.Array
    """int32 in [0, vocab_size)."""
    positions_BL: jax.Array
    """int32, the token's position in its document; -1 marks padding, which no token sees, no expert
    works on and no state keeps."""
    segments_BL: jax.Array
    """int32, equal for the tokens of one document (or of one request's chunk) of a row."""
    rows_BL: jax.Array | None = None
    """int32, the row of the state that holds the token's sequence: a ragged step, one row of
    requests' chunks. None: row b of the tokens is row b of the state."""
    tables_RN: jax.Array | None = None
    """int32, the pages of each row of the state, for states in pages; None for dense states."""
    is_exited_BL: jax.Array | None = None
    """bool, tokens that have left the model: layers make their keys and leave them as they are."""
    preference: Preference | None = None
    """The experts that requests would rather have."""
    chosen: ChosenExperts | None = None
    """The experts of each token, where they are given instead of chosen (routing replay)."""
    is_replayed: bool = struct.field(pytree_node=False, default=True)
    """Whether `chosen` decides; if not, what the routers choose is only compared with it."""
    is_whole: bool = struct.field(pytree_node=False, default=False)
    """Whether nothing was written before these tokens, as the program knows: they see only each
    other, as without a state, and need no scores over its slots."""
    layers: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
    """First layer of the pattern to run, and the one to stop before; None runs all."""

    def gather(self, places_BC: jax.Array) -> "Step":
        """The step of those tokens of each row alone, int32 [B, C]."""

        def taken(x_BL: jax.Array | None) -> jax.Array | None:
            return None if x_BL is None else jnp.take_along_axis(x_BL, places_BC, axis=1)

        return self.replace(
            tokens_BL=taken(self.tokens_BL),
            positions_BL=taken(self.positions_BL),
            segments_BL=taken(self.segments_BL),
            rows_BL=taken(self.rows_BL),
            is_exited_BL=taken(self.is_exited_BL),
        )

    def state_rows(self) -> jax.Array:
        """The row of the state of each token, int32 [B, L]."""
        if self.rows_BL is not None:
            return self.rows_BL
        return jax.lax.broadcasted_iota(jnp.int32, self.positions_BL.shape, 0)


def make_step(
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    *,
    rows_BL: jax.Array | None = None,
    tables_RN: jax.Array | None = None,
    preference: Preference | None = None,
    chosen: ChosenExperts | None = None,
    is_whole: bool = False,
) -> Step:
    """A step whose documents follow from its positions (see `document_segments`).

    Args:
      chosen, is_whole: see Step.
    Raises:
      ValueError: shapes that differ.
    """
    if tokens_BL.shape != positions_BL.shape:
        raise ValueError(f"tokens {tokens_BL.shape} and positions {positions_BL.shape} must agree")
    return Step(
        tokens_BL=tokens_BL,
        positions_BL=positions_BL,
        segments_BL=document_segments(positions_BL, rows_BL),
        rows_BL=rows_BL,
        tables_RN=tables_RN,
        preference=preference,
        chosen=chosen,
        is_whole=is_whole,
    )


def require_own_rows(step: Step, reason: str | None) -> None:
    """
    Raises:
      NotImplementedError: a row of tokens is of several sequences, and the layer can't read it so,
        for this reason.
    """
    if step.rows_BL is not None:
        raise NotImplementedError(f"{reason}: give each sequence a row of tokens")


def document_segments(positions_BL: jax.Array, rows_BL: jax.Array | None = None) -> jax.Array:
    """Numbers the documents of each row, int32 [B, L]: one ends where positions stop rising by
    one, and where the row of the state changes.
    """
    is_start_BL = positions_BL[:, 1:] != positions_BL[:, :-1] + 1
    if rows_BL is not None:
        is_start_BL |= rows_BL[:, 1:] != rows_BL[:, :-1]
    return jnp.pad(jnp.cumsum(is_start_BL, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
