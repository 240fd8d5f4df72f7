"""What a text says, taken apart: content, reasoning and calls of tools, as mlx-lm tells them apart."""

import contextlib
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic_core import from_json

from ..plain import UNKNOWN_TOKEN
from ..stop_texts import certain
from .worker import Logprobs, Said

# How a call begins, up to its arguments, where calls are written as JSON.
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
LONGEST_HEAD = 1 << 10  # characters; what begins otherwise is told when it is whole
LONGEST_PARTS = 1 << 15  # of a call; after so many, the rest comes in one piece


@dataclass
class Call:
    """A call of a tool, or some of one: what has the same id goes on."""

    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass
class OpenCall:
    """A call that is told while it is written, from where its arguments begin.

    Attributes:
        told: characters of the call's text that have been.
    """

    name: str
    start: int
    told: int
    id: str
    is_whole: bool = False

    @classmethod
    def begin(cls, text: str) -> "OpenCall | None":
        """The call that a text begins; None if that is not known yet, or it is written otherwise."""
        found = HEAD.match(text) if len(text) < LONGEST_HEAD else None
        if found is None:
            return None
        try:
            name = str(json.loads(found[1]))
            name.encode()
        except ValueError:
            return None
        return cls(name, found.end(), found.end(), Call("", "").id)

    def grow(self, text: str, last: bool = False) -> Call | None:
        """What is new of its arguments, such that all that was told may become JSON; None: nothing."""
        if self.is_whole or (len(text) > LONGEST_PARTS and not last):
            return None
        end = len(text.rstrip("} \t\r\n"))  # a bracket may close what the arguments are in
        try:
            from_json(text, allow_partial="trailing-strings", allow_inf_nan=False)
        except ValueError:
            return None
        with contextlib.suppress(ValueError):  # they go on
            end, self.is_whole = json.JSONDecoder().raw_decode(text, self.start)[1], True
        part, self.told = text[self.told : end], max(self.told, end)
        return Call(self.name, part, self.id) if part else None


@dataclass
class Piece:
    """Some of what a text says, from one token or none."""

    kind: str  # "content" or "reasoning"
    text: str
    drafted: bool = False


@dataclass
class Update:
    """What a step added to a text."""

    pieces: list[Piece | Call] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)  # of the step's tokens
    finish: str | None = None  # "stop", "length", "tool_calls", "error"
    stop: str | None = None  # the stop text that ended it
    error: str = ""
    status: int = 500  # HTTP's, of an error

    def text(self, kind: str = "content") -> str:
        """All that was added of one kind."""
        return "".join(each.text for each in self.pieces if isinstance(each, Piece) and each.kind == kind)

    @property
    def runs(self) -> "list[Piece | Call]":
        """The pieces, with neighbours of one kind as one."""
        found: list[Piece | Call] = []
        for each in self.pieces:
            last = found[-1] if found else None
            if isinstance(each, Piece) and isinstance(last, Piece) and last.kind == each.kind:
                found[-1] = Piece(each.kind, last.text + each.text)
            else:
                found.append(each)
        return found


class Reader:
    """Turns the tokens of one text into updates.

    Args:
        stop: texts that end it, and are not part of it.
        structured: whether reasoning and calls are told apart.
        tools: functions that may be called, as in the chat template; () if none may.
        begins_in: "reasoning" if the prompt ends in it, or else "normal", or "tool".
        in_parts: tell calls while they are written, where that is as JSON. One that turns out to be none
            stays as it is then.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        stop: Sequence[str] = (),
        structured: bool = True,
        tools: Sequence[dict[str, Any]] = (),
        begins_in: str = "normal",
        in_parts: bool = False,
    ) -> None:
        self._tokenizer, self._stop, self._tools = tokenizer, list(stop), list(tools)
        self._detokenizer = tokenizer.detokenizer
        self._held = ""  # may be the beginning of a stop text
        self._tool_text = ""
        self._in_parts = in_parts and writes_json(tokenizer)
        self._open: OpenCall | None = None
        machine = make_text_state_machine(tokenizer) if structured else TextStateMachine()
        self._state = machine.make_state(begins_in)
        self._in, self._called = begins_in, False
        self.tokens = self.reasoning = self.steps = self.offered = self.accepted = 0
        self.ended = False

    def take(self, said: Said) -> Update:
        """What a step added."""
        update = Update(logprobs=said.logprobs, finish=said.finish, error=said.error, status=said.status)
        self.steps += bool(self.tokens)  # the first token comes from the prompt
        if self.tokens:
            self.offered, self.accepted = self.offered + said.offered, self.accepted + said.drafted
        for place, token in enumerate(said.tokens):
            self.tokens += 1
            if token in self._tokenizer.eos_token_ids:
                continue
            try:
                self._detokenizer.add_token(token)
            except (IndexError, TypeError):
                update.finish, update.error = "error", UNKNOWN_TOKEN
                break
            self._add(self._detokenizer.last_segment, place < said.drafted, update)
            self.reasoning += self._in == "reasoning"
            if update.stop is not None:
                update.logprobs = update.logprobs[: place + 1]
                break
        if update.finish and update.stop is None:
            self._detokenizer.finalize()
            self._add(self._detokenizer.last_segment, False, update, last=True)
        if update.finish:
            self.ended = True
            self._flush(update)
            if update.finish == "stop" and self._called:
                update.finish = "tool_calls"
        return update

    def _add(self, text: str, drafted: bool, update: Update, last: bool = False) -> None:
        """Take in text up to a stop text, or what may become one."""
        self._held += text
        sure = len(self._held) if last else certain(self._held, self._stop)
        places = [(self._held.find(text), text) for text in self._stop]
        found = min(((place, text) for place, text in places if place >= 0), default=None)
        if found is not None and found[0] <= sure:
            (sure, update.stop), update.finish = found, "stop"
        text, self._held = self._held[:sure], self._held[sure:]
        if text:
            self._state, segments = TextStateMachine.split(self._state, text)
            self._sort(segments, drafted, update)

    def _flush(self, update: Update) -> None:
        """Take in what the state machine holds back, and a call that was not closed."""
        if self._state[0] is not None:
            self._state, rest, name = TextStateMachine.flush(self._state)
            self._sort([(name, rest)], False, update)
        if self._tool_text:
            self._call(update)

    def _sort(self, segments: Sequence[tuple[str | None, str]], drafted: bool, update: Update) -> None:
        for state, text in segments:
            if self._in == "tool" and state != "tool":
                self._call(update)
            self._in = state or "normal"
            if state == "tool":
                self._tool_text += text
                self._tell_part(update)
            elif text:
                kind = "reasoning" if state == "reasoning" else "content"
                update.pieces.append(Piece(kind, text, drafted))

    def _tell_part(self, update: Update) -> None:
        """Take in what is known of a call that is being written."""
        if self._in_parts and self._open is None and (found := OpenCall.begin(self._tool_text)) is not None:
            self._open = found
            update.pieces.append(Call(found.name, "", found.id))
        if self._open is not None and (part := self._open.grow(self._tool_text)) is not None:
            _add_part(update, part)

    def _call(self, update: Update) -> None:
        """Take in a call's text; as content if it cannot be understood."""
        text, self._tool_text = self._tool_text, ""
        begun, self._open = self._open, None
        try:
            parsed = self._tokenizer.tool_parser(text, self._tools)
            calls = [_whole_call(**each) for each in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # a model may write anything
            if begun is None:
                start, end = self._tokenizer.tool_call_start or "", self._tokenizer.tool_call_end or ""
                update.pieces.append(Piece("content", start + text + end))
            return
        self._called = True
        if begun is not None:
            if (rest := begun.grow(text, last=True)) is not None:
                _add_part(update, rest)
            return
        update.pieces += calls


def _add_part(update: Update, part: Call) -> None:
    """Take in some of a call, as one with what else there is of it."""
    last = update.pieces[-1] if update.pieces else None
    if isinstance(last, Call) and last.id == part.id:
        last.arguments += part.arguments
    else:
        update.pieces.append(part)


def writes_json(tokenizer: TokenizerWrapper) -> bool:
    """Whether the model writes calls as JSON objects of a name and arguments."""
    return bool(tokenizer.has_tool_calling) and tokenizer.tool_parser.__module__.endswith(".json_tools")


def _whole_call(name: str, arguments: dict[str, Any], **_: Any) -> Call:
    """A call that can be told; an error for names and arguments that JSON or UTF-8 cannot hold."""
    if not isinstance(arguments, dict):
        raise TypeError("arguments that are no object")
    call = Call(str(name), json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    (call.name + call.arguments).encode()
    return call
