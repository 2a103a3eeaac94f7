"""Options of verbs that read a model: its weights' format, its keys' format, its mesh."""

import argparse

from jax.sharding import Mesh

from configs.checks import require
from infer.sources import Source
from infer.weights import FORMATS, check_format
from model.transformer import Transformer, Variables
from parallel.mesh import AXES, make_mesh
from scripts import command
from scripts.reading import reading

KV_FORMATS = ("float32", "bfloat16", "int8")


def add_model_options(parser: argparse.ArgumentParser, *, has_state: bool = True) -> None:
    """--dtype, --weights, --mesh.AXIS; for verbs that generate --kv and --kv-pages, too."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument(
        "--weights",
        choices=FORMATS,
        default="float32",
        help="format of the weights in memory (float32); fp8, int8 and int4 are rounded to nearest",
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


def description(arguments: argparse.Namespace) -> str:
    """The format and mesh that were asked for, as "int8_expert4"; empty for what is the default."""
    kinds = [] if arguments.weights == "float32" else [arguments.weights]
    kinds += [arguments.dtype] if arguments.dtype else []
    sizes = [(axis, getattr(arguments, f"mesh.{axis}")) for axis in AXES]
    return "_".join([*kinds, *(f"{axis}{size}" for axis, size in sizes if size != 1)])


def load_model(
    source: Source, arguments: argparse.Namespace, *, for_decoding: bool = False
) -> tuple[Transformer, Variables, Mesh | None]:
    """The model in the formats and on the mesh that were asked for; None is one device.

    Raises:
      UserError: as Source.load; fewer devices than the mesh has.
    """
    sizes = {axis: getattr(arguments, f"mesh.{axis}") for axis in AXES}
    mesh = None
    for axis, size in sizes.items():
        require(size >= 1, f"--mesh.{axis} {size} must be at least 1")
    if max(sizes.values()) > 1:
        command.use_host_devices(sizes["data"] * sizes["expert"] * sizes["tensor"])
        mesh = make_mesh(**sizes)
    weights = check_format(arguments.weights, mesh)
    with reading(source) as progress:
        model, variables = source.load(
            mesh=mesh,
            dtype=arguments.dtype,
            weights=weights,
            progress=progress,
            for_decoding=for_decoding,
        )
    return model, variables, mesh
