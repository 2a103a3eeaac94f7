"""Compares a training step with PyTorch transformers' Mixtral of the same shape, on CPU.

    pip install ".[parity]"                              # torch and transformers, once
    python -m scripts.bench_train                        # alternating rounds, ratio with its spread
    python -m scripts.bench_train --dtype bfloat16       # ours in bfloat16, the peer in autocast
    python -m scripts.bench_train --profile              # where our step's time goes; needs no peer

The peer is of this Python, or of another (--transformers-python). Both train 15.5M parameters
(4 layers, width 256, 8 experts top-2 of width 512, vocabulary 4,096) on batches of 8 x 256 tokens
with AdamW; both get huge pages from malloc, the peer its fused AdamW and the fastest of its experts
implementations. Beside the result stand the machine's own ceilings: dense products of this
project, of XLA and of PyTorch, and a large copy.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks import machine
from benchmarks.alternate import Worker, alternate, serve
from benchmarks.ceilings import print_ceilings
from benchmarks.compare_training import PEER_EXPERTS, print_comparison, print_profile
from scripts import command


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--profile", action="store_true", help="print our step's time by part")
    parser.add_argument("--serve", action="store_true", help="be the worker of our side")
    arguments = parser.parse_args(argv)
    if arguments.profile:
        print_profile(arguments.steps, arguments.dtype)
        return
    if arguments.serve:
        from benchmarks.training import make_step, mixtral_run

        serve(make_step(mixtral_run(arguments.dtype)))
        return
    root = Path(__file__).resolve().parent.parent
    ours = [sys.executable, "-m", "scripts.bench_train", "--serve"]
    ours += ["--dtype", arguments.dtype]
    peer = [arguments.transformers_python, str(root / "benchmarks" / "mixtral_torch.py")]
    with tempfile.TemporaryDirectory() as elsewhere:
        workers = [Worker("moesaic", ours, root)]
        workers += [Worker(e, [*peer, e, arguments.dtype], Path(elsewhere)) for e in PEER_EXPERTS]
        try:
            series = alternate(workers, arguments.rounds, arguments.steps)
        finally:
            for worker in workers:
                worker.close()
    print(machine.description())
    print_comparison(dict(zip([w.name for w in workers], series, strict=True)), arguments.dtype)
    print_ceilings(arguments.transformers_python)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
