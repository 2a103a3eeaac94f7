"""Log-likelihoods and greedy answers by transformers, one request at a time: needs the `parity`
extra and gguf, run from another folder than the checkout's.

    python peer.py MODEL.gguf REQUESTS.json ANSWERS.json

Requests are {"pairs": [[context, continuation], ...], "prompts": [{"prompt", "stops",
"max_new_tokens"}, ...]}; text becomes tokens by transformers' own reading of the file.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As lm-evaluation-harness states it: blanks move, the pair is encoded together."""
    if not context:
        return [tokenizer.bos_token_id], tokenizer.encode(continuation, add_special_tokens=False)
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    before = tokenizer.encode(context)
    return before, tokenizer.encode(context + continuation)[len(before) :]


def log_likelihood(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    before, after = encode_pair(tokenizer, context, continuation)
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after][:-1]])).logits[0, -len(after) :]
    log_p = torch.log_softmax(logits.double(), -1)
    targets = torch.tensor(after)
    nats = log_p[torch.arange(len(after)), targets].sum()
    return float(nats), bool((log_p.argmax(-1) == targets).all())


def answer(model, tokenizer, request, eos_id: int) -> str:
    """Greedy text up to a stop string, token by token with a cache."""
    ids = torch.tensor([tokenizer.encode(request["prompt"])])
    made: list[int] = []
    cache, given = None, ids
    text = ""
    while len(made) < request["max_new_tokens"]:
        with torch.no_grad():
            out = model(given, past_key_values=cache, use_cache=True)
        cache, best = out.past_key_values, int(out.logits[0, -1].argmax())
        if best == eos_id:
            break
        made.append(best)
        given = torch.tensor([[best]])
        text = tokenizer.decode(made)
        found = [text.find(stop) for stop in request["stops"] if stop in text]
        if found:
            return text[: min(found)]
    return text


def main(file: Path, requests_path: Path, answers_path: Path) -> None:
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    requests = json.loads(requests_path.read_text())
    pairs = [log_likelihood(model, tokenizer, *pair) for pair in requests["pairs"]]
    texts = [answer(model, tokenizer, r, requests["eos_id"]) for r in requests["prompts"]]
    answers_path.write_text(json.dumps({"pairs": pairs, "texts": texts}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
