"""Optimisers and learning-rate schedules, from optax."""

from typing import Any, assert_never

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from configs.optimizer import OptimizerConfig

MUON_RMS = 0.2
"""RMS of an AdamW update: Muon's is scaled to it, so one learning rate serves both (Liu et al.
2025).
"""

STACKED = ("layers", "expert", None)
"""Logical axes that stack matrices rather than belong to one."""


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine decay, or stable and then linear decay, or
    a cosine to a constant rate and then linear decay.

    The last step (steps - 1) has learning_rate * final_ratio.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_ratio
    warmup, last = config.warmup_steps, steps - 1
    warm = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(last - warmup, 1), alpha=config.final_ratio)
        return optax.join_schedules([warm, decay], [warmup])
    if config.schedule == "wsd":
        assert config.decay_fraction is not None
        decay_steps = max(round(config.decay_fraction * steps), 1)
        begin = max(last - decay_steps, warmup)
        decay = optax.linear_schedule(peak, final, max(last - begin, 1))
        return optax.join_schedules([warm, optax.constant_schedule(peak), decay], [warmup, begin])
    if config.schedule == "infinite":
        return _infinite(config, steps, warm)
    assert_never(config.schedule)


def _infinite(config: OptimizerConfig, steps: int, warm: optax.Schedule) -> optax.Schedule:
    assert config.cooldown_fraction is not None
    assert config.constant_ratio is not None
    peak, constant = config.learning_rate, config.learning_rate * config.constant_ratio
    warmup, last = config.warmup_steps, steps - 1
    cooldown = max(round(config.cooldown_fraction * steps), 1)
    cool = optax.cosine_decay_schedule(peak, cooldown, alpha=config.constant_ratio)
    parts, begins = [warm, cool], [warmup]  # a cosine stays at its end
    if config.decay_fraction is not None:
        begin = max(last - max(round(config.decay_fraction * steps), 1), warmup + cooldown)
        final = config.learning_rate * config.final_ratio
        parts.append(optax.linear_schedule(constant, final, max(last - begin, 1)))
        begins.append(begin)
    return optax.join_schedules(parts, begins)


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    logical_axes: Any,
    *,
    width: int | None = None,
    is_trained: Any = None,
    decays_all: bool = False,
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon for hidden matrices and AdamW for the rest.

    Beside Muon, AdamW has Nesterov momentum as well: optax pairs them so.

    Args:
      logical_axes: tree like the parameters, naming each dimension; it tells matrices from norms
        and says which dimensions stack matrices.
      width: the model's d_model, which config.base_width needs.
      is_trained: tree of bools; of the others there is no state, and their updates are their
        gradients, which are to be zero. None: all are trained.
      decays_all: whether weight decay is of all parameters: of adapters, which are all matrices.
    """
    is_axes = {"is_leaf": lambda x: isinstance(x, tuple)}
    if is_trained is not None:
        logical_axes = jax.tree.map(
            lambda axes, trained: axes if trained else optax.MaskedNode(),
            logical_axes,
            is_trained,
            **is_axes,
        )
        is_axes = {"is_leaf": lambda x: isinstance(x, tuple) and len(x) > 0}
    is_matrix = jax.tree.map(
        lambda axes: decays_all or _matrix_dims(axes) is not None, logical_axes, **is_axes
    )
    if config.kind == "adamw":
        scales = None
        if config.base_width is not None:
            assert width is not None
            ratio = config.base_width / width
            scales = jax.tree.map(
                lambda axes: ratio if _reads_width(axes) else 1.0, logical_axes, **is_axes
            )
        update = _adamw(config, schedule, is_matrix, scales)
    elif config.kind == "muon":
        hidden = jax.tree.map(_hidden_matrix_dims, logical_axes, **is_axes)
        update = _muon(config, schedule, hidden)
    else:
        assert_never(config.kind)
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    chained = optax.chain(clip, update)
    return chained if is_trained is None else optax.masked(chained, is_trained)


def _adamw(
    config: OptimizerConfig, schedule: optax.Schedule, is_matrix: Any, scales: Any
) -> optax.GradientTransformation:
    """
    Args:
      scales: tree of each update's factor, which weight decay has not; None: no factors.
    """
    moments: dict[str, Any] = {"b1": config.beta1, "b2": config.beta2, "eps": config.eps}
    if scales is None:
        decay = config.weight_decay
        return optax.adamw(schedule, **moments, weight_decay=decay, mask=is_matrix)
    return optax.chain(
        optax.scale_by_adam(**moments),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, scales)),
        optax.add_decayed_weights(config.weight_decay, is_matrix),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(
    config: OptimizerConfig, schedule: optax.Schedule, hidden: Any
) -> optax.GradientTransformation:
    """
    Args:
      hidden: tree of the hidden matrices' dimension numbers; None: AdamW's.
    """
    assert config.momentum is not None
    return muon(
        schedule,
        beta=config.momentum,
        eps=config.eps,
        weight_decay=config.weight_decay,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=lambda _: hidden,
        consistent_rms=MUON_RMS,
    )


def _reads_width(logical_axes: tuple[str | None, ...]) -> bool:
    """Whether a weight's sums or outputs grow with d_model: matrices and the router's rows; of the
    vocabulary's two the output layer, as an embedding is looked up.
    """
    sides = [axis for axis in logical_axes if axis not in ("layers", "expert")]
    return "embed" in sides and len(sides) > 1 and sides[0] != "vocab"


def _matrix_dims(logical_axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """d_model on one side, all other dimensions on the other; None for norms and the router's
    rows.
    """
    one_side = [i for i, axis in enumerate(logical_axes) if axis == "embed"]
    other = [i for i, axis in enumerate(logical_axes) if axis not in (*STACKED, "embed")]
    return MuonDimensionNumbers(tuple(one_side), tuple(other)) if one_side and other else None


def _hidden_matrix_dims(logical_axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """As above without embedding and output layer, which Muon leaves to AdamW (Jordan 2024)."""
    return None if "vocab" in logical_axes else _matrix_dims(logical_axes)


def state_shardings(
    optimizer: optax.GradientTransformation, abstract_params: Any, shardings: Any, replicated: Any
) -> Any:
    """Shardings of the optimiser's state: moments as their parameters, everything else replicated.

    A moment is told by its place: optax keeps trees like the parameters inside its own state.
    """
    by_path = dict(jax.tree_util.tree_leaves_with_path(shardings))

    def shard(path: tuple[Any, ...], _: jax.ShapeDtypeStruct) -> Any:
        suffixes = (path[start:] for start in range(len(path)))
        return next((by_path[suffix] for suffix in suffixes if suffix in by_path), replicated)

    state = jax.eval_shape(optimizer.init, abstract_params)
    return jax.tree_util.tree_map_with_path(shard, state)
