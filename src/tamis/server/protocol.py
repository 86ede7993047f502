"""The bodies of requests and responses, as OpenAI's API has them; what is ours says so.

A field that is not known is refused, so that nobody takes an ignored option for one that works.
Fields of OpenAI's that change nothing here are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer
from pydantic_core import PydanticCustomError

FinishReason = Literal["stop", "length"]

TokenIds = list[int]


def _whole(text: str) -> str:
    """The text itself, if it can be written in UTF-8: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("unicode", "Input should be valid unicode text") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Body(BaseModel):
    """What a client sends: JSON types as they are, "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    name: Text
    description: Text | None = None
    schema_: dict[Text, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`json_schema` is OpenAI's; a schema given with `json_object` is not needed."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """What both endpoints have in common.

    Attributes:
        kv_plan: ours: what becomes of this request's KV cache; the operator's list says what may.
        contexts: ours: ids of contexts that the prompt goes on from; see `ContextRequest`.
        top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos, include_stop:
            ours too; see `SamplingParams`.
        priority: ours: the smaller goes first, where the server's order asks for it.
    """

    model: Text
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: int | None = None
    logit_bias: dict[Text, float] | None = None
    response_format: ResponseFormat | None = None

    kv_plan: Text | None = None
    contexts: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    include_stop: bool = False
    priority: int = Field(default=0, ge=-1000, le=1000)

    user: Text | None = None
    metadata: dict[Text, Text] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Text | list[Text] | TokenIds | list[TokenIds]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    suffix: None = None


class ContentPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    """A turn of a conversation; the last fields are those of OpenAI's answers, sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart] | None = None
    name: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    tool_calls: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    modalities: list[Literal["text"]] | None = None


class ContextRequest(Body):
    """`POST /v1/contexts`: ours; a document whose KV is computed once and kept for many requests.

    Attributes:
        document: a text or token ids.
        kv_plan: how its KV lives; what such a plan keeps must not depend on the question.
        id: how requests name it; by default a random one.
        priority, user: as of `Sampling`.
    """

    document: Text | TokenIds
    model: Text | None = None
    kv_plan: Text | None = None
    id: Annotated[Text, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    priority: int = Field(default=0, ge=-1000, le=1000)
    user: Text | None = None


class ContextCard(BaseModel):
    """A context that is kept. `kv_bytes` are those of its pages; `kv_bytes_dense` what exact
    attention would take."""

    id: str
    object: Literal["context"] = "context"
    created: int
    model: str
    tokens: int
    kv_plan: str
    kv_bytes: int
    kv_bytes_dense: int


class ContextList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ContextCard]


class ContextDeleted(BaseModel):
    id: str
    object: Literal["context.deleted"] = "context.deleted"
    deleted: Literal[True] = True


class TokenizeRequest(Body):
    """`POST /tokenize`: ours; a text, or a conversation in the model's template."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None


class TokenizeResponse(BaseModel):
    tokens: TokenIds
    count: int
    max_model_len: int


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Tokens as OpenAI counts them, and ours: bytes of KV pages.

    Attributes:
        kv_bytes, kv_bytes_peak: the pages of the request's KV cache at its end, and at most.
        kv_bytes_dense: what exact attention would have needed for the same tokens.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_dense: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """An answer of `/v1/completions`, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """An answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class Delta(BaseModel):
    """What an event adds to a message; fields that are not set are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _what_is_set(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class ModelCard(BaseModel):
    """A model that is served; `max_model_len` and `kv_plan` are ours."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tamis"
    max_model_len: int
    kv_plan: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Any answer that is not the one that was asked for."""

    error: ErrorDetail
