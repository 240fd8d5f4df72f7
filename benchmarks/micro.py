"""Time every function of the decoding core by itself, and the host's share of a step.

    uv run benchmarks/micro.py

Each is evaluated alone, so their times add up to more than a step, in which MLX runs them together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import harness

from mlx_redrafter.decoding import lookup
from mlx_redrafter.decoding.accept import accept
from mlx_redrafter.decoding.beam import draft
from mlx_redrafter.decoding.chance import seeds_at
from mlx_redrafter.decoding.layers import View, commit, leave_path, visible
from mlx_redrafter.decoding.sampling import Sampling, draw, filter_settings
from mlx_redrafter.decoding.state import DraftShape, State, with_capacity
from mlx_redrafter.decoding.step import propose
from mlx_redrafter.decoding.topk import top_k
from mlx_redrafter.decoding.tree import build_tree, from_beam
from mlx_redrafter.engine.loop import Fixed, bucket, enqueue
from mlx_redrafter.engine.step_times import candidates
from mlx_redrafter.engine.stopwatch import after_text
from mlx_redrafter.model import SpeculativeModel
from mlx_redrafter.train.evaluate import parse_shape

import mlx.core as mx  # isort: skip

SAMPLINGS = {
    "greedy": Sampling(),
    "temperature 0.7": Sampling(0.7),
    "temperature 0.7, top-p 0.9": Sampling(0.7, 0.9),
    "temperature 0.7, top-k 40": Sampling(0.7, top_k=40),
    "temperature 0.7, top-k 1000": Sampling(0.7, top_k=1000),
    "temperature 0.7, top-p 0.8, top-k 20": Sampling(0.7, 0.8, 20),
    "temperature 0.7, min-p 0.1": Sampling(0.7, min_p=0.1),
}
Timed = Iterator[tuple[str, Callable[[], Any]]]


def main() -> None:
    parser = harness.parser(__doc__, "micro.json")
    parser.add_argument("--rows", type=int, default=512, help="tokens of the text before (default: 512)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shapes", nargs="+", help="width,length,nodes,lookup (default: the device's)")
    args = parser.parse_args()
    model = harness.load(args)
    shapes = [parse_shape(text) for text in args.shapes or ()] or candidates(model.prepare())
    results = []
    for shape in shapes:
        for name, function in functions(model, shape, args.rows):
            row = {"shape": label(shape), "function": name, **harness.timed(function, args.repeats)}
            print(f"{row['shape']:12} {name:32} {row['ms']:9.3f} ms", flush=True)
            results.append(row)
    for name, function in heads(model, shapes):
        row = {"shape": None, "function": name, **harness.timed(function, args.repeats)}
        print(f"{'':12} {name:32} {row['ms']:9.3f} ms", flush=True)
        results.append(row)
    harness.write(args, {"results": results})


def label(shape: DraftShape) -> str:
    return f"{shape.width},{shape.length},{shape.size},{shape.lookup}"


def functions(model: SpeculativeModel, shape: DraftShape, rows: int) -> Timed:
    """The stages of a step of one shape, after a text of ``rows`` tokens."""
    target, drafter = model.prepare().target, model.prepare().drafter
    assert target is not None
    state = with_room_for_a_step(model, rows, shape)
    shown = View(state.capacity)
    if shape.width:
        assert drafter is not None
        length, memory = min(shape.length, shape.depth), None
        if state.layers.memory:
            entries = state.layers.rows[-1]
            memory = drafter.look_back(entries, state.rows, shown.columns, state.history, target.embed)

        def search() -> Any:
            return draft(drafter, target.embed, state.token, state.context, shape.width, length, memory)

        beam = search()
        mx.eval(vars(beam))
        yield "draft", lambda: vars(search())
        if not shape.lookup:
            yield (
                "build_tree",
                lambda: parts(build_tree(state.token, from_beam(beam), shape.size, shape.depth)),
            )
    if shape.lookup:
        yield (
            "lookup.find",
            lambda: vars(lookup.find(state.history, state.rows, min(shape.lookup, shape.depth))),
        )
    tree = propose(target, drafter, shape, state, shown).tree
    mx.eval(parts(tree))
    yield "propose (draft to tree)", lambda: parts(propose(target, drafter, shape, state, shown).tree)
    yield "visible (mask)", lambda: visible(tree, state.rows, shown.columns)
    picks = mx.zeros(tree.tokens.shape, mx.int32)
    yield "accept", lambda: vars(accept(tree, picks, shape.depth))
    box = [commit(state.layers)]  # the only reference, so that buffers are written in place

    def verify() -> Any:
        layers = box.pop()
        seen = target.verify(tree, layers, state.rows, shown)
        box.append(replace(layers, rows=seen.rows))
        return vars(seen)

    yield "verify", verify
    seen = target.verify(tree, box[0], state.rows, shown)
    mx.eval(seen.logits, seen.nodes)
    nodes, path = seen.nodes, accept(tree, picks, shape.depth).path
    del seen

    def write_path() -> Any:
        layers = commit(leave_path(box.pop(), nodes, path, state.rows))
        box.append(layers)
        return layers.rows

    yield "commit", write_path
    box.clear()
    yield from whole_step(model, shape, rows)


def with_room_for_a_step(model: SpeculativeModel, rows: int, shape: DraftShape) -> State:
    """The state after a text of ``rows`` tokens, with room for a step."""
    return with_capacity(after_text(model.prepare(), rows), bucket(rows + shape.room))


def whole_step(model: SpeculativeModel, shape: DraftShape, rows: int) -> Timed:
    """A step in one piece, and what the host does for it before the device has anything to do."""
    run = model.engine(Fixed(shape)).runner
    box: list[State] = [with_room_for_a_step(model, rows, shape)]
    shown = View(box[0].capacity)

    def step() -> Any:
        state, output = run(shape, box.pop(), shown)
        state.rows = mx.array([rows], mx.int32)  # stay where there is room
        box.append(state)
        enqueue(state, output)
        return output.tokens, vars(state.layers)

    yield "step", step
    run(shape, box[0], shown)  # traced, if steps are compiled
    yield "step, host only", lambda: run(shape, box[0], shown) and None


def heads(model: SpeculativeModel, shapes: Sequence[DraftShape]) -> Timed:
    """Picking from the target's logits, and the best of the drafter's."""
    for size in sorted({1, max(shape.size for shape in shapes)}):
        logits = 3 * mx.random.normal((1, size, model.vocabulary or 1))
        seeds = seeds_at(mx.random.key(0)[None], mx.arange(size)[None])
        mx.eval(logits, seeds)
        for name, sampling in SAMPLINGS.items():
            filters = filter_settings([sampling], model.vocabulary or 1)
            yield f"pick of {size}, {name}", lambda x=logits, s=seeds, f=filters: draw(x, s, f)
    if model.drafter is None:
        return
    for width in sorted({shape.width for shape in shapes if shape.width}):
        scores = mx.random.normal((1, width * model.drafter.config.head_outputs))
        mx.eval(scores)
        yield f"top_k {width} of {scores.shape[1]}", lambda s=scores, k=width: top_k(s, k)


def parts(tree: Any) -> list[mx.array]:
    return [value for value in vars(tree).values() if isinstance(value, mx.array)]


if __name__ == "__main__":
    main()
