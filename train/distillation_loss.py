"""The student's objective on a chunk of logits: divergences from its teachers, and cross-entropy.

B rows, c tokens of a chunk, D d_model, V vocab, J teacher tokens kept, N teachers, R terms.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from configs.distill import MATCHING, DistillConfig
from kernels.quantize import QTensor
from model.layers import rows_for, unembed
from train.divergences import Bins, accepted, divergence, kept_and_tail
from train.losses import ChunkLoss, cross_entropy


def make_chunk_loss(config: DistillConfig) -> ChunkLoss:
    """The objective on a chunk of logits: see `distillation_loss`."""
    return partial(distillation_loss, config=config)


def distillation_loss(
    logits_BcV: jax.Array,
    inputs: dict[str, Any],
    shared: dict[str, Any] | None = None,
    *,
    config: DistillConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum over config.terms of weight * term, over the tokens that count; terms that compare
    layers are not among them (train/matching.py).

    Divergences are of softmax(logits / T), times T^2 (Hinton et al. 2015). Cross-entropy counts
    tokens that are data's, divergences those that the student wrote, too.

    Args:
      inputs: "targets" int32 [B, c], -1 where nothing counts; what `teacher_bins` needs; where
        rows are written, "is_data" bool [B, c].
      shared: what `teacher_bins` needs; "weights" float32 [R], of the step, where they change.
    """
    weights: Any = [term.weight for term in config.terms]
    if not all(term.is_constant for term in config.terms):
        assert shared is not None
        weights = shared["weights"]
    is_counted_Bc, temperature = inputs["targets"] >= 0, config.temperature
    bins = teacher_bins(logits_BcV, inputs, shared, temperature)
    nats, sums = cross_entropy(logits_BcV, _of_data(inputs))
    total = None
    for i, term in enumerate(config.terms):
        if term.kind in MATCHING:
            continue
        if term.kind == "cross_entropy":
            value = nats
        else:
            value_Bc = divergence(term.kind, bins, term.beta)
            value = jnp.where(is_counted_Bc, value_Bc, 0.0).sum() * temperature**2
            sums |= {"kl" if term.kind == "forward_kl" else term.kind: value}
        part = weights[i] * value
        total = part if total is None else total + part
    if config.drafter:
        sums |= {"acceptance": jnp.where(is_counted_Bc, accepted(bins), 0.0).sum()}
    return jnp.float32(0.0) if total is None else total, sums


def _of_data(inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """The targets that are data's."""
    targets_Bc = inputs["targets"]
    if "is_data" in inputs:
        targets_Bc = jnp.where(inputs["is_data"], targets_Bc, -1)
    return {"targets": targets_Bc}


def teacher_bins(
    logits_BcV: jax.Array, inputs: dict[str, Any], shared: Any, temperature: float
) -> Bins:
    """What teachers and student say of the next token, in the bins that they are compared in.

    Args:
      inputs: of one teacher that keeps its best tokens "teacher_ids" int [B, c, J] and
        "teacher_log_probs" float [B, c, J], its log softmax(logits / T) at those ids, and where it
        is kept "teacher_tail" [B, c], the logarithm of what they leave; else "teacher_hidden", a
        tuple of [B, c, D_teacher], and of several teachers "teacher_shares" float32 [B, c, N].
      shared: "teacher_output", a tuple of their output layers [D_teacher, V], in any format of
        weights.
    """
    log_q_BcV = jax.nn.log_softmax(logits_BcV / temperature, axis=-1)
    if "teacher_ids" in inputs:
        log_p_BcJ = inputs["teacher_log_probs"].astype(jnp.float32)
        ids_BcJ = inputs["teacher_ids"].astype(jnp.int32)
        return kept_and_tail(log_q_BcV, ids_BcJ, log_p_BcJ, inputs.get("teacher_tail"))
    hidden, output = inputs["teacher_hidden"], shared["teacher_output"]
    log_p_BcV = mixed_log_probs(hidden, output, inputs.get("teacher_shares"), temperature)
    return [(log_p_BcV, log_q_BcV)]


def mixed_log_probs(
    hidden: tuple[jax.Array, ...],
    output: tuple[Any, ...],
    shares_BcN: jax.Array | None,
    temperature: float,
) -> jax.Array:
    """log of the teachers' distributions, mixed by their shares, float32 [B, c, V].

    Args:
      hidden, output: of each teacher, see `teacher_bins`.
      shares_BcN: sum to 1 over the teachers; None of a single one.
    """
    each = [
        jax.nn.log_softmax(_teacher_logits(x_BcD, w_DV) / temperature, axis=-1)
        for x_BcD, w_DV in zip(hidden, output, strict=True)
    ]
    if shares_BcN is None:
        (log_p_BcV,) = each
        return log_p_BcV
    total = None
    for i, log_p_BcV in enumerate(each):
        part = jnp.exp(log_p_BcV) * shares_BcN[:, :, i : i + 1]
        total = part if total is None else total + part
    assert total is not None
    return jnp.log(jnp.maximum(total, jnp.finfo(jnp.float32).tiny))


def _teacher_logits(hidden_BcD: jax.Array, w_DV: jax.Array | QTensor) -> jax.Array:
    return unembed(rows_for(hidden_BcD, w_DV), w_DV)
