"""Options of verbs that read a model: its weights' format, its keys' format, its mesh."""

import argparse
import math
import os
import sys
from pathlib import Path

from jax.sharding import Mesh

from configs.checks import require
from infer.adapters import with_adapter
from infer.kept_weights import KeptWeights
from infer.sources import Source, open_source
from infer.weights import FORMATS, check_format
from model.transformer import Transformer, Variables
from parallel.mesh import AXES, make_mesh
from scripts import command
from scripts.reading import reading

MOST_DEVICES = 64
"""Of a process: more, made of a CPU's threads, take minutes to begin with."""

LENGTH = 4096
"""Tokens of a prompt and its text where nobody says, at most."""
KV_FORMATS = ("float32", "bfloat16", "int8")
KEPT_GIB, MOST_GIB = "MOESAIC_KEPT_WEIGHTS_GIB", 8.0
"""The environment's word for the disk's GiB that kept weights may take, and where it says none."""
AUTO = "auto"
"""Formats as they are planned for this machine (scripts/inference_plans.py)."""


def add_model_options(
    parser: argparse.ArgumentParser, *, has_state: bool = True, has_auto: bool = False
) -> None:
    """--adapter, --dtype, --weights, --mesh.AXIS; for verbs that generate --kv and --kv-pages,
    too.

    Args:
      has_auto: whether the verb settles --weights auto.
    """
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a LoRA adapter in PEFT's form, to be added"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument(
        "--weights",
        choices=(*FORMATS, AUTO) if has_auto else FORMATS,
        default="float32",
        help="format of the weights in memory (float32); fp8, int8, int4 are rounded to nearest,"
        " int4_affine to blocks with an offset, as GGUF's Q4_1 and Q4_K have them"
        + ("; auto: as moesaic plan-inference has it for this machine" if has_auto else ""),
    )
    for axis in AXES:
        parser.add_argument(
            f"--mesh.{axis}", type=int, default=1, metavar="N", help=f"devices along {axis!r} (1)"
        )
    if has_state:
        parser.add_argument(
            "--kv", choices=KV_FORMATS, help="format of keys and values in memory (the dtype's)"
        )
        parser.add_argument(
            "--kv-pages", type=int, metavar="N", help="keep them in N pages of 64 positions"
        )


def chosen_source(name: str, arguments: argparse.Namespace) -> Source:
    """The source of that name, with the adapter that was asked for.

    Raises:
      UserError: as open_source and with_adapter.
    """
    source = open_source(name)
    return source if arguments.adapter is None else with_adapter(source, arguments.adapter)


def description(arguments: argparse.Namespace) -> str:
    """The format and mesh that were asked for, as "int8_expert4"; empty for what is the default."""
    kinds = [] if arguments.weights == "float32" else [arguments.weights]
    kinds += [arguments.dtype] if arguments.dtype else []
    sizes = [(axis, getattr(arguments, f"mesh.{axis}")) for axis in AXES]
    return "_".join([*kinds, *(f"{axis}{size}" for axis, size in sizes if size != 1)])


def asked_mesh(arguments: argparse.Namespace) -> Mesh | None:
    """The mesh that was asked for, None for one device; to be called before JAX touches any.

    Raises:
      UserError: sizes that no mesh has, fewer devices than that, or weights that it can't split.
    """
    sizes = {axis: getattr(arguments, f"mesh.{axis}") for axis in AXES}
    for axis, size in sizes.items():
        require(size >= 1, f"--mesh.{axis} {size} must be at least 1")
    count = math.prod(sizes.values())
    require(
        count <= MOST_DEVICES,
        f"the mesh has {count:,} devices, at most {MOST_DEVICES} are used by one process: make it "
        "smaller",
    )
    mesh = None
    if count > 1:
        command.use_host_devices(count)
        mesh = make_mesh(**sizes)
    if arguments.weights == AUTO:
        require(
            mesh is None and arguments.dtype is None,
            "--weights auto plans for one device and the model's own dtype: name a format beside "
            "--mesh.* or --dtype",
        )
    else:
        check_format(arguments.weights)
    return mesh


def settle_auto(source: Source, arguments: argparse.Namespace) -> None:
    """Puts what is planned for this machine in the place of --weights auto, and in that of --kv and
    of rows where they were left open; says so. Whatever else --weights is stays as it is.

    Raises:
      UserError: nothing fits.
    """
    if arguments.weights == AUTO:
        from scripts import inference_plans  # which takes a while, of every start

        inference_plans.settle(source, arguments)


def load_model(
    source: Source,
    arguments: argparse.Namespace,
    mesh: Mesh | None,
    *,
    for_decoding: bool = False,
    is_kept: bool = True,
) -> tuple[Transformer, Variables]:
    """The model in the formats that were asked for, on this mesh.

    Args:
      is_kept: whether the weights may be kept for later loads, and come from an earlier one.
    Raises:
      UserError: as Source.load and kept_weights.
    """
    with reading(source) as progress:
        return source.load(
            mesh=mesh,
            dtype=arguments.dtype,
            weights=check_format(arguments.weights),
            progress=progress,
            for_decoding=for_decoding,
            kept=kept_weights() if is_kept else None,
        )


def kept_weights() -> KeptWeights | None:
    """Weights in their formats, in the user's cache folder beside the compiled programs; None where
    there is none, or the environment's KEPT_GIB is 0.

    Raises:
      UserError: KEPT_GIB is no size.
    """
    stated = os.environ.get(KEPT_GIB, "")
    try:
        gib = float(stated or MOST_GIB)
    except ValueError:
        gib = math.nan
    require(gib >= 0, f"{KEPT_GIB}={stated} must be a number of GiB; 0 keeps no weights")
    try:
        folder = command.cache_folder() / "weights"
    except OSError:
        return None  # as keep_compiled says
    return KeptWeights(folder, gib * 2**30, _note) if gib else None


def _note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr, flush=True)
