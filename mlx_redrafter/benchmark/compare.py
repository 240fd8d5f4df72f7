"""Two results side by side."""

from typing import Any

from .tables import Table, number, speedup

IGNORED = ("load", "git", "json", "markdown", "plots")  # may differ without making results incomparable


def compare(a: dict[str, Any], b: dict[str, Any]) -> Table:
    """Speed-ups of two reports of ``report.read`` by category, and whether their intervals overlap."""
    names = [name for name in a["categories"] if name in b["categories"]]
    rows = [_row(name, a["categories"][name], b["categories"][name]) for name in names]
    rows.append(_row("overall", a["overall"], b["overall"]))
    header = ["category", "A", "B", "B / A", "intervals", "A tokens/s", "B tokens/s"]
    return Table("Speed-up over plain decoding", header, rows, _differences(a, b))


def agree(a: dict[str, Any], b: dict[str, Any]) -> bool | None:
    """Whether two groups' intervals overlap; None if one has none."""
    if a["speedup"]["low"] is None or b["speedup"]["low"] is None:
        return None
    return bool(a["speedup"]["low"] <= b["speedup"]["high"] and b["speedup"]["low"] <= a["speedup"]["high"])


def _row(name: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    first, second = a["speedup"]["median"], b["speedup"]["median"]
    quotient = second / first if first and second is not None else None
    speeds = [number(a["tps"]), number(b["tps"])]
    verdict = {True: "overlap", False: "apart", None: "–"}[agree(a, b)]
    return [name, speedup(a["speedup"]), speedup(b["speedup"]), number(quotient), verdict, *speeds]


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """A sentence about each setting that differs, and about missing categories."""
    notes = [
        f"{key}: {a[part].get(key)} (A), {b[part].get(key)} (B)."
        for part in ("machine", "settings")
        for key in sorted({*a[part], *b[part]} - set(IGNORED))
        if a[part].get(key) != b[part].get(key)
    ]
    if only := sorted({*a["categories"]} ^ {*b["categories"]}):
        notes.append(f"Only in one of them: {', '.join(only)}.")
    return notes or ["Same settings and machine."]
