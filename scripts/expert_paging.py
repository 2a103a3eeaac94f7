"""Says what paging a model's experts would bring: least-recently and least-often used, with and
without forecasts, beside Belady's rule, which knows the future.

    python -m scripts.expert_paging runs/v31_nano --prompt "import argparse" --max-new-tokens 100
    python -m scripts.expert_paging models/mixtral --prompt-file text.txt --share 0.25

The model generates once with all experts resident; which experts its tokens went to, and what the
router of each layer said of the layer before, is then run through caches of each size.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from configs.checks import UserError, require
from infer.expert_store import Paging
from infer.paging_report import compare_policies, default_shares, record, table_of
from infer.sources import open_source
from infer.weights import FORMATS
from scripts import command
from scripts.arguments import finite, utf8
from scripts.paged import open_paged


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    prompts = [*arguments.prompt, *map(_text_of, arguments.prompt_file)]
    require(bool(prompts), "nothing to read: give --prompt or --prompt-file")
    command.keep_compiled()
    source = open_source(arguments.source)
    tokenizer = source.tokenizer()
    recorder = open_paged(source, Paging(1.0, records=True), arguments.weights)
    for prompt in prompts:
        record(recorder, tokenizer.encode(prompt), arguments.max_new_tokens)
    found = compare_policies(recorder, arguments.share or default_shares(recorder))
    if arguments.json:
        print(json.dumps([x.as_tree() for x in found], indent=2))
    else:
        Console().print(table_of(found, source.name))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: give another file") from error


def _parser() -> argparse.ArgumentParser:
    made = command.parser(__doc__)
    made.add_argument("source", metavar="SRC", help="run, folder or GGUF file")
    made.add_argument("--prompt", action="append", default=[], type=utf8, help="text to continue")
    made.add_argument("--prompt-file", action="append", default=[], type=Path, metavar="FILE")
    made.add_argument("--max-new-tokens", type=int, default=64)
    made.add_argument("--weights", choices=FORMATS, default="float32")
    made.add_argument("--share", action="append", type=finite, help="resident (1/8, 1/4, 1/2, 3/4)")
    made.add_argument("--json", action="store_true", help="for programs")
    return made


if __name__ == "__main__":
    command.execute(main)
