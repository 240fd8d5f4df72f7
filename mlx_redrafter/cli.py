"""The ``mlx-redrafter`` command."""

import argparse
import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

DEBUG = "MLX_REDRAFTER_DEBUG"  # environment variable: show tracebacks


class Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit code.

    0 is success, 2 bad input, 130 an interrupt.
    """
    _quiet_libraries()
    with contextlib.suppress(ValueError):  # where this is not the main thread
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # as Ctrl-C, so that nothing half-written stays
    try:
        args = build_parser().parse_args(arguments)
        args.words = sys.argv[1:] if arguments is None else list(arguments)
        code = int(args.run(args))
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


def build_parser() -> Parser:
    """The parser of all subcommands; ``args.run`` is the function to call."""
    from importlib.metadata import version

    from . import benchmark_command, convert, generate_command, train_command, tune_command

    parser = Parser(prog="mlx-redrafter", description="Generate faster what the model would have said.")
    parser.add_argument("--version", action="version", version=version("mlx-redrafter"))
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, text, add, run in (
        ("generate", "generate text", generate_command.add_arguments, generate_command.run),
        ("benchmark", "measure speed", benchmark_command.add_arguments, benchmark_command.run),
        ("tune", "measure which draft shape is fastest here", tune_command.add_arguments, tune_command.run),
        ("train", "make a drafter for a model", train_command.add_arguments, train_command.run),
        ("convert", "convert a model or a drafter", convert.add_convert_arguments, convert.run_convert),
        ("export", "write a drafter in Apple's layout", convert.add_export_arguments, convert.run_export),
    ):
        command: Any = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        add(command)
        command.set_defaults(run=run)
    return parser


def one_line(text: str) -> str:
    """The text on one line that any terminal can show."""
    line = " ".join(part.strip() for part in text.strip().splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where a terminal cannot show a character
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
