"""A share of the experts resident, for verbs that generate."""

import argparse
from pathlib import Path
from typing import Any

from configs.checks import require
from infer.engine.paged import PagedPrograms
from infer.expert_paging import PagedModel, load_paged
from infer.expert_store import Paging
from infer.sources import Source
from infer.weights import check_format
from parallel.mesh import AXES
from scripts.model_options import AUTO
from scripts.reading import reading

REFUSED = ("dtype", "adapter", "exit_threshold", "draft_exit", "allow_updates")
"""Options that need weights as they lie in a file, all layers in one program, or room for other
weights; each of some verb."""


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
    given: dict[str, Any] = {
        f"--{name.replace('_', '-')}": getattr(arguments, name, None) for name in REFUSED
    }
    given |= {f"--mesh.{axis}": getattr(arguments, f"mesh.{axis}") > 1 for axis in AXES}
    given["--weights auto"] = arguments.weights == AUTO
    given["--draft mtp"] = getattr(arguments, "draft", None) == "mtp"
    set_ones = [name for name, value in given.items() if value not in (None, False)]
    require(
        not set_ones,
        f"{' and '.join(set_ones)} can't go together with --resident-experts, which runs the model "
        "layer by layer, on one device, with the weights that it began with: leave one out",
    )


def open_paged(source: Source, paging: Paging, weights: str) -> PagedModel:
    """
    Raises:
      UserError: as load_paged.
    """
    with reading(source) as progress:
        return load_paged(source, paging, weights=check_format(weights), progress=progress)


def asked_programs(
    source: Source, arguments: argparse.Namespace, *, records: bool = False
) -> PagedPrograms | None:
    """The model with its experts outside, as it was asked for; None: it was not.

    Args:
      records: see Paging.
    Raises:
      UserError: as load_paged.
    """
    if arguments.resident_experts is None:
        return None
    paging = Paging(
        arguments.resident_experts,
        has_forecast=not arguments.no_expert_forecast,
        directory=arguments.expert_dir,
        records=records,
    )
    return PagedPrograms(open_paged(source, paging, arguments.weights))


def paging_sentence(paged: PagedModel) -> str:
    """What was asked for and brought, beside the least that could have been."""
    counts, least = paged.counts(), paged.belady()
    slots = sorted({layer.table.num_slots for layer in paged.layers if layer.table})
    named = "" if counts.accuracy is None else f"; forecasts named {counts.accuracy:.1%}"
    return (
        f"experts: {'/'.join(map(str, slots))} of each layer resident, {counts.requests:,} asked "
        f"for, {counts.on_demand:,} waited for, {counts.ahead:,} brought ahead: hit rate "
        f"{counts.hit_rate:.1%} (Belady's, which knows the future: {least.hit_rate:.1%}), there "
        f"when asked {counts.ready_rate:.1%}{named}"
    )
