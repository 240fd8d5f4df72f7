"""One long generation: does memory stay flat, and are steps no slower than they have to be?

    uv run benchmarks/soak.py                    # 10,000 tokens of a tiny random model
    uv run benchmarks/soak.py --model MODEL --tokens 7000

A longer text needs a larger cache and slower attention. So the end of the long generation is held against
a fresh one after a text of the same length: active memory and the time per step must be about the same.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import harness
from tqdm import tqdm

from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine.loop import Chooser, Emitted, Fixed
from mlx_redrafter.engine.step_times import candidates
from mlx_redrafter.engine.stopwatch import after_text
from mlx_redrafter.model import SpeculativeModel
from mlx_redrafter.train.evaluate import parse_shape

import mlx.core as mx  # isort: skip

PROMPT = 48  # tokens
LAST = 12  # steps, among them some of each shape
FRESH = 400  # tokens of the generation that the end is compared with
MEMORY, SLOWER = 1.05, 1.15  # what the end may have, in multiples of the fresh one's


@dataclass
class Window:
    """A stretch of the generation."""

    tokens: int  # emitted until its end
    steps: int
    seconds_per_step: float  # median
    waited: float  # milliseconds per step that the device waited for the host
    active_mb: float  # the least in its last steps, as what a running step holds depends on its shape
    cache_mb: float  # that MLX keeps for reuse
    resident_mb: float


def main() -> None:
    parser = harness.parser(__doc__, "soak.json", harness.TINY)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--window", type=int, default=500, help="tokens per line of the result")
    parser.add_argument("--shape", help="width,length,nodes,lookup (default: all of the device's in turn)")
    args = parser.parse_args()
    model = harness.load(args)
    shape = None if args.shape is None else parse_shape(args.shape)
    windows = generate(model, policy(model, shape), PROMPT, args.tokens, args.window)
    fresh = generate(model, policy(model, shape), PROMPT + args.tokens - FRESH, FRESH, FRESH)[-1]
    last = windows[-1]
    memory = last.active_mb / fresh.active_mb
    slower = last.seconds_per_step / fresh.seconds_per_step
    passed = memory <= MEMORY and slower <= SLOWER
    print(
        f"At {args.tokens} tokens: {memory:.2f} x the active memory and {slower:.2f} x the time per step of"
    )
    print(f"a fresh generation after a text as long: {'passed' if passed else 'FAILED'}.")
    harness.write(
        args,
        {
            "passed": passed,
            "memory_ratio": round(memory, 4),
            "step_ratio": round(slower, 4),
            "fresh": vars(fresh),
            "windows": [vars(window) for window in windows],
        },
    )
    sys.exit(not passed)


class InTurn:
    """A policy that uses the shapes in turn, so that every step has another one."""

    def __init__(self, shapes: list[DraftShape]) -> None:
        self.shapes, self.steps = shapes, 0

    def choose(self, rows: int = 0, texts: Sequence[int] = ()) -> DraftShape:
        self.steps += 1
        return self.shapes[self.steps % len(self.shapes)]

    def observe(
        self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float, away: float
    ) -> None:
        pass


def policy(model: SpeculativeModel, shape: DraftShape | None) -> Chooser:
    """One shape, or all of the device's in turn."""
    return InTurn(candidates(model.prepare())) if shape is None else Fixed(shape)


def generate(model: SpeculativeModel, chosen: Chooser, prompt: int, tokens: int, window: int) -> list[Window]:
    """Decode ``tokens`` after a text of ``prompt`` tokens; what each ``window`` of them was like."""
    steps = harness.decode(model, chosen, after_text(model.prepare(), prompt), prompt)
    windows: list[Window] = []
    seen: list[tuple[float, Emitted, int]] = []
    start, emitted = time.perf_counter(), 0
    with tqdm(total=tokens, unit="tok", desc=f"after {prompt} tokens") as bar:
        for step in steps:
            now = time.perf_counter()
            step.logits = None  # nobody asks for them, and they are large
            seen.append((now - start, step, mx.get_active_memory()))
            start = now
            emitted += len(step.tokens)
            bar.update(len(step.tokens))
            if emitted >= window * (len(windows) + 1) or emitted >= tokens:
                windows.append(summary(emitted, seen))
                seen.clear()
                start = time.perf_counter()
            if emitted >= tokens:
                break
    return windows


def summary(emitted: int, seen: list[tuple[float, Any, int]]) -> Window:
    """The window that ends here."""
    return Window(
        emitted,
        len(seen),
        round(median(seconds for seconds, *_ in seen), 6),
        round(1000 * sum(step.waited for _, step, _ in seen) / len(seen), 4),
        round(min(active for *_, active in seen[-LAST:]) / 1e6, 2),
        round(mx.get_cache_memory() / 1e6, 2),
        round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3), 1
        ),
    )


if __name__ == "__main__":
    main()
