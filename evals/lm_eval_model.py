"""Our models in lm-evaluation-harness (0.4.13): its tasks, prompts and command line ask them.

`register` makes the model "moesaic" known to it; python -m scripts.lm_eval does so and goes on with
its command line. model_args are source, weights, dtype, batch_tokens and max_gen_toks.
"""

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jax.sharding import Mesh

from configs.checks import UserError, require
from data.tokenizers.chat import render
from data.tokenizers.public_tokenizer import PublicTokenizer
from evals.local_model import BATCH_TOKENS, LocalModel
from evals.samples import Prompt
from infer.sources import open_source
from infer.weights import check_format
from train.progress import ProgressBar

NAME = "moesaic"
INSTALL = "pip install lm-eval==0.4.13, or -e '.[evaluation]' in the checkout"
MAX_GEN_TOKS = 256
"""Tokens of an answer where a task does not say."""
DTYPES = ("float32", "bfloat16")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest answer; the first that is there counts."""


class SpelledSpecials(PublicTokenizer):
    """Reads special tokens that a text spells, as the harness's own models do: it renders a chat
    template before it asks."""

    def encode(self, text: str, *, specials: bool = True, bos: bool | None = None) -> list[int]:
        begin = self.text_of(self.bos_id)
        has_bos = specials and bool(begin) and text.startswith(begin)
        return super().encode(text, specials=specials, bos=False if has_bos else bos)


def spelled_specials(tokenizer: PublicTokenizer) -> SpelledSpecials:
    return SpelledSpecials(
        tokenizer=tokenizer.tokenizer,
        bos_id=tokenizer.bos_id,
        eos_ids=tokenizer.eos_ids,
        add_bos=tokenizer.add_bos,
        chat_template=tokenizer.chat_template,
        eos_id=tokenizer.eos_id,
    )


class HarnessModel:
    """The harness's questions, answered by a LocalModel; mixed with its class LM when that is
    there."""

    mesh: Mesh | None = None
    cache_hook: Any = None
    """The harness's, which keeps answers where it is told to."""

    def __init__(
        self,
        source: str = "",
        weights: str = "float32",
        dtype: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        max_gen_toks: int = MAX_GEN_TOKS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """
        Args:
          batch_size, max_batch_size, device: the harness sends them always: batches are made by
            tokens, and devices are JAX's.
        Raises:
          UserError: a model that can't be read, or arguments that it can't have.
        """
        super().__init__()  # the harness's LM
        require(bool(source), "name a model: --model_args source=smollm2, a run or a folder")
        require(dtype in (None, *DTYPES), f"dtype={dtype} must be one of {', '.join(DTYPES)}")
        found = open_source(source)
        self.source_name = source
        self.max_gen_toks = int(max_gen_toks)
        model, variables = found.load(
            mesh=self.mesh,
            dtype="bfloat16" if dtype == "bfloat16" else "float32" if dtype else None,
            weights=check_format(weights),
            for_decoding=True,
        )
        self.local = LocalModel(
            model,
            variables,
            lambda: spelled_specials(found.tokenizer()),
            mesh=self.mesh,
            window=model.config.context_length,
            batch_tokens=int(batch_tokens),
        )

    # --- The three verbs ---

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """log p and whether it is what greedy decoding writes, of each (context, continuation)."""
        pairs = [(r.args[0], r.args[1]) for r in requests]
        with _counting("likelihoods", len(pairs)) as count:
            found = self.local.log_likelihoods(pairs, count)
        answers = [(x.nats, x.is_greedy) for x in found]
        self._keep("loglikelihood", requests, answers)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log p of each text."""
        texts = [r.args[0] for r in requests]
        with _counting("texts", len(texts)) as count:
            answers = [x.nats for x in self.local.rolling(texts, count)]
        self._keep("loglikelihood_rolling", requests, answers)
        return answers

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The text that continues each context, up to the first of its stop strings."""
        prompts = [
            prompt(str(i), r.args[0], r.args[1], self.max_gen_toks) for i, r in enumerate(requests)
        ]
        with _counting("answers", len(prompts)) as count:
            answers = [given[0].text for given in self.local.generate(prompts, count)]
        self._keep("generate_until", requests, answers)
        return answers

    def _keep(self, verb: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        """Into the harness's cache, where it has one."""
        for request, answer in zip(requests, answers, strict=True):
            if self.cache_hook is not None:
                self.cache_hook.add_partial(verb, request.args, answer)

    # --- Chat ---

    @property
    def tokenizer_name(self) -> str:
        """What its cache of requests tells tokenizers by."""
        text = self.local.tokenizer.tokenizer.to_str()
        return f"{self.source_name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """
        Raises:
          UserError: the model has none, or not this one of several.
        """
        if chat_template is False:
            return ""
        require(
            chat_template is True,
            f"--apply_chat_template {chat_template}: a model has one template here; give no name",
        )
        template = self.local.tokenizer.chat_template
        require(
            template is not None,
            f"{self.source_name} has no chat template: leave --apply_chat_template out",
        )
        return template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt it ends within the last message,
        which the model goes on with."""
        tokenizer = self.local.tokenizer
        text = render(
            chat_history,
            self.chat_template(True),
            bos=tokenizer.text_of(tokenizer.bos_id),
            eos=tokenizer.text_of(tokenizer.eos_id),
            add_generation_prompt=add_generation_prompt,
        )
        if add_generation_prompt:
            return text
        last = str(chat_history[-1]["content"]).strip()
        return text[: text.rindex(last) + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """For the results' file."""
        return {
            "model_num_parameters": self.local.model.config.num_parameters,
            "model_dtype": self.local.model.execution.compute_dtype,
            "model_revision": "",
            "model_sha": "",
        }


def prompt(key: str, context: str, settings: Mapping[str, Any], longest: int) -> Prompt:
    """A request of the harness as a prompt of ours.

    Raises:
      UserError: a setting of generation that we have not.
    """
    left = dict(settings)
    lengths = [left.pop(name, None) for name in LENGTHS]
    length = next((int(value) for value in lengths if value is not None), longest)
    until = left.pop("until", None) or []
    temperature = float(left.pop("temperature", 0.0) or 0.0)
    if left.pop("do_sample", None) is False:
        temperature = 0.0
    top_p = float(left.pop("top_p", 1.0) or 1.0)
    neutral = {"num_beams": 1, "top_k": 0, "skip_special_tokens": True}
    unknown = [name for name, value in left.items() if neutral.get(name, ...) != value]
    require(
        not unknown,
        f"generation settings {', '.join(sorted(unknown))} are not known here: there are until, "
        "max_gen_toks, do_sample, temperature and top_p",
    )
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Prompt(
        key=key,
        prompt=context,
        reference=None,
        stops=tuple(stop for stop in stops if stop),
        max_new_tokens=length,
        temperature=temperature,
        top_p=top_p,
    )


class _counting:
    """A bar of what is done; called with each answer's index."""

    def __init__(self, unit: str, total: int) -> None:
        self._bar = ProgressBar(NAME, total=total, unit=unit)
        self._done = 0

    def __enter__(self) -> "_counting":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def __call__(self, index: int, answer: Any) -> None:
        self._done += 1
        self._bar.update(self._done)


@cache
def model_class(mesh: Mesh | None = None) -> type:
    """The class that the harness makes a model of.

    Raises:
      UserError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed here ({error}): {INSTALL}"
        ) from error
    return type("MoesaicModel", (HarnessModel, LM), {"mesh": mesh})


def register(mesh: Mesh | None = None) -> None:
    """Makes "moesaic" a model that the harness knows.

    Raises:
      UserError: the harness is not installed.
    """
    made = model_class(mesh)
    # Its own models register themselves when they are asked for and the list is empty: now.
    importlib.import_module("lm_eval.models")
    from lm_eval.api.registry import model_registry  # type: ignore[import-not-found]

    if NAME not in model_registry:
        model_registry.register(NAME, target=made)
