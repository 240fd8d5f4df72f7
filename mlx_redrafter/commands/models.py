"""``mlx-redrafter models``."""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..engine import backend
from ..engine.runner import Runner
from ..engine.step_times import OLD, conditions, weight_bytes
from ..loading.base import as_floats, load_base
from ..loading.cache import notes
from ..loading.find import shipped_drafters
from ..loading.fit import KnownDrafter, drafter_of, known_drafters
from ..loading.library import Entry, library
from ..loading.read import first_line
from ..loading.search import may_ask
from ..models.target import Target
from .arguments import colours, harmless

Note = dict[str, Any]
HEADS = ("model", "architecture", "parameters", "size", "precision", "drafts", "drafter", "speed-up")
SAME = ("chip", "backend", "model", "weights", "versions")  # of the conditions of step times
NONE = """No models are on this machine yet: `mlx-redrafter generate --model REPOSITORY` downloads one from \
Hugging Face, and --model-dir FOLDER names a folder that has some."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("--model-dir", action="append", type=Path, default=[], help="folder of models; may be given again")
    add(
        "--offline", action="store_true", help="do not ask the hub for drafters of models that have none here"
    )
    add("--json", action="store_true", help="print JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    """List the models on this machine, and what can be drafted for them."""
    for folder in args.model_dir:
        if not folder.is_dir():
            raise ValueError(f"--model-dir {folder} is no folder: check the path.")
    entries = library(args.model_dir)
    drafters, kept = known_drafters(entries), notes("step-times", OLD)
    hub = functools.cache(lambda: _published() if may_ask() and not args.offline else [])  # once, if at all
    rows = [described(entry, drafters, kept, hub) for entry in entries if not entry.is_drafter]
    if args.json:
        others = [
            {"name": each.name, "path": str(each.folder), "for": each.base and str(each.base)}
            for each in drafters
        ]
        print(json.dumps({"models": rows, "drafters": others}, indent=1))
    elif rows:
        show(rows)
    else:
        print(NONE)
    return 0


def _published() -> list[KnownDrafter]:
    from ..loading.hub_drafters import published

    return [
        KnownDrafter(repo, Path(repo), base.hidden_size, base.vocab_size, base) for repo, base in published()
    ]


def described(
    entry: Entry,
    drafters: Sequence[KnownDrafter],
    kept: Sequence[Note],
    hub: Callable[[], Sequence[KnownDrafter]] = tuple,
) -> dict[str, Any]:
    """What there is to say of a model, as JSON.

    ``drafter``: one that fits, and ``drafter_at``: shipped, local or hub, which is asked where none is here.

    ``drafts``: trees, chains, plain if it can only be decoded so, none if it cannot be loaded, and unknown of
    what has to be converted first; ``reason`` says why. ``tuned``: step times are kept; None where unknown.
    ``speedup``: that ``tune`` has measured on this machine, with the best of the drafters that it was given.
    """
    told: dict[str, Any] = {name: value for name, value in vars(entry).items() if name != "is_drafter"}
    told |= {
        "path": str(entry.path),
        "drafts": "none",
        "reason": entry.problem,
        "drafter": None,
        "drafter_at": None,
        "tuned": None,
        "speedup": None,
    }
    if not (entry.problem or entry.supported):
        told["reason"] = f"there is no code for {entry.architecture}"
    if told["reason"]:
        return told
    try:
        if entry.format == "gguf":
            return told | {"drafts": "unknown"} | _fitting(entry.path, drafters, hub)
        model, _ = load_base(entry.path, check_values=False)  # nothing is computed
        told["drafts"] = "plain"
        told["drafts"] = "trees" if Target(model).trees else "chains"
        fitting = _fitting(model, drafters, hub)
        known = _tuned(model, kept)
        speedups = [note["speedup"] for note in known if isinstance(note.get("speedup"), int | float)]
        told |= {"tuned": bool(known), "speedup": max(speedups, default=None)}
        return told | fitting
    except Exception as error:  # of mlx-lm's code, for one, since configs may say anything
        return told | {"reason": first_line(error, 1000)}


def _fitting(
    source: nn.Module | Path, drafters: Sequence[KnownDrafter], hub: Callable[[], Sequence[KnownDrafter]]
) -> Note:
    if found := drafter_of(source, drafters):
        return {
            "drafter": found.name,
            "drafter_at": "shipped" if found.folder in shipped_drafters() else "local",
        }
    found = drafter_of(source, hub())
    return {"drafter": found.name, "drafter_at": "hub"} if found else {}


def _tuned(model: nn.Module, kept: Sequence[Note]) -> list[Note]:
    """What is known of the model's step times on this machine."""
    as_floats(model, backend.current().dtype)  # as when it is used
    weights = weight_bytes(model.parameters())
    alike = [each for each in kept if each["conditions"].get("weights") == weights]
    if not alike:  # then no weights are read
        return []
    now = conditions(Runner(Target(model), None), ())
    return [each for each in alike if all(each["conditions"].get(key) == now[key] for key in SAME)]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table for people, and below it what keeps models from being drafted for."""
    cells = [[harmless(cell) for cell in _cells(row)] for row in rows]
    notes = [harmless(f"{row['name']}: {row['reason']}") for row in rows if row["reason"]]
    widths = [max(map(len, column)) for column in zip(HEADS, *cells, strict=True)]
    fits = sum(widths) + 3 * len(widths) < shutil.get_terminal_size().columns  # else rich would cut names
    if find_spec("rich") and fits and (sys.stdout.isatty() or colours()):
        from ..benchmark import tables

        tables.show([tables.Table("", list(HEADS), cells, notes)], colours())
        return
    for line in (HEADS, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("\n".join(["", *notes]) if notes else "", end="\n" if notes else "")


def _cells(row: dict[str, Any]) -> list[str]:
    drafts = {"unknown": "when loaded"}.get(row["drafts"], row["drafts"])
    copies = row["drafts"] in ("trees", "chains")
    tuned = "tuned" if row["tuned"] else "-"
    speedup = tuned if row["speedup"] is None else f"{row['speedup']:.2f} x"
    size = f"{row['bytes'] / 1e9:.2f} GB"
    place = " (hub)" if row["drafter_at"] == "hub" else ""
    drafter = f"{row['drafter']}{place}" if row["drafter"] else "copies only" if copies else "-"
    return [
        row["name"],
        row["architecture"],
        _count(row["parameters"]),
        size,
        row["precision"],
        drafts,
        drafter,
        speedup,
    ]


def _count(parameters: int) -> str:
    """As in 135M or 7.2B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.3g}{letter}"
    return str(parameters or "-")
