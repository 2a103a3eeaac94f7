"""Matching of layers: a student's hidden states, or what its attention adds, through learned
projections against its teacher's (FitNets, Romero et al. 2015; TinyBERT, Jiao et al. 2020).

Layers are those of the pattern, numbered through all periods. The projections belong to the
objective: they are trained beside the student, lie in its checkpoints, and are no part of the
model.

B batch, L length, D the student's d_model, S the teacher's, P periods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.architecture import ModelConfig
from configs.checks import UserError, require
from configs.distill import DistillConfig
from model.seeds import seed_key
from model.step import make_step
from model.transformer import Transformer, Variables

SOWN = {"hidden": "hidden", "attention": "attended"}
"""Names of what is compared in the collection "activations" (model/block.py)."""
EPS = 1e-6
"""Least mean square of a teacher's vector that a distance is divided by."""


@dataclass(frozen=True)
class MatchedLayers:
    """One layer of the student and the teacher's that it is compared with."""

    term: int
    """Place of its term in DistillConfig.terms."""
    kind: str
    """"hidden" or "attention"."""
    student: int
    teacher: int

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.student}_{self.term}"


@dataclass(frozen=True)
class Matching:
    """What is compared, and how large it is; hashable."""

    layers: tuple[MatchedLayers, ...]
    num_terms: int
    student_width: int
    teacher_width: int

    def init(self, seed: int) -> dict[str, jax.Array]:
        """Projections by name, float32 [D, S]: the identity between equal widths, else drawn so
        that lengths are kept."""
        shape = (self.student_width, self.teacher_width)
        if self.student_width == self.teacher_width:
            return {layers.name: jnp.eye(shape[0], dtype=jnp.float32) for layers in self.layers}
        key = jax.random.fold_in(seed_key(seed), 1)
        draw = partial(jax.random.normal, shape=shape, dtype=jnp.float32)
        return {
            layers.name: draw(jax.random.fold_in(key, i)) * self.teacher_width**-0.5
            for i, layers in enumerate(self.layers)
        }


def make_matching(
    config: DistillConfig, student: ModelConfig, teacher: ModelConfig
) -> Matching | None:
    """The layers that config.terms compare; None where none does.

    Raises:
      UserError: layers that the student has not, or that show no whole rows (Mixture-of-Depths).
    """
    if not config.matching:
        return None
    depths = (_num_layers(student), _num_layers(teacher))
    pairs = []
    for place, term in enumerate(config.terms):
        if term not in config.matching:
            continue
        wanted = term.layers or tuple(range(depths[0]))
        require(
            max(wanted) < depths[0],
            f"distill.losses: {term.kind}.layers={term.layers} must be below the "
            f"{depths[0]} layers of the student's pattern",
        )
        for layer in wanted:
            partner = max(round((layer + 1) * depths[1] / depths[0]) - 1, 0)
            pairs.append(MatchedLayers(place, term.kind, layer, partner))
    for who, config_of, layers in (
        ("student", student, {p.student for p in pairs}),
        ("teacher", teacher, {p.teacher for p in pairs}),
    ):
        for layer in sorted(layers):
            if config_of.pattern[layer % len(config_of.pattern)].depth is not None:
                raise UserError(
                    f"distill.losses compare layer {layer} of the {who}, which works on chosen "
                    "tokens alone (Mixture-of-Depths): name other layers"
                )
    return Matching(tuple(pairs), len(config.terms), student.d_model, teacher.d_model)


def _num_layers(config: ModelConfig) -> int:
    return config.num_periods * len(config.pattern)


def activations(sown: Any, config: ModelConfig, kind: str, layer: int) -> jax.Array:
    """One layer's sown activations, [B, L, D].

    Args:
      sown: the collection "activations".
      layer: of the pattern, through all periods.
    """
    period, place = divmod(layer, len(config.pattern))
    return sown["periods"][f"layer_{place}"][SOWN[kind]][period]


@partial(jax.jit, static_argnums=(0, 1))
def teacher_activations(
    model: Transformer,
    wanted: tuple[tuple[str, int], ...],
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The teacher's last hidden states, and those of the layers wanted by "kind_layer"."""
    step = make_step(tokens_BL, positions_BL)
    outputs: Any = model.apply(variables, step, mutable=["activations"])
    (hidden_BLD, _), sown = outputs
    found = {
        f"{kind}_{layer}": activations(sown["activations"], model.config, kind, layer)
        for kind, layer in wanted
    }
    return hidden_BLD, found


def matching_loss(
    matching: Matching,
    weights: Sequence[float] | jax.Array,
    projections: dict[str, jax.Array],
    sown: Any,
    student: ModelConfig,
    teacher: dict[str, jax.Array],
    targets_BL: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum over terms of their mean over layers, summed over tokens that count; and
    each kind's own sum.

    Each vector's part is ||x P - t||^2 / ||t||^2, float32: 0 where the two agree, 1 of a
    projection that gives nothing.

    Args:
      weights: of each term of DistillConfig.terms.
      teacher: by "kind_layer", [B, L, S].
    """
    total, sums = jnp.float32(0.0), {}
    for term in sorted({layers.term for layers in matching.layers}):
        own = [layers for layers in matching.layers if layers.term == term]
        value = jnp.float32(0.0)
        for layers in own:
            x_BLD = activations(sown, student, layers.kind, layers.student).astype(jnp.float32)
            t_BLS = teacher[f"{layers.kind}_{layers.teacher}"].astype(jnp.float32)
            made_BLS = jnp.einsum("BLD,DS->BLS", x_BLD, projections[layers.name])
            distance_BL = ((made_BLS - t_BLS) ** 2).mean(axis=-1)
            distance_BL /= jnp.maximum((t_BLS**2).mean(axis=-1), EPS)
            value += jnp.where(targets_BL >= 0, distance_BL, 0.0).sum() / len(own)
        total += weights[term] * value
        sums[own[0].kind] = sums.get(own[0].kind, 0.0) + value
    return total, sums


def projection_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam at the student's learning rate: projections are small and have no decay."""
    return optax.adam(schedule, b1=0.9, b2=0.95)
