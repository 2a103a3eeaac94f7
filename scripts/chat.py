"""A conversation in the terminal: `make chat`, or

    python -m scripts.chat [SRC] [--system "You are brief."]

SRC is a model that was trained to chat (default: smollm2). Type a message; /new begins again, an
empty line or Ctrl-D ends. Each answer is followed by the time to its first token and its speed.
"""

from data.chat import Messages
from data.public_tokenizer import PublicTokenizer
from infer.chat import chat_ids, without_oldest
from infer.generate import generate
from infer.sampling import Sampling
from infer.sources import open_source
from scripts import command
from scripts.reading import Printer, reading


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", nargs="?", default="smollm2")
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    arguments = parser.parse_args(argv)
    sampling = Sampling(arguments.temperature, arguments.top_p)
    command.keep_compiled()
    source = open_source(arguments.source)
    tokenizer = source.tokenizer()
    first = [{"role": "system", "content": arguments.system}] if arguments.system else []
    chat_ids(tokenizer, [*first, {"role": "user", "content": "hello"}])  # refuses before loading
    with reading(source) as progress:
        model, variables = source.load(progress=progress, for_decoding=True)
    print(f"{source.name}: /new begins again, an empty line ends", flush=True)
    messages = list(first)
    while text := _asked():
        if text == "/new":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": text})
        ids = _fitting(tokenizer, messages, model.config.context_length - arguments.max_new_tokens)
        printer = Printer("", tokenizer)
        made = generate(
            model,
            variables,
            [ids],
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            seed=len(messages),
            stop_ids=tokenizer.eos_ids,
            on_tokens=printer.show,
        )
        printer.finish()
        messages.append({"role": "assistant", "content": tokenizer.decode(made.tokens[0])})
        print(
            f"\n[{len(made.tokens[0])} tokens; first after {made.first_token_seconds:.2f} s, then "
            f"{made.tokens_per_second:.1f} tokens/s]",
            flush=True,
        )


def _asked() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


def _fitting(tokenizer: PublicTokenizer, messages: Messages, room: int) -> list[int]:
    """The conversation's tokens; its oldest exchanges are forgotten where it outgrows the model."""
    while len(ids := chat_ids(tokenizer, messages)) > room and len(messages) > 2:
        messages[:] = without_oldest(messages)
        print("[the oldest exchange no longer fits and is forgotten]")
    return ids


if __name__ == "__main__":
    command.execute(main)
