"""Change each field of a GGUF file's header, and see that conversion refuses in one line or converts.

    uv run benchmarks/hostile_gguf.py --cases 10000

The file is a tiny one made on the spot. A field is whatever the reader reads at once: a count, a length, a
type, a number, a text. It is given small, huge and random values. Any error but a ValueError of one line,
a conversion that computes for over 10 seconds, or over 2 GiB of memory ends this with the bytes that did it.
"""

import argparse
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from test_gguf import Type, write_model

from mlx_redrafter.loading.gguf import convert_gguf, reader

SECONDS, MOST_BYTES = 10, 2 << 30


def fields(path: Path) -> list[tuple[int, int]]:
    """Where each field of the header starts, and its bytes."""
    found: list[tuple[int, int]] = []
    take = reader._Cursor.take

    def noting(cursor: Any, size: int) -> bytes:
        found.append((cursor.position, size))
        return take(cursor, size)

    with mock.patch.object(reader._Cursor, "take", noting):
        reader.read_gguf(path)
    return [field for field in found if field[1]]


def changed(whole: bytes, field: tuple[int, int], rng: np.random.Generator) -> bytes:
    """The file with one field changed."""
    start, size = field
    old = int.from_bytes(whole[start : start + size], "little")
    most = (1 << 8 * size) - 1
    values = [0, 1, most, most >> 1, (most >> 1) + 1, old + 1, old - 1, old * 2]
    values += [old ^ 1 << int(rng.integers(8 * size)), int.from_bytes(rng.bytes(size), "little")]
    value = values[rng.integers(len(values))]
    return whole[:start] + (value & most).to_bytes(size, "little") + whole[start + size :]


def main() -> None:
    """Run the cases and say how many were refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, refused, reasons = np.random.default_rng(args.seed), 0, set()
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(TimeoutError("it takes too long")))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "m.gguf", kind=Type.Q4_0)
        whole = (folder / "m.gguf").read_bytes()
        places = fields(folder / "m.gguf")
        for case in range(args.cases):
            damaged = changed(whole, places[rng.integers(len(places))], rng)
            (folder / "bad.gguf").write_bytes(damaged)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                convert_gguf(folder / "bad.gguf", folder / "out")
            except ValueError as error:
                refused += 1
                reasons.add(str(error)[-40:])
                assert "\n" not in str(error), repr(error)
            except BaseException:
                Path("hostile.gguf").write_bytes(damaged)
                print(f"case {case}: the file is kept as hostile.gguf", file=sys.stderr)
                raise
            signal.setitimer(signal.ITIMER_PROF, 0)
            shutil.rmtree(folder / "out", ignore_errors=True)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{args.cases} cases, {len(places)} fields: {refused} refused in one line ({len(reasons)} reasons), "
        f"{args.cases - refused} converted; at most {most / 2**20:.0f} MiB"
    )
    assert most < MOST_BYTES


if __name__ == "__main__":
    main()
