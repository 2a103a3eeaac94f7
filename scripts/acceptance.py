"""Says how well a small model drafts for a large one: the share of its tokens that speculative
sampling accepts, on held-out text.

    python -m scripts.acceptance runs/drafter --target runs/v31_nano
    python -m scripts.acceptance runs/drafter                 for the teacher that it learned from

The draft is a run, whose held-out text is read; the target is anything that scripts.generate reads.
"""

import json
from pathlib import Path

from checkpoint.provenance import read_provenance
from checkpoint.run_corpus import open_run_corpus
from checkpoint.run_directory import read_run
from configs.checks import UserError, require
from data.held_out import held_out_batches
from data.tokenizers.tokenizer import vocabulary_difference
from formats.atomic_folder import replace_text
from infer.acceptance import acceptance
from infer.sources import open_source
from infer.weights import FORMATS, check_format
from scripts import command
from scripts.reading import reading


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("draft", type=Path, metavar="RUN")
    parser.add_argument("--target", help="the model it drafts for; default: its teacher")
    parser.add_argument("--target-weights", choices=FORMATS, default="float32")
    parser.add_argument("--max-rows", type=int, default=64, help="held-out rows to read (64)")
    arguments = parser.parse_args(argv)
    require(arguments.max_rows > 0, f"--max-rows {arguments.max_rows} must be at least 1")
    run = read_run(arguments.draft)
    corpus = open_run_corpus(run, arguments.draft)
    target = open_source(arguments.target or _teacher(arguments.draft))
    difference = vocabulary_difference(corpus.tokenizer, target.tokenizer().tokenizer)
    same = difference is None and run.model.vocab_size == target.config.vocab_size
    require(
        same,
        f"{arguments.draft} and {target.name} number tokens differently "
        f"({difference or 'vocabularies of other sizes'}): a draft's tokens must be its target's",
    )
    with reading(target) as progress:
        weights = check_format(arguments.target_weights)
        loaded = target.load(weights=weights, progress=progress)
    draft = open_source(str(arguments.draft)).load()
    rows = (run.data.seq_len, arguments.max_rows, run.batch_size)
    batches = held_out_batches(corpus.held_out, *rows)
    found = acceptance(loaded, draft, batches, run.execution.logits_chunks)
    print(
        f"{target.name} accepts {found.sampled:.1%} of the tokens that {arguments.draft} draws, "
        f"and has the same first choice at {found.greedy:.1%} of {found.num_places:,} places"
    )
    for length, tokens in found.tokens_per_step.items():
        print(f"  drafts of {length}: {tokens:.2f} tokens for each reading by the target")
    result = {"target": target.name, **found.__dict__}
    replace_text(arguments.draft / "acceptance.json", json.dumps(result, indent=2) + "\n")
    return 0


def _teacher(run_dir: Path) -> str:
    known = read_provenance(run_dir)
    if known is None or known.teacher is None:
        raise UserError(f"--target is missing, and {run_dir} notes no teacher: name the model")
    return known.teacher.name


if __name__ == "__main__":
    command.execute(main)
