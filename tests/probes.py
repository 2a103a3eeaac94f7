"""Checks that every layer kind must pass: nothing sees the future, and reading piece by piece
equals reading at once.
"""

from functools import partial

import jax
import numpy as np
from jax.tree_util import DictKey

from configs.architecture import ModelConfig
from model.model_state import init_state
from model.transformer import Transformer, Variables, abstract_variables, hidden_states
from parallel.mesh import make_mesh
from parallel.sharding import tree_shardings
from tests import oracle

empty_state = jax.jit(init_state, static_argnums=range(4))
"""A program to a config instead of one to a shape."""


@partial(jax.jit, static_argnums=0, static_argnames="is_whole")
def read(model: Transformer, variables, tokens_BL, positions_BL, state=None, *, is_whole=False):
    """`hidden_states`, compiled once for each model and kind of piece: the tests share it."""
    return hidden_states(model, variables, tokens_BL, positions_BL, state, is_whole=is_whole)


def drawn(config: ModelConfig, seed: int = 1) -> Variables:
    """Random variables, none of them zero or one: those would hide what they multiply."""
    random = np.random.RandomState(seed)
    abstract, _ = abstract_variables(Transformer(config))

    def draw(x):
        if np.issubdtype(x.dtype, np.integer):  # a table of experts, of which there are two
            return random.randint(0, 2, x.shape).astype(x.dtype)
        fan_in = np.prod(x.shape[-1:])
        return (random.randn(*x.shape) * fan_in**-0.5).astype(np.float32)

    return jax.device_put(jax.tree.map(draw, abstract))


def inputs(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """One row of random tokens and its positions, int32 [1, L]."""
    tokens = np.random.RandomState(0).randint(0, config.vocab_size, (1, length))
    return tokens.astype(np.int32), np.arange(length, dtype=np.int32)[None]


class Parity:
    """Our hidden states of one row of two packed documents, beside the numpy oracle's.

    The scales of norms are of order 1, and with them all activations: in smaller ones a mistake at
    a bound or in a softmax would not be seen.

    tolerance: of float32 through the model's layers against float64.
    """

    def __init__(self, config: ModelConfig, length: int, *, tolerance: float) -> None:
        self.config, self.tolerance = config, tolerance
        self.variables = jax.tree_util.tree_map_with_path(_with_loud_norms, drawn(config))
        tokens, positions = inputs(config, length)
        packed = np.concatenate([positions[:, :7], positions[:, : length - 7]], axis=1)
        self.row = (tokens[0], packed[0])
        hidden_BLD, _ = read(Transformer(config), self.variables, tokens, packed)
        self.ours_LD = np.asarray(hidden_BLD[0])

    def check(self) -> None:
        np.testing.assert_allclose(self.ours_LD, self._oracle(self.config), atol=self.tolerance)

    def check_told_apart(self, wrong: str | ModelConfig) -> None:
        """Ours is nowhere near a wrong version: the oracle with a mistake that it knows by name, or
        with the settings of another model."""
        named = isinstance(wrong, str)
        other_LD = self._oracle(self.config, wrong) if named else self._oracle(wrong)
        assert np.abs(self.ours_LD - other_LD).max() > 100 * self.tolerance

    def _oracle(self, config: ModelConfig, wrong: str = "") -> np.ndarray:
        params = _with_tables(jax.device_get(self.variables), self.row[0])
        return oracle.transformer(params, config, *self.row, wrong)[0]


def _with_tables(variables, tokens_L: np.ndarray):
    """The parameters, with the experts of each token [periods, L, K] where a table names them."""
    params = variables["params"]
    for name, state in variables["router_state"].get("periods", {}).items():
        table_PVK = state["moe"].get("token_experts")
        if table_PVK is not None:
            params["periods"][name]["moe"]["token_experts"] = table_PVK[:, tokens_L]
    return params


def _with_loud_norms(path, x):
    return x * x.shape[-1] ** 0.5 if path[-1] == DictKey("scale") else x


def check_causality(config: ModelConfig, variables: Variables, length: int) -> None:
    """Tokens after t change no hidden state at or before t, bitwise, and some after it."""
    tokens, positions = inputs(config, length)

    def forward(tokens_BL):
        return np.asarray(read(Transformer(config), variables, tokens_BL, positions)[0])

    before = forward(tokens)
    for t in (0, length // 3, length - 5):
        changed = tokens.copy()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 7) % config.vocab_size
        after = forward(changed)
        np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
        assert (before[:, t + 1 :] != after[:, t + 1 :]).any()


def check_decode(config: ModelConfig, variables: Variables, length: int, prefill: int) -> None:
    """Prefill and then token by token gives the hidden states of one forward pass, to 1e-4."""
    model, (tokens, positions) = Transformer(config), inputs(config, length)
    expected, _ = read(model, variables, tokens, positions)
    state = empty_state(config, 1, length, "float32")
    pieces = [slice(0, prefill), *(slice(i, i + 1) for i in range(prefill, length))]
    hidden = []
    for piece in pieces:
        is_whole = piece.start == 0
        part, state = read(
            model, variables, tokens[:, piece], positions[:, piece], state, is_whole=is_whole
        )
        hidden.append(part)
    np.testing.assert_allclose(np.concatenate(hidden, axis=1), expected, atol=1e-4)


def check_devices(
    config: ModelConfig,
    variables: Variables,
    length: int,
    shape: tuple[int, int, int],
    *,
    tolerance: float,
) -> None:
    """A mesh of (data, expert, tensor) gives the hidden states of one device."""
    model, (tokens, positions) = Transformer(config), inputs(config, length)
    rows = [np.repeat(x, 4, axis=0) for x in (tokens, positions)]
    forward = jax.jit(lambda v: hidden_states(model, v, *rows)[0])
    expected, mesh = forward(variables), make_mesh(*shape)
    abstract, axes = abstract_variables(model)
    placed = jax.device_put(variables, tree_shardings(mesh, axes, abstract))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(forward(placed), expected, atol=tolerance)
