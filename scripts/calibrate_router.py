"""Calibrates who answers a question, a small model or a large one, from questions that both have
answered; moesaic serve LARGE --small SMALL --router FILE then asks accordingly.

    python -m scripts.calibrate_router smollm2 --questions scored.jsonl --out router.json
    python -m scripts.calibrate_router runs/small --questions scored.jsonl --out r.json --target 0.9

Each line of the questions is {"prompt": TEXT, "small": SCORE, "large": SCORE}, higher scores for
better answers. Half of them fit the router, a quarter its threshold; the rest is the report.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from configs.checks import UserError
from formats.atomic_folder import replace_text
from infer.chat import chat_ids
from infer.query_router import Question, Router, calibrate, question_of
from infer.question_features import QuestionScorer
from scripts import command
from scripts.arguments import finite
from scripts.model_options import add_model_options, asked_mesh, chosen_source, load_model
from train.progress import ProgressBar


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    mesh = asked_mesh(arguments)
    questions = read_questions(arguments.questions)
    command.keep_compiled()
    source = chosen_source(arguments.small, arguments)
    tokenizer = source.tokenizer()
    scorer = QuestionScorer(*load_model(source, arguments, mesh))
    features = []
    with ProgressBar("looking at questions", total=len(questions), unit="questions") as bar:
        for question in questions:
            message = [{"role": "user", "content": question.prompt}]
            is_chat = arguments.chat
            ids = chat_ids(tokenizer, message) if is_chat else tokenizer.encode(question.prompt)
            features.append(scorer(ids if len(ids) > 1 else [*ids, *ids]))
            bar.update(len(features))
    target, seed = arguments.target, arguments.seed
    found = np.array(features)
    router = calibrate(questions, found, small=arguments.small, target=target, seed=seed)
    replace_text(arguments.out, json.dumps(dataclasses.asdict(router), indent=2) + "\n")
    print(report_of(router))
    print(f"router: {arguments.out}")


def read_questions(path: Path) -> list[Question]:
    """
    Raises:
      UserError: a line that is no scored question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: give another file") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                tree = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is not valid JSON ({error})") from error
            found.append(question_of(tree, f"{path}, line {number}"))
    return found


def report_of(router: Router) -> str:
    """What the router does with the questions that were held out."""
    r = router.report
    return (
        f"{r.questions} questions held out: {r.call_share:.1%} go to the large model, score "
        f"{r.quality:.3f} (small alone {r.small_quality:.3f}, large alone {r.large_quality:.3f})\n"
        f"performance gap recovered {r.pgr:.1%}, at random {r.random_pgr:.1%}; over all shares "
        f"{r.apgr:.3f} of at most {r.oracle_apgr:.3f}, at random 0.5; probabilities are off by "
        f"{r.calibration_error:.3f}"
    )


def _parser() -> argparse.ArgumentParser:
    made = command.parser(__doc__)
    made.add_argument("small", metavar="SMALL", help="run, folder, GGUF file, or smollm2")
    made.add_argument("--questions", type=Path, required=True, metavar="FILE")
    made.add_argument("--out", type=Path, required=True, metavar="FILE")
    made.add_argument("--target", type=finite, default=0.95, help="share of the gap to keep (0.95)")
    made.add_argument("--chat", action="store_true", help="questions are messages, as to a chat")
    made.add_argument("--seed", type=int, default=0, help="of the split (0)")
    add_model_options(made, has_state=False)
    return made


if __name__ == "__main__":
    command.execute(main)
