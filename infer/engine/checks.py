"""What an engine refuses, in sentences."""

from configs.architecture import ModelConfig
from configs.checks import UserError, require
from configs.feed_forward import MoEConfig
from infer.choice import MOST_LOGPROBS
from infer.early_exit import check_exits
from infer.engine.options import EngineOptions
from infer.engine.types import Request
from infer.model_draft import ModelDraft, check_model_draft
from infer.mtp_draft import MtpDraft, check_mtp_draft
from infer.ngram_draft import NgramDraft
from infer.sampling import Sampling
from infer.self_speculative import Draft, check_draft
from model.model_state import unrewindable_reason
from model.transformer import Transformer


def check_model(model: Transformer, options: EngineOptions) -> None:
    """
    Raises:
      UserError: options that the model can't follow.
    """
    if options.exit_threshold is not None:
        check_exits(model)
    if isinstance(options.draft, Draft):
        check_draft(model, options.draft)
    if isinstance(options.draft, ModelDraft):
        check_model_draft(model.config, options.draft)
    if options.keeps_experts:
        reason = unroutable_reason(model.config)
        require(reason is None, f"keeps_experts has no effect: {reason}")
    if isinstance(options.draft, MtpDraft):
        check_mtp_draft(model.config)
    if isinstance(options.draft, NgramDraft | ModelDraft):
        reason = unrewindable_reason(model.config)
        require(reason is None, f"drafts can't be taken back ({reason}): generate without a draft")


def unroutable_reason(config: ModelConfig) -> str | None:
    """Why it can't be told which experts a model's tokens go to; None: it can."""
    if not preferring_layers(config):
        return "the model has no layers with experts"
    if any(spec.depth is not None for spec in config.pattern):
        return "its Mixture-of-Depths layers work on chosen tokens alone"
    return None


def check_request(model: Transformer, options: EngineOptions, request: Request) -> None:
    """
    Raises:
      UserError: a request that can never be served.
    """
    config, prompt, new = model.config, request.prompt, request.max_new_tokens
    require(new >= 1, f"max_new_tokens={new} must be at least 1")
    require(len(prompt) > 0, "a prompt is empty: it needs at least one token")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise UserError(f"a prompt has tokens outside [0, {config.vocab_size})")
    _check_length(model, options, request)
    for token, _ in request.sampling.biases:
        require(
            token < config.vocab_size,
            f"logit_bias names token {token}, the vocabulary is [0, {config.vocab_size})",
        )
    require(
        options.keeps_experts or not request.wants_experts,
        "the experts of each token are asked for, and this engine does not keep them: leave that "
        "out, or take a model with experts and an engine with keeps_experts",
    )
    asked = request.num_logprobs
    require(
        asked is None or 0 <= asked <= MOST_LOGPROBS,
        f"num_logprobs={asked} must lie in [0, {MOST_LOGPROBS}]",
    )
    layers = preferring_layers(config)
    for name in request.preference or {}:
        require(
            name in layers,
            f"a preference names {name}, and the layers with experts are {', '.join(layers)}",
        )
    _check_together(options, request)


def preferring_layers(config: ModelConfig) -> dict[str, int]:
    """Layers of the pattern whose experts a request may prefer, and how many they have."""
    return {
        f"layer_{i}": spec.ffn.num_experts
        for i, spec in enumerate(config.pattern)
        if isinstance(spec.ffn, MoEConfig)
    }


def _check_length(model: Transformer, options: EngineOptions, request: Request) -> None:
    prompt, new = request.prompt, request.max_new_tokens
    asked = f"a prompt of {len(prompt)} tokens and {new} new ones exceed"
    require(
        len(prompt) + new <= model.config.context_length,
        f"{asked} the model's context_length={model.config.context_length}: shorten the prompt or "
        "ask for fewer",
    )
    longest = options.max_length
    require(len(prompt) + new <= longest, f"{asked} the engine's max_length={longest}")
    most = options.max_prompt
    require(
        most is None or len(prompt) <= most,
        f"a prompt of {len(prompt)} tokens exceeds the engine's max_prompt={most}",
    )
    if options.num_pages is not None:
        needed = -(-(len(prompt) + new) // options.page_size)
        require(
            needed < options.num_pages,
            f"{asked} the {options.num_pages} pages of {options.page_size} positions: {needed} are "
            "needed beside page 0",
        )


def _check_together(options: EngineOptions, request: Request) -> None:
    """What excludes each other."""
    temperature, has_draft = request.sampling.temperature, isinstance(options.draft, Draft)
    require(
        not has_draft or temperature == 0,
        f"draft gives the greedy text, got temperature={temperature}: leave one out",
    )
    require(
        not has_draft or request.sampling == Sampling(seed=request.sampling.seed),
        "draft gives the greedy text, penalties and biases change it: leave one out",
    )
    require(
        not has_draft or (request.constraint is None and request.num_logprobs is None),
        "draft gives the greedy text alone, without constraint and log-probabilities: leave one "
        "out",
    )
    given = {
        "exit_threshold": options.exit_threshold,
        "draft": options.draft if has_draft else None,
        "a preference for experts": request.preference,
    }
    names = [name for name, value in given.items() if value is not None]
    require(len(names) < 2, f"{' and '.join(names)} can't go together: leave one out")
