"""Changes of a model's weights that leave its function as it is, and make it easier to round.

smooth      SmoothQuant (Xiao et al. 2022): m = max|x|^a / max|w|^(1 - a) for each input
awq         AWQ (Lin et al. 2023): m = mean|x|^a, a from a grid, by what the products lose
rotate      QuaRot (Ashkboos et al. 2024): the residual stream, and each head's values, turned

Smoothing multiplies the weights of an input by m and divides what makes that input by it: the norm
before, the values before the output projection, the up projection before the down projection.
Turning needs norms without scales, so they are folded into the weights that read them.

D d_model, H query heads, G key/value heads, C head_dim, F d_ff.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.linalg import hadamard

from compress.layered import Layer, LayeredModel, Tree
from configs.attention import AttentionConfig
from configs.checks import require
from configs.feed_forward import DenseConfig, MoEConfig

EXPONENTS = tuple(i / 20 for i in range(20))
"""Tried by AWQ; 0 leaves the weights as they are."""


def scale_inputs(layer: Layer, name: str, factor: np.ndarray) -> Layer:
    """The same layer, the inputs of some weights multiplied by a factor.

    Args:
      name: "attention" or "ffn" (D factors), "heads" (G times C: one for the heads of a group),
        "hidden" (F).
    """
    params = {k: dict(v) if isinstance(v, dict) else v for k, v in layer.params.items()}
    factor = factor.astype(np.float32)
    if name in ("attention", "ffn"):
        norm = f"{name}_norm"
        params[norm] = {"scale": params[norm]["scale"] / factor}
        readers = {"q", "kv"} if name == "attention" else set()
        branch = name if name == "attention" else "ffn" if "ffn" in params else "moe"
        for reader in readers or _ffn_readers(params[branch]):
            params[branch][reader] = _scaled_reader(branch, reader, params[branch][reader], factor)
    elif name == "heads":
        attention, config = params["attention"], layer.spec.attention
        assert isinstance(config, AttentionConfig)
        each = config.num_heads // config.num_kv_heads
        factor_GC = factor.reshape(config.num_kv_heads, config.head_dim)
        attention["o"] = attention["o"] * np.repeat(factor_GC, each, axis=0)[:, :, None]
        attention["kv"] = _divided(attention["kv"], 1, factor_GC)
        if "kv_bias" in attention:
            bias = attention["kv_bias"].copy()
            bias[1] /= factor_GC
            attention["kv_bias"] = bias
    else:
        ffn = params["ffn"]
        ffn["down"] = ffn["down"] * factor[:, None]
        ffn["gate_up"] = _divided(ffn["gate_up"], 1, factor)
        if "gate_up_bias" in ffn:
            bias = ffn["gate_up_bias"].copy()
            bias[1] /= factor
            ffn["gate_up_bias"] = bias
    return dataclasses.replace(layer, params=params)


def _divided(w: np.ndarray, part: int, factor: np.ndarray) -> np.ndarray:
    """w [D, 2, ...] with one of its two parts divided."""
    w = w.copy()
    w[:, part] /= factor
    return w


def _ffn_readers(ffn: Tree) -> list[str]:
    return [name for name in ("gate_up", "router", "shared_gate", "shared") if name in ffn]


def _scaled_reader(branch: str, reader: str, w, factor_D: np.ndarray):
    if reader == "shared":
        return w | {"gate_up": w["gate_up"] * factor_D[:, None, None]}
    axis = 1 if branch == "moe" and reader == "gate_up" else 0
    shape = [1] * w.ndim
    shape[axis] = len(factor_D)
    return w * factor_D.reshape(shape)


def places(layer: Layer) -> dict[str, tuple[str, ...]]:
    """Inputs that can be scaled, and the weights that read them, by path in the layer."""
    found: dict[str, tuple[str, ...]] = {}
    spec = layer.spec
    is_grouped = isinstance(spec.attention, AttentionConfig)
    has_norm = spec.norms != "post"
    if is_grouped and has_norm:
        found["attention"] = ("attention.q", "attention.kv")
    if is_grouped:
        found["heads"] = ("attention.o",)
    if isinstance(spec.ffn, DenseConfig):
        found |= {"ffn": ("ffn.gate_up",)} if has_norm else {}
        found["hidden"] = ("ffn.down",)
    elif (
        has_norm
        and "correlation" not in layer.params["moe"]
        and "context" not in layer.params["moe"]
    ):
        shared = ("moe.shared.gate_up",) if "shared" in layer.params["moe"] else ()
        found["ffn"] = ("moe.gate_up", *shared)
    return found


def smoothing(largest_x_K: np.ndarray, largest_w_K: np.ndarray, exponent: float) -> np.ndarray:
    """SmoothQuant's factors of the weights; 1 where an input or its weights are 0."""
    safe = (largest_x_K > 0) & (largest_w_K > 0)
    x, w = np.where(safe, largest_x_K, 1.0), np.where(safe, largest_w_K, 1.0)
    return np.where(safe, x**exponent / w ** (1 - exponent), 1.0)


def best_factor(
    mean_x_K: np.ndarray, loss: Callable[[np.ndarray], float]
) -> tuple[np.ndarray, float]:
    """AWQ's factors of the least loss, and their exponent.

    Args:
      mean_x_K: mean |x| of each input.
      loss: of factors.
    """
    safe_K = np.where(mean_x_K > 0, mean_x_K, 1.0)
    tried = []
    for exponent in EXPONENTS:
        factor_K = safe_K**exponent
        factor_K = factor_K / np.sqrt(factor_K.max() * factor_K.min())
        if exponent == 0:
            factor_K = np.ones_like(factor_K)
        tried.append((loss(factor_K), exponent, factor_K))
    _, exponent, factor_K = min(tried, key=lambda t: t[:2])
    return factor_K, exponent


def rotation(width: int, seed: int = 0) -> np.ndarray:
    """A random orthogonal matrix that spreads each input over all, float64 [width, width]: a
    Hadamard matrix of the largest power of two that divides the width, times a random one of the
    rest, with random signs.
    """
    random = np.random.default_rng(seed)
    power = width & -width
    spread = hadamard(power) / np.sqrt(power)
    if width != power:
        rest, _ = np.linalg.qr(random.standard_normal((width // power, width // power)))
        spread = np.kron(rest, spread)
    return random.choice([-1.0, 1.0], width)[:, None] * spread


def rotated(model: LayeredModel, seed: int = 0) -> LayeredModel:
    """The same function with a turned residual stream and turned values; embedding and output layer
    lie apart from then on.

    Raises:
      UserError: norms after the branches, attention or routers of another kind.
    """
    for layer in model.layers:
        require(
            layer.spec.norms == "pre" and isinstance(layer.spec.attention, AttentionConfig),
            "rotation needs norms before each branch alone and grouped-query attention: take "
            "another --method",
        )
        ffn = layer.spec.ffn
        require(
            not isinstance(ffn, MoEConfig) or ffn.router.context is None,
            "rotation is not built for routers with context: take another --method",
        )
    turn_DD = rotation(model.config.d_model, seed)
    layers = tuple(_rotated_layer(layer, turn_DD, seed) for layer in model.layers)
    embedding_VD, scale_D = model.ends["embedding"], model.ends["final_norm"]["scale"]
    output_DV = model.ends.get("output", embedding_VD.T)
    ends: Tree = {
        "embedding": _float(embedding_VD @ turn_DD),
        "output": _float(turn_DD.T @ (scale_D[:, None] * output_DV)),
        "final_norm": {"scale": np.ones_like(scale_D)},
    }
    config = dataclasses.replace(model.config, tie_embeddings=False)
    return dataclasses.replace(model, config=config, ends=ends, layers=layers)


def _float(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32)


def _rotated_layer(layer: Layer, turn_DD: np.ndarray, seed: int) -> Layer:
    params: Tree = {k: dict(v) for k, v in layer.params.items()}
    for norm, branch in (("attention_norm", "attention"), ("ffn_norm", "ffn")):
        branch = branch if branch in params else "moe"
        scale_D = params[norm]["scale"].astype(np.float64)
        read = turn_DD.T * scale_D[None]  # [turned, D]
        own = params[branch]
        for name in ("q", "kv", "gate_up", "router", "shared_gate"):
            if name in own:
                own[name] = _read_by(
                    read, own[name], 1 if branch == "moe" and name == "gate_up" else 0
                )
        for name in ("o", "down", "o_bias", "down_bias"):
            if name in own:
                own[name] = _float(own[name] @ turn_DD)
        if "shared" in own:
            shared = own["shared"]
            own["shared"] = shared | {
                "gate_up": _read_by(read, shared["gate_up"], 0),
                "down": _float(shared["down"] @ turn_DD),
            }
        params[norm] = {"scale": np.ones_like(params[norm]["scale"])}
    params["attention"] = _with_turned_values(layer, params["attention"], seed)
    return dataclasses.replace(layer, params=params)


def _read_by(read_ED: np.ndarray, w: np.ndarray, axis: int) -> np.ndarray:
    """w with its dim of D read through a matrix."""
    return _float(np.moveaxis(np.tensordot(read_ED, w, axes=(1, axis)), 0, axis))


def _with_turned_values(layer: Layer, attention: Tree, seed: int) -> Tree:
    """Values turned within each head, and the output projection turned back."""
    config = layer.spec.attention
    assert isinstance(config, AttentionConfig)
    if config.clip_qkv is not None:
        return attention
    turn_CC = rotation(config.head_dim, seed + 1)
    kv = attention["kv"].copy()
    kv[:, 1] = kv[:, 1] @ turn_CC
    turned = attention | {
        "kv": _float(kv),
        "o": _float(np.einsum("cd,hce->hde", turn_CC, attention["o"])),
    }
    if "kv_bias" in attention:
        bias = attention["kv_bias"].copy()
        bias[1] = bias[1] @ turn_CC
        turned["kv_bias"] = bias
    return turned
