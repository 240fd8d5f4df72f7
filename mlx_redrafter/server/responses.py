"""OpenAI's responses, whole and streamed; the last ones are remembered, and others may go on from them."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .errors import BadRequest
from .generation import Generation, Usage
from .memory import Messages
from .output import Call, Piece, Update
from .prompts import with_tools_called
from .schemas import (
    Item,
    JsonSchema,
    Message,
    NamedResponseTool,
    ResponseFormat,
    ResponsesRequest,
    parse,
)
from .service import Service, Wanted, keep_alive


async def respond(service: Service, request: Request, body: bytes) -> Response:
    """POST /v1/responses."""
    asked = parse(ResponsesRequest, body)
    loaded = await service.catalog.get(asked.model)
    before = service.memory.find(asked.previous_response_id) if asked.previous_response_id else []
    conversation = [*before, *_messages(asked)]
    if not conversation:
        raise BadRequest("input: is empty: say something.", param="input")
    instructions = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    tools = _tools(asked)
    messages = with_tools_called(_system_first([*instructions, *conversation]))
    wanted = Wanted(
        asked.max_output_tokens,
        stop=asked.stop,
        tools=tools,
        format=asked.format or _format(asked),
        must_call=asked.tool_choice == "required" or isinstance(asked.tool_choice, NamedResponseTool),
    )
    prompt = await service.prompt(loaded, wanted, messages, asked.chat_template_kwargs)
    generation = await service.generation(loaded, asked, wanted, [prompt])
    writer = _Writer(service, asked, generation, conversation)
    if asked.stream:
        return service.streamed(request, generation, writer.events())
    (text,) = await service.whole(request, generation)
    for run in text.runs:
        writer.add(run)
    return JSONResponse(writer.end(text))


class _Writer:
    """A response as it grows."""

    def __init__(
        self, service: Service, asked: ResponsesRequest, generation: Generation, conversation: Messages
    ) -> None:
        self._service, self._asked, self._generation = service, asked, generation
        self._conversation = conversation
        self._output: list[dict[str, Any]] = []
        self._number = 0  # of the next event
        self.id = f"resp_{uuid.uuid4().hex}"
        form = asked.text.format if asked.text and asked.text.format else None
        choice = asked.tool_choice or "auto"
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model or service.catalog.default_name,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": {
                "format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
            },
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{"strict": None, **tool.model_dump()} for tool in asked.tools or []],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "user": None,
        }

    async def events(self) -> AsyncIterator[str]:
        """The stream."""
        began, kind = False, ""  # what the open item is, or which call
        async for each in self._generation.updates():
            if not began:
                began = True
                for name in ("created", "in_progress"):
                    yield self._event(f"response.{name}", response=self._response("in_progress"))
            if not isinstance(each, tuple):
                yield keep_alive(each)
                continue
            _, update = each
            if update.error:
                failed = self._response("failed")
                code = "invalid_prompt" if update.status == 400 else "server_error"
                failed["error"] = {"code": code, "message": update.error}
                yield self._event("response.failed", response=failed)
                return
            for run in update.runs:
                new = run.id if isinstance(run, Call) else run.kind
                if new != kind:
                    for event in self._closing(kind):
                        yield event
                    kind = new
                    for event in self._opening(run):
                        yield event
                for event in self._growing(run):
                    yield event
            if update.finish:
                for event in self._closing(kind):
                    yield event
                response = self.end(update)
                yield self._event(f"response.{response['status']}", response=response)

    def add(self, run: Piece | Call) -> None:
        """A whole item."""
        self._output.append(_item(run))

    def end(self, update: Update) -> dict[str, Any]:
        """The whole response; remembers it."""
        whole = update.finish != "length"
        response = self._response("completed" if whole else "incomplete")
        if not whole:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["usage"] = _usage(self._generation.usage)
        if self._asked.store is not False:
            whole_items = [item for item in self._output if item.get("status") != "incomplete"]
            said = _from_items([Item.model_validate(_plain(item)) for item in whole_items])
            self._service.memory.keep(self.id, [*self._conversation, *said])
        return response

    def _response(self, status: str) -> dict[str, Any]:
        return {**self._head, "status": status, "output": list(self._output), "usage": None}

    def _opening(self, run: Piece | Call) -> list[str]:
        empty = run if isinstance(run, Piece) else Call(run.name, "", run.id)
        item = _item(Piece(empty.kind, "") if isinstance(empty, Piece) else empty)
        self._output.append(item)
        shown = {**item, "status": "in_progress"} | ({"content": []} if "content" in item else {})
        events = [self._event("response.output_item.added", output_index=self._place, item=shown)]
        if isinstance(run, Piece):
            events.append(self._at("response.content_part.added", part=item["content"][0]))
        return events

    def _growing(self, run: Piece | Call) -> list[str]:
        item = self._output[-1]
        if isinstance(run, Call):
            item["arguments"] += run.arguments
            if not run.arguments:
                return []
            name = "response.function_call_arguments.delta"
            return [self._event(name, item_id=item["id"], output_index=self._place, delta=run.arguments)]
        item["content"][0]["text"] += run.text
        if run.kind == "reasoning":
            return [self._at("response.reasoning_text.delta", delta=run.text)]
        return [self._at("response.output_text.delta", delta=run.text, logprobs=[])]

    def _closing(self, kind: str) -> list[str]:
        if not kind:
            return []
        item, done = self._output[-1], []
        if item["type"] == "function_call":
            item["status"] = "completed" if _is_json(item["arguments"]) else "incomplete"
            done.append(
                self._event(
                    "response.function_call_arguments.done",
                    item_id=item["id"],
                    output_index=self._place,
                    name=item["name"],
                    arguments=item["arguments"],
                )
            )
        else:
            part = item["content"][0]
            name = "reasoning_text" if kind == "reasoning" else "output_text"
            extra: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
            done.append(self._at(f"response.{name}.done", text=part["text"], **extra))
            done.append(self._at("response.content_part.done", part=part))
        return [*done, self._event("response.output_item.done", output_index=self._place, item=item)]

    @property
    def _place(self) -> int:
        return len(self._output) - 1

    def _at(self, kind: str, **content: Any) -> str:
        item = self._output[-1]
        return self._event(kind, item_id=item["id"], output_index=self._place, content_index=0, **content)

    def _event(self, kind: str, **content: Any) -> str:
        content = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"


def _item(run: Piece | Call) -> dict[str, Any]:
    number = uuid.uuid4().hex
    if isinstance(run, Call):
        call = {"id": f"fc_{number}", "type": "function_call", "status": "completed"}
        return {**call, "call_id": run.id, "name": run.name, "arguments": run.arguments}
    if run.kind == "reasoning":
        parts = [{"type": "reasoning_text", "text": run.text}]
        return {"id": f"rs_{number}", "type": "reasoning", "summary": [], "content": parts}
    parts = [{"type": "output_text", "text": run.text, "annotations": [], "logprobs": []}]  # type: ignore[dict-item]
    message = {"id": f"msg_{number}", "type": "message", "status": "completed", "role": "assistant"}
    return {**message, "content": parts}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    return {
        name: item[name]
        for name in ("type", "role", "content", "call_id", "name", "arguments")
        if name in item
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **usage.extensions,
    }


# --- From the items of responses to the chat template's messages -----------------------------------------


def _messages(asked: ResponsesRequest) -> Messages:
    if isinstance(asked.input, str):
        return [{"role": "user", "content": asked.input}] if asked.input else []
    return _from_items(asked.input)


def _from_items(items: list[Item]) -> Messages:
    found: Messages = []
    reasoning = ""
    for item in items:
        kind = item.type or "message"
        if kind == "message" and item.role:
            message = Message(role=item.role, content=item.content).for_template()
            if reasoning and item.role == "assistant":
                message["reasoning_content"], reasoning = reasoning, ""
            found.append(message)
        elif kind == "function_call":
            function = {"name": item.name or "", "arguments": item.arguments or "{}"}
            call = {"id": item.call_id or "", "type": "function", "function": function}
            if not (found and found[-1]["role"] == "assistant"):
                found.append({"role": "assistant", "content": ""})
            if reasoning:
                found[-1]["reasoning_content"], reasoning = reasoning, ""
            found[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            said = Message(role="tool", content=item.output, tool_call_id=item.call_id).for_template()
            found.append(said)
        elif kind == "reasoning":
            parts = item.content if isinstance(item.content, list) else item.summary or []
            reasoning = "".join(part.text or "" for part in parts)
        else:
            text = f"input: has an item of type {kind[:40]!r}, which cannot be read here."
            raise BadRequest(text, param="input")
    return found


def _system_first(messages: Messages) -> Messages:
    """The messages with one of the system's, at the beginning, where templates expect it."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system}, *others] if system else others


def _tools(asked: ResponsesRequest) -> list[dict[str, Any]]:
    choice = asked.tool_choice
    if choice == "none":
        return []
    found = []
    for tool in asked.tools or []:
        if tool.type != "function" or not tool.name:
            continue  # tools that OpenAI's server would run itself
        if isinstance(choice, NamedResponseTool) and tool.name != choice.name:
            continue
        function = tool.model_dump(exclude_none=True, exclude={"type"})
        found.append({"type": "function", "function": function})
    if (not found and choice in ("required",)) or (isinstance(choice, NamedResponseTool) and not found):
        raise BadRequest("tool_choice: names a function that is none of the tools.", param="tool_choice")
    return found


def _format(asked: ResponsesRequest) -> ResponseFormat | None:
    form = asked.text.format if asked.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema":
        if form.schema_ is None:
            raise BadRequest("text.format: json_schema needs a schema.", param="text.format")
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=form.schema_))
    return ResponseFormat(type="json_object")
