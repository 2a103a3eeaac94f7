"""PyTorch's dense products, for benchmarks/ceilings.py; runs as a program where PyTorch is.

Prints GFLOP/s by dtype as JSON.
"""

import json
import os
import time

SIDE = 2048
"""Of the square matrices."""
REPEATS = 5


def main() -> None:
    import torch  # pyright: ignore[reportMissingImports]  (the `parity` extra)

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = {}
    for dtype in ("float32", "bfloat16"):
        x, w = (torch.randn(SIDE, SIDE).to(getattr(torch, dtype)) for _ in range(2))
        times = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            torch.mm(x, w)
            times.append(time.perf_counter() - began)
        found[dtype] = 2.0 * SIDE**3 / min(times[1:]) / 1e9
    print(json.dumps(found))


if __name__ == "__main__":
    main()
