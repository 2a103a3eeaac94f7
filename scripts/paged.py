"""Generation with a share of the experts resident, for scripts.generate."""

import argparse
from pathlib import Path

from configs.checks import require
from infer.chat import chat_ids
from infer.expert_paging import PagedModel, load_paged
from infer.expert_store import Paging
from infer.paged_generation import generate_paged
from infer.sampling import Sampling
from infer.sources import Source
from infer.stop_texts import stops_at
from infer.weights import check_format
from parallel.mesh import AXES
from scripts.model_options import AUTO
from scripts.reading import Printer, reading

REFUSED = (
    *("dtype", "adapter", "kv", "kv_pages", "exit_threshold", "draft_exit", "draft_ngram"),
    *("expert_preference",),
)
"""Options of scripts.generate that need the engine, or weights as they lie in a file."""


def add_paging_options(parser: argparse.ArgumentParser) -> None:
    """--resident-experts and --expert-dir."""
    parser.add_argument(
        "--resident-experts",
        type=float,
        metavar="SHARE",
        help="of each layer's experts, in memory; the others are brought when a token needs them",
    )
    parser.add_argument(
        "--expert-dir", type=Path, metavar="DIR", help="files for the others (else host memory)"
    )
    parser.add_argument(
        "--no-expert-forecast", action="store_true", help="bring experts only when they are needed"
    )


def check_options(arguments: argparse.Namespace) -> None:
    """
    Raises:
      UserError: options that can't go together, or have no effect.
    """
    if arguments.resident_experts is None:
        alone = "--expert-dir" if arguments.expert_dir is not None else None
        alone = "--no-expert-forecast" if arguments.no_expert_forecast else alone
        require(alone is None, f"{alone} has no effect without --resident-experts: give both")
        return
    given = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in REFUSED}
    given |= {f"--mesh.{axis}": getattr(arguments, f"mesh.{axis}") > 1 for axis in AXES}
    given["--weights auto"] = arguments.weights == AUTO
    set_ones = [name for name, value in given.items() if value not in (None, False)]
    require(
        not set_ones,
        f"{' and '.join(set_ones)} can't go together with --resident-experts, which runs one text "
        "at a time, layer by layer, on one device: leave one out",
    )


def open_paged(source: Source, paging: Paging, weights: str) -> PagedModel:
    """
    Raises:
      UserError: as load_paged.
    """
    with reading(source) as progress:
        return load_paged(source, paging, weights=check_format(weights), progress=progress)


def run(source: Source, arguments: argparse.Namespace, sampling: Sampling) -> None:
    """Continues each prompt, and says what was brought."""
    from scripts.generate import show_speed

    paging = Paging(
        arguments.resident_experts,
        has_forecast=not arguments.no_expert_forecast,
        directory=arguments.expert_dir,
    )
    tokenizer = source.tokenizer()
    paged = open_paged(source, paging, arguments.weights)
    for prompt in arguments.prompt:
        message = {"role": "user", "content": prompt}
        ids = chat_ids(tokenizer, [message]) if arguments.chat else tokenizer.encode(prompt)
        before = ("", ()) if arguments.chat else (prompt, ids)
        printer = Printer(before[0], tokenizer, before[1])
        result = generate_paged(
            paged,
            ids,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            stop_ids=tokenizer.eos_ids,
            is_stopped=stops_at(tokenizer, arguments.stop or []),
            on_tokens=printer.show,
        )
        printer.finish()
        show_speed(result, arguments.max_new_tokens)
    print(paging_sentence(paged))


def paging_sentence(paged: PagedModel) -> str:
    """What was asked for and brought, beside the least that could have been."""
    counts, least, accuracy = paged.counts(), paged.belady(), paged.accuracy()
    slots = sorted({layer.table.num_slots for layer in paged.layers if layer.table})
    forecast = "" if accuracy is None else f"; forecasts named {accuracy:.1%}"
    return (
        f"experts: {'/'.join(map(str, slots))} of each layer resident, {counts.requests:,} asked "
        f"for, {counts.on_demand:,} waited for, {counts.ahead:,} brought ahead: hit rate "
        f"{counts.hit_rate:.1%} (Belady's, which knows the future: {least.hit_rate:.1%}), there "
        f"when asked {counts.ready_rate:.1%}{forecast}"
    )
