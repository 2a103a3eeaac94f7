"""What a long text costs with each kind of attention: bytes that are kept, and FLOPs of a token.

    python -m docs.examples.attention_costs            # at 100,000 tokens
    python -m docs.examples.attention_costs 1000000

DeepSeek-V4-Flash's sizes, with its own attention and with those of others in its place. Counted, by
the planner's own functions, from the shapes of the state and the model's arithmetic; nothing is
run, and no weights are made.
"""

import dataclasses
import sys

import jax
from rich.console import Console
from rich.table import Table

from configs.architecture import ModelConfig
from configs.attention import Attention, AttentionConfig, IndexerConfig, LatentAttentionConfig
from configs.family_models import deepseek_v4_flash
from model.flops import attention_flops_per_token, decode_flops_per_token
from model.model_state import init_state
from planning.inference_cost import num_bytes

MULTI_HEAD = AttentionConfig(num_heads=64, num_kv_heads=64, head_dim=128)
LATENT = LatentAttentionConfig(
    num_heads=64,
    query_rank=1024,
    latent_rank=512,
    nope_head_dim=128,
    rope_head_dim=64,
    value_head_dim=128,
)
SPARSE = dataclasses.replace(LATENT, indexer=IndexerConfig(num_heads=64, head_dim=128, top_k=2048))
OTHERS: dict[str, Attention] = {
    "multi-head": MULTI_HEAD,
    "grouped-query, 8 heads of keys": dataclasses.replace(MULTI_HEAD, num_kv_heads=8),
    "latent (MLA)": LATENT,
    "latent, sparse (DSA)": SPARSE,
}


def models() -> dict[str, ModelConfig]:
    """The model with each attention in all of its layers, its own last."""
    own = deepseek_v4_flash()

    def with_attention(attention: Attention) -> ModelConfig:
        layers = (dataclasses.replace(layer, attention=attention) for layer in own.pattern)
        return dataclasses.replace(own, pattern=tuple(layers))

    return {name: with_attention(each) for name, each in OTHERS.items()} | {
        "compressed (CSA and HCA)": own
    }


def kept_bytes(model: ModelConfig, tokens: int) -> float:
    """Of one text's keys, values and what else layers keep of it, in bfloat16."""
    return num_bytes(jax.eval_shape(lambda: init_state(model, 1, tokens, "bfloat16")))


def main(arguments: list[str]) -> None:
    tokens = int(arguments[0]) if arguments else 100_000
    table = Table(title=f"DeepSeek-V4-Flash's sizes, the token after {tokens:,}")
    for header in ("attention", "kept, GB", "of multi-head", "attention, GFLOP", "all, GFLOP"):
        table.add_column(header, justify="left" if header == "attention" else "right")
    first = None
    for name, model in models().items():
        size = kept_bytes(model, tokens)
        first = first or size
        mixing = attention_flops_per_token(model, tokens) / 1e9
        whole = decode_flops_per_token(model, tokens) / 1e9
        share = f"{100 * size / first:.2f}%"
        table.add_row(name, f"{size / 1e9:.3f}", share, f"{mixing:.2f}", f"{whole:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
