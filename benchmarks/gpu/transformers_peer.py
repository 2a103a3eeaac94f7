"""The peer of training.py and decoding.py: transformers' OLMoE on PyTorch, with grouped_mm.

Runs as a program from another folder than the repository's: transformers takes a package named
`kernels` for its own. Reads its settings as JSON from the command line, writes a line of JSON.

Parameters and gradients are bfloat16: grouped_mm takes no other, and has no part in autocast. With
masters in float32, as ours, AdamW updates float32 copies of the parameters, whose moments are
float32 too; without them, the parameters themselves, which is less work and rounds most of the
updates away.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

READ_AT_ONCE = 8192
"""Tokens of all prompts: each has eight rows among the experts'."""


def make_model(torch: Any, settings: dict[str, Any]) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM  # pyright: ignore[reportMissingImports]

    config = OlmoeConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["d_model"],
        intermediate_size=settings["d_ff"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"],
        num_experts=settings["experts"],
        num_experts_per_tok=settings["top_k"],
        max_position_embeddings=settings["length"],
        output_router_logits=False,
        use_cache=False,
        attn_implementation="sdpa",
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(settings["device"]):
        torch.set_default_dtype(torch.bfloat16)
        model = OlmoeForCausalLM(config)
    model.set_experts_implementation(settings["implementation"])
    return model


def train(torch: Any, settings: dict[str, Any]) -> dict[str, Any]:
    model = make_model(torch, settings)
    model.train()
    shape, device = (settings["rows"], settings["length"]), settings["device"]
    tokens = (
        settings["vocab_size"] * torch.rand(shape, dtype=torch.float32, device=device) ** 3
    ).long()
    forward = torch.compile(model) if settings["is_compiled"] else model

    def gradients() -> float:
        loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        return loss.item()

    found = {}
    for masters in ("float32", "bfloat16"):
        update = make_update(torch, list(model.parameters()), masters)
        seconds, losses = [], []
        for _ in range(2 + settings["steps"]):
            start = time.perf_counter()
            losses.append(gradients())
            update()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[2:])
        found[masters] = {
            "seconds": seconds,
            "losses": losses,
            "tokens_per_second": shape[0] * shape[1] / median,
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        }
        del update
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return found


def make_update(torch: Any, parameters: list[Any], masters: str) -> Callable[[], None]:
    """AdamW's update of the parameters, by their gradients, which it clears."""
    if masters == "bfloat16":
        optimizer = torch.optim.AdamW(parameters, lr=4e-4, fused=True)
        copies = parameters
    else:
        copies = [p.detach().float() for p in parameters]
        optimizer = torch.optim.AdamW(copies, lr=4e-4, fused=True)

    def update() -> None:
        if masters == "float32":
            for copy, parameter in zip(copies, parameters, strict=True):
                copy.grad = parameter.grad.float()
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if masters == "float32":
            with torch.no_grad():
                torch._foreach_copy_([p.data for p in parameters], copies)

    return update


def decode(torch: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of greedy decoding over a static cache, the step recorded as one CUDA graph."""
    from transformers import StaticCache  # pyright: ignore[reportMissingImports]

    model = make_model(torch, settings).eval()
    device, steps, found = settings["device"], settings["steps"], []
    for batch in settings["batches"]:
        length = settings["context"]
        cache = StaticCache(config=model.config, max_cache_len=length + 4 * steps + 8)
        tokens = torch.randint(0, settings["vocab_size"], (batch, length), device=device)
        piece = max(1, min(256, READ_AT_ONCE // batch))
        with torch.inference_mode():
            for begin in range(0, length, piece):
                part = tokens[:, begin : begin + piece]
                model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            found.append({"batch": batch} | _time_steps(torch, model, cache, tokens, steps))
        del cache
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"decoding": found, "peak_bytes": peak}


def _time_steps(torch: Any, model: Any, cache: Any, tokens: Any, steps: int) -> dict[str, Any]:
    token, position = (
        tokens[:, -1:].clone(),
        torch.full((tokens.shape[0], 1), tokens.shape[1], device=tokens.device),
    )

    def step() -> None:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        token.copy_(out.logits[:, -1:].argmax(dim=-1))
        position.add_(1)

    run, how = step, "eager"
    if tokens.is_cuda:
        try:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run, how = graph.replay, "CUDA graph"
        except Exception as problem:
            how = f"eager ({type(problem).__name__}: {str(problem)[:200]})"
    seconds = []
    for _ in range(3):
        if tokens.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            run()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / steps)
    return {"how": how, "seconds": seconds, "tokens_per_second": tokens.shape[0] / min(seconds)}


def main() -> None:
    import torch  # pyright: ignore[reportMissingImports]

    settings = json.loads(sys.argv[1])
    found = decode(torch, settings) if settings["task"] == "decode" else train(torch, settings)
    print(json.dumps(settings | found | {"torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
