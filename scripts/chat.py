"""A conversation with a model in the terminal: `make chat`.

    python -m scripts.chat [SRC] [--system "You are brief."]

SRC is a model that was trained to chat (default: smollm2). Type a message; /new begins again, an
empty line or Ctrl-D ends. Each answer is followed by the time to its first token and its speed. A
message that can't be answered, such as one longer than the model's context, is refused and
forgotten; the conversation goes on.
"""

import argparse
import dataclasses
import io
import sys
from collections.abc import Callable

from configs.checks import UserError, require, require_text
from data.tokenizers.chat import Messages
from data.tokenizers.public_tokenizer import PublicTokenizer
from infer.chat import chat_ids, fitting
from infer.generate import generate
from infer.generation import Generation, OnTokens
from infer.sampling import Sampling
from scripts import command
from scripts.arguments import finite, utf8
from scripts.model_options import add_model_options, asked_mesh, chosen_source, load_model
from scripts.reading import Printer, length_shown

Answer = Callable[[list[int], int, OnTokens], Generation]
"""Continues a conversation's tokens: (ids, seed, on_tokens)."""


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    mesh = asked_mesh(arguments)
    sampling = Sampling(arguments.temperature, arguments.top_p)
    command.keep_compiled()
    source = chosen_source(arguments.source, arguments)
    room = source.config.context_length - arguments.max_new_tokens
    require(
        0 < room < source.config.context_length,
        f"--max-new-tokens {arguments.max_new_tokens} must lie between 1 and "
        f"{source.config.context_length - 1}: the model's context_length, "
        f"{source.config.context_length}, holds the conversation and its answer",
    )
    tokenizer = source.tokenizer()
    first = [{"role": "system", "content": arguments.system}] if arguments.system else []
    chat_ids(tokenizer, [*first, {"role": "user", "content": "hello"}])  # refuses before loading
    model, variables = load_model(source, arguments, mesh, for_decoding=True)

    def answer(ids: list[int], seed: int, on_tokens: OnTokens) -> Generation:
        return generate(
            model,
            variables,
            [ids],
            max_new_tokens=arguments.max_new_tokens,
            sampling=dataclasses.replace(sampling, seed=seed),
            stop_ids=tokenizer.eos_ids,
            on_tokens=on_tokens,
            kv_dtype=arguments.kv,
            num_pages=arguments.kv_pages,
            mesh=mesh,
        )

    print(f"{source.name}: /new begins again, an empty line ends", flush=True)
    converse(tokenizer, first, answer, room, arguments.max_new_tokens)


def converse(
    tokenizer: PublicTokenizer, first: Messages, answer: Answer, room: int, max_new_tokens: int
) -> None:
    """Answers what is typed until an empty line; what can't be answered is told and forgotten.

    Args:
      first: what the system is told, if anything.
      room: tokens that the conversation may have.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # refused below, line by line
    messages = list(first)
    while text := _asked():
        if text == "/new":
            messages = list(first)
            continue
        try:
            messages = _exchange(tokenizer, messages, text, answer, room, max_new_tokens)
        except UserError as error:
            print(f"[not answered: {error}]", flush=True)


def _exchange(
    tokenizer: PublicTokenizer,
    messages: Messages,
    text: str,
    answer: Answer,
    room: int,
    max_new_tokens: int,
) -> Messages:
    """Shows the answer; the conversation with it, less what no longer fits.

    Raises:
      UserError: the message can't be read, or does not fit even alone.
    """
    require_text(text, "the message")
    ids, kept = fitting(tokenizer, [*messages, {"role": "user", "content": text}], room)
    if len(kept) <= len(messages):
        print("[the oldest exchanges no longer fit and are forgotten]")
    printer = Printer("", tokenizer)
    made = answer(ids, len(kept), printer.show)
    printer.finish()
    print(
        f"\n[{length_shown(made, max_new_tokens)}; first after {made.first_token_seconds:.2f} s, "
        f"then {made.tokens_per_second:.1f} tokens/s]",
        flush=True,
    )
    return [*kept, {"role": "assistant", "content": tokenizer.decode(made.tokens[0])}]


def _asked() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", nargs="?", default="smollm2")
    parser.add_argument("--system", type=utf8, help="what the model is told first")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--temperature", type=finite, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=finite, default=1.0)
    add_model_options(parser)
    return parser


if __name__ == "__main__":
    command.execute(main)
