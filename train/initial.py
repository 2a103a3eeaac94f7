"""What a run begins with that begins with a trained model."""

import dataclasses

from configs.architecture import ModelConfig
from configs.base import RunConfig
from configs.checks import UserError, require
from configs.feed_forward import MoEConfig
from configs.serialization import differences
from model.transformer import Variables
from model.upcycle import upcycle


def initial_variables(run: RunConfig, source: ModelConfig, variables: Variables) -> Variables:
    """The source's variables, upcycled where the run's model has experts and the source none.

    Args:
      source: the model that run.init.source names, with these variables; its context_length may be
        another one.
    Raises:
      UserError: the source is no beginning of the run's model, or init.drop has no experts to drop
        units from.
    """
    source = dataclasses.replace(source, context_length=run.model.context_length)
    if _has_experts(run.model) and not _has_experts(source):
        return upcycle(variables, source, run.model, drop=run.init.drop, seed=run.seed)
    changed = differences(source, run.model, "model")
    if changed:
        raise UserError(
            f"init.source={run.init.source!r} is another model than the run's: {'; '.join(changed)}"
        )
    require(
        not run.init.drop,
        f"init.drop={run.init.drop} goes with upcycling, but {run.init.source!r} is taken as it is",
    )
    return variables


def _has_experts(config: ModelConfig) -> bool:
    return any(isinstance(spec.ffn, MoEConfig) for spec in config.pattern)
