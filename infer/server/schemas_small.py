"""Bodies of the routes beside chat and completions: tokens, embeddings, editors, administration."""

from typing import Annotated, Any, Literal

from pydantic import Field

from infer.server.schemas import Body, Message, SamplingFields, Text, TokenIds


class TokenizeBody(Body):
    """POST /tokenize: of a text, or of a conversation in the chat template. `content` is
    llama.cpp's name for a text."""

    model: str | None = None
    prompt: Text | None = None
    content: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=10_000_000)]


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: str | None = None


class InputExtra(Body):
    """A piece of another file."""

    text: Text
    filename: str | None = None


class InfillBody(SamplingFields):
    """POST /infill, as llama.cpp's server has it and editors ask it.

    What is about that server's own slots and cache has no effect here.
    """

    model: str | None = None
    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: Annotated[list[InputExtra], Field(max_length=1000)] | None = None
    prompt: Text | None = None
    n_predict: int | None = Field(None, ge=-1)
    stream: bool | None = None
    # No effect: slots, caches and time bounds of another server.
    samplers: list[str] | str | None = None
    cache_prompt: bool | None = None
    t_max_prompt_ms: int | None = None
    t_max_predict_ms: int | None = None
    id_slot: int | None = None
    n_indent: int | None = None
    n_cmpl: Literal[1] | None = None
    response_fields: list[str] | None = None
    lora: Annotated[list[Any], Field(max_length=0)] | None = None


class UpdateBody(Body):
    """POST /update_weights: a run, a folder or a file on the server's machine."""

    source: str = Field(min_length=1, max_length=4096)
