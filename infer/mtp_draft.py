"""Drafts by the model's own multi-token module (DeepSeek-V3, 2024, section 2.2): how many, and of
which models. The engine runs the module (infer/engine/ahead.py)."""

from dataclasses import dataclass

from configs.architecture import ModelConfig
from configs.checks import require, require_positive
from model.model_state import ahead_config, unmixable_reason, unrewindable_reason


@dataclass(frozen=True)
class MtpDraft:
    """How much the model's own module drafts."""

    length: int = 1
    """Tokens drafted; a module is trained to say one, and says more of what it said itself."""

    def __post_init__(self) -> None:
        require_positive(self, "length")


def check_mtp_draft(config: ModelConfig) -> None:
    """
    Raises:
      UserError: no module, or states that can't go back.
    """
    require(
        config.multi_token is not None,
        "this model has no multi-token module to draft with: take another draft",
    )
    for each in (config, ahead_config(config)):
        for reason in (unmixable_reason(each), unrewindable_reason(each)):
            require(reason is None, f"drafts can't be taken back ({reason}): take no draft")
