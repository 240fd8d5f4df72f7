"""The ``mlx-redrafter`` command."""

import argparse
import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, NoReturn

from ..blas import load_blas

DEBUG = "MLX_REDRAFTER_DEBUG"  # environment variable: show tracebacks


class Diagnostics(io.TextIOWrapper):
    """Standard error that never fails: a full disk, or a reader who has left, stops no work there."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


COMMANDS = {  # each in a file of its name
    "generate": "generate text",
    "chat": "talk with a model",
    "serve": "serve models to programs that speak OpenAI's or Anthropic's API, and a web page",
    "benchmark": "measure speed",
    "models": "list the models on this machine",
    "doctor": "check this installation, and a model",
    "tune": "measure which draft shape is fastest here",
    "train": "make a drafter for a model",
    "convert": "convert a model or a drafter",
    "export": "write a drafter in Apple's layout, or a model's functions for Swift and C++",
}


class Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit code.

    0 is success, 2 bad input, 130 an interrupt.
    """
    try:
        with contextlib.suppress(ValueError):  # where this is not the main thread
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing half-written stays
        _use_utf_8(arguments)
        _open_streams()
        _quiet_libraries()
        load_blas()
        words = sys.argv[1:] if arguments is None else list(arguments)
        args = build_parser(words[0] if words and words[0] in COMMANDS else "").parse_args(words)
        args.words = words
        run = import_module(".together", __package__).run if "MLX_RANK" in os.environ else args.run
        code = int(run(args))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG):
            raise
        print(f"error: {one_line(str(error) or type(error).__name__)}", file=sys.stderr)
        return 2
    finally:
        _let_go_of_output()


def build_parser(chosen: str | None = None) -> Parser:
    """The parser of all subcommands, with flags of the ``chosen`` one (None: all), and ``args.run``."""
    parser = Parser(prog="mlx-redrafter", description="Generate faster what the model would have said.")
    parser.add_argument("--version", action="version", version=version("mlx-redrafter"))
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command: Any = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        if chosen in (None, name):
            module: Any = import_module(f".{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run, ranks=None)
        for action in command._actions:
            if action.nargs != 0 and action.default not in (None, "", []) and "(default" not in action.help:
                action.help += " (default: %(default)s)"
    parser.prog += f" {chosen}" if chosen else ""  # what it says of unknown flags
    return parser


def one_line(text: str) -> str:
    """The text on one line that any terminal can show."""
    line = " ".join(part.strip() for part in text.strip().splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _use_utf_8(arguments: Sequence[str] | None) -> None:
    """Start this process anew where Python takes file names for ASCII, which cannot name all files."""
    ascii_only = sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1"
    if arguments is None and ascii_only:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def _open_streams() -> None:
    """Open the null device for streams that are closed, or other files would get their descriptors.

    Raises:
        ValueError: standard output is closed.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if type(sys.stderr) is io.TextIOWrapper:
        encoding = sys.stderr.encoding
        sys.stderr = Diagnostics(sys.stderr.detach(), encoding, "replace", line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where a terminal cannot show a character
    if "stdout" in closed:
        raise ValueError("standard output is closed: redirect it to a file, or to /dev/null.")


def _let_go_of_output() -> None:
    """Do without what cannot be written, or the interpreter would complain about it in the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_libraries() -> None:
    """Keep other libraries' chatter out of the way of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if any("error" in option for option in sys.warnoptions):
        warnings.simplefilter("default")  # python -W error: they are told, and stop nothing
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
