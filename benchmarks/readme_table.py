"""Write the tables of README.md from committed results.

    uv run benchmarks/readme_table.py            # rewrite them
    uv run benchmarks/readme_table.py --check    # exit code 1 if one is not what its result says

A table stands between ``<!-- table of FILE -->`` (FILE from the root) and ``<!-- end of table -->``.
"""

import argparse
import re
import sys
from pathlib import Path

from mlx_redrafter.benchmark.report import read, speed_table
from mlx_redrafter.benchmark.tables import markdown

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(<!-- table of (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(text: str, root: Path = ROOT) -> str:
    """The text with every table as its result has it."""
    return PLACE.sub(lambda place: f"{place[1]}\n{table(root / place[2])}\n{place[3]}", text)


def table(result: Path) -> str:
    """The speed-ups of a result, in Markdown."""
    return markdown([speed_table(read(result))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text("utf-8")
    new = filled(old)
    if args.check and new != old:
        sys.exit("error: README.md has a table that is not what its result says: run this without --check.")
    if new != old:
        readme.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
