"""lm-evaluation-harness with our models: its own command line, in which --model moesaic is one.

    python -m scripts.lm_eval run --model moesaic --model_args source=smollm2 --tasks arc_easy
    python -m scripts.lm_eval run --model moesaic --model_args source=runs/student,weights=int8 \\
        --tasks my_task --include_path my_tasks/ --apply_chat_template
    python -m scripts.lm_eval ls tasks

--mesh.AXIS N is ours, everything else the harness's (run --help). It fetches its tasks' data from a
hub; tasks on files of your own need no network.
"""

import math
import sys

from evals.lm_eval_model import register
from parallel.mesh import AXES, make_mesh
from scripts import command


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    for axis in AXES:
        parser.add_argument(f"--mesh.{axis}", type=int, default=1, metavar="N")
    if argv[:1] in (["-h"], ["--help"], []):
        parser.parse_args(["--help"])  # the harness has its own behind its verbs
    ours, theirs = _split(argv)
    sizes = {axis: getattr(parser.parse_args(ours), f"mesh.{axis}") for axis in AXES}
    mesh = None
    if math.prod(sizes.values()) > 1:
        command.use_host_devices(math.prod(sizes.values()))
        mesh = make_mesh(**sizes)
    register(mesh)
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]

    sys.argv = ["lm-eval", *theirs]
    return cli_evaluate() or 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options of the mesh, and all others."""
    ours: list[str] = []
    theirs: list[str] = []
    words = iter(argv)
    for word in words:
        if word.startswith("--mesh."):
            ours += [word] if "=" in word else [word, next(words, "")]
        else:
            theirs.append(word)
    return ours, theirs


if __name__ == "__main__":
    command.execute(main)
