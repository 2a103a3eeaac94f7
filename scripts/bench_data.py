"""Measures how fast a file of records becomes tokens, beside the library `tokenizers` alone.

python -m scripts.bench_data web.jsonl --tokenizer smollm2
python -m scripts.bench_data web.jsonl --tokenizer runs/a --megabytes 1000 --rounds 1
"""

import tempfile
from pathlib import Path

from benchmarks.alternate import ratios
from benchmarks.machine import description
from benchmarks.reading import beginning, measure
from configs.checks import require
from data.tokenizers.tokenizer_sources import load_public_tokenizer
from scripts import command


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("file", type=Path, help="a .jsonl file with a text in each line")
    parser.add_argument("--tokenizer", default="smollm2", help="a folder, a GGUF file or 'smollm2'")
    parser.add_argument("--data.text-field", dest="field", default="text", help="a text's (text)")
    parser.add_argument("--megabytes", type=float, default=50, help="of the file's beginning (50)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating (3)")
    asked = parser.parse_args(argv)
    require(
        asked.file.is_file() and asked.file.suffix == ".jsonl",
        f"{asked.file} is no .jsonl file: name one with a text in each line",
    )
    require(asked.rounds > 0, f"--rounds is {asked.rounds}: at least one is needed")
    require(asked.megabytes > 0, f"--megabytes is {asked.megabytes}: some of the file is needed")
    load_public_tokenizer(asked.tokenizer)  # or says why it can't
    with tempfile.TemporaryDirectory() as folder:
        part = beginning(asked.file, asked.megabytes, Path(folder))
        found = measure(part, asked.tokenizer, asked.field, asked.rounds)
    middle, least, most = ratios(found.peer, found.ours)
    print(f"{description()}; {found.megabytes:,.1f} MB of {asked.file}, {asked.rounds} rounds")
    for name, series in (("moesaic", found.ours), ("tokenizers", found.peer)):
        rate = found.megabytes / series.median
        print(f"  {name:<10} {rate:6.2f} MB/s, at most {series.peak_mb:,.0f} MB of memory")
    print(f"  ratio {middle:.2f} ({least:.2f} to {most:.2f})")


if __name__ == "__main__":
    command.execute(main)
