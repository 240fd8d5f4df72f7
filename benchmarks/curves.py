"""Published costs of verifying several tokens at once, and bandwidths of Apple's chips, as data."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published_curves.json")


@cache
def published() -> dict[str, Any]:
    """What ``published_curves.json`` holds: ``curves`` and ``bandwidth``, with their sources."""
    return dict(json.loads(FILE.read_text()))


def curve(name: str) -> Callable[[int], float]:
    """The cost of a number of rows by a published curve, in multiples of one row.

    Between two measured numbers of rows, the cost is taken to grow evenly.

    Raises:
        ValueError: there is no such curve, or (when called) more rows than it was measured for.
    """
    curves = published()["curves"]
    if name not in curves:
        raise ValueError(f"curve {name} is not known: choose one of {', '.join(curves)}.")
    rows, time = curves[name]["rows"], curves[name]["time"]

    def cost(count: int) -> float:
        if not rows[0] <= count <= rows[-1]:
            raise ValueError(f"{count} rows are not in {name}: it has {rows[0]} to {rows[-1]}.")
        after = next(i for i, value in enumerate(rows) if value >= count)
        before = max(after - 1, 0)
        share = (count - rows[before]) / max(rows[after] - rows[before], 1)
        return float((time[before] + share * (time[after] - time[before])) / time[0])

    return cost


def most_rows(name: str) -> int:
    """The most rows that a curve was measured for."""
    return int(published()["curves"][name]["rows"][-1])
