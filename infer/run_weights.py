"""A run's weights, loaded, and their identity: what was made or measured with some says which they
were.
"""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from checkpoint.orbax_store import latest_step
from checkpoint.provenance import weights_fingerprint
from configs.base import RunConfig
from infer.load import abstract_on_mesh, inference_model
from infer.sources import restore_run
from model.transformer import Transformer, Variables


@dataclass(frozen=True, kw_only=True)
class RunWeights:
    """Steps that a run's weights were trained for, and their fingerprint."""

    step: int | None
    """None: of a model that is no run."""
    sha256: str
    """See checkpoint.provenance.weights_fingerprint."""

    def __str__(self) -> str:
        at_step = "" if self.step is None else f" at step {self.step}"
        return f"the weights{at_step} ({self.sha256[:8]})"


def load_model(
    run: RunConfig, run_dir: Path, mesh: Mesh | None = None
) -> tuple[Transformer, Variables]:
    """The run's model and its newest variables (infer/sources.py: restore_run).

    Args:
      mesh: where they go, whatever mesh they were trained on; None is the first device.
    Raises:
      UserError: no checkpoint, or one that can't be read.
      UserError: the mesh does not divide a dimension it splits.
    """
    model = inference_model(run)
    return model, restore_run(run, run_dir, abstract_on_mesh(model, mesh))[0]


def load_with_identity(run: RunConfig, run_dir: Path) -> tuple[Transformer, Variables, RunWeights]:
    """`load_model` on the first device, and which weights these are.

    Raises:
      UserError: no checkpoint, or one that can't be read.
    """
    model = inference_model(run)
    variables, step = restore_run(run, run_dir, abstract_on_mesh(model, None))
    return model, variables, RunWeights(step=step, sha256=weights_fingerprint(variables))


def newer_weights(known: RunWeights, run: RunConfig, run_dir: Path) -> str | None:
    """Names the newest weights of the run where they are not the known ones.

    Those of another step are not read.
    """
    step = latest_step(run_dir / "checkpoints")
    if step is None:
        return "no checkpoint"
    if step != known.step:
        return f"those at step {step}"
    found = load_with_identity(run, run_dir)[2]
    return None if found == known else str(found)
