"""What requests may say, checked: OpenAI's fields, mlx-lm's and vLLM's names for what OpenAI has not."""

import inspect
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from ..decoding.sampling import CONTEXT, Sampling
from .errors import BadRequest

Model = TypeVar("Model", bound=BaseModel)
STOPS = 16  # stop texts; OpenAI takes four
MOST_TEXTS = 32  # of one request
MOST_PROMPTS = 256
LONGEST_STOP = 512  # characters: all beginnings of it are looked for, after each token
SEEDS = 1 << 64
# Names that options of chat templates cannot have: a request brings no template, nor takes protection away.
ARGUMENTS = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    "messages",
}


class Strict(BaseModel):
    """Takes values of the right type only; fields that are not known are ignored, as OpenAI's server does."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def parse(kind: type[Model], body: bytes) -> Model:
    """The request in a body.

    Raises:
        BadRequest: it is no JSON, or a value cannot be used; says which.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    parts = [str(part) for part in first["loc"] if not _is_branch(part)]
    place = ".".join(parts)[:200]
    text = first["msg"].removeprefix("Value error, ")
    return BadRequest(f"{place}: {text}" if place else text, param=place or None)


def _is_branch(part: int | str) -> bool:
    """Whether a part of an error's place is not the request's but pydantic's, for one of several types."""
    return isinstance(part, str) and (not part.isidentifier() or part in ("str", "int", "dict"))


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be written as JSON again ({error}).") from error
    return value


def _of_templates(value: dict[str, Any]) -> dict[str, Any]:
    if bad := ARGUMENTS & value.keys():
        raise ValueError(f"chat_template_kwargs cannot set {min(bad)}: leave it out.")
    return value


Object = Annotated[dict[str, Any], AfterValidator(_finite)]
TemplateOptions = Annotated[Object, AfterValidator(_of_templates)]


class StreamOptions(Strict):
    include_usage: bool | None = None


class Function(Strict):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class JsonSchema(Strict):
    name: str | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "choice"]
    json_schema: JsonSchema | None = None
    pattern: str | None = None
    grammar: str | None = None
    choices: list[str] | None = None

    @model_validator(mode="after")
    def _has_what_it_names(self) -> "ResponseFormat":
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema needs a schema: give response_format.json_schema.schema.")
        if self.type == "regex" and not self.pattern:
            raise ValueError("regex needs a pattern: give response_format.pattern.")
        if self.type == "grammar" and not self.grammar:
            raise ValueError("grammar needs one in Lark's form: give response_format.grammar.")
        if self.type == "choice" and not self.choices:
            raise ValueError("choice needs texts: give response_format.choices.")
        return self


StopText = Annotated[str, Field(max_length=LONGEST_STOP)]
StopTexts = Annotated[list[StopText], Field(max_length=STOPS)]
Stop = StopText | StopTexts | None


class Decoding(Strict):
    """How tokens are picked; what is not said, the server's flags say."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=0.5)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_context_size: int | None = Field(None, ge=1, le=1 << 20)
    frequency_context_size: int | None = Field(None, ge=1, le=1 << 20)
    repetition_context_size: int | None = Field(None, ge=1, le=1 << 20)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, gt=-SEEDS, lt=SEEDS)
    draft: bool | None = None
    guided_json: str | Object | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None

    def sampling(self, usual: dict[str, Any], special: tuple[int, ...]) -> Sampling:
        """How tokens are picked.

        Args:
            usual: of a ``Sampling``'s fields, for what the request does not say.
            special: tokens that XTC never drops.
        """
        temperature = usual.get("temperature", 0.0) if self.temperature is None else self.temperature
        names = ["top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold"]
        names += ["presence_penalty", "frequency_penalty", "repetition_penalty"]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        sizes = {
            f"{name}_context_size": getattr(self, f"{name}_context_size") or CONTEXT
            for name in ("presence", "frequency", "repetition")
        }
        given = {**usual, **given, **sizes, "temperature": temperature}
        given["top_k"] = max(given.get("top_k", 0), 0)
        biases = []
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise BadRequest(f"logit_bias: {token[:40]!r} is no token id.", param="logit_bias")
            biases.append((int(token), bias))
        try:
            return Sampling(**given, logit_bias=tuple(biases), xtc_special_tokens=special)
        except ValueError as error:
            raise BadRequest(str(error)) from error

    @property
    def format(self) -> ResponseFormat | None:
        """What the answer must look like, by vLLM's fields; None if they say nothing."""
        try:
            if self.guided_json is not None:
                schema = self.guided_json
                schema = json.loads(schema) if isinstance(schema, str) else schema
                return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=schema))
            if self.guided_regex is not None:
                return ResponseFormat(type="regex", pattern=self.guided_regex)
            if self.guided_grammar is not None:
                return ResponseFormat(type="grammar", grammar=self.guided_grammar)
            if self.guided_choice is not None:
                return ResponseFormat(type="choice", choices=self.guided_choice)
        except ValidationError as error:
            raise _refusal(error) from error
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"guided_json: is no JSON ({error}).", param="guided_json") from error
        return None


class Part(Strict):
    type: str
    text: str | None = None


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it.

        Raises:
            BadRequest: it has parts that are no text.
        """
        if isinstance(self.content, list):
            for part in self.content:
                if part.type not in ("text", "input_text", "output_text", "refusal"):
                    text = f"a message has a part of type {part.type[:40]!r}: only text can be read."
                    raise BadRequest(text, param="messages")
        parts = self.content if isinstance(self.content, list) else []
        content = "".join(part.text or "" for part in parts) if parts else self.content or ""
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        found["content"] = content
        if self.tool_calls:
            found["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        if reasoning := self.reasoning_content or self.reasoning:
            found["reasoning_content"] = reasoning
        for name in ("name", "tool_call_id"):
            if value := getattr(self, name):
                found[name] = value
        return found


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Decoding):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_TEXTS)
    stop: Stop = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set it to true.")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in [tool.function.name for tool in self.tools or []]:
                raise ValueError(f"tool_choice names {name[:64]!r}, which is none of the tools.")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice required needs tools: give some.")
        return self


class CompletionRequest(Decoding):
    prompt: (
        str
        | Annotated[list[str], Field(max_length=MOST_PROMPTS)]
        | list[int]
        | Annotated[list[list[int]], Field(max_length=MOST_PROMPTS)]
    ) = ""
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_TEXTS)
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    stop: Stop = None
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fits(self) -> "CompletionRequest":
        if self.suffix:
            raise ValueError("suffix cannot be followed: write the model's own tokens for infilling.")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of cannot be followed: give n, or leave it out.")
        return self


# --- OpenAI's responses ----------------------------------------------------------------------------------


class Item(Strict):
    """Anything that may stand in a response's input; which fields count depends on the type."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None


class ResponseTool(Strict):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: Object | None = None


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Object | None = Field(None, alias="schema")


class TextOptions(Strict):
    format: TextFormat | None = None


class NamedResponseTool(Strict):
    type: Literal["function"]
    name: str


class ResponsesRequest(Decoding):
    input: str | list[Item] = ""
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    stop: Stop = None
    chat_template_kwargs: TemplateOptions | None = None


# --- Anthropic's messages --------------------------------------------------------------------------------


class Block(Strict):
    """A part of a message; which fields count depends on the type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Object | None = None
    tool_use_id: str | None = None
    content: str | list[Part] | None = None
    is_error: bool | None = None


class Turn(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Strict):
    name: str = Field(min_length=1, max_length=256)
    type: str | None = None
    description: str | None = None
    input_schema: Object | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class CountRequest(Decoding):
    messages: list[Turn] = Field(min_length=1)
    system: str | list[Part] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: TemplateOptions | None = None


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: StopTexts | None = None

    @model_validator(mode="after")
    def _fits(self) -> "MessagesRequest":
        choice = self.tool_choice
        names = [tool.name for tool in self.tools or []]
        if choice is not None and choice.type == "tool" and choice.name not in names:
            raise ValueError(f"tool_choice names {str(choice.name)[:64]!r}, which is none of the tools.")
        if choice is not None and choice.type == "any" and not names:
            raise ValueError("tool_choice any needs tools: give some.")
        return self
