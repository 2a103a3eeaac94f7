"""Prunes a model by what its parts add on a text: heads, channels, widths, layers, experts.

    python -m scripts.prune smollm2 pruned --keep 0.7
    python -m scripts.prune smollm2 small --parameters 35M --layers 24 --to huggingface
    python -m scripts.prune models/mixtral fewer --experts 0.5 --by reap
    python -m scripts.prune runs/v31_nano dense --dense 2

DST is as scripts.convert's: a folder (--to), or a file that ends in .gguf. Interrupted, the same
command goes on. Recovery is training that begins with DST: --init.source DST.
"""

import json
from pathlib import Path
from typing import get_args

from compress.prune import ExpertScore
from compress.pruning import Pruning, prune_source
from compress.sizes import AXES, Budget, parsed_count
from configs.checks import require
from infer.sources import open_source
from scripts import command
from scripts.arguments import finite
from scripts.compression import (
    add_target,
    add_text,
    conversion_to,
    layer_progress,
    pruning_lines,
    rows_of,
)
from scripts.reading import reading


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    add_target(parser)
    parser.add_argument("--keep", type=finite, help="share of the layers' parameters that stays")
    parser.add_argument("--parameters", help="how many at most, as 35M")
    parser.add_argument("--active-parameters", help="how many a token meets at most")
    parser.add_argument("--axes", help=f"what goes for these: of {','.join(AXES)} (what suits)")
    parser.add_argument("--experts", type=finite, help="share of each layer's experts that stays")
    parser.add_argument("--by", choices=get_args(ExpertScore), default="reap")
    parser.add_argument("--merge", action="store_true", help="experts that go into those that stay")
    parser.add_argument("--dense", type=int, help="groups of experts that a dense layer is made of")
    parser.add_argument("--layers", type=int, help="layers that stay")
    add_text(parser)
    arguments = parser.parse_args(argv)
    counts = {
        name: None if getattr(arguments, name) is None else parsed_count(getattr(arguments, name))
        for name in ("parameters", "active_parameters")
    }
    sizes = {k: v for k, v in {"keep": arguments.keep, **counts}.items() if v is not None}
    axes = None if arguments.axes is None else tuple(arguments.axes.split(","))
    require(set(axes or ()) <= set(AXES), f"--axes {arguments.axes} must be of {', '.join(AXES)}")
    pruning = Pruning(
        budget=Budget(**sizes) if sizes else None,
        axes=axes,
        **{k: getattr(arguments, k) for k in ("experts", "by", "merge", "dense", "layers")},
    )
    source, target = open_source(arguments.source), Path(arguments.target)
    rows = rows_of(source, arguments)
    notes: list[str] = []
    with reading(source) as read, layer_progress("measuring", source) as measuring:
        report = prune_source(
            source, target, pruning, rows, conversion_to(arguments),
            reading=read, measuring=measuring, notes=notes.append,
        )  # fmt: skip
    print("\n".join([f"{target}: written", *pruning_lines(report), *notes]))
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report.record(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
