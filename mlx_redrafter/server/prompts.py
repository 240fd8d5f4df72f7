"""Conversations become prompts by the chat template; what users say is never taken for control tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

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
    ends: bool = False,
) -> Prompt:
    """The prompt of a conversation.

    Args:
        messages: role, content (a text) and what else chat templates know, such as ``tool_calls``.
        tools: functions that may be called, in OpenAI's form.
        options: of the chat template.
        goes_on: the last message is the model's own, and is to be continued.
        direct: the answer must follow at once, without reasoning, where the template can have it so.
        ends: find out where the system prompt ends, which takes rendering it once more.

    Raises:
        BadRequest: the template refuses them, or a name in them holds a control token.
    """
    _check_names(tokenizer, [messages, list(tools), dict(options or {})])
    if not tokenizer.has_chat_template:
        marked = mark_control_tokens(messages, _pattern(tokenizer))
        text = "\n".join(f"{each['role']}: {each['content']}" for each in marked)
        ids = encode_marked_chat(tokenizer._tokenizer, text if goes_on else f"{text}\nassistant:")
        return Prompt([*tokenizer.encode(""), *ids])
    given: dict[str, Any] = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    given |= {
        "tools": list(tools) or None,
        **({"enable_thinking": False} if direct else {}),
        **(options or {}),
    }
    try:
        shown = _suited(tokenizer, messages, given)
        ids = _encode(tokenizer, shown, given)
        checkpoints = _system_end(tokenizer, shown, given, ids) if ends else ()
        return Prompt(ids, checkpoints, _begins_in(tokenizer, ids, goes_on))
    except BadRequest:
        raise
    except Exception as error:
        raise BadRequest(str(refusal(messages, error)), param="messages") from error


def control_tokens(tokenizer: TokenizerWrapper) -> list[str]:
    """The added tokens that what users say must not become: special ones, marks of reasoning and of calls,
    and those that the chat template writes, as ``transformers`` would find them by its text alone.
    """
    marks = [tokenizer.think_start, tokenizer.think_end, tokenizer.tool_call_start, tokenizer.tool_call_end]
    marks += [str(tokenizer.chat_template or ""), *(getattr(tokenizer, "chat_control_tokens", None) or ())]
    written = "\0".join(filter(None, marks))
    known = tokenizer.added_tokens_decoder.values()
    return [
        token.content
        for token in known
        if token.special or (token.content in written and not token.content.isspace())
    ]


def _pattern(tokenizer: TokenizerWrapper) -> re.Pattern[str]:
    tokens = tokenizer.chat_control_tokens or control_tokens(tokenizer)  # known once it serves
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # which is nowhere


def _check_names(tokenizer: TokenizerWrapper, given: list[Any]) -> None:
    """Raise ``BadRequest`` for an entry's name with a control token: such names are written as they are."""
    pattern, left = _pattern(tokenizer), given
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if bad := next(filter(pattern.search, value), None):
                raise BadRequest(f"the name {bad[:100]!r} holds a control token: give another.")
            left += value.values()
        elif isinstance(value, list):
            left += value


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


def _with_texts(message: Message) -> Message:
    """The message with the arguments of its calls as JSON texts."""
    calls = [{**call, "function": {**call["function"]}} for call in message.get("tool_calls", ())]
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**message, "tool_calls": calls} if calls else message


def _suited(tokenizer: TokenizerWrapper, messages: list[Message], options: dict[str, Any]) -> list[Message]:
    """The messages in a form that the template keeps: content as a text, or in parts; arguments of earlier
    calls as objects, or as texts, which DeepSeek's template expects.
    """
    heard = [m["content"].strip() for m in messages if m["role"] in ("system", "user")]
    heard = heard[:8] + heard[8:][-8:]  # of thousands, to look for all would take too long
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    for form in (messages, parts, list(map(_with_texts, messages))):
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
    if tokenizer._chat_template is not None:  # mlx-lm's own code, which knows of no such thing
        messages, options = mark_control_tokens([messages, options], _pattern(tokenizer))
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return list(encode_marked_chat(tokenizer._tokenizer, text))
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


def _begins_in(tokenizer: TokenizerWrapper, ids: list[int], goes_on: bool) -> str:
    """Whether the prompt has opened the model's reasoning: at its end, unless its own text goes on."""
    if tokenizer.response_initial_state:
        return str(tokenizer.response_initial_state)
    if not tokenizer.has_thinking:
        return "normal"
    start = tokenizer.rfind_think_start(ids)
    is_open = start > tokenizer.rfind_think_end(ids)
    if is_open and not goes_on:
        is_open = not tokenizer.decode(ids[start + len(tokenizer.think_start_tokens) :]).strip()
    return "reasoning" if is_open else "normal"
