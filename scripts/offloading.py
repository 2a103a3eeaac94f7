"""A small model beside the served one (scripts.serve --small), and its router."""

import argparse
from dataclasses import replace
from pathlib import Path

from configs.checks import UserError, require
from data.tokenizers.tokenizer import vocabulary_difference
from formats.small_files import read_record
from infer.engine import Engine, EngineOptions
from infer.ngram_draft import NgramDraft
from infer.query_router import Router
from infer.question_features import QuestionScorer
from infer.server.engine_thread import EngineThread
from infer.server.offload import Offload
from infer.sources import Source, open_source
from model.model_state import unpageable_reason, unrewindable_reason
from scripts.model_options import load_model

MAKE = "make it with moesaic calibrate-router"


def check_offload_options(arguments: argparse.Namespace) -> None:
    """
    Raises:
      UserError: one of --small and --router without the other, or weights that may be exchanged.
    """
    small, router = arguments.small, arguments.router
    require(
        (small is None) == (router is None),
        f"--small needs the --router that was calibrated for it, and the other way round: {MAKE}",
    )
    require(
        small is None or not arguments.allow_updates,
        "--allow-updates exchanges the weights that --router was calibrated for: leave one out",
    )


def read_router(path: Path) -> Router:
    """
    Raises:
      UserError: there is none, or it is damaged.
    """
    try:
        return read_record(Router, path, MAKE)
    except FileNotFoundError:
        raise UserError(f"there is no router {path}: {MAKE}") from None


def open_offload(
    large: Source, arguments: argparse.Namespace, options: EngineOptions
) -> Offload | None:
    """The small model, read in the formats of the large one, on one device.

    Raises:
      UserError: a router of another model, or models that number tokens differently.
    """
    if arguments.small is None:
        return None
    router = read_router(Path(arguments.router))
    require(
        router.small == arguments.small,
        f"{arguments.router} was calibrated for {router.small}, and --small is {arguments.small}: "
        "give that one, or calibrate again",
    )
    small = open_source(arguments.small)
    require_one_vocabulary(small, large)
    model, variables = load_model(small, arguments, None, for_decoding=True)
    length = min(options.max_length, model.config.context_length)
    large_length = options.max_length
    has_draft = isinstance(options.draft, NgramDraft) and not unrewindable_reason(model.config)
    options = replace(
        options,
        max_length=length,
        cache_dir=None,
        target_seconds=None,
        keeps_experts=False,
        draft=options.draft if has_draft else None,
    )
    if unpageable_reason(model.config) is not None:
        options = replace(options, num_pages=None, host_cache_bytes=0)
    elif options.num_pages is None:
        pages = 1 + options.max_rows * -(-length // options.page_size)
        options = replace(options, num_pages=pages)
    engine = Engine(model, variables, options)
    thread = EngineThread(engine, options.max_rows, arguments.max_queue)
    return Offload(thread, router, QuestionScorer(model, variables), length, large_length)


def require_one_vocabulary(small: Source, large: Source) -> None:
    """
    Raises:
      UserError: a token's number means another one.
    """
    difference = vocabulary_difference(small.tokenizer().tokenizer, large.tokenizer().tokenizer)
    sizes = small.config.vocab_size, large.config.vocab_size
    require(
        difference is None and sizes[0] == sizes[1],
        f"{small.name} and {large.name} number tokens differently "
        f"({difference or f'vocabularies of {sizes[0]} and {sizes[1]}'}): both must have one "
        "vocabulary to stand behind one endpoint",
    )
