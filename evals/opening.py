"""Models under evaluation, and the held-out text that some tasks are made of."""

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint.orbax_store import latest_step
from checkpoint.provenance import weights_fingerprint
from checkpoint.run_corpus import RunCorpus, count_tokens, open_run_corpus
from checkpoint.run_directory import read_run
from configs.base import DataConfig
from configs.checks import UserError
from data.corpora import read_documents
from data.pipeline import prepare_corpus
from data.tokenizers.tokenizer import num_ids
from data.tokenizers.tokenizer_sources import load_public_tokenizer
from evals.local_model import BATCH_TOKENS, LocalModel
from evals.results import FILE, FILE_OF_INITIAL
from evals.results_form import ModelDescription
from evals.run import Evaluation, Settings, plain_name
from evals.samples import HeldOut
from infer.load import inference_model
from infer.run_weights import RunWeights, load_with_identity
from infer.sources import Source, open_source
from model.transformer import Transformer, Variables
from model.unstacked import unstack
from parallel.distributed import on_host

FOLDER = Path("runs/evaluations")
"""Of results, where nobody says."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    model: Transformer
    variables: Variables
    weights: RunWeights
    mesh: Mesh | None = None
    format: str = "float32"
    name: str = ""
    """Of format and mesh as results' files have it: int8_expert4; empty for what is the default."""


def load_run(
    run_dir: Path, initial: Variables | None = None, *, for_decoding: bool = False
) -> Loaded:
    """A run's newest variables on the first device.

    Args:
      initial: what the run began with, in place of its newest variables.
      for_decoding: whether each layer's weights lie apart (model/unstacked.py).
    Raises:
      UserError: a run without checkpoint.
    """
    run = read_run(run_dir)
    if initial is None:
        model, variables, weights = load_with_identity(run, run_dir)
    else:
        model, variables = inference_model(run), initial
        weights = RunWeights(step=0, sha256=weights_fingerprint(initial))
    if for_decoding:
        model, variables = unstack(model, variables)
    return Loaded(model, variables, weights)


def weights_identity(source: Source, model: Transformer, variables: Variables) -> RunWeights:
    """Which weights these are: of a run as it was trained by its own fingerprint, of others the
    same whether layers are stacked or lie apart."""
    if source.kind == "run":
        step = latest_step(source.path / source.checkpoints)
        return RunWeights(step=step, sha256=weights_fingerprint(variables))
    period, found = len(model.config.pattern), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name, x = jax.tree_util.keystr(path), on_host(leaf)
        layer = re.search(r"\['periods'\]\['layer_(\d+)'\]", name)
        if layer is None:
            found.append((name, _digest(x)))
            continue
        for p in range(x.shape[0]):
            own = f"['periods']['layer_{p * period + int(layer[1])}']"
            found.append((name.replace(layer[0], own), _digest(x[p : p + 1])))
    return RunWeights(step=None, sha256=hashlib.sha256(repr(sorted(found)).encode()).hexdigest())


def _digest(x: np.ndarray) -> str:
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
    return hashlib.sha256(f"{x.shape} {x.dtype}\n".encode() + data).hexdigest()


def evaluation_of(
    source: Source,
    loaded: Loaded,
    settings: Settings,
    *,
    window: int,
    held_out: Callable[[], RunCorpus],
    copy: Path | None = None,
    output: Path | None = None,
    name: str = "",
    may_set_aside: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Evaluation:
    """An evaluation of a model that is in memory.

    Args:
      window: tokens of the windows in which texts are read.
      held_out: text in the model's own tokens, for tasks that are made of it.
      copy: file that gets what results.json gets; a format or mesh has one of its own.
      output: folder of results; None: one below FOLDER, by source, weights, format and settings.
      name: what else such a folder is called by.
      may_set_aside: see Evaluation; None: only where no folder is named.
    """
    model = LocalModel(
        loaded.model,
        loaded.variables,
        source.tokenizer,
        mesh=loaded.mesh,
        window=window,
        batch_tokens=batch_tokens,
    )
    description = describe(source, loaded, window, batch_tokens)
    shots = "" if settings.num_fewshot is None else f"{settings.num_fewshot}shot"
    name = "_".join(x for x in (loaded.weights.sha256[:8], loaded.name, shots, name) if x)
    if copy is not None and loaded.name:
        copy = copy.with_name(f"{copy.stem}_{loaded.name}.json")

    @functools.cache
    def made() -> HeldOut:
        corpus = held_out()
        return HeldOut(corpus.tokenizer, corpus.held_out, corpus.token_counts_V, window)

    return Evaluation(
        model=model,
        description=description,
        settings=settings,
        output=output or FOLDER / plain_name(source.name) / name,
        held_out=made,
        copies=() if copy is None else (copy,),
        may_set_aside=output is None if may_set_aside is None else may_set_aside,
    )


def describe(source: Source, loaded: Loaded, window: int, batch_tokens: int) -> ModelDescription:
    """What results say of the model; of its tokenizer where it has one that is read."""
    try:
        tokenizer = source.tokenizer()
    except UserError:
        tokenizer = None
    ids = {} if tokenizer is None else {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    return ModelDescription(
        name=source.name,
        kind=source.kind,
        weights=loaded.weights,
        format=loaded.format,
        dtype=loaded.model.execution.compute_dtype,
        mesh=loaded.name,
        num_parameters=source.config.num_parameters,
        max_length=source.config.context_length,
        window=window,
        batch_tokens=batch_tokens,
        chat_template=tokenizer and tokenizer.chat_template,
        special_tokens={
            name: (tokenizer.text_of(token) if tokenizer else "", str(token))
            for name, token in ids.items()
        },
        eot_token_id=ids.get("eos"),
    )


def run_evaluation(
    run_dir: Path,
    loaded: Loaded,
    settings: Settings = Settings(),
    *,
    output: Path | None = None,
    may_set_aside: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    is_initial: bool = False,
) -> Evaluation:
    """A run on the text that it did not learn from; evals.json beside it gets the results.

    Raises:
      UserError: a run that can't be read; of one that lost what it keeps of its corpus, later.
    """
    run = read_run(run_dir)
    return evaluation_of(
        open_source(str(run_dir)),
        loaded,
        settings,
        window=run.data.seq_len,
        held_out=lambda: open_run_corpus(run, run_dir),
        copy=run_dir / (FILE_OF_INITIAL if is_initial else FILE),
        output=output,
        may_set_aside=may_set_aside,
        batch_tokens=batch_tokens,
    )


def text_folder(source: Source, text: str, folder: Path) -> Path:
    """Where a text in the source's own tokens is kept, by the names of both."""
    return folder / f"{plain_name(source.name)}_on_{plain_name(text)}"


def open_text(source: Source, text: str, suffix: str, fraction: float, kept: Path) -> RunCorpus:
    """Held-out text in the source's own tokens.

    Args:
      text: 'stdlib', a folder, or a file: see configs.base.DataConfig.
      fraction: of the text that is held out; the rest gives the unigram model its counts.
      kept: folder that keeps it, by what text and tokenizer are now, so that another share or a
        changed file is read anew.
    Raises:
      UserError: a text or tokenizer that can't be read.
    """
    identity = hashlib.sha256(
        f"{fraction}\n{load_public_tokenizer(source.tokenizer_name).to_str()}".encode()
    )
    for document in read_documents(text, suffix):
        identity.update(f"{document.name}\n{document.text}\n".encode())
    # A run's folder and a model's hold tokenizer.json; files and packages are known by name.
    settings = DataConfig(
        source=text,
        suffix=suffix,
        tokenizer=source.tokenizer_name,
        directory=str(kept / f"text_{identity.hexdigest()[:12]}"),
        holdout_fraction=fraction,
    )
    corpus = prepare_corpus(settings, source.config.vocab_size)
    tokenizer = corpus.tokenizer()
    counts_V = count_tokens(corpus.training(), num_ids(tokenizer))
    return RunCorpus(tokenizer, corpus.held_out(), counts_V)
