"""The peer of scripts/bench_train.py: transformers' Mixtral on PyTorch, as fast as it goes on CPU.

Runs as a program from another folder than the repository's: transformers takes a package named
`kernels` for its own. Usage: python mixtral_torch.py EXPERTS DTYPE, where EXPERTS is an experts
implementation of transformers ("grouped_mm", "batched_mm" or "eager"), and DTYPE float32, or
bfloat16 for autocast: parameters and the optimiser are float32 either way.
"""

import sys

from alternate import serve  # pyright: ignore[reportMissingImports]  (this file's neighbour)


def main(experts: str, dtype: str) -> None:
    import torch  # pyright: ignore[reportMissingImports]  (the `parity` extra)
    from transformers import (  # pyright: ignore[reportMissingImports]
        MixtralConfig,
        MixtralForCausalLM,
    )

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        intermediate_size=512,
        vocab_size=4096,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        output_router_logits=False,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, 4096, (8, 256))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    serve(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
