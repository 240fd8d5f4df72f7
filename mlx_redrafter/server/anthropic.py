"""Anthropic's messages, whole and streamed, and their tokens counted."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .errors import BadRequest, kind_of
from .generation import Generation, Usage
from .output import Call, Piece, Update
from .schemas import Block, CountRequest, MessagesRequest, Part, parse
from .service import Service, Wanted, keep_alive

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def messages(service: Service, request: Request, body: bytes) -> Response:
    """POST /v1/messages."""
    asked = parse(MessagesRequest, body)
    loaded = await service.catalog.get(asked.model)
    tools = _tools(asked)
    wanted = Wanted(
        asked.max_tokens,
        stop=asked.stop_sequences,
        tools=tools,
        format=asked.format,
        must_call=asked.tool_choice is not None and asked.tool_choice.type in ("any", "tool"),
    )
    prompt = await service.prompt(loaded, wanted, *_conversation(asked))
    generation = await service.generation(loaded, asked, wanted, [prompt])
    head: dict[str, Any] = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": asked.model or service.catalog.default_name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }
    if asked.stream:
        return service.streamed(request, generation, _events(generation, head, len(prompt.ids)))
    (text,) = await service.whole(request, generation)
    head["content"] = [_block(each) for each in text.runs]
    return JSONResponse({**head, **_ending(text), "usage": _usage(generation.usage)})


async def count_tokens(service: Service, request: Request, body: bytes) -> Response:
    """POST /v1/messages/count_tokens."""
    asked = parse(CountRequest, body)
    loaded = await service.catalog.get(asked.model)
    prompt = await service.prompt(loaded, Wanted(tools=_tools(asked)), *_conversation(asked))
    return JSONResponse({"input_tokens": len(prompt.ids)})


async def _events(generation: Generation, head: dict[str, Any], prompt_tokens: int) -> AsyncIterator[str]:
    began, place, kind = False, -1, ""  # of the open block: its number, and what or which call it is

    def begin() -> str:
        usage = {**_usage(generation.usage), "output_tokens": 0}
        if not generation.usage.completion_tokens:
            usage["input_tokens"] = prompt_tokens - usage["cache_read_input_tokens"]
        return _event("message_start", message={**head, "usage": usage})

    async for each in generation.updates():
        if not isinstance(each, tuple):
            yield keep_alive(each)
            continue
        _, update = each
        if update.error:
            told = "api_error" if update.status == 500 else kind_of(update.status)
            yield _event("error", error={"type": told, "message": update.error})
            return
        if not began:
            began = True
            yield begin()
        for run in update.runs:
            new = run.id if isinstance(run, Call) else run.kind
            if new != kind:
                if kind:
                    yield _event("content_block_stop", index=place)
                place, kind = place + 1, new
                yield _event("content_block_start", index=place, content_block=_block(run, empty=True))
            yield _event("content_block_delta", index=place, delta=_delta(run))
        if update.finish:
            if kind:
                yield _event("content_block_stop", index=place)
            yield _event("message_delta", delta=_ending(update), usage=_usage(generation.usage))
            yield _event("message_stop")


def _block(run: Piece | Call, empty: bool = False) -> dict[str, Any]:
    if isinstance(run, Call):
        given = {} if empty else json.loads(run.arguments)
        return {"type": "tool_use", "id": _id(run), "name": run.name, "input": given}
    text = "" if empty else run.text
    if run.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _delta(run: Piece | Call) -> dict[str, Any]:
    if isinstance(run, Call):
        return {"type": "input_json_delta", "partial_json": run.arguments}
    if run.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": run.text}
    return {"type": "text_delta", "text": run.text}


def _id(call: Call) -> str:
    return "toolu_" + call.id.removeprefix("call_")


def _ending(update: Update) -> dict[str, Any]:
    if update.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": update.stop}
    return {"stop_reason": REASONS.get(update.finish or "stop"), "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        **usage.extensions,
    }


def _event(kind: str, **content: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **content}, ensure_ascii=False)}\n\n"


# --- From Anthropic's form to the chat template's --------------------------------------------------------


def _tools(asked: CountRequest) -> list[dict[str, Any]]:
    choice = asked.tool_choice
    if choice is not None and choice.type == "none":
        return []
    found = []
    for tool in asked.tools or []:
        if tool.type not in (None, "custom") or (
            choice and choice.type == "tool" and tool.name != choice.name
        ):
            continue  # tools that Anthropic's server would run itself
        parameters = tool.input_schema or {"type": "object", "properties": {}}
        function: dict[str, Any] = {"name": tool.name, "parameters": parameters}
        if tool.description:
            function["description"] = tool.description
        found.append({"type": "function", "function": function})
    return found


def _conversation(asked: CountRequest) -> tuple[list[dict[str, Any]], dict[str, Any] | None, bool]:
    """The messages, options of the chat template, and whether the last message is to be continued."""
    found: list[dict[str, Any]] = []
    if asked.system:
        found.append({"role": "system", "content": _text(asked.system)})
    for turn in asked.messages:
        found += _turn(turn.role, turn.content)
    goes_on = found[-1]["role"] == "assistant" and not found[-1].get("tool_calls")
    if goes_on and not found[-1]["content"].strip():
        raise BadRequest("messages: the last one, which is to be continued, is empty.", param="messages")
    return found, asked.chat_template_kwargs, goes_on


def _turn(role: str, content: str | list[Block]) -> list[dict[str, Any]]:
    """A turn as messages: what tools said is a message of its own for each."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    found: list[dict[str, Any]] = []
    message: dict[str, Any] = {"role": role, "content": ""}
    for block in content:
        if block.type == "text":
            message["content"] += block.text or ""
        elif block.type == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + (block.thinking or "")
        elif block.type == "tool_use":
            function = {"name": block.name or "", "arguments": block.input or {}}
            call = {"type": "function", "id": block.id or "", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif block.type == "tool_result":
            said = _text(block.content or "")
            found.append({"role": "tool", "content": said, "tool_call_id": block.tool_use_id or ""})
        elif block.type != "redacted_thinking":
            text = f"a message has a part of type {block.type[:40]!r}: only text can be read."
            raise BadRequest(text, param="messages")
    if message["content"] or message.get("tool_calls") or not found:
        found.append(message)
    return found


def _text(content: str | list[Part]) -> str:
    if isinstance(content, str):
        return content
    if bad := [part.type for part in content if part.type != "text"]:
        text = f"a message has a part of type {bad[0][:40]!r}: only text can be read."
        raise BadRequest(text, param="messages")
    return "\n".join(part.text or "" for part in content)
