"""Every draft shape of a grid against plain decoding, and what a verification costs."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import mlx.core as mx

from ..decoding.layers import Layers, fit_rows
from ..decoding.state import DraftShape
from ..decoding.tree import make_tree
from ..models.target import Target
from ..record import describe_shape
from .measure import Contender, Meter, Run, time_answer
from .statistics import interval, shapes_used, speed, tokens_per_step
from .tables import Table, number, speedup

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 33, 40, 48, 64)  # tokens of the cost curve
ROUNDS = 9  # of the cost curve
CONTEXT = 256  # tokens before them
KEYS = ("beam_width", "beam_length", "max_nodes", "lookup")  # of a shape


@dataclass(frozen=True)
class Grid:
    """Which shapes are tried: every width with every length, all nodes verified or at most a budget."""

    widths: Sequence[int] = (1, 2, 4)
    lengths: Sequence[int] = (1, 2, 3, 5)
    nodes: Sequence[int] = (4, 8, 16)
    lookup: int = 4  # tokens copied from the text besides, as most automatic shapes do

    def __post_init__(self) -> None:
        asked = (("width", self.widths, 1), ("length", self.lengths, 1), ("nodes", self.nodes, 2))
        for name, values, least in asked:
            if bad := [value for value in values if value < least]:
                raise ValueError(f"sweep: {name} {bad[0]} is not usable: give {least} or more.")

    def shapes(self) -> list[DraftShape]:
        """Every shape once, the ones with few nodes first."""
        found = {
            DraftShape(width, length, min(budget, most), self.lookup)
            for width in self.widths
            for length in self.lengths
            if (most := 1 + width * length + self.lookup)
            for budget in (*self.nodes, most)
        }
        return sorted(found, key=lambda shape: (shape.size, shape.width, shape.length))


@dataclass
class Swept:
    """One prompt's answers: plain ones before and after those of the shapes and of the automatic choice."""

    plain: list[Run] = field(default_factory=list)
    runs: dict[DraftShape | None, Run] = field(default_factory=dict)  # None: the automatic choice


def sweep(
    baseline: Contender,
    decode_with: Callable[[DraftShape | None], Contender],
    shapes: Iterable[DraftShape | None],
    prompts: Sequence[list[int]],
    max_tokens: int,
    meter: Meter,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Swept]:
    """Answer each prompt with every shape, in the opposite order every second time."""
    order = list(shapes)
    for number_, ids in enumerate(prompts):
        found = Swept([time_answer(baseline, ids, max_tokens, meter)])
        for shape in order if number_ % 2 == 0 else reversed(order):
            found.runs[shape] = time_answer(decode_with(shape), ids, max_tokens, meter)
            tick()
        found.plain.append(time_answer(baseline, ids, max_tokens, meter))
        yield found


def summarise(grid: Grid, found: Sequence[Swept]) -> dict[str, Any]:
    """What the report says of a sweep: a row for each shape, the best one, and the automatic choice."""
    shapes = [shape for shape in found[0].runs if shape is not None]
    shapes.sort(key=lambda shape: (shape.size, shape.width, shape.length, shape.lookup))
    rows = [{**describe_shape(shape), **_fared(found, shape)} for shape in shapes]
    timed = [row for row in rows if row["speedup"]["median"] is not None]
    used = shapes_used([swept.runs[None] for swept in found if None in swept.runs])
    chosen = used.most_common(1)[0][0] if used else None
    best = max(timed, key=lambda row: row["speedup"]["median"], default=None)
    return {
        "prompts": len(found),
        "widths": list(grid.widths),
        "lengths": list(grid.lengths),
        "budgets": [*sorted(grid.nodes), None],
        "lookup": grid.lookup,
        "rows": rows,
        "best": best and {key: best[key] for key in KEYS},
        "automatic": chosen and {**describe_shape(chosen), **_fared(found, None)},
    }


def sweep_table(report: dict[str, Any]) -> Table:
    """All shapes, best first."""
    found = report["sweep"]
    automatic = found["automatic"]
    chosen = {"best": numbers(found["best"]), "automatic choice": numbers(automatic)}
    cells = []
    for row in sorted(found["rows"], key=lambda row: -(row["speedup"]["median"] or 0)):
        shape = numbers(row)
        names = [name for name, its in chosen.items() if its == shape]
        cells.append([", ".join(names), *map(str, shape), *_figures(row)])
    if automatic:
        cells.append(["automatic, as it goes", *[""] * len(KEYS), *_figures(automatic)])
    notes = [f"{found['prompts']} prompts; plain decoding timed before and after the shapes of each."]
    if automatic:
        notes.append(f"The automatic choice used {shape_name(automatic)} most.")
    header = ["", "width", "length", "nodes", "lookup", "speed-up (95 %)", "tokens per step"]
    return Table("Draft shapes against plain decoding", header, cells, notes)


def numbers(shape: dict[str, Any] | None) -> tuple[int, ...]:
    """Those of a shape, or of a row about one; none of no shape."""
    return () if shape is None else tuple(shape[key] for key in KEYS)


def shape_name(shape: dict[str, Any]) -> str:
    """A shape in words."""
    width, length, nodes, copied = numbers(shape)
    if nodes == 1:
        return "plain decoding"
    copying = f", lookup {copied}" if copied else ""
    return f"width {width}, length {length}{copying}, {nodes} nodes"


def _read_context(target: Target) -> Layers:
    """The layers after ``CONTEXT`` tokens, whose buffers nothing else holds: so steps need not copy them."""
    caches = target.make_cache()
    target.forward(mx.ones((1, CONTEXT), mx.int32), caches)
    return target.layers_of(caches)[1]


def cost_curve(
    target: Target, sizes: Sequence[int], rounds: int, tick: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Seconds of one verification of a chain of tokens, by their number; sizes take turns.

    Returns:
        ``rows`` of ``tokens``, ``seconds`` (median) and ``relative`` (to one); ``context`` tokens before.
    """
    layers = fit_rows(_read_context(target), CONTEXT + max(sizes))
    length = mx.array([CONTEXT], mx.int32)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for number_ in range(rounds + 1):  # the first one warms up
        for size in sizes if number_ % 2 else reversed(sizes):
            seconds, layers = _time_verification(target, layers, length, size)
            times[size] += [seconds] if number_ else []
        tick()
    medians = {size: median(found) for size, found in times.items()}
    one = medians[min(sizes)]
    rows = [{"tokens": n, "seconds": s, "relative": s / one} for n, s in medians.items()]
    return {"context": CONTEXT, "rounds": rounds, "rows": rows}


def cost_table(report: dict[str, Any]) -> Table:
    """The cost curve."""
    found = report["cost_curve"]
    rows = [[str(r["tokens"]), number(1000 * r["seconds"]), f"{r['relative']:.2f}"] for r in found["rows"]]
    notes = [f"Medians of {found['rounds']} verifications after {found['context']} tokens."]
    return Table("Cost of one verification", ["tokens", "ms", "relative to one token"], rows, notes)


def _time_verification(target: Target, layers: Layers, length: mx.array, size: int) -> tuple[float, Layers]:
    parents = mx.maximum(mx.arange(size, dtype=mx.int32) - 1, 0)[None]
    tree = make_tree(mx.ones((1, size), mx.int32), parents, size - 1)
    mx.eval(vars(tree), layers.rows)
    start = time.perf_counter()
    seen = target.verify(tree, layers, length)
    mx.eval(seen.logits, seen.rows)
    return time.perf_counter() - start, replace(layers, rows=seen.rows)


def _fared(found: Sequence[Swept], shape: DraftShape | None) -> dict[str, Any]:
    runs = [(swept.runs[shape], speed(swept.plain)) for swept in found if shape in swept.runs]
    ratios = [fast / plain for run, plain in runs if plain and (fast := speed([run]))]
    mine = [run for run, _ in runs]
    return {"speedup": asdict(interval(ratios)), "tps": speed(mine), "tokens_per_step": tokens_per_step(mine)}


def _figures(row: dict[str, Any]) -> list[str]:
    return [speedup(row["speedup"]), f"{row['tokens_per_step']:.2f}"]
