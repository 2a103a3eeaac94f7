"""Texts that a model writes while it is trained (SamplesConfig): in samples.jsonl, and shown."""

import json
from pathlib import Path
from typing import Any

import jax

from configs.base import RunConfig
from configs.checks import require
from data.pipeline import prepare_corpus
from data.tokenizers.public_tokenizer import PublicTokenizer, read_public_tokenizer
from data.tokenizers.tokenizer import end_of_text_id
from infer.chat import chat_ids
from infer.generate import generate
from infer.load import inference_model
from infer.sampling import Sampling
from model.adapters import merge
from model.transformer import Variables
from model.unstacked import unstack
from parallel.distributed import is_started
from train.loop import Sample

FILE = "samples.jsonl"


def sampler(run: RunConfig, run_dir: Path) -> Sample | None:
    """What train.loop.fit calls; None where the run asks for no samples. The corpus, whose
    tokenizer is needed, is made if it is not there.

    Raises:
      UserError: samples of several processes, or longer than the model's context.
    """
    config = run.samples
    if config.every is None:
        return None
    require(
        not is_started() and run.mesh.num_devices == 1,
        "samples.every is for runs on one device: leave it out, and generate from a checkpoint",
    )
    model, path = inference_model(run), run_dir / FILE
    tokenizer = _tokenizer(run)
    prompts = [_prompt_ids(run, tokenizer, prompt) for prompt in config.prompts]
    longest = max(map(len, prompts))
    require(
        longest + config.max_new_tokens <= run.model.context_length,
        f"samples.prompts of up to {longest} tokens and samples.max_new_tokens="
        f"{config.max_new_tokens} exceed model.context_length={run.model.context_length}: shorten "
        "the prompt or ask for fewer",
    )

    def sample(step: int, variables: Variables) -> None:
        if "adapters" in variables:
            variables = jax.jit(lambda held: merge(model, held))(variables)
        apart, own = unstack(model, variables)
        made = generate(
            apart,
            own,
            prompts,
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(config.temperature, seed=step),
            stop_ids=tokenizer.eos_ids,
        )
        lines: list[dict[str, Any]] = [
            {"step": step, "prompt": prompt, "text": tokenizer.decode(tokens)}
            for prompt, tokens in zip(config.prompts, made.tokens, strict=True)
        ]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for line in lines:
            print(f"step {step}: {line['prompt']!r} -> {line['text']!r}", flush=True)

    return sample


def _tokenizer(run: RunConfig) -> PublicTokenizer:
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    tokenizer = corpus.tokenizer()
    if run.data.form != "text":
        public = read_public_tokenizer(corpus.directory)
        return PublicTokenizer(
            tokenizer, public.bos_id, public.eos_ids, public.add_bos, public.chat_template
        )
    end = end_of_text_id(tokenizer)
    return PublicTokenizer(tokenizer, bos_id=end, eos_ids=frozenset({end}), add_bos=True)


def _prompt_ids(run: RunConfig, tokenizer: PublicTokenizer, prompt: str) -> list[int]:
    if run.data.form == "text":
        return tokenizer.encode(prompt)
    return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
