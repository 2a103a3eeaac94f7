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

from formats.atomic_folder import replace_text
from infer.chat import chat_ids
from infer.query_router import calibrate, report_of
from infer.question_features import QuestionScorer
from infer.scored_questions import read_questions
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
