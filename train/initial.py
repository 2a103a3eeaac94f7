"""Initial weights taken from a trained model (`run.init`), and the rows that it has read."""

import dataclasses
from pathlib import Path

from checkpoint.provenance import read_provenance
from checkpoint.run_directory import read_run
from configs.architecture import ModelConfig
from configs.base import RunConfig
from configs.checks import UserError, require
from configs.feed_forward import MoEConfig
from configs.serialization import differences
from data.pipeline import Corpus
from data.tokenizers.tokenizer import fingerprint
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


def rows_read(parent_dir: Path, steps: int, run: RunConfig, corpus: Corpus) -> int:
    """Rows at the beginning of the run's data order that a run has read which it begins with.

    0 where the two read in different orders: other tokens, seed, or length of a row.

    Args:
      steps: the parent's, when its weights were taken.
    """
    parent, known = read_run(parent_dir), read_provenance(parent_dir)
    before = known.initial.rows_read if known and known.initial else 0
    return before + steps * parent.batch_size if _same_order(parent_dir, run, corpus) else 0


def _same_order(parent_dir: Path, run: RunConfig, corpus: Corpus) -> bool:
    parent, known = read_run(parent_dir), read_provenance(parent_dir)
    if known is None:
        same_tokens = Path(parent.data.directory).resolve() == corpus.directory.resolve()
    else:
        same_tokens = known.corpus.training_tokens == fingerprint(corpus.training().path)
    own = [(x.data.order, x.data.seq_len, _order_setting(x)) for x in (parent, run)]
    return same_tokens and own[0] == own[1]


def _order_setting(run: RunConfig) -> tuple[object, ...]:
    """Beside the order's name, the settings that decide it."""
    phases = run.data.phases
    is_by_step = run.data.order == "streams" or len(phases) > 1
    seed = None if run.data.order == "streams" else run.seed
    return (seed, run.batch_size if is_by_step else None, phases)
