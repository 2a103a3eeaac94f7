"""Continues a prompt with a trained run, token by token.

python -m scripts.generate runs/v31_nano --prompt "def parse_args("
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from checkpoint.run_directory import read_run
from configs.checks import require
from data.pipeline import prepare_corpus
from data.tokenizer import end_of_text_id
from evals.expert_domains import read_preference
from infer.generate import generate
from infer.load import load_model
from infer.sampling import Sampling
from infer.self_speculative import Draft
from model.unstacked import unstack, unstack_preference
from scripts import command


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    sampling = Sampling(arguments.temperature, arguments.top_p)
    first, length = arguments.draft_exit, arguments.draft_length
    require(
        first is not None or length is None,
        f"--draft-length {length} has no effect without --draft-exit: give both",
    )
    draft = None
    if first is not None:
        draft = Draft(exit=first) if length is None else Draft(exit=first, length=length)
    run = read_run(arguments.run_dir)
    wanted = arguments.expert_preference
    preference = read_preference(arguments.run_dir, wanted) if wanted is not None else None
    stacked, variables = load_model(run, arguments.run_dir)
    model, variables = unstack(stacked, variables)
    if preference is not None:
        preference = unstack_preference(stacked, preference)
    tokenizer = prepare_corpus(run.data, run.model.vocab_size).tokenizer()
    end = end_of_text_id(tokenizer)
    prompt = [end, *tokenizer.encode(arguments.prompt).ids]
    result = generate(
        model,
        variables,
        [prompt],
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
        stop_ids=frozenset({end}),
        on_tokens=_Printer(arguments.prompt, tokenizer).show,
        exit_threshold=arguments.exit_threshold,
        draft=draft,
        preference=preference,
    )
    depth = "" if result.mean_layers is None else f", {result.mean_layers:.1f} layers a token"
    if result.mean_accepted is not None:
        depth = f", {result.mean_accepted:.1f} tokens a draft"
    print(
        f"\n--- {len(result.tokens[0])} tokens; first after {result.first_token_seconds:.2f} s "
        f"(compilation included), then {result.tokens_per_second:.1f} tokens/s{depth}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a trained run")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--exit-threshold", type=float, help="leave at the first exit this sure (above 1: never)"
    )
    parser.add_argument(
        "--draft-exit", type=int, help="the layers before this exit draft, the rest verify"
    )
    parser.add_argument("--draft-length", type=int, help="tokens drafted at a time (4)")
    parser.add_argument(
        "--expert-preference",
        metavar="DOMAIN[:BETA]",
        help="rather use the experts that scripts.label_experts found for this domain",
    )
    return parser


class _Printer:
    """Shows the text as it grows, the prompt with the first token: what can't be done is said
    before it.
    """

    def __init__(self, prompt: str, tokenizer: Tokenizer) -> None:
        self._prompt, self._tokenizer = prompt, tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def show(self, token_B: np.ndarray) -> None:
        """Prints what the new token adds; a character whose bytes are incomplete waits."""
        sys.stdout.write(self._prompt)
        self._prompt = ""
        self._ids.extend(token_B[token_B >= 0].tolist())
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[self._shown :])
            sys.stdout.flush()
            self._shown = len(text)


if __name__ == "__main__":
    command.execute(main)
