"""What serving a model takes: bytes of its weights and state in each format, and least times.

Weights' bytes are exact, by shape, format and block; so are the state's, from the state's own
shapes. Times are bounds: bytes over bandwidth or FLOPs over the rate, whichever is more, at the
sheet's peak rates or as they were measured (infer/hardware.py).

R rows (sequences at once), E experts, K experts per token.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax

from configs.architecture import ModelConfig
from configs.base import ExecutionConfig
from configs.checks import UserError
from configs.feed_forward import MoEConfig
from infer.hardware import Hardware
from infer.load import inference_execution
from infer.weights import FORMATS, formats_of, matrices_of
from kernels.quantize import MatrixDims
from kernels.quantize.formats import (
    AFFINE,
    QUANTIZED,
    WeightFormat,
    choose_block_size,
    scale_dtype,
)
from model.depth import with_threshold_selection
from model.flops import decode_flops_per_token, forward_flops_per_token
from model.model_state import init_state, unpageable_reason
from model.moe_layers import moe_layers
from model.transformer import Transformer, abstract_variables

BITS = {"fp8_e4m3": 8, "int8": 8, "int4": 4}


Bytes = dict[WeightFormat, float]


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights in one format."""

    total: float
    always: Bytes
    """By format: what every step reads."""
    experts: tuple[tuple[float, Bytes], ...]
    """Of each kind of MoE layer: K / E, and the routed experts' bytes by format."""

    def read(self, rows: int) -> Bytes:
        """Bytes by format that a step of so many tokens reads, with balanced routing: an expert is
        left alone by a token with probability 1 - K / E."""
        read = dict(self.always)
        for share, held in self.experts:
            touched = 1 - (1 - share) ** rows
            for name, size in held.items():
                read[name] = read.get(name, 0.0) + touched * size
        return read


class Costs:
    """What one model costs on one device.

    Args:
      context: tokens of a prompt and its text.
    """

    def __init__(
        self, config: ModelConfig, execution: ExecutionConfig, hardware: Hardware, context: int
    ) -> None:
        config = with_threshold_selection(config)
        self.config, self.hardware, self.context = config, hardware, context
        self._model = Transformer(config, inference_execution(execution))
        self.compute = self._model.execution.compute_dtype
        self._weights: dict[WeightFormat, Weights] = {}
        self._decode_flops = decode_flops_per_token(config, context)
        self._prompt_flops = forward_flops_per_token(config, context)
        self.unpageable = unpageable_reason(config)

    def weights(self, format: WeightFormat) -> Weights:
        if format not in self._weights:
            self._weights[format] = self._count(format)
        return self._weights[format]

    def state_bytes(self, kv: str, rows: int, page_size: int) -> float | None:
        """Of keys, values and what else layers keep; None: they can't be kept in this format."""
        per_row = -(-self.context // page_size)
        num_pages = None if self.unpageable else 1 + rows * per_row
        length = per_row * page_size

        def make() -> Any:
            sizes = (self.config, rows, length, kv)
            return init_state(*sizes, num_pages=num_pages, page_size=page_size)

        try:
            return num_bytes(jax.eval_shape(make))
        except UserError:
            return None

    def step_bytes(self, rows: int, tokens: int) -> float:
        """What a step makes on the way, estimated: each row's logits twice, and of the tokens read
        at once what one layer makes, in float32."""
        c = self.config
        widest = max(
            spec.ffn.router.top_k * spec.ffn.d_ff
            if isinstance(spec.ffn, MoEConfig)
            else spec.ffn.d_ff
            for spec in (*c.prefix, *c.pattern)
        )
        heads = max(spec.attention.out_width for spec in (*c.prefix, *c.pattern))
        of_token = 4.0 * (6 * c.d_model + 3 * widest + 4 * heads)
        return 8.0 * rows * c.vocab_size + max(rows, tokens) * of_token

    def decode_seconds(self, format: WeightFormat, rows: int, state_bytes: float) -> float:
        """A step that gives each row a token, at the end of its context."""
        read = self.hardware.read_seconds(self.weights(format).read(rows))
        read += state_bytes / self.hardware.bandwidth
        flops = rows * self._decode_flops
        return max(read, self.hardware.multiply_seconds(flops, format, self.compute))

    def prompt_seconds(self, format: WeightFormat, tokens: int) -> float:
        """Reading so many tokens of prompts at once."""
        read = self.hardware.read_seconds(self.weights(format).read(tokens))
        flops = tokens * self._prompt_flops
        return max(read, self.hardware.multiply_seconds(flops, format, self.compute))

    def is_bound_by_products(self, format: WeightFormat, tokens: int) -> bool:
        """Whether reading so many tokens of prompts takes its products longer than its weights."""
        read = self.hardware.read_seconds(self.weights(format).read(tokens))
        flops = tokens * self._prompt_flops
        return self.hardware.multiply_seconds(flops, format, self.compute) >= read

    def _count(self, format: WeightFormat) -> Weights:
        target = self.hardware.target
        matrices = matrices_of(self._model)
        chosen: dict[str, WeightFormat] = {}
        if target is not None:
            chosen = formats_of(self._model, format, target)
        elif format == "bfloat16":
            chosen = dict.fromkeys(matrices, format)
        abstract, _ = abstract_variables(self._model)
        shares = {
            "".join(f"['{key}']" for key in layer.path): layer.config.router.top_k
            / layer.config.num_experts
            for layer in moe_layers(self.config).values()
        }
        total, always = 0.0, defaultdict[WeightFormat, float](float)
        experts = {share: defaultdict[WeightFormat, float](float) for share in shares}
        for path, leaf in jax.tree.leaves_with_path(abstract["params"]):
            name = jax.tree_util.keystr(path)
            held: WeightFormat = chosen.get(name, "float32")
            _, dims = matrices.get(name, (None, None))
            size = self._size(leaf.shape, held, dims)
            total += size
            of_expert = re.fullmatch(r"(.*\['moe'\])\['(gate_up|down)(_bias)?'\]", name)
            if name.startswith("['multi_token"):
                continue  # no step of decoding reads it
            is_embedding = name == "['embedding']" and not self.config.tie_embeddings
            if is_embedding or name == "['per_layer_embeddings']['table']":
                continue  # a row of it for each token
            if of_expert and of_expert[1] in experts:
                experts[of_expert[1]][held] += size
            else:
                always[held] += size
        return Weights(total, always, tuple((shares[name], held) for name, held in experts.items()))

    def _size(self, shape: tuple[int, ...], format: WeightFormat, dims: MatrixDims | None) -> float:
        """Bytes of a weight in its format, scales and offsets included."""
        count = math.prod(shape)
        if format not in QUANTIZED:
            return count * (2.0 if format == "bfloat16" else 4.0)
        target, quantized = self.hardware.target, QUANTIZED[format]
        assert dims is not None
        assert target is not None
        block = choose_block_size(math.prod(dims.split(shape)[1]), quantized, target)
        assert block is not None
        scale = 2 if scale_dtype(target) == "bfloat16" else 4
        per_block = scale * (2 if format in AFFINE else 1)
        return count * BITS[quantized] / 8 + count / block * per_block


def num_bytes(tree: Any) -> float:
    """Of abstract arrays."""
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def formats_on(hardware: Hardware) -> tuple[WeightFormat, ...]:
    """Formats of weights that kernels for the device read."""
    if hardware.target is None or hardware.sheet.platform == "unknown":
        return ("float32", "bfloat16")
    return FORMATS
