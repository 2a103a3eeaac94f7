"""Answers generated for prompts, many at once by the engine, each as if it were alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from configs.checks import require, require_text
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.text_stream import TextStream
from evals.likelihood import first_id
from evals.samples import Answer, Prompt
from infer.chat import chat_ids
from infer.engine import Engine, EngineOptions, Request, with_pages
from infer.sampling import Sampling
from infer.stop_texts import stops_at
from model.transformer import Transformer, Variables


@dataclass(frozen=True)
class Generator:
    """Continues prompts with a model."""

    model: Transformer
    variables: Variables
    tokenizer: PublicTokenizer
    mesh: Mesh | None
    max_rows: int

    def answers(
        self, prompts: Sequence[Prompt], on_answer: Callable[[int, list[Answer]], None]
    ) -> list[list[Answer]]:
        """num_answers of each prompt, in order.

        Args:
          on_answer: called with each prompt's index and answers as soon as they are all there.
        Raises:
          UserError: a chat prompt for a model without chat template, or text that is no UTF-8.
        """
        if not prompts:
            return []
        plans = [self._plan(prompt) for prompt in prompts]
        options = EngineOptions(
            max_rows=self.max_rows,
            max_length=max(len(p.ids) + p.max_new_tokens for p in plans),
            max_prompt=max(len(p.ids) for p in plans),
            prefix_cache=True,  # examples before the question are read once
        )
        options = with_pages(options, self.model.config)
        engine = Engine(self.model, self.variables, options, mesh=self.mesh)
        owner_of: dict[int, int] = {}
        numbers: list[list[int]] = []
        for i, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
            seeds = range(prompt.num_answers)
            numbers.append([engine.add(self._request(prompt, plan, seed)) for seed in seeds])
            owner_of |= dict.fromkeys(numbers[-1], i)
        texts: dict[int, list[int]] = {number: [] for number in owner_of}
        left = [prompt.num_answers for prompt in prompts]
        found: list[list[Answer]] = [[] for _ in prompts]
        while engine.has_work():
            for emitted in engine.step():
                i = owner_of[emitted.request]
                texts[emitted.request] += emitted.tokens
                left[i] -= emitted.is_done
                if emitted.is_done and not left[i]:
                    found[i] = [self._answer(prompts[i], plans[i], texts[n]) for n in numbers[i]]
                    on_answer(i, found[i])
        return found

    def _plan(self, prompt: Prompt) -> "_Plan":
        """The prompt's tokens, cut on the left where no room would be left for an answer: what
        lm-evaluation-harness does, but an answer gets at most half of the model's context.
        """
        if isinstance(prompt.prompt, str):
            require_text(prompt.prompt, "a prompt")
            ids = self.tokenizer.encode(prompt.prompt) or [first_id(self.tokenizer)]
        else:
            messages = [dict(message) for message in prompt.prompt]
            ids = chat_ids(self.tokenizer, messages, tools=prompt.tools)
        new = prompt.max_new_tokens
        require(new >= 1, f"max_new_tokens={new} must be at least 1")
        longest = self.model.config.context_length
        require(longest > 1, f"a model of context_length={longest} has no room for an answer")
        room = max(longest - new, (longest + 1) // 2)
        kept = ids[-room:]
        return _Plan(kept, min(new, longest - len(kept)), len(ids) - len(kept))

    def _request(self, prompt: Prompt, plan: "_Plan", seed: int) -> Request:
        is_greedy = prompt.temperature == 0
        return Request(
            plan.ids,
            plan.max_new_tokens,
            sampling=Sampling(
                temperature=prompt.temperature, top_p=1.0 if is_greedy else prompt.top_p, seed=seed
            ),
            stop_ids=self.tokenizer.eos_ids,
            is_stopped=stops_at(self.tokenizer, prompt.stops),
        )

    def _answer(self, prompt: Prompt, plan: "_Plan", tokens: list[int]) -> Answer:
        """The text up to the first stop string, and why it ended."""
        stream = TextStream(self.tokenizer, plan.ids)
        text = stream.add(tokens) + stream.finish()
        ends = [at for stop in prompt.stops if (at := text.find(stop)) >= 0]
        if ends:
            return Answer(text[: min(ends)], "stop", len(tokens), plan.num_dropped)
        ended = "length" if len(tokens) >= plan.max_new_tokens else "end"
        return Answer(text, ended, len(tokens), plan.num_dropped)


@dataclass(frozen=True)
class _Plan:
    """A prompt in tokens, and how many may follow it."""

    ids: list[int]
    max_new_tokens: int
    num_dropped: int
