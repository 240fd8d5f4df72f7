"""Tables for terminals and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose others are figures."""

    title: str  # empty for none
    header: list[str]  # names of the columns
    rows: list[list[str]]  # cells; the last row is a total if its first cell is "overall"
    notes: list[str] = field(default_factory=list)  # sentences below the table


def number(value: float | None) -> str:
    """Three significant digits; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def speedup(found: dict[str, Any]) -> str:
    """A median with its interval."""
    if found["median"] is None:
        return "–"
    return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def markdown(tables: Sequence[Table]) -> str:
    """The tables for pasting."""
    return "\n\n".join(_markdown(table) for table in tables) + "\n"


def show(tables: Sequence[Table], colours: bool) -> None:
    """Print the tables on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False, color_system="auto" if colours else None)
    if not console.is_terminal:
        console.width = 120
    for table in tables:
        title = Text(table.title) if table.title else None
        made = RichTable(title=title, box=box.SIMPLE, title_justify="left")
        for i, name in enumerate(table.header):
            made.add_column(Text(name), justify="right" if i else "left")
        for row in table.rows:
            made.add_row(*map(Text, row), style="bold" if row[0] == "overall" else "")
        console.print(made)
        for note in table.notes:
            console.print(note, markup=False, style="dim")
        console.print()


def _markdown(table: Table) -> str:
    lines = [table.title, ""] if table.title else []
    lines += [_line(table.header), "|" + "|".join(["---", *["---:"] * (len(table.header) - 1)]) + "|"]
    lines += [_line(row if row[0] != "overall" else [f"**{cell}**" for cell in row]) for row in table.rows]
    if table.notes:
        lines += ["", " ".join(table.notes)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
