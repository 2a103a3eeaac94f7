"""Bodies of /v1/chat/completions and /v1/completions.

A field that is not named here is refused: a setting that would be ignored is an error. Those under
"no effect" are taken, as they are about a provider's accounts and storage, not about the answer.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_ANSWERS, MOST_STOPS, MOST_PROMPTS, MOST_LOGPROBS = 64, 16, 2048, 20
LONGEST_STOP = 512

Text = Annotated[str, Field(max_length=50_000_000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class Body(BaseModel):
    """A JSON object: types as they are written, no other fields, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SamplingFields(Body):
    """How tokens are chosen, and where a text ends."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=300
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[str, Field(max_length=LONGEST_STOP)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
            Field(max_length=MOST_STOPS),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    cache_salt: str | None = Field(None, max_length=256)
    expert_preference: str | Annotated[list[str], Field(max_length=64)] | None = None
    """Domains of experts that the answer would rather use: "markup", or "markup:0.8"."""
    # Structured output beyond OpenAI's response_format, as vLLM names it.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(None, min_length=1, max_length=20_000)
    guided_grammar: str | None = Field(None, min_length=1, max_length=200_000)
    # No effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    pattern: str | None = None
    grammar: str | None = None


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.\-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Body):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ContentPart(BaseModel):
    """A part of a message; only text is read."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str
    text: str | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    prefix: bool = False
    """Of the last message, an assistant's: the answer goes on from it (DeepSeek's interface)."""
    # What clients send back of an answer of ours.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Thinking(Body):
    type: Literal["enabled", "disabled"]


class ChatBody(SamplingFields):
    """POST /v1/chat/completions."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    thinking: Thinking | None = None
    reasoning_effort: str | None = Field(None, max_length=32)
    chat_template_kwargs: dict[str, Any] | None = None
    return_routed_experts: bool = False
    """The experts of each token, in the answer's `routed_experts`."""


class CompletionBody(SamplingFields):
    """POST /v1/completions, and with a suffix /beta/completions and /v1/fim/completions."""

    model: str | None = None
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    suffix: Text | None = None
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    best_of: Literal[1] | None = None
    return_routed_experts: bool = False
    """The experts of each token, in the answer's `routed_experts`."""
    response_format: ResponseFormat | None = None
