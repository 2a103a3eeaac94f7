"""Body of /v1/responses (OpenAI's newer interface)."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from infer.server.schemas import MOST_LOGPROBS, Body, ContentPart, StreamOptions, Text


class InputItem(BaseModel):
    """A message, a call of a function, what it gave, or a reasoning item."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str = "message"
    role: str | None = None
    content: Text | list[ContentPart] | None = None
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None
    output: str | list[ContentPart] | None = None


class ResponseTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None


class Reasoning(Body):
    effort: str | None = None
    summary: None = None


class ResponsesBody(Body):
    """POST /v1/responses. No response is kept: `previous_response_id` is refused, the whole
    conversation is sent."""

    model: str | None = None
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=10_000)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    expert_preference: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    # No effect.
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
