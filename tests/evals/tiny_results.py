"""Results of one task, as an evaluation writes them."""

from typing import Any

from evals.records import choices_record
from evals.results_form import ModelDescription, results_tree
from evals.run import summarize
from evals.samples import Choices, Likelihood, Load, Task
from evals.scoring import CHOICES, score_choices
from infer.run_weights import RunWeights

WEIGHTS = RunWeights(step=3, sha256="ab" * 32)

SAMPLES = tuple(
    Choices(str(i), f"Question {i}:", (" one", " two"), i % 2, ("low", "high")[i > 1])
    for i in range(4)
)


def load(settings: Load) -> tuple[Choices, ...]:
    return SAMPLES[: settings.limit]


TASK = Task(
    name="numbers",
    version=2,
    description="One or two.",
    origin="here",
    license="none",
    output_type="multiple_choice",
    metrics=CHOICES,
    load=load,
)


def tree(weights: RunWeights = WEIGHTS) -> dict[str, Any]:
    """Of a model that always takes the first choice: results.json."""
    likelihoods = [Likelihood(-1.0, True, 1), Likelihood(-2.0, False, 1)]
    records = [
        choices_record(TASK, sample, likelihoods, score_choices(sample, likelihoods), 0)
        for sample in SAMPLES
    ]
    model = ModelDescription("a model", "run", weights)
    return results_tree(model, [summarize(TASK, 0, [records])], {"limit": None}, 1.0, 2.0)
