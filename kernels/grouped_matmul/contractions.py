"""The three contractions of grouped_matmul as one differentiable function.

An implementation brings two of them: rows times matrices, which is the forward and, with the
matrices transposed, the gradient of the rows; and rows times rows, the gradient of the matrices.

R rows sorted by group, E groups, D input width, F output width.
"""

from typing import Protocol

import jax


class RowsTimesMatrix(Protocol):
    """y[r] = x[r] @ w[group of r]: x [R, D] and w [E, D, F] to [R, F]; with `transpose` the last
    two dimensions of w change places: x [R, F] to [R, D].
    """

    def __call__(
        self, x: jax.Array, w: jax.Array, group_sizes: jax.Array, /, *, transpose: bool
    ) -> jax.Array: ...


class RowsTimesRows(Protocol):
    """dw[e] = sum over the group's rows of x[r]^T dy[r]: x [R, D] and dy [R, F] to [E, D, F]."""

    def __call__(self, x: jax.Array, dy: jax.Array, group_sizes: jax.Array, /) -> jax.Array: ...


class GroupedMatmul(Protocol):
    """x [R, D], w [E, D, F] and group_sizes [E] to [R, F]; see api.py."""

    def __call__(self, x: jax.Array, w: jax.Array, group_sizes: jax.Array, /) -> jax.Array: ...


def differentiable(
    rows_times_matrix: RowsTimesMatrix, rows_times_rows: RowsTimesRows
) -> GroupedMatmul:
    """grouped_matmul with its gradients, of these contractions."""

    @jax.custom_vjp
    def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        return rows_times_matrix(x_RD, w_EDF, group_sizes_E, transpose=False)

    def forward(x_RD, w_EDF, group_sizes_E):
        return grouped_matmul(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)

    def backward(residuals, dy_RF):
        x_RD, w_EDF, group_sizes_E = residuals
        dx_RD = rows_times_matrix(dy_RF, w_EDF, group_sizes_E, transpose=True)
        dw_EDF = rows_times_rows(x_RD, dy_RF, group_sizes_E)
        return dx_RD, dw_EDF, None

    grouped_matmul.defvjp(forward, backward)
    return grouped_matmul
