"""Files of prompts (JSON lines), and their token ids."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, str]  # role and content

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        turns: the user's texts; the first one is asked unless there are ``messages``.
        category: what kind of prompt it is; empty if the file does not say.
        messages: a conversation with roles that ends with a user's message.
        ids: token ids that take the place of all these.
    """

    turns: list[str]
    category: str = ""
    messages: list[Message] | None = None
    ids: list[int] | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a JSONL file; ``-`` reads standard input.

    A line is an object with one of ``messages`` (each with ``role`` and ``content``; what follows the
    last user's message is left out), ``turns`` (the user's texts) and ``prompt`` (a text), and perhaps
    a ``category``. Other entries are ignored, empty lines too.

    Raises:
        ValueError: the file cannot be read, a line is no prompt (which one), or there are none.
    """
    name = "standard input" if str(path) == "-" else str(path)
    lines = _read(path, name).split("\n")
    prompts = [_parse(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{name} holds no prompts: give lines such as " + '{"prompt": "Hello"}.')
    return prompts


def encode(prompt: Prompt, tokenizer: TokenizerWrapper) -> list[int]:
    """Token ids of the first turn, or of the messages, in the model's chat template.

    A model without a template gets the plain text, with the special tokens that its tokenizer adds.

    Raises:
        ValueError: the template refuses the conversation, or nothing is left to say.
    """
    if prompt.ids:
        return prompt.ids
    messages = prompt.messages or [{"role": "user", "content": prompt.turns[0]}]
    if not tokenizer.has_chat_template:
        ids = tokenizer.encode("\n".join(message["content"] for message in messages))
    else:
        ids = tokenizer.encode(_render(messages, tokenizer), add_special_tokens=False)
    if not ids:
        raise ValueError(f"the prompt {prompt.turns[0]!r} has no tokens: give some text.")
    return list(ids)


def render(tokenizer: TokenizerWrapper, messages: list[Message], **options: Any) -> str:
    """The messages in the model's chat template; in parts, where only that keeps what they say."""

    def apply(given: list[Any]) -> str:
        return str(tokenizer.apply_chat_template(given, tokenize=False, **options))

    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    texts: list[str] = []
    for given in (messages, parts):
        with contextlib.suppress(Exception):  # a template may refuse either
            texts.append(apply(given))
            if all(m["content"].strip() in texts[-1] for m in messages):
                return texts[-1]
    return texts[0] if texts else apply(messages)  # which says why


def _render(messages: list[Message], tokenizer: TokenizerWrapper) -> str:
    try:
        return render(tokenizer, messages, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may refuse a role or the order of roles
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template refuses messages of {roles} ({error}): give other prompts."
        ) from error


def _read(path: str | Path, name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).expanduser().read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"{name} cannot be read ({error.strerror}): give a JSONL file of prompts."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error.reason}): give a JSONL file of prompts.") from error


def _parse(line: str, place: str) -> Prompt:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}): give one object per line.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: {_short(raw)} is no object: give one with turns, messages or prompt.")
    category = raw.get("category") or ""
    if not isinstance(category, str):
        raise ValueError(f"{place}: category is {_short(category)}: it must be a text.")
    if raw.get("messages") is not None:
        messages = _messages(raw["messages"], place)
        return Prompt([m["content"] for m in messages if m["role"] == "user"], category, messages)
    if raw.get("turns") is not None:
        return Prompt(_turns(raw["turns"], place), category)
    if raw.get("prompt") is not None:
        return Prompt([_text(raw["prompt"], f"{place}: prompt")], category)
    raise ValueError(f"{place}: neither turns nor messages nor prompt is there: give one of them.")


def _turns(raw: Any, place: str) -> list[str]:
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{place}: turns is {_short(raw)}: it must be a list of texts.")
    return [_text(turn, f"{place}: a turn") for turn in raw]


def _messages(raw: Any, place: str) -> list[Message]:
    """The messages up to the user's last one."""
    try:
        messages = parse_messages(raw)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError(f"{place}: no message has the role user: give one.")
    for message in messages[: users[-1] + 1]:
        _text(message["content"], f"{place}: a message's content")
    return messages[: users[-1] + 1]


def parse_messages(items: Any) -> list[Message]:
    """The messages of a conversation, also ShareGPT's, with the roles' usual names.

    Raises:
        ValueError: there are none, or one has no role that is known, or no text.
    """
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"messages is {_short(items)}: it must be a list of objects with role and content.")
    messages = []
    for item in items:
        name = item.get("role", item.get("from"))
        if not isinstance(name, str) or name not in ROLES:
            raise ValueError(f"role {name!r} is not known: use system, user or assistant.")
        content = parse_text(item.get("content", item.get("value")), "a message's content")
        messages.append({"role": ROLES[name], "content": content})
    return messages


def parse_text(value: Any, what: str) -> str:
    """A text, given as such or in parts ``{"type": "text", "text": ...}``; ``ValueError`` if it is none."""
    if isinstance(value, list) and all(isinstance(x, dict) and isinstance(x.get("text"), str) for x in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_short(value)}: it must be a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is {_short(value)}: half of a character is missing.") from error
    return value


def _text(value: Any, what: str) -> str:
    text = parse_text(value, what)
    if not text.strip():
        raise ValueError(f"{what} is {_short(value)}: it must be a text.")
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
