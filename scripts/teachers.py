"""Teachers by their names, their answers made ahead, and the engine as the student's pen."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from checkpoint.orbax_store import latest_step
from checkpoint.provenance import ModelOrigin
from configs.base import RunConfig
from configs.checks import UserError
from data.pipeline import prepare_corpus
from data.tokenizers.tokenizer import end_of_text_id
from infer.generate import generate
from infer.load import inference_model
from infer.routing import chosen_experts
from infer.sampling import Sampling
from infer.sources import open_source
from infer.weights import WeightFormat, check_format
from model.transformer import Variables
from model.unstacked import unstack
from scripts.reading import reading
from train.distill import check_vocabulary
from train.loop import mesh_of
from train.offline_cache import make_cache
from train.on_policy import MakeWriter, Write, Written
from train.server_teacher import ServerTeacher
from train.teachers import (
    Teacher,
    TeacherSource,
    View,
    joint_origin,
    teacher_shares,
    with_top_k,
)


def teacher_of(name: str | Path, weights: WeightFormat = "float32") -> TeacherSource:
    """The teacher's config, how to load it onto the student's mesh, and its tokenizer.

    Args:
      weights: the format of its weights in memory.
    Raises:
      UserError: nothing that can be read, or a source without a tokenizer.
    """
    source = open_source(str(name))

    def load(mesh: Mesh) -> Teacher:
        is_run = source.kind == "run"
        step = latest_step(source.path / "checkpoints") or 0 if is_run else None
        with reading(source) as progress:
            model, variables = source.load(
                mesh=mesh, weights=check_format(weights), progress=progress
            )
        return Teacher(model, variables, step, source.name)

    return TeacherSource(source.config, load, source.tokenizer().tokenizer)


def cache_ahead(run: RunConfig, directory: Path, sources: Sequence[TeacherSource]) -> None:
    """Makes the cache of what these teachers say of the rows that the run reads, or goes on.

    Raises:
      UserError: as train.offline_cache.make_cache.
    """
    config = run.distill
    if config is None or config.top_k is None:
        raise UserError(
            f"{run.name} keeps no best tokens: set --distill.top-k to how many of a teacher's are "
            "to be cached"
        )
    for source in sources:
        check_vocabulary(run, source.config, source.tokenizer)
    mesh, corpus = mesh_of(run), prepare_corpus(run.data, run.model.vocab_size)
    with jax.set_mesh(mesh):
        teachers = [source.load(mesh) for source in sources]
        shares = teacher_shares(run, corpus.training(), len(teachers))
        look = with_top_k(teachers, shares, config, run.execution.logits_chunks, tail=True)
        origin = joint_origin([teacher.origin for teacher in teachers])
        make_cache(directory, run, corpus, origin, look, mesh)


def cache_answers(
    run: RunConfig, directory: Path, origin: ModelOrigin, make_view: Callable[[Mesh], View]
) -> None:
    """As `cache_ahead`, of a teacher of which no more is known than what it says."""
    mesh, corpus = mesh_of(run), prepare_corpus(run.data, run.model.vocab_size)
    with jax.set_mesh(mesh):
        make_cache(directory, run, corpus, origin, make_view(mesh), mesh)


def is_server(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def server_teacher(run: RunConfig, address: str) -> ServerTeacher:
    """The model behind an address; its key is in the environment's OPENAI_API_KEY."""
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    key = os.environ.get("OPENAI_API_KEY")
    return ServerTeacher(address, corpus.tokenizer(), run.model.vocab_size, key)


def make_writer(run: RunConfig) -> MakeWriter:
    """The engine as what writes the student's own rows."""
    share = 0.0 if run.distill is None else run.distill.on_policy.share
    model, rows = inference_model(run), max(math.ceil(share * run.batch_size), 1)
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    end = end_of_text_id(corpus.tokenizer())

    def make(mesh: Mesh) -> Write:
        def write(
            variables: Variables,
            prompts: Sequence[Sequence[int]],
            *,
            max_new_tokens: int,
            temperature: float,
            seeds: Sequence[int],
        ) -> Written:
            # A step of one token reads each layer's weights where they lie, and copies none.
            made = generate(
                *unstack(model, variables),
                prompts,
                max_new_tokens=max_new_tokens,
                sampling=[Sampling(temperature=temperature, seed=seed) for seed in seeds],
                stop_ids=frozenset({end}),
                rows=rows,
                mesh=mesh,
            )
            # That a text ends is the student's word, too.
            texts = [t if len(t) == max_new_tokens else [*t, end] for t in made.tokens]
            length = run.data.seq_len
            chosen = chosen_experts(model, variables, prompts, texts, length, rows)
            return Written(texts, chosen)

        return write

    return make
