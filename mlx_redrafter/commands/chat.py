"""``mlx-redrafter chat``."""

import argparse
import contextlib
import importlib.util
import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..conversations import read_rows
from ..decoding.state import PLAIN
from ..engine.prefixes import Prefixes
from ..loading.cache import cache_folder
from ..loading.files import atomic_file
from ..loading.find import DEFAULT_MODEL
from ..model import drafter_for
from ..options import check_range, check_text, choose_drafter, load_model, warn_of_idle
from ..plain import load_draft_model
from ..session import Session
from ..text import Response, statistics
from .arguments import add_decoding_arguments, colours, harmless, options_of

LONGEST = 2048  # tokens of an answer, unless --max-tokens says otherwise
COMMANDS = ("help", "reset", "system", "model", "drafter", "draft", "save", "load", "tokens", "stats")
HELP = """\
/help            this
/reset           begin anew
/system [TEXT]   show the system message, or set it (none: have none)
/model [NAME]    show the model, or go on with another one
/drafter [NAME]  show the drafter, or take another one (none: have none)
/draft on|off    draft, or decode plainly
/save FILE       write the conversation, one row of JSON
/load FILE       go on with a conversation
/tokens          how long the conversation is
/stats           how the last answer was made
A line that ends with a backslash goes on in the next one{keys}.
Ctrl-C stops an answer and keeps the conversation, Ctrl-D leaves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``generate`` that say which model decodes and how."""
    add_decoding_arguments(parser)
    text = (
        "bytes of texts that are kept, so that they are not read again (default: a quarter of what is free)"
    )
    parser.add_argument("--prompt-cache-bytes", type=int, help=text)
    parser.set_defaults(max_tokens=LONGEST)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends. What is piped in is answered line by line, as plain text."""
    check_range("prompt_cache_bytes", args.prompt_cache_bytes, 0)
    chat = Chat(args)
    with _input() as read:
        while (text := _message(read)) is not None:
            try:
                chat.take(text)
            except (ValueError, OSError) as error:
                if not sys.stdin.isatty():
                    raise
                print(f"error: {error}", file=sys.stderr)
    return 0


class Chat:
    """A session, and what its user may tell it besides messages."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.asked, prompting, self.decoding = options_of(args)
        self.drafts = not args.no_draft
        self.last: Response | None = None
        model, tokenizer = self._load(prompting)
        self.session = Session(model, tokenizer, prompting, Prefixes(args.prompt_cache_bytes))
        self.commands: dict[str, Callable[[str], str]] = {name: getattr(self, name) for name in COMMANDS}

    def take(self, text: str) -> None:
        """Answer a message, or do what a command says.

        Raises:
            ValueError, OSError: it cannot be done; the conversation is as it was.
        """
        name, _, rest = text[1:].partition(" ")
        if not text.startswith("/"):
            self.answer(text)
        elif name in self.commands:
            print(self.commands[name](rest.strip()))
        else:
            raise ValueError(f"/{name} is no command: /help lists them, and a space before / says it.")

    def answer(self, text: str) -> None:
        """Print what the model says, as it says it."""
        options = self.decoding.for_stream_generate(self.session.tokenizer) | {"draft": True}
        if self.draft_model is not None:
            options |= {"draft": False, "draft_model": self.draft_model}
        elif not self.drafts:
            options["shape"] = PLAIN  # which, unlike mlx-lm's loop, goes on from what is kept
        with _interrupts() as is_stopped, _output() as write:

            def progress(done: int, total: int) -> None:
                if is_stopped():
                    raise KeyboardInterrupt

            responses: Any = self.session.say(text, prompt_progress_callback=progress, **options)
            with contextlib.closing(responses):
                for self.last in responses:
                    write(self.last.text)
                    if is_stopped():
                        break

    def help(self, rest: str) -> str:
        return HELP.format(keys=", and so does Alt-Enter" if _has("prompt_toolkit") else "")

    def reset(self, rest: str) -> str:
        self.session.messages.clear()
        return "A new conversation."

    def system(self, rest: str) -> str:
        if rest:
            check_text("system_prompt", rest)
            told = None if rest == "none" else rest
            self.session.prompting = replace(self.session.prompting, system_prompt=told)
        return f"System message: {self.session.prompting.system_prompt or 'none'}"

    def model(self, rest: str) -> str:
        if rest:
            before, self.asked = self.asked, replace(self.asked, model=rest, drafter="auto")
            try:
                self.session.model, self.session.tokenizer = self._load(self.session.prompting)
            except BaseException:
                self.asked = before
                raise
        return f"Model: {self.asked.model or DEFAULT_MODEL}. {self.drafter('')}"

    def drafter(self, rest: str) -> str:
        model = self.session.model
        if rest:
            before = model.drafter
            name = str(self.asked.model or DEFAULT_MODEL)
            model.drafter = drafter_for(model.model, name, None if rest == "none" else rest)
            if model.drafter is not None and model.prepare() is None:
                refusal, model.drafter = model.refusal, before
                raise ValueError(refusal)
            self.asked = replace(self.asked, drafter=rest)
        return f"Drafter: {'none' if model.drafter is None else self.asked.drafter}"

    def draft(self, rest: str) -> str:
        if rest not in ("on", "off", ""):
            raise ValueError(f"/draft {rest} is not usable: give on or off.")
        self.drafts = rest == "on" if rest else self.drafts
        return f"Drafting is {'on' if self.drafts else 'off'}."

    def save(self, rest: str) -> str:
        path, system = _path("save", rest), self.session.prompting.system_prompt
        told = [{"role": "system", "content": system}] * (system is not None)
        with atomic_file(path) as temporary:
            row = {"messages": [*told, *self.session.messages]}
            temporary.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8", "replace")
        return f"Wrote {path}."

    def load(self, rest: str) -> str:
        messages = next(read_rows(_path("load", rest), lambda row: row.messages, []))
        is_told = bool(messages) and messages[0]["role"] == "system"
        prompting = self.session.prompting
        if is_told:
            prompting = replace(prompting, system_prompt=messages.pop(0)["content"])
        self.session.messages, self.session.prompting = messages, prompting
        return f"{len(messages)} messages."

    def tokens(self, rest: str) -> str:
        count = len(self.session.encode()) if self.session.messages else 0
        most = self.session.model.context_length
        return f"{count} tokens{f' of {most}' if most else ''}, kept: {self.session.prefixes.nbytes:,} bytes."

    def stats(self, rest: str) -> str:
        if self.last is None:
            return "Nothing has been said yet."
        read = self.session.prompt_tokens - self.session.cached_tokens
        return f"{statistics(self.last)}\nRead: {read} of the prompt's tokens, the others were known"

    def _load(self, prompting: Any) -> tuple[Any, Any]:
        """The model that is asked for, and its tokenizer; warnings go to standard error."""
        with warnings.catch_warnings(record=True) as notes:
            drafter = choose_drafter(self.asked, self.decoding)
            model, tokenizer = load_model(self.asked, drafter)
            warn_of_idle(self.asked, prompting, self.decoding, tokenizer)
            self.draft_model = load_draft_model(self.asked.draft_model, self.asked.dtype, tokenizer)
        for note in notes:
            print(f"warning: {note.message}", file=sys.stderr)
        return model, tokenizer


def _path(command: str, rest: str) -> Path:
    if not rest:
        raise ValueError(f"/{command} needs a file: name one.")
    return Path(rest).expanduser()


def _has(package: str) -> bool:
    """Whether a package of the extra ``chat`` is there, and a terminal in which it can be used."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return terminal and importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def _input() -> Iterator[Callable[[str], str]]:
    """What reads a line of the user's, given what is to stand before it."""
    if not _has("prompt_toolkit"):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # edits lines of ``input``
        yield input if sys.stdin.isatty() else lambda mark: _line()
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    history: History = InMemoryHistory()
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        history = FileHistory(str(folder / "chat-history"))
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: Any = PromptSession(history=history, multiline=True, key_bindings=keys)
    yield session.prompt


def _line() -> str:
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.rstrip("\n")


def _message(read: Callable[[str], str]) -> str | None:
    """The user's next message that is not empty, of one line or several; None: there is none."""
    lines: list[str] = []
    while True:
        try:
            line = read("... " if lines else ">>> ")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            lines = []
            print("(Ctrl-D leaves)")
            continue
        except EOFError:
            return "\n".join(lines) if any(map(str.strip, lines)) else None
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not text in UTF-8 ({error}): convert it.") from error
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            if (text := "\n".join(lines)).strip():
                return text
            lines = []


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C has been pressed; in a terminal it ends no more than the block."""
    if not sys.stdin.isatty():
        yield lambda: False
        return
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) > 1:  # the first lets the step that is running come to its end
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _output() -> Iterator[Callable[[str], None]]:
    """What shows an answer bit by bit: as Markdown in a terminal, else as it is."""
    if not (_has("rich") and colours()):
        shown = harmless if sys.stdout.isatty() else str
        try:
            yield lambda text: print(shown(text), end="", flush=True)
        finally:
            print()
        return
    from rich.live import Live
    from rich.markdown import Markdown

    with Live(refresh_per_second=8, vertical_overflow="visible") as live:
        rest = ""

        def write(text: str) -> None:
            nonlocal rest
            done, rest = finished_blocks(rest + harmless(text))
            if done:  # only the last block is drawn anew, so that what has scrolled away stays as it is
                live.console.print(Markdown(done))
            live.update(Markdown(rest))

        yield write


def finished_blocks(text: str) -> tuple[str, str]:
    """Markdown up to the last blank line that is not in a block of code, and what comes after that line."""
    lines, fence, cut, place = text.splitlines(keepends=True), "", 0, 0
    for line in lines:
        place += len(line)
        mark = line.strip()[:3]
        if mark in ("```", "~~~") and fence in ("", mark):
            fence = "" if fence else mark
        if not fence and not line.strip() and line.endswith("\n"):
            cut = place
    return text[:cut], text[cut:]
