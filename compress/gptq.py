"""GPTQ (Frantar et al. 2022): rounding one input after the other, each error made up for by those
that are still to come.

The measure is what the products lose on the calibration text: sum over outputs of e H e^T, where e
is an output's error and H = sum x x^T over the inputs' rows.

N outputs, K inputs.
"""

import numpy as np

from compress.grids import Grid, Steps, choose_steps, decoded, nearest_codes, round_to_nearest

DAMPING = 0.01
"""Of H's mean diagonal, added to it."""
COLUMNS = 128
"""Inputs after which the others' weights are brought up to date."""


def gptq(w_NK: np.ndarray, h_KK: np.ndarray, grid: Grid) -> tuple[np.ndarray, Steps]:
    """Codes, float32 [N, K], and steps: of each output those that lose less, these or the nearest.

    Scales are chosen before, by the inputs' importance, so that inputs may come in the order of
    theirs; of an output's codes the measure is never above round-to-nearest's.

    Args:
      w_NK: float32.
      h_KK: sum of x x^T, float [K, K].
    """
    plain, plain_steps = round_to_nearest(w_NK, grid)
    diagonal_K = np.diag(h_KK).copy()
    if not diagonal_K.any():
        return plain, plain_steps
    steps = choose_steps(w_NK, grid, diagonal_K)
    codes_NK = _in_turn(w_NK, h_KK, diagonal_K, steps, grid)
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
    return ((error @ h_KK.astype(np.float64)) * error).sum(1)


def _in_turn(
    w_NK: np.ndarray, h_KK: np.ndarray, diagonal_K: np.ndarray, steps: Steps, grid: Grid
) -> np.ndarray:
    num_outputs, num_inputs = w_NK.shape
    block = grid.block or num_inputs
    order = np.argsort(-diagonal_K, kind="stable")
    upper_KK = _inverse_factor(h_KK, order)
    w = w_NK[:, order].astype(np.float32)
    codes = np.zeros_like(w)
    for first in range(0, num_inputs, COLUMNS):
        last = min(first + COLUMNS, num_inputs)
        errors = np.zeros((num_outputs, last - first), np.float32)
        for j in range(first, last):
            scales_N, offsets_N = steps.column(int(order[j]), block)
            shift_N = 0.0 if offsets_N is None else offsets_N
            codes[:, j] = nearest_codes(w[:, j] - shift_N, scales_N, grid)
            error_N = (w[:, j] - (codes[:, j] * scales_N + shift_N)) / upper_KK[j, j]
            w[:, j + 1 : last] -= error_N[:, None] * upper_KK[j, j + 1 : last]
            errors[:, j - first] = error_N
        w[:, last:] -= errors @ upper_KK[first:last, last:]
    restored = np.empty_like(codes)
    restored[:, order] = codes
    return restored


def _inverse_factor(h_KK: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Upper triangular U with U^T U = (H + damping)^-1, inputs in this order; float32."""
    h = h_KK.astype(np.float64)[np.ix_(order, order)]
    mean = float(np.diag(h).mean())
    h[np.diag_indices(len(h))] += DAMPING * mean
    inverse = np.linalg.inv(h)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
