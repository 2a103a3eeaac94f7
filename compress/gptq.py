"""GPTQ (Frantar et al. 2022): rounding one input after the other, each error made up for by those
that are still to come.

The measure is what the products lose on the calibration text: sum over outputs of e H e^T, where e
is an output's error and H = sum x x^T over the inputs' rows.

N outputs, K inputs.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from compress.grids import Grid, Steps, choose_steps, decoded, nearest_codes, round_to_nearest

DAMPING = 0.01
"""Of H's mean diagonal, added to it."""
COLUMNS = 128
"""Inputs after which the others' weights are brought up to date."""


def gptq(w_NK: np.ndarray, inputs: "PreparedInputs", grid: Grid) -> tuple[np.ndarray, Steps]:
    """Codes, float32 [N, K], and steps: of each output those that lose less, these or the nearest.

    Scales are chosen before, by the inputs' importance, so that inputs may come in the order of
    theirs; of an output's codes the measure is never above round-to-nearest's.

    Args:
      w_NK: float32.
      inputs: what they are, of `prepare`.
    """
    h_KK = inputs.h_KK
    plain, plain_steps = round_to_nearest(w_NK, grid)
    diagonal_K = np.diag(h_KK).copy()
    if not diagonal_K.any():
        return plain, plain_steps
    steps = choose_steps(w_NK, grid, diagonal_K)
    codes_NK = _in_turn(w_NK, inputs, steps, grid)
    errors_N, plain_N = (
        row_losses(w_NK - decoded(codes, own, grid), h_KK)
        for codes, own in ((codes_NK, steps), (plain, plain_steps))
    )
    better_N1 = (errors_N <= plain_N)[:, None]
    scales_NS = np.where(better_N1, steps.scales_NS, plain_steps.scales_NS)
    offsets_NS = None
    if steps.offsets_NS is not None and plain_steps.offsets_NS is not None:
        offsets_NS = np.where(better_N1, steps.offsets_NS, plain_steps.offsets_NS)
    return np.where(better_N1, codes_NK, plain), Steps(scales_NS, offsets_NS)


def row_losses(error_NK: np.ndarray, h_KK: np.ndarray) -> np.ndarray:
    """The measure of each output, float64 [N]."""
    error = error_NK.astype(np.float64)
    return ((error @ h_KK) * error).sum(1)


def _in_turn(w_NK: np.ndarray, inputs: "PreparedInputs", steps: Steps, grid: Grid) -> np.ndarray:
    num_outputs, num_inputs = w_NK.shape
    block = grid.block or num_inputs
    order, upper_KK = inputs.order_K, inputs.upper_KK
    w_KN = np.ascontiguousarray(w_NK.T[order], np.float32)  # an input's weights lie together
    codes_KN = np.zeros_like(w_KN)
    for first in range(0, num_inputs, COLUMNS):
        last = min(first + COLUMNS, num_inputs)
        errors = np.zeros((last - first, num_outputs), np.float32)
        for j in range(first, last):
            scales_N, offsets_N = steps.column(int(order[j]), block)
            shift_N = 0.0 if offsets_N is None else offsets_N
            codes_KN[j] = nearest_codes(w_KN[j] - shift_N, scales_N, grid)
            error_N = (w_KN[j] - (codes_KN[j] * scales_N + shift_N)) / upper_KK[j, j]
            w_KN[j + 1 : last] -= upper_KK[j, j + 1 : last, None] * error_N
            errors[j - first] = error_N
        w_KN[last:] -= upper_KK[first:last, last:].T @ errors
    restored_KN = np.empty_like(codes_KN)
    restored_KN[order] = codes_KN
    return np.ascontiguousarray(restored_KN.T)


@dataclass(frozen=True)
class PreparedInputs:
    """What rounding needs of H; shared by the weights that read the same inputs."""

    h_KK: np.ndarray
    """float64."""
    order_K: np.ndarray
    """Inputs by their squares, largest first."""
    upper_KK: np.ndarray
    """float32, upper triangular U with U^T U = (H + damping)^-1, inputs in this order."""


def prepare(h_KK: np.ndarray) -> PreparedInputs:
    """
    Args:
      h_KK: sum of x x^T.
    """
    order = np.argsort(-np.diag(h_KK), kind="stable")
    damped = h_KK.astype(np.float64)[np.ix_(order, order)]
    mean = float(np.diag(damped).mean())
    damped[np.diag_indices(len(damped))] += DAMPING * mean if mean > 0 else 1.0
    # H = M M^T with M upper triangular, by turning Cholesky's factor round; so U = M^-1.
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    inverse = solve_triangular(upper, np.eye(len(upper)), lower=False)
    return PreparedInputs(h_KK, order, inverse.astype(np.float32))
