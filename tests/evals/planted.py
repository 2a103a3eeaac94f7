"""Models whose answers are known beforehand, for tasks to be scored by arithmetic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.results_form import ModelDescription
from evals.run import Evaluation, Settings
from evals.samples import Answer, Likelihood, Prompt, Rolling
from infer.run_weights import RunWeights


@dataclass
class Planted:
    """Answers by functions, and counts what it was asked."""

    nats: Callable[[str, str], float] = lambda context, continuation: -1.0
    answer: Callable[[str], str] = lambda prompt: ""
    asked: list[object] = field(default_factory=list)
    stop_after: int | None = None
    """Interrupted after so many answers."""

    def log_likelihoods(self, pairs, on_answer=lambda i, x: None) -> list[Likelihood]:
        found = []
        for i in sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0])):  # as by length
            self._ask(pairs[i])
            found.append((i, Likelihood(self.nats(*pairs[i]), False, 1)))
            on_answer(*found[-1])
        return [x for _, x in sorted(found, key=lambda pair: pair[0])]

    def rolling(self, texts, on_answer=lambda i, x: None) -> list[Rolling]:
        found = []
        for i, text in enumerate(texts):
            self._ask(text)
            found.append(Rolling(self.nats("", text), len(text), len(text.encode())))
            on_answer(i, found[-1])
        return found

    def generate(
        self, prompts: Sequence[Prompt], on_answer=lambda i, x: None
    ) -> list[list[Answer]]:
        found = []
        for i, prompt in enumerate(prompts):
            self._ask(prompt.key)
            text = self.answer(str(prompt.prompt))
            ended = "length" if len(text) >= prompt.max_new_tokens else "end"
            found.append([Answer(text, ended, len(text))] * prompt.num_answers)
            on_answer(i, found[-1])
        return found

    def _ask(self, what: object) -> None:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(what)


def evaluation(
    model: Planted, output: Path, *, weights: str = "a", name: str = "planted", **settings
) -> Evaluation:
    described = ModelDescription(name, "planted", RunWeights(step=1, sha256=weights * 64))
    return Evaluation(model, described, Settings(**settings), output)
