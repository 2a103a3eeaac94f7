"""Model FLOPs, the numerator of MFU: the work that the mathematics asks for.

Two per weight that a token meets (the embedding is only looked up), and two per visible key and
channel of each of scores and values; an indexer scores all keys before a query. Norms, softmax and
routing are left out, as is everything that a program does twice. A training step takes three times
the forward pass.
"""

import numpy as np

from configs.architecture import LayerSpec, ModelConfig
from configs.attention import Attention
from model.attention.kinds import KINDS


def training_flops_per_token(model: ModelConfig, length: int) -> float:
    """Forward and backward, multi-token modules included, on rows of `length` tokens."""
    return 3.0 * (forward_flops_per_token(model, length) + _multi_token_flops(model, length))


def forward_flops_per_token(model: ModelConfig, length: int) -> float:
    """A token of a row of `length`, on average: training's forward pass, scoring, prefill."""
    places = np.arange(1, length + 1)
    return _forward(model, places)


def decode_flops_per_token(model: ModelConfig, length: int) -> float:
    """The token at the end of a row of `length`."""
    return _forward(model, np.array([length]))


def attention_flops_per_token(model: ModelConfig, length: int) -> float:
    """Of that token, the scores and values of all layers alone."""
    return _mixing(model, np.array([length]))


def _forward(model: ModelConfig, places: np.ndarray) -> float:
    weights = model.num_active_parameters - model.num_looked_up_parameters
    return 2.0 * weights + _mixing(model, places)


def _mixing(model: ModelConfig, places: np.ndarray) -> float:
    prefix = sum(_attention_flops(spec, places) for spec in model.prefix)
    period = sum(_attention_flops(spec, places) for spec in model.pattern)
    return prefix + model.num_periods * period


def _multi_token_flops(model: ModelConfig, length: int) -> float:
    """Of the modules that look ahead: a layer, a projection and the output layer each."""
    if model.multi_token is None:
        return 0.0
    layer, width = model.multi_token.layer, model.d_model
    weights = layer.attention.num_parameters(width) + layer.ffn.num_active_parameters(width)
    weights += 0 if layer.dense is None else layer.dense.num_parameters(width)
    weights += 2 * width * width + width * model.vocab_size
    seen = _attention_flops(layer, np.arange(1, length + 1))
    return model.multi_token.depth * (2.0 * weights + seen)


def _attention_flops(spec: LayerSpec, places: np.ndarray) -> float:
    """Scores and values of one layer, for a query at these places (from 1) on average."""
    attention, capacity = spec.attention, 1.0 if spec.depth is None else spec.depth.capacity
    # A layer of a Mixture-of-Depths has fewer queries, and each of them fewer keys.
    places = np.maximum(places * capacity, 1)
    return capacity * KINDS[type(attention)].mixing_flops(attention, places)


def visible_keys(attention: Attention, places: np.ndarray) -> np.ndarray:
    """Keys that the query at each place sees, itself included."""
    return KINDS[type(attention)].visible_keys(attention, places)
