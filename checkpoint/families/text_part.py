"""Text models of files that hold encoders for images or sound beside them (text_config)."""

from typing import NoReturn

from checkpoint.config_reader import Settings
from checkpoint.families.base import Family
from configs.architecture import ModelConfig
from configs.checks import UserError

RENAMES = (
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
"""Names where an encoder lies beside the text model: transformers', and released ones."""
UNREAD = (
    (
        r"(model\.)?(vision_tower|vision_model|multi_modal_projector|embed_vision)\..*",
        "an encoder for images",
    ),
    (r"(model\.)?(audio_tower|embed_audio)\..*", "an encoder for sound"),
)


def beside_encoders(model_type: str, architecture: str, text: Family) -> Family:
    """The family of the files that hold encoders too: its text model is read.

    Args:
      text: the family of the text model alone, which is what is written; its `unread` where its
        files have other parts than most.
    """

    def read_config(settings: Settings) -> ModelConfig:
        part = settings.part("text_config") or Settings({}, settings.where)
        tied = [each.flag("tie_word_embeddings", default=None) for each in (settings, part)]
        said = {each for each in tied if each is not None}
        if len(said) == 2:
            raise UserError(
                f"{settings.where} has tie_word_embeddings={tied[0]}, and {tied[1]} in its "
                "text_config: set both to what the files hold"
            )
        values = part.values | ({"tie_word_embeddings": said.pop()} if said else {})
        return text.read_config(Settings(values, part.where, text.defaults))

    def refuse(config: ModelConfig) -> NoReturn:
        del config
        raise UserError(
            f"{model_type} has encoders beside its text model, which are not read: write "
            f"{text.model_type}, the text model alone"
        )

    return Family(
        model_type=model_type,
        architecture=architecture,
        read_config=read_config,
        write_config=refuse,
        rows=text.rows,
        fuses_experts=text.fuses_experts,
        renames=RENAMES,
        unused=text.unused,
        unread=text.unread or UNREAD,
    )
