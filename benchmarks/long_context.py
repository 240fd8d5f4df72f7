"""Long texts: time per step of plain and of speculative decoding, and peak memory.

    uv run benchmarks/long_context.py

Peak memory is that of decoding (the prompt has been read), against the weights and one cache: a copy of
the cache in every step would show. Tokens per step are not measured here: the text is made up.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import harness
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mlx_redrafter.decoding.state import DraftShape, with_capacity
from mlx_redrafter.engine.loop import Fixed, bucket
from mlx_redrafter.engine.step_times import candidates
from mlx_redrafter.engine.stopwatch import after_text, measure
from mlx_redrafter.model import SpeculativeModel

import mlx.core as mx  # isort: skip


def main() -> None:
    parser = harness.parser(__doc__, "long-context.json")
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096, 8192 - 512])
    parser.add_argument("--seconds", type=float, default=20.0, help="per length, about (default: 20)")
    parser.add_argument("--steps", type=int, default=24, help="decoded for each peak (default: 24)")
    parser.add_argument("--no-mlx-lm", action="store_true", help="leave mlx-lm's own decoding out")
    args = parser.parse_args()
    model = harness.load(args)
    results = []
    for rows in args.rows:
        results.append(at_length(model, rows, args.seconds, args.steps, not args.no_mlx_lm))
        print(table(results[-1]), flush=True)
        harness.write(args, {"results": results})


def at_length(model: SpeculativeModel, rows: int, seconds: float, steps: int, mlx_lm: bool) -> dict[str, Any]:
    """Everything after a text of ``rows`` tokens."""
    shapes = candidates(model.prepare())
    measured = measure(model.prepare(), shapes, seconds, rows)
    return {
        "rows": rows,
        "rounds": len(measured.rounds[0]),
        "steady": measured.steady,
        "mlx_lm_plain_ms": mlx_lm_step(model, rows, steps) if mlx_lm else None,
        "shapes": [
            {
                "shape": vars(shape),
                "ms": round(1000 * median(times), 3) if times else None,
                "plain_steps": round(median(ratios), 4) if times else None,
                **peak(model, shape, rows, steps),
            }
            for shape, times, ratios in zip(shapes, measured.rounds, measured.ratios, strict=True)
        ],
    }


def peak(model: SpeculativeModel, shape: DraftShape, rows: int, steps: int) -> dict[str, float]:
    """Peak memory of some steps with room for them, in MB, and its ratio to the weights and the cache."""
    room = bucket(rows + steps * (shape.depth + 1) + shape.room)
    state = with_capacity(after_text(model.prepare(), rows), room)
    mx.eval(state.layers.rows)
    held = weights(model) + sum(part.nbytes for parts in state.layers.rows for part in parts)
    decoding = harness.decode(model, Fixed(shape), state, rows)
    del state
    mx.clear_cache()
    mx.reset_peak_memory()
    for _ in range(steps):
        next(decoding)
    highest = mx.get_peak_memory()
    return {"peak_mb": round(highest / 1e6, 1), "peak_of_weights_and_cache": round(highest / held, 4)}


def weights(model: SpeculativeModel) -> int:
    """Bytes of the model's weights and the drafter's."""
    parameters: Any = tree_flatten(model.model.parameters())
    drafter = {} if model.drafter is None else model.drafter.weights()
    return sum(value.nbytes for value in {id(v): v for _, v in parameters}.values()) + sum(
        value.nbytes for value in drafter.values()
    )


def mlx_lm_step(model: SpeculativeModel, rows: int, steps: int) -> float:
    """Milliseconds per token of mlx-lm's own decoding, after a text as long."""
    times = list(arrivals(model, rows, steps))[2:]
    return round(1000 * median(later - earlier for earlier, later in pairwise(times)), 3)


def arrivals(model: SpeculativeModel, rows: int, steps: int) -> Iterator[float]:
    prompt = mx.array([(7919 * i + 13) % (model.vocabulary or 1) for i in range(rows)])
    for _ in generate_step(prompt, model.model, max_tokens=steps + 3):
        yield time.perf_counter()


def table(row: dict[str, Any]) -> str:
    """Text for people."""
    lines = [f"{row['rows']} tokens; mlx-lm's plain decoding: {row['mlx_lm_plain_ms']} ms per token"]
    for told in row["shapes"]:
        shape = DraftShape(**told["shape"])
        timed = "hopeless"
        if told["ms"] is not None:
            timed = f"{told['ms']:8.2f} ms, {told['plain_steps']:5.2f} plain steps"
        lines.append(
            f"  {shape.width} x {shape.length}, {shape.size} nodes, {shape.lookup} copied: {timed}, "
            f"peak {told['peak_mb']:7.1f} MB ({told['peak_of_weights_and_cache']:.2f} x weights and cache)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
