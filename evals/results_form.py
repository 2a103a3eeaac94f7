"""Results of an evaluation in the form of lm-evaluation-harness 0.4.13.

A metric is "name,filter", its standard error "name_stderr,filter"; over several draws of few-shot
examples "name_std,filter" is their standard deviation. Generated answers have empty_rate and
truncated_rate beside their scores. "baselines", "weights" and "identity" are additions.
"""

import hashlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from evals.aggregation import Score
from evals.records import Record
from evals.samples import Metric, Task
from infer.run_weights import RunWeights

UNKNOWN = "N/A"
"""As lm-evaluation-harness writes a standard error that is not known."""
BY_TASK = (
    *("results", "groups", "group_subtasks", "configs", "versions", "n-shot"),
    *("higher_is_better", "n-samples", "task_hashes", "baselines"),
)
"""The parts of results.json that are tables by task."""


@dataclass(frozen=True)
class ModelDescription:
    """The model that was evaluated: what results say of it, and what they are tied to."""

    name: str
    kind: str
    """run, huggingface, gguf, ..."""
    weights: RunWeights | None
    """None: of a server."""
    format: str = "float32"
    """Of the weights in memory."""
    dtype: str = "float32"
    """Of the computation."""
    mesh: str = ""
    num_parameters: int | None = None
    max_length: int | None = None
    window: int | None = None
    """Tokens of the windows in which texts are read."""
    batch_tokens: int | None = None
    chat_template: str | None = None
    special_tokens: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Text and id by name: pad, eos, bos."""
    eot_token_id: int | None = None

    def identity(self) -> dict[str, Any]:
        """What scores depend on: not on mesh or batch size."""
        weights = self.weights.sha256 if self.weights else self.name
        return {"weights": weights, "format": self.format, "dtype": self.dtype}


@dataclass(frozen=True)
class GroupScores:
    """Scores of a task, or of its samples of one group."""

    scores: Mapping[Metric, Score]
    count: int
    """Samples, of each draw."""
    empty_rate: float | None = None
    """Share of generated answers without text; None where nothing is generated."""
    truncated_rate: float | None = None
    """Share of generated answers that were cut off."""
    cut_rate: float = 0.0
    """Share of samples whose context or prompt was cut on the left."""


@dataclass(frozen=True)
class TaskScores:
    """A finished task."""

    task: Task
    num_fewshot: int
    total: GroupScores
    groups: Mapping[str, GroupScores]
    data_sha256: str
    """Of all samples in their order."""
    task_hash: str
    """As lm-evaluation-harness makes it: of documents, prompts and targets."""
    records: Sequence[Record] = ()
    """Its samples, those of each draw after the other's."""
    num_draws: int = 1
    uses_chat_template: bool = False
    baselines: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    num_asked: int = 0
    """Samples that were asked in these seconds; the others were finished before."""


def results_tree(
    model: ModelDescription,
    tasks: Sequence[TaskScores],
    settings: Mapping[str, Any],
    started: float,
    seconds: float,
) -> dict[str, Any]:
    """The JSON of these tasks.

    Args:
      settings: limit, seeds and the like, for "config".
      started: UNIX time.
    """
    tree: dict[str, Any] = {name: {} for name in BY_TASK}
    for found in tasks:
        _add_task(tree, found)
    is_chat = any(found.uses_chat_template for found in tasks)
    return tree | _model_section(model, settings, started, seconds, is_chat=is_chat)


def _add_task(tree: dict[str, Any], found: TaskScores) -> None:
    task = found.task
    tree["results"][task.name] = _metrics(task.name, task.name, found.total)
    subtasks = {f"{task.name}_{group}": (group, x) for group, x in found.groups.items()}
    tree["group_subtasks"][task.name] = list(subtasks)
    for name, (group, scores) in subtasks.items():
        tree["results"][name] = _metrics(name, f" - {group}", scores)
    if subtasks:
        tree["groups"][task.name] = tree["results"][task.name]
    tree["configs"][task.name] = _config(found)
    higher = {metric.name: metric.higher_is_better for metric in task.metrics}
    for name, scores in {
        task.name: found.total,
        **{n: x for n, (_, x) in subtasks.items()},
    }.items():
        tree["versions"][name] = task.version
        tree["n-shot"][name] = found.num_fewshot
        tree["higher_is_better"][name] = higher
        known = task.metadata.get("num_samples", scores.count)
        original = known if name == task.name else scores.count
        tree["n-samples"][name] = {"original": original, "effective": scores.count}
    tree["task_hashes"][task.name] = found.task_hash
    if found.baselines:
        tree["baselines"][task.name] = dict(found.baselines)


def _metrics(name: str, alias: str, found: GroupScores) -> dict[str, Any]:
    tree: dict[str, Any] = {"name": name, "alias": alias, "sample_len": found.count}
    for metric, score in found.scores.items():
        error = score.standard_error
        tree[f"{metric.name},{metric.filter}"] = score.value
        tree[f"{metric.name}_stderr,{metric.filter}"] = UNKNOWN if error is None else error
        if score.deviation is not None:
            tree[f"{metric.name}_std,{metric.filter}"] = score.deviation
    if found.empty_rate is not None:
        tree |= {"empty_rate,none": found.empty_rate, "truncated_rate,none": found.truncated_rate}
    if found.cut_rate:
        tree["cut_context_rate,none"] = found.cut_rate
    return tree


def _config(found: TaskScores) -> dict[str, Any]:
    task = found.task
    return {
        "task": task.name,
        "dataset_path": task.origin,
        "description": task.description,
        "output_type": task.output_type,
        "num_fewshot": found.num_fewshot,
        "repeats": 1,
        "should_decontaminate": False,
        "unsafe_code": task.runs_code,
        "generation_kwargs": task.metadata.get("generation_kwargs"),
        "metric_list": [
            {
                "metric": metric.name,
                "filter": metric.filter,
                "aggregation": metric.aggregation,
                "higher_is_better": metric.higher_is_better,
            }
            for metric in task.metrics
        ],
        "metadata": {
            "version": task.version,
            "license": task.license,
            "data_sha256": found.data_sha256,
            "chat_template": found.uses_chat_template,
            "num_draws": found.num_draws,
            "seconds": found.seconds,
            "unit": task.metadata.get("unit"),
        },
    }


def _model_section(
    model: ModelDescription,
    settings: Mapping[str, Any],
    started: float,
    seconds: float,
    *,
    is_chat: bool,
) -> dict[str, Any]:
    """Everything about the model and the machine."""
    weights = model.weights
    source = {"source": model.name, "weights": model.format, "mesh": model.mesh or None}
    template = model.chat_template if is_chat else None
    sanitized = "".join(c if c.isalnum() or c in "-_." else "_" for c in model.name)
    return {
        "config": {
            "model": "moesaic",
            "model_args": source,
            "model_num_parameters": model.num_parameters,
            "model_dtype": model.dtype,
            "model_revision": "" if weights is None or weights.step is None else str(weights.step),
            "model_sha": "" if weights is None else weights.sha256,
            "batch_size": model.batch_tokens and f"{model.batch_tokens} tokens",
            "batch_sizes": [],
            "device": jax.default_backend(),
            "use_cache": None,
            "bootstrap_iters": 0,
            "gen_kwargs": None,
            "random_seed": 0,
            "numpy_seed": 0,
            "torch_seed": 0,
            "fewshot_seed": 0,
            **settings,
        },
        "git_hash": _git_hash(),
        "date": started,
        "pretty_env_info": _environment(),
        "transformers_version": UNKNOWN,
        "lm_eval_version": UNKNOWN,
        "upper_git_hash": None,
        **{
            f"tokenizer_{name}_token": list(model.special_tokens.get(name, ("None", "None")))
            for name in ("pad", "eos", "bos")
        },
        "eot_token_id": model.eot_token_id,
        "max_length": model.max_length,
        "model_source": "moesaic",
        "model_name": model.name,
        "model_name_sanitized": sanitized,
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": False,
        "chat_template": template,
        "chat_template_sha": None if template is None else sha256(template),
        "total_evaluation_time_seconds": str(seconds),
        "weights": None if weights is None else {"step": weights.step, "sha256": weights.sha256},
        "identity": model.identity(),
    }


def sha256(text: str) -> str:
    """Of a text, in hexadecimal digits, as lm-evaluation-harness writes hashes."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _git_hash() -> str | None:
    """Of the checkout; None where it is none, or there is no git."""
    command = ["git", "describe", "--always"]
    root = Path(__file__).resolve().parent
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _environment() -> str:
    devices = jax.devices()
    return (
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}"
    )
