"""``mlx-redrafter benchmark``."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading.files import atomic_file, check_writable
from .arguments import add_decoding_arguments, colours, options_of, taken

if TYPE_CHECKING:
    from ..benchmark.tables import Table

PLOTS = Path("benchmark-plots")
STDOUT = "-"
NOT_SETTINGS = ("run", "ranks", "command", "words", "compare", "json", "markdown", "plots", "max_nodes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags: those of ``generate``, and what to ask, to measure and to write."""
    add = parser.add_argument
    add("compare", nargs="*", metavar="compare A B", help="instead: show two results of --json side by side")
    add("--prompts", default="mt-bench", help="JSONL file, mt-bench, spec-bench, or -")
    add("--limit", type=int, help="prompts at most: evenly spaced ones")
    add("--turns", type=int, help="of each prompt at most (default: all)")
    add("--first-turns", dest="turns", action="store_const", const=1, help="the same as --turns 1")
    add("--trials", type=int, default=1, help="how often each turn is answered")
    add("--warm-up", type=int, default=32, help="tokens decoded before measuring")
    add("--profile", type=int, default=2, help="prompts for the time per phase; 0: none")
    add("--cost-curve", action="store_true", help="time one verification against its number of tokens")
    add("--sweep", action="store_true", help="try draft shapes: every width, length and number of nodes")
    some: Any = {"type": int, "nargs": "+", "metavar": "N"}
    add("--sweep-widths", default=[1, 2, 4], help="(default: 1 2 4)", **some | {"metavar": "W"})
    add("--sweep-lengths", default=[1, 2, 3, 5], help="(default: 1 2 3 5)", **some | {"metavar": "L"})
    add("--sweep-nodes", default=[4, 8, 16], help="(default: 4 8 16, and all)", **some | {"nargs": "*"})
    add("--sweep-limit", type=int, default=8, help="prompts of the sweep at most")
    text = "decode so many texts at once, against mlx-lm's BatchGenerator (greedy); such as 1 4 8"
    add("--concurrency", default=[], help=text, **some)
    text = "with --concurrency, seconds between the texts' arrivals; such as 0 1 (default: 0, at once)"
    add("--arrive-every", default=[0.0], help=text, **some | {"type": float, "metavar": "S"})
    add(
        "--lengths",
        default=[],
        help="put text before prompts, up to so many tokens; such as 1024 4096",
        **some,
    )
    add("--padding", metavar="FILE", help="with --lengths, the text (default: that of all prompts)")
    file: Any = {"nargs": "?", "const": STDOUT, "metavar": "FILE"}
    add("--json", **file, help="write the result; without FILE, print it")
    add("--markdown", **file, help="write the tables; without FILE, print them")
    add("--plots", metavar="FOLDER", help=f"draw PNGs there (with --sweep and --cost-curve: {PLOTS})")
    add_decoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure as the command line says, or compare two results."""
    _require("rich", "tables need")
    if args.compare:
        return _compare(args)
    if args.plots is None and (args.sweep or args.cost_curve):
        args.plots = str(PLOTS)
    if args.plots is not None:
        _require("matplotlib", "plots need")
    _check_files(args)
    if args.ranks:
        args.profile = 0  # its phases are this machine's only
    from ..benchmark.measure import settle
    from ..benchmark.session import BenchmarkOptions, Session
    from ..benchmark.sweep import Grid

    parts = dict(zip(("model", "prompting", "decoding"), options_of(args), strict=True))
    copied = {} if args.lookup is None else {"lookup": args.lookup}
    grid = Grid(args.sweep_widths, args.sweep_lengths, args.sweep_nodes, **copied)
    options = taken(BenchmarkOptions, args, grid=grid, **parts)
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_SETTINGS}
    file = None if args.json in (None, STDOUT) else Path(args.json)
    session, code = Session(options, settings, file, args.ranks), 0
    try:
        session.measure()
    except KeyboardInterrupt:
        code = 130
    finally:  # what was finished is kept, whatever happened
        settle()  # ending while something is being computed aborts the process
        if session.report:
            _write(args, session.report)
    if code:
        kept = "kept" if session.report else "nothing to keep"
        done, asked = len(session.asked), len(session.prompts)
        print(f"\nInterrupted: {done} of {asked} prompts finished, {kept}.", file=sys.stderr)
    return code


def _compare(args: argparse.Namespace) -> int:
    from ..benchmark.compare import compare
    from ..benchmark.report import read

    if len(args.compare) != 3 or args.compare[0] != "compare":
        raise ValueError(f"{' '.join(args.compare)} is not understood: give flags only, or compare A B.")
    table = compare(*(read(Path(name)) for name in args.compare[1:]))
    _show(args.markdown, [table], quiet=False)
    return 0


def _check_files(args: argparse.Namespace) -> None:
    for flag in ("json", "markdown"):
        name = getattr(args, flag)
        if name not in (None, STDOUT) and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
            raise ValueError(f"--{flag} {name} cannot be written: name a file in a folder that exists.")
        if name not in (None, STDOUT):
            check_writable(name)
    if args.json is not None and args.json == args.markdown:
        raise ValueError("--json and --markdown would be mixed: give one of them another file.")
    if args.plots is not None:
        if Path(args.plots).exists() and not Path(args.plots).is_dir():
            raise ValueError(f"--plots {args.plots} is no folder: name one.")
        check_writable(Path(args.plots, "speedup.png"))


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} the package {package}: pip install 'mlx-redrafter[benchmark]'.")


def _write(args: argparse.Namespace, report: dict[str, object]) -> None:
    """Write the files, and then show the tables, unless only JSON or Markdown is to be printed."""
    from ..benchmark.report import dumps, tables, write

    made = tables(report)
    try:
        if args.json not in (None, STDOUT):
            write(report, Path(args.json))
            _say_written(args.json)
        if args.plots is not None:
            from ..benchmark.plots import draw

            for path in draw(report, Path(args.plots)):
                _say_written(path)
    finally:  # a full disk takes no figures away
        _show(args.markdown, made, quiet=args.json == STDOUT)
        if args.json == STDOUT:
            print(dumps(report), end="")


def _show(markdown: str | None, tables: "Sequence[Table]", quiet: bool) -> None:
    """Print the tables, or write them as Markdown to a file besides."""
    from ..benchmark import tables as form

    if markdown is not None and markdown != STDOUT:
        with atomic_file(Path(markdown)) as new:
            new.write_text(form.markdown(tables), "utf-8")
        _say_written(markdown)
    if markdown == STDOUT:
        print(form.markdown(tables), end="")
    elif not quiet:
        form.show(tables, colours())


def _say_written(path: str | Path) -> None:
    print(f"Wrote {path}", file=sys.stderr)
