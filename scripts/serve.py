"""Serves a model over HTTP, many requests at once: OpenAI's and Anthropic's interfaces and a page.

    python -m scripts.serve smollm2 --weights int8
    python -m scripts.serve runs/v31_nano --mesh.expert 4 --port 8080 --api-key-file keys.txt

SRC is a run directory, a folder in Hugging Face form or of scripts.convert, a GGUF file, or
smollm2. Needs the extra `serve`. docs/serving.md says what clients get.
"""

import argparse

from configs.checks import UserError
from scripts import command, paged
from scripts.arguments import positive
from scripts.model_options import add_model_options, asked_mesh, chosen_source, settle_auto

INSTALL = "pip install -e '.[serve]' -c constraints.txt"


def main(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    try:
        from scripts import served
    except ImportError as error:
        raise UserError(f"{error.name} is missing: {INSTALL}") from error
    mesh = asked_mesh(arguments)
    paged.check_options(arguments)
    command.keep_compiled()
    source = chosen_source(arguments.source, arguments)
    settle_auto(source, arguments)
    served.run(source, arguments, mesh)


def parser() -> argparse.ArgumentParser:
    made = command.parser(__doc__)
    made.add_argument("source", metavar="SRC", help="run, folder, GGUF file, or smollm2")
    add_model_options(made, has_auto=True)
    paged.add_paging_options(made)
    made.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    made.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    made.add_argument("--served-name", action="append", metavar="NAME", help="of the model")
    made.add_argument("--api-key-file", metavar="FILE", help="keys that are let in, one a line")
    made.add_argument("--max-rows", type=int, default=8, help="texts generated at once (8)")
    made.add_argument("--max-queue", type=int, default=256, help="requests that may wait (256)")
    made.add_argument("--max-length", type=int, help="tokens of prompt and text (at most 4,096)")
    made.add_argument("--max-body-bytes", type=int, default=32 << 20, help="of a request (32 MiB)")
    made.add_argument("--draft", metavar="KIND", help="ngram, mtp, or a smaller model: SRC of it")
    made.add_argument("--draft-length", type=int, help="tokens drafted (4; 1 with mtp)")
    made.add_argument("--batching", choices=("continuous", "static"), default="continuous")
    made.add_argument("--step-seconds", type=positive, help="that others may wait for a prompt")
    made.add_argument("--no-prefix-cache", action="store_true", help="reads all prompts anew")
    made.add_argument("--cache-dir", metavar="DIR", help="keeps prefixes there, for later starts")
    made.add_argument("--host-cache-mib", type=int, default=0, help="of prefixes, in memory (0)")
    made.add_argument("--small", metavar="SRC", help="answers what --router holds simple")
    made.add_argument("--router", metavar="FILE", help="of moesaic calibrate-router")
    made.add_argument("--drain-seconds", type=positive, default=30.0, help="to finish in (30)")
    made.add_argument("--allow-updates", action="store_true", help="/pause, /update_weights")
    return made


if __name__ == "__main__":
    command.execute(main)
