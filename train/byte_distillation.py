"""Distillation from a teacher with another vocabulary, at the borders that both tokenizers have.

Where the next chunk of the text is one token of each, the two distributions are compared token by
token over what both vocabularies have; what only one has is one bin, and is compared besides by its
sorted probabilities (ULD, Boizard et al. 2024). Where it is several tokens, their probabilities are
multiplied, and the chunk's probability is compared with all else in two bins. With one vocabulary
this is the divergence itself.

B rows, c tokens of a chunk, L student's tokens of a row, U teacher's, V vocab, C common tokens.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from configs.base import RunConfig
from configs.checks import require
from configs.distill import DistillConfig
from kernels.quantize import QTensor
from model.layers import rows_for, unembed
from model.transformer import Transformer, Variables, hidden_states, output_weights
from train.alignment import EXACT, MERGED, Alignment
from train.divergences import EMPTY, Bins, distance, divergence
from train.loop import to_devices
from train.losses import ChunkLoss, cross_entropy
from train.teachers import Batch, Teacher, View

NEAR_ONE = -1e-6
"""Greatest logarithm of a chunk's probability, so that all else keeps one."""
WIDTHS = 64
"""The teacher's rows are a multiple of it long: few lengths are compiled."""


def make_byte_loss(config: DistillConfig) -> ChunkLoss:
    """The objective on a chunk of logits."""
    return partial(byte_loss, config=config)


def byte_loss(
    logits_BcV: jax.Array, inputs: dict[str, Any], shared: dict[str, Any], *, config: DistillConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As train.distillation_loss.distillation_loss, at the places with a border.

    Args:
      inputs: "targets" int32 [B, c], and what `aligned_view` gives.
    """
    weights: Any = [term.weight for term in config.terms]
    if not all(term.is_constant for term in config.terms):
        weights = shared["weights"]
    targets_Bc, temperature = inputs["targets"], config.temperature
    is_exact_Bc = (inputs["kind"] == EXACT) & (targets_Bc >= 0)
    is_merged_Bc = (inputs["kind"] == MERGED) & (targets_Bc >= 0)
    is_data_Bc = inputs.get("is_data", True)
    nats, sums = cross_entropy(logits_BcV, {"targets": jnp.where(is_data_Bc, targets_Bc, -1)})
    log_q_BcV = jax.nn.log_softmax(logits_BcV / temperature, axis=-1)
    teacher_logits = _logits(inputs["teacher_hidden"], shared["teacher_output"])
    log_p_BcV = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    bins = _common_bins(log_p_BcV, log_q_BcV, shared)
    merged = _chunk_bins(log_q_BcV, inputs)
    total = jnp.float32(0.0)
    for i, term in enumerate(config.terms):
        if term.kind == "cross_entropy":
            value = nats
        else:
            assert term.kind not in ("hidden", "attention")
            by_token_Bc = divergence(term.kind, bins, term.beta)
            by_chunk_Bc = divergence(term.kind, merged, term.beta)
            value = jnp.where(is_exact_Bc, by_token_Bc, 0.0).sum()
            value += jnp.where(is_merged_Bc, by_chunk_Bc, 0.0).sum()
            value *= temperature**2
            sums |= {"kl" if term.kind == "forward_kl" else term.kind: value}
        total += weights[i] * value
    distance_Bc = _sorted_distance(log_p_BcV, log_q_BcV, shared)
    unmatched = jnp.where(is_exact_Bc | is_merged_Bc, distance_Bc, 0.0).sum()
    total += (1.0 if config.unmatched_weight is None else config.unmatched_weight) * unmatched
    counted = (is_exact_Bc | is_merged_Bc).sum(dtype=jnp.float32)
    return total, sums | {"unmatched": unmatched, "aligned": counted}


def _logits(hidden_BcD: jax.Array, w_DV: jax.Array | QTensor) -> jax.Array:
    return unembed(rows_for(hidden_BcD, w_DV), w_DV)


def _common_bins(log_p_BcV: jax.Array, log_q_BcV: jax.Array, shared: dict[str, Any]) -> Bins:
    """The tokens that both have, and one bin of all others."""
    ours_C, theirs_C = shared["common"]
    pairs = [(log_p_BcV[..., theirs_C], log_q_BcV[..., ours_C])]
    rest = [
        jnp.maximum(jax.nn.logsumexp(log[..., ids], axis=-1), EMPTY)
        if ids.size
        else jnp.full(log.shape[:-1], EMPTY)
        for log, ids in ((log_p_BcV, shared["unmatched"][1]), (log_q_BcV, shared["unmatched"][0]))
    ]
    return [*pairs, (rest[0][..., None], rest[1][..., None])]


def _chunk_bins(log_q_BcV: jax.Array, inputs: dict[str, Any]) -> Bins:
    """The chunk that the text goes on with, and all else."""
    targets_Bc, group_Bc = inputs["targets"], inputs["group"]
    vocab_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, log_q_BcV.shape[-1]), 2)
    own_Bc = jnp.where(vocab_V == targets_Bc[..., None], log_q_BcV, 0.0).sum(axis=-1)
    is_same_Bcc = (group_Bc[:, :, None] == group_Bc[:, None]) & (group_Bc >= 0)[:, :, None]
    log_q_Bc = jnp.where(is_same_Bcc, own_Bc[:, None], 0.0).sum(axis=-1)
    logs = [jnp.minimum(x, NEAR_ONE) for x in (inputs["teacher_chunk"], log_q_Bc)]
    others = [jnp.log(-jnp.expm1(x)) for x in logs]
    return [(logs[0][..., None], logs[1][..., None]), (others[0][..., None], others[1][..., None])]


def _sorted_distance(
    log_p_BcV: jax.Array, log_q_BcV: jax.Array, shared: dict[str, Any]
) -> jax.Array:
    """sum |p_i - q_i| over what only one vocabulary has, each in falling order, [B, c]."""
    ours, theirs = shared["unmatched"]
    if not ours.size and not theirs.size:
        return jnp.zeros(log_q_BcV.shape[:-1])
    width = max(ours.size, theirs.size)
    falling = [
        -jnp.sort(-jnp.pad(jnp.exp(log[..., ids]), ((0, 0), (0, 0), (0, width - ids.size))))
        for log, ids in ((log_p_BcV, theirs), (log_q_BcV, ours))
    ]
    return distance(*falling).sum(axis=-1)


def aligned_view(
    run: RunConfig, teacher: Teacher, tokenizers: tuple[Tokenizer, Tokenizer], mesh: Mesh
) -> View:
    """Adds what a teacher with another vocabulary says at the borders of a batch's text:
    "teacher_hidden" [B, L, D_teacher], "teacher_chunk" float32 [B, L], the logarithm of the next
    chunk's probability, "kind" and "group" [B, L] (train/alignment.py).

    Args:
      tokenizers: the student's and the teacher's.
    Raises:
      UserError: tokenizers that can't be aligned.
    """
    assert run.distill is not None
    config, length, chunks = run.distill, run.data.seq_len, run.execution.logits_chunks
    sizes = (run.model.vocab_size, teacher.model.config.vocab_size)
    alignment = Alignment(*tokenizers, sizes)
    output = jax.jit(output_weights, static_argnums=0)(teacher.model, teacher.variables)
    widest = 4 * length
    shared = {
        "teacher_output": output,
        "common": tuple(alignment.common_2C),
        "unmatched": alignment.unmatched,
    }

    def view(batch: Batch) -> Batch:
        pairs = zip(np.asarray(batch["tokens"]), np.asarray(batch["positions"]), strict=True)
        rows = [alignment.align(t, p, widest, length // chunks) for t, p in pairs]
        used = max(int((row.positions_U >= 0).sum()) for row in rows)
        width = -(-used // WIDTHS) * WIDTHS
        require(
            max(int(row.positions_U.max()) for row in rows) < teacher.model.config.context_length,
            f"a document has more than the teacher's context_length="
            f"{teacher.model.config.context_length} tokens of the teacher's: shorten data.seq_len",
        )
        names = ("tokens_U", "positions_U", "targets_U", "kind_L", "place_L", "end_L", "group_L")
        made = {n: np.stack([getattr(row, n) for row in rows]) for n in names}
        made = {n: x[:, :width] if n.endswith("U") else x for n, x in made.items()}
        made = to_devices(made, mesh)
        hidden, chunk = _look(
            teacher.model, WIDTHS, config.temperature, teacher.variables, output, made
        )
        added = {"teacher_hidden": hidden, "teacher_chunk": chunk}
        added |= {"kind": made["kind_L"], "group": made["group_L"]}
        return {**batch, **added, "shared": {**batch.get("shared", {}), **shared}}

    return view


@partial(jax.jit, static_argnums=(0, 1, 2))
def _look(
    model: Transformer,
    chunk: int,
    temperature: float,
    variables: Variables,
    w_DV: Any,
    made: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The teacher's hidden states at the student's places, and the logarithms of its chunks."""
    hidden_BUD, _ = hidden_states(model, variables, made["tokens_U"], made["positions_U"])
    batch, width, _ = hidden_BUD.shape

    def cut(x):
        return x.reshape(batch, width // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)

    def log_p(parts):
        hidden_BcD, targets_Bc = parts
        log_p_BcV = jax.nn.log_softmax(_logits(hidden_BcD, w_DV) / temperature, axis=-1)
        return jnp.take_along_axis(log_p_BcV, targets_Bc[..., None], axis=-1)[..., 0]

    own_BU = jax.lax.map(log_p, (cut(hidden_BUD), cut(made["targets_U"])))
    own_BU = own_BU.swapaxes(0, 1).reshape(batch, width)
    before_BU = jnp.cumsum(own_BU, axis=1) - own_BU  # of the tokens up to and with this one
    place_BL, end_BL = made["place_L"], made["end_L"]
    from_BL, to_BL = (jnp.take_along_axis(before_BU, x, axis=1) for x in (place_BL, end_BL))
    hidden_BLD = jnp.take_along_axis(hidden_BUD, place_BL[..., None], axis=1)
    return hidden_BLD, jnp.where(made["kind_L"] == MERGED, to_BL - from_BL, NEAR_ONE)
