"""Conversations become prompts by the chat template; what users say is never taken for control tokens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..chat import Message, refusal
from .errors import BadRequest

Tool = dict[str, Any]


@dataclass
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        ids: its tokens.
        checkpoints: tokens after which it may differ from the next conversation's: the system prompt's.
        begins_in: what the model's answer is at first (``Reader``).
    """

    ids: list[int]
    checkpoints: tuple[int, ...] = ()
    begins_in: str = "normal"


def encode_chat(
    tokenizer: TokenizerWrapper,
    messages: list[Message],
    tools: Sequence[Tool] = (),
    options: Mapping[str, Any] | None = None,
    goes_on: bool = False,
    direct: bool = False,
) -> Prompt:
    """The prompt of a conversation.

    Args:
        messages: role, content (a text) and what else chat templates know, such as ``tool_calls``.
        tools: functions that may be called, in OpenAI's form.
        options: of the chat template.
        goes_on: the last message is the model's own, and is to be continued.
        direct: the answer must follow at once, without reasoning, where the template can have it so.

    Raises:
        BadRequest: the template refuses them.
    """
    if not tokenizer.has_chat_template:
        text = "\n".join(f"{each['role']}: {each['content']}" for each in messages)
        return Prompt(list(tokenizer.encode(text if goes_on else f"{text}\nassistant:")))
    given: dict[str, Any] = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    given |= {
        "tools": list(tools) or None,
        **({"enable_thinking": False} if direct else {}),
        **(options or {}),
    }
    try:
        shown = _suited(tokenizer, messages, given)
        ids = _encode(tokenizer, shown, given)
        return Prompt(ids, _system_end(tokenizer, shown, given, ids), _begins_in(tokenizer, ids))
    except BadRequest:
        raise
    except Exception as error:
        raise BadRequest(str(refusal(messages, error)), param="messages") from error


def with_tools_called(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of earlier calls as objects, which templates expect.

    Raises:
        BadRequest: arguments that are no JSON object.
    """
    found = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [_with_object(call) for call in calls]}
        found.append(message)
    return found


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
        if not isinstance(arguments, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        message = f"the arguments of the call of {function['name']} are no JSON object ({error})."
        raise BadRequest(message, param="messages") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _suited(tokenizer: TokenizerWrapper, messages: list[Message], options: dict[str, Any]) -> list[Message]:
    """The messages in a form that the template keeps: content as a text, or in parts."""
    heard = [m["content"].strip() for m in messages if m["role"] in ("system", "user")]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    for form in (messages, parts):
        try:
            text = tokenizer.apply_chat_template(form, tokenize=False, **options)
        except Exception:  # a template is a program, and may refuse either
            continue
        if all(each in text for each in heard):
            return form
    tokenizer.apply_chat_template(messages, tokenize=False, **options)  # which may say why not
    return messages


def _encode(tokenizer: TokenizerWrapper, messages: list[Message], options: dict[str, Any]) -> list[int]:
    """Token ids; control tokens that a message spells out become plain text."""
    made = tokenizer.apply_chat_template(messages, tokenize=True, sanitize_control_tokens=True, **options)
    return list(made)


def _system_end(
    tokenizer: TokenizerWrapper, messages: list[Message], options: dict[str, Any], ids: list[int]
) -> tuple[int, ...]:
    """How many tokens the system prompt and the tools take: where another conversation would differ."""
    system = [message for message in messages if message["role"] == "system"]
    if len(messages) == len(system) or not (system or options.get("tools")):
        return ()
    other = {"role": "user", "content": "\u2400"}  # says something that nobody begins with
    if not isinstance(messages[0]["content"], str):
        other["content"] = [{"type": "text", "text": "\u2400"}]  # type: ignore[assignment]
    try:
        given = {**options, "add_generation_prompt": True, "continue_final_message": False}
        others = _encode(tokenizer, [*system, other], given)
    except Exception:  # only where reading may be spared is not known then
        return ()
    common = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), 0)
    return (common,) if 0 < common < len(ids) - 1 else ()


def _begins_in(tokenizer: TokenizerWrapper, ids: list[int]) -> str:
    """Whether the prompt has opened the model's reasoning, as mlx-lm's server finds out."""
    if tokenizer.response_initial_state:
        return str(tokenizer.response_initial_state)
    if not tokenizer.has_thinking:
        return "normal"
    is_open = tokenizer.rfind_think_start(ids) > tokenizer.rfind_think_end(ids)
    return "reasoning" if is_open else "normal"
