"""OpenAI's chat completions, completions and models."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..chat import encode_text
from .catalog import Loaded
from .errors import BadRequest, kind_of
from .generation import Generation, Usage
from .output import Call, Piece, Update
from .prompts import Prompt, with_tools_called
from .schemas import ChatRequest, CompletionRequest, NamedTool, parse
from .service import Service, Wanted, keep_alive
from .token_text import token_bytes, token_text
from .worker import Logprobs

DONE = "data: [DONE]\n\n"


async def models(service: Service) -> Response:
    """GET /v1/models."""
    created = int(time.time())
    names = await service.catalog.names()
    rows = [{"id": n, "object": "model", "created": created, "owned_by": "mlx-redrafter"} for n in names]
    return JSONResponse({"object": "list", "data": rows})


async def model(service: Service, name: str) -> Response:
    """GET /v1/models/NAME."""
    if name not in await service.catalog.names():
        raise BadRequest(f"there is no model {name[:200]!r} here.", 404, "model_not_found", "model")
    return JSONResponse({"id": name, "object": "model", "created": 0, "owned_by": "mlx-redrafter"})


# --- Chat ------------------------------------------------------------------------------------------------


async def chat(service: Service, request: Request, body: bytes) -> Response:
    """POST /v1/chat/completions."""
    asked = parse(ChatRequest, body)
    loaded = await service.catalog.get(asked.model)
    tools = chosen_tools(asked)
    messages = with_tools_called([message.for_template() for message in asked.messages])
    wanted = Wanted(
        asked.max_completion_tokens or asked.max_tokens,
        asked.n or 1,
        asked.stop,
        tools=tools,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        format=asked.format or asked.response_format,
        must_call=asked.tool_choice == "required" or isinstance(asked.tool_choice, NamedTool),
    )
    prompt = await service.prompt(loaded, wanted, messages, asked.chat_template_kwargs)
    generation = await service.generation(loaded, asked, wanted, [prompt])
    head = head_of("chatcmpl", "chat.completion", asked.model or service.catalog.default_name)
    if asked.stream:
        events = _chat_events(generation, loaded, asked, head)
        return service.streamed(request, generation, events)
    texts = await service.whole(request, generation)
    choices = []
    for number, text in enumerate(texts):
        calls = [_call(each) for each in text.pieces if isinstance(each, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": text.text() or (None if calls else "")}
        message["refusal"] = None
        if reasoning := text.text("reasoning"):
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if wanted.logprobs is not None:
            logprobs = {"content": _chat_logprobs(loaded.tokenizer, text.logprobs), "refusal": None}
        choices.append(
            {"index": number, "message": message, "logprobs": logprobs, "finish_reason": text.finish}
        )
    return JSONResponse({**head, "choices": choices, "usage": usage_of(generation.usage)})


def chosen_tools(asked: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the model is told of."""
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or []]
    if asked.tool_choice == "none":
        return []
    if isinstance(asked.tool_choice, NamedTool):
        return [tool for tool in tools if tool["function"]["name"] == asked.tool_choice.function.name]
    return tools


async def _chat_events(
    generation: Generation,
    loaded: Loaded,
    asked: ChatRequest,
    head: dict[str, Any],
) -> AsyncIterator[str]:
    head = {**head, "object": "chat.completion.chunk"}
    begun: set[int] = set()
    calls: list[list[str]] = [[] for _ in range(asked.n or 1)]  # ids
    async for each in generation.updates():
        if not isinstance(each, tuple):
            yield keep_alive(each)
            continue
        number, update = each
        if update.error:
            yield event(error_object(update.error, update.status, kind_of(update.status)))
            return
        if number not in begun:
            begun.add(number)
            first = {"role": "assistant", "content": ""}
            yield event({**head, "choices": [_chunk(number, first)]})
        delta: dict[str, Any] = {}
        if text := update.text():
            delta["content"] = text
        if reasoning := update.text("reasoning"):
            delta |= {"reasoning": reasoning, "reasoning_content": reasoning}
        for call in update.pieces:
            if isinstance(call, Call):
                known, told = call.id in calls[number], _call(call)
                if known:
                    told = {"function": {"arguments": call.arguments}}
                else:
                    calls[number].append(call.id)
                place = calls[number].index(call.id)
                delta.setdefault("tool_calls", []).append({"index": place, **told})
        logprobs = _chat_logprobs(loaded.tokenizer, update.logprobs) if asked.logprobs else []
        if delta or logprobs:
            chunk = {**head, "choices": [_chunk(number, delta, logprobs=logprobs)]}
            yield event(chunk | drafted(update))
        if update.finish:
            yield event({**head, "choices": [_chunk(number, {}, update.finish)]})
    if asked.stream_options and asked.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": usage_of(generation.usage)})
    yield DONE


def _chunk(
    number: int, delta: dict[str, Any], finish: str | None = None, logprobs: Sequence[Any] = ()
) -> dict[str, Any]:
    told = {"content": list(logprobs), "refusal": None} if logprobs else None
    return {"index": number, "delta": delta, "logprobs": told, "finish_reason": finish}


def drafted(update: Update) -> dict[str, Any]:
    """Our extension: which pieces of the content, and of the reasoning, were drafted."""
    told: dict[str, Any] = {}
    for piece in update.pieces:
        if isinstance(piece, Piece):
            name = "drafted" if piece.kind == "content" else "drafted_reasoning"
            told.setdefault(name, []).append([piece.text, piece.drafted])
    return told


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat_logprobs(tokenizer: TokenizerWrapper, rows: Sequence[Logprobs]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        said, *top = ({**_token(tokenizer, token), "logprob": _logprob(value)} for token, value in row)
        found.append({**said, "top_logprobs": top})
    return found


def _token(tokenizer: TokenizerWrapper, token: int) -> dict[str, Any]:
    return {"token": token_text(tokenizer, token), "bytes": list(token_bytes(tokenizer, token))}


def _logprob(value: float) -> float:
    return max(value, -9999.0)  # OpenAI's number for what cannot be: JSON has no infinity


# --- Completions -----------------------------------------------------------------------------------------


async def completions(service: Service, request: Request, body: bytes) -> Response:
    """POST /v1/completions."""
    asked = parse(CompletionRequest, body)
    loaded = await service.catalog.get(asked.model)
    prompts = [Prompt(await service.encode(_ids, loaded.tokenizer, each)) for each in _prompts(asked)]
    wanted = Wanted(
        asked.max_tokens or 16,  # as OpenAI's
        asked.n or 1,
        asked.stop,
        structured=False,
        logprobs=asked.logprobs,
        format=asked.format or asked.response_format,
    )
    generation = await service.generation(loaded, asked, wanted, prompts)
    head = head_of("cmpl", "text_completion", asked.model or service.catalog.default_name)
    echoes = [_echo(loaded.tokenizer, each) if asked.echo else "" for each in _prompts(asked)]
    if asked.stream:
        events = _completion_events(generation, loaded, asked, head, echoes)
        return service.streamed(request, generation, events)
    texts = await service.whole(request, generation)
    choices = []
    for number, text in enumerate(texts):
        said = echoes[number // wanted.n] + text.text()
        logprobs = _logprobs(loaded.tokenizer, text.logprobs) if asked.logprobs is not None else None
        choices.append({"index": number, "text": said, "logprobs": logprobs, "finish_reason": text.finish})
    return JSONResponse({**head, "choices": choices, "usage": usage_of(generation.usage)})


async def _completion_events(
    generation: Generation,
    loaded: Loaded,
    asked: CompletionRequest,
    head: dict[str, Any],
    echoes: list[str],
) -> AsyncIterator[str]:
    if asked.echo:
        for number in range(len(generation.readers)):
            text = echoes[number // (asked.n or 1)]
            choice = {"index": number, "text": text, "logprobs": None, "finish_reason": None}
            yield event({**head, "choices": [choice]})
    async for each in generation.updates():
        if not isinstance(each, tuple):
            yield keep_alive(each)
            continue
        number, update = each
        if update.error:
            yield event(error_object(update.error, update.status, kind_of(update.status)))
            return
        logprobs = _logprobs(loaded.tokenizer, update.logprobs) if update.logprobs else None
        text = update.text()
        if text or logprobs or update.finish:
            choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": update.finish}
            yield event({**head, "choices": [choice]} | drafted(update))
    if asked.stream_options and asked.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": usage_of(generation.usage)})
    yield DONE


def _prompts(asked: CompletionRequest) -> list[str | list[int]]:
    given = asked.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]  # type: ignore[list-item]
    return given or [""]  # type: ignore[return-value]


def _ids(tokenizer: TokenizerWrapper, prompt: str | list[int]) -> list[int]:
    return encode_text(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)


def _echo(tokenizer: TokenizerWrapper, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt))


def _logprobs(tokenizer: TokenizerWrapper, rows: Sequence[Logprobs]) -> dict[str, Any]:
    """OpenAI's older form."""
    texts = [token_text(tokenizer, row[0][0]) for row in rows]
    offsets = [sum(len(text) for text in texts[:place]) for place in range(len(texts))]
    top = [{token_text(tokenizer, token): _logprob(value) for token, value in row[1:]} for row in rows]
    chosen = [_logprob(row[0][1]) for row in rows]
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}


# --- What they share -------------------------------------------------------------------------------------


def head_of(prefix: str, kind: str, name: str) -> dict[str, Any]:
    """What every answer begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
        "system_fingerprint": None,
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, with our extensions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": max(usage.drafted_tokens - usage.accepted_tokens, 0),
        },
        **usage.extensions,
    }


def event(content: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_object(
    message: str, status: int, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code or str(status)}}
