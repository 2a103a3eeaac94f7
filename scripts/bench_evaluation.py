"""Measures an evaluation's samples a second, in batches and one at a time.

python -m scripts.bench_evaluation smollm2
python -m scripts.bench_evaluation smollm2 --tasks exams_es,gsm8k --limit 8
"""

from evals.local_model import BATCH_TOKENS, LocalModel
from evals.task_list import find_tasks
from evals.throughput import measure, print_throughput
from scripts import command
from scripts.model_options import add_model_options, asked_mesh, chosen_source, load_model


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("model", help="a run, a model's folder or file, or 'smollm2'")
    parser.add_argument("--tasks", default="multiemo_en,exams_es,winogrande_ni")
    parser.add_argument("--limit", type=int, default=32, help="samples of a round (32)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating (3)")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="of a batch (4096)")
    parser.add_argument("--rows", type=int, default=LocalModel.max_rows, help="answers at once")
    add_model_options(parser, has_state=False)
    arguments = parser.parse_args(argv)
    tasks, mesh = find_tasks(arguments.tasks.split(",")), asked_mesh(arguments)
    command.keep_compiled()
    source = chosen_source(arguments.model, arguments)
    loaded = load_model(source, arguments, mesh, for_decoding=True)
    model = LocalModel(
        *loaded,
        source.tokenizer,
        mesh=mesh,
        batch_tokens=arguments.batch_tokens,
        max_rows=arguments.rows,
    )
    for task in tasks:
        print_throughput(measure(model, task, arguments.limit, arguments.rounds))


if __name__ == "__main__":
    command.execute(main)
