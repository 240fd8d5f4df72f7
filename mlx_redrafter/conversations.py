"""Files of conversations and prompts: the one reader of rows, roles and texts; and prompts' token ids."""

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .chat import Message, encode_messages, rendered

T = TypeVar("T")

NAMES = {  # of roles, by what templates call them
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt gpt4 bing bard claude model bot chatbot ai function_call tool_call",
    "tool": "tool function observation ipython tool_response function_response",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "instruction", "question", "query")
INPUTS = ("input", "context")  # what an instruction is about
ANSWERS = ("completion", "response", "output", "answer", "chosen")
OTHERS = ("turns", "text", "system", "system_prompt", "category")
KNOWN = {*CONVERSATIONS, *QUESTIONS, *INPUTS, *ANSWERS, *OTHERS}
LIST = re.compile(  # how a file that is a list of rows begins, perhaps as the first entry of an object
    r'\s*(?:\{\s*"(?:data|train|rows|examples|instances)"\s*:\s*)?\[(?!\s*\{\s*"(?:role|from)")'
)
BETWEEN = re.compile(r"[\s,\]}]*")  # what may stand between rows, and after the last one


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    turns: list[str]  # the user's texts; the first one is asked unless there are messages
    category: str = ""  # what kind of prompt it is; empty if the file does not say
    messages: list[Message] | None = None  # a conversation with roles that ends with a user's message
    ids: list[int] | None = None  # token ids that take the place of all these


@dataclass(frozen=True)
class Row:
    """A row of a file: a conversation, a user's turns or a text; the other two are empty."""

    messages: list[Message]  # with the roles' usual names; perhaps without an answer
    turns: list[str]  # the user's texts, to be asked one after the other
    text: str  # without roles
    category: str  # what kind of row it is, if it says so
    unread: list[str]  # the row's other keys

    def asked(self) -> list[Message]:
        """The messages from the user's first to the last one; ``ValueError`` if there is none, or no text."""
        messages = from_first_user(self.messages)
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError("no message has the role user: give one.")
        for message in messages[: users[-1] + 1]:
            _text(message["content"], "a message's content")
        return messages[: users[-1] + 1]


# --- Files -----------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file of rows (see ``read_rows``); ``-`` reads standard input.

    What follows a conversation's last user's message is left out.

    Raises:
        ValueError: the file cannot be read, or no row is a prompt.
    """
    return list(read_rows(path, _prompt, []))


def read_rows(path: str | Path, use: Callable[[Row], T], unusable: list[str]) -> Iterator[T]:
    """What ``use`` makes of each row of a JSON file: objects one after another, or in a list.

    An object has ``messages`` or ``conversations`` (objects with ``role`` or ``from``, and ``content`` or
    ``value``), or ``turns`` (the user's texts), or a question (``prompt``, ``instruction`` with ``input``,
    ``question``: a text or messages) and perhaps its answer (``completion``, ``response``, ``output``,
    ``answer``, ``chosen``), or ``text``; besides, perhaps ``system`` and ``category``. Keys and roles may be
    capitalized; null counts as nothing. In the end, warns of the rows that cannot be used.

    Args:
        use: raises ``ValueError`` where a row cannot be used.
        unusable: gets for each row that cannot be used where it is, and why.
    Raises:
        ValueError: the file cannot be read, or no row can be used.
    """
    used = 0
    for place, item in _items(read_text(path)):
        try:
            if isinstance(item, Exception):
                raise item
            found = use(_parse(item))
        except ValueError as error:
            unusable.append(f"{place}: {error}")
        else:
            used += 1
            yield found
    tell(path, unusable, used)


def tell(path: str | Path, unusable: Sequence[str], used: int) -> None:
    """Warn of rows that are left out, if there are any; ``ValueError`` if none was used."""
    rows = "it is empty"
    if unusable:
        rows = f"{len(unusable)} unusable row{'s' * (len(unusable) > 1)}; the first, {unusable[0]}"
    if not used:
        raise ValueError(f"{_name(path)} holds nothing that can be used ({rows}): give another.")
    if unusable:
        warnings.warn(f"{_name(path)}: left out {rows}", stacklevel=2)


def read_text(path: str | Path) -> str:
    """A file's text, without its byte order mark; bytes that are not UTF-8 become halves of characters."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"{_name(path)} cannot be read ({error.strerror}): name a file that can.") from error
    return data.decode("utf-8-sig", "surrogateescape")


def _name(path: str | Path) -> str:
    return "standard input" if str(path) == "-" else str(path)


def _items(text: str) -> Iterator[tuple[str, Any]]:
    """The rows with their places, or the error that a row has; after it, the next line may be a row."""
    found = LIST.match(text)
    place, number = (found.end() if found else 0), 0
    line = 1 + text.count("\n", 0, place)
    while (start := place + len(BETWEEN.match(text, place)[0])) < len(text):  # type: ignore[index]
        end = text.find("\n", start) + 1 or len(text)
        try:
            item, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            item = ValueError(f"not JSON ({getattr(error, 'msg', error)}): correct it.")
        if not is_whole(text[start:end]):
            item = ValueError("not UTF-8: correct it.")
        line, number = line + text.count("\n", place, start), number + 1
        yield f"item {number}" if found else f"line {line}", item
        line, place = line + text.count("\n", start, end), end


# --- Rows ------------------------------------------------------------------------------------------------


def _parse(item: Any) -> Row:
    """An object of a file, or a list of messages, as a row; ``ValueError`` if it is none."""
    row = _entries({"messages": item} if isinstance(item, list) else item)
    if row.get("history"):
        raise ValueError("history is not read: give messages instead.")
    if isinstance(row.get("turns"), list) and any(isinstance(turn, dict) for turn in row["turns"]):
        row = {"messages": row.pop("turns"), **row}
    messages, turns, text = _conversation(row), list[str](), ""
    if not messages and "turns" in row:
        if not isinstance(row["turns"], list) or not row["turns"]:
            raise ValueError(f"turns is {_short(row['turns'])}: it must be a list of texts.")
        turns = [_text(turn, "a turn") for turn in row["turns"]]
    elif not messages and "text" in row:
        text = _text(row["text"], "text")
    elif not messages:
        raise ValueError(f"it has only the keys {sorted(row)}: give messages, turns, prompt or text.")
    return Row(messages, turns, text, str(row.get("category", "")), sorted(row.keys() - KNOWN))


def _messages(items: Any) -> list[Message]:
    """The messages of a conversation, also ShareGPT's, with the usual roles; without an empty system's."""
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"messages is {_short(items)}: it must be a list of objects with role and content.")
    messages = [_message(_entries(item)) for item in items]
    return [m for m in messages if m["role"] != "system" or m["content"].strip()]


def from_first_user(messages: list[Message]) -> list[Message]:
    """Without what anyone but the system says before the user's first message, such as a greeting."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    return [m for i, m in enumerate(messages) if i >= first or m["role"] == "system"]


def _given_text(value: Any, what: str) -> str:
    """A text, given as such or in parts ``{"type": "text", "text": ...}``; ``ValueError`` if it is none."""
    if isinstance(value, list) and all(isinstance(x, dict) and isinstance(x.get("text"), str) for x in value):
        value = "".join(part["text"] for part in value) if value else None
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_short(value)}: it must be a text.")
    if not is_whole(value):
        raise ValueError(f"{what} is {_short(value)}: half of a character is missing.")
    return value


def _entries(item: Any) -> dict[str, Any]:
    """An object's entries that are not null, by their names in lower case."""
    if not isinstance(item, dict):
        raise ValueError(f"{_short(item)} is no object: give one with messages, turns or prompt.")
    return {name.strip().lower(): value for name, value in item.items() if value is not None}


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _conversation(row: dict[str, Any]) -> list[Message]:
    """A row's messages: a conversation, or a question and perhaps its answer; empty if it has neither."""
    question = _first(row, (*CONVERSATIONS, *QUESTIONS))
    given, answer = question is not None or "input" in row, _first(row, ANSWERS)
    if any(name in row for name in CONVERSATIONS) or isinstance(question, list):
        messages = _messages(question)
    elif given:
        texts = [_given_text(x, "prompt") for x in (question, _first(row, INPUTS)) if x is not None]
        messages = [{"role": "user", "content": _text("\n\n".join(filter(str.strip, texts)), "prompt")}]
    else:
        messages = []
    if answer is not None and (not messages or messages[-1]["role"] != "assistant"):
        messages = _answered(messages, answer)
    system = _given_text(row.get("system", row.get("system_prompt", "")), "system")
    if system.strip() and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _answered(messages: list[Message], answer: Any) -> list[Message]:
    """The messages with an answer, which may be a text, messages, or the whole conversation again."""
    if isinstance(answer, str):
        said = [{"role": "assistant", "content": _given_text(answer, "answer")}]
    else:
        said = _messages([answer] if isinstance(answer, dict) else answer)
    if any(message["role"] == "user" for message in said):
        return said
    if not messages:
        raise ValueError("there is an answer without a question: give messages or prompt.")
    return [*messages, *said]


def _message(item: dict[str, Any]) -> Message:
    role = _first(item, ("role", "from"))
    if (usual := ROLES.get(str(role).strip().lower())) is None:
        raise ValueError(f"role {_short(role)} is not known: use system, user, assistant or tool.")
    if item.get("tool_calls") or item.get("function_call"):
        raise ValueError("a message calls tools, which is no text: leave it out.")
    content = _given_text(_first(item, ("content", "value", "text")), "a message's content")
    weight = item.get("weight", item.get("train", 1))
    if weight not in (0, 1):
        raise ValueError(f"weight {_short(weight)} is not usable: give 0 or 1.")
    return {"role": usual, "content": content} | ({} if weight else {"weight": 0})


def _prompt(row: Row) -> Prompt:
    if row.text:
        raise ValueError("a text is no prompt: give messages, turns or prompt.")
    if row.turns:
        return Prompt(row.turns, row.category)
    messages = row.asked()
    users = [message["content"] for message in messages if message["role"] == "user"]
    return Prompt(users, row.category, messages if len(messages) > 1 else None)


def _text(value: Any, what: str) -> str:
    text = _given_text(value, what)
    if not text.strip():
        raise ValueError(f"{what} is {_short(value)}: it must be a text.")
    return text


def is_whole(text: str) -> bool:
    """Whether a text holds no half of a character."""
    return re.search(r"[\ud800-\udfff]", text) is None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- Token ids -------------------------------------------------------------------------------------------


def encode(prompt: Prompt, tokenizer: TokenizerWrapper) -> list[int]:
    """Token ids of the first turn, or of the messages, in the model's chat template.

    A model without a template gets the plain text, with the special tokens that its tokenizer adds.

    Raises:
        ValueError: the template refuses the conversation, or nothing is left to say.
    """
    if prompt.ids:
        return prompt.ids
    messages = prompt.messages or [{"role": "user", "content": prompt.turns[0]}]
    text = rendered(messages, tokenizer, prompt=True) if tokenizer.has_chat_template else None
    return encode_messages(messages, tokenizer, text)


def usable(
    prompts: Sequence[Prompt], encoded: Callable[[Prompt], list[int]]
) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts that can be encoded, and their token ids; warns of the others.

    Raises:
        ValueError: none can.
    """
    found, unusable = list[tuple[Prompt, list[int]]](), list[str]()
    for prompt in prompts:
        try:
            found.append((prompt, encoded(prompt)))
        except ValueError as error:
            unusable.append(f"{_short((prompt.turns or [''])[-1])}: {error}")
    tell("the set of prompts", unusable, len(found))
    return [prompt for prompt, _ in found], [ids for _, ids in found]
