"""A model's prefill and decoding steps as functions for programs without Python (``mx.export_function``).

They share a *state*: what they are given of it they give back changed. Its buffers have a capacity in rows.
Each function is there for every capacity that has room for it, so that attention to a short text reads short
buffers; a program makes them larger when they are full. Weights are inputs too, so that they are stored once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..decoding.layers import View, commit, leave_path, write_rows, write_tokens
from ..decoding.lookup import first_record
from ..decoding.state import PLAIN, DraftShape, State
from ..decoding.step import conclude, look_ahead, pick
from ..decoding.tree import Candidates, build_chain
from ..engine.runner import Runner
from ..models.hooks import Tape, parts, view

CHUNKS = 32, 256  # prompt tokens read at once; only the smaller is padded, so short prompts cost little
SMALLEST, GRAIN = 256, 64  # rows: the first capacity, which is doubled; the last one is a multiple of these
SAMPLINGS: dict[str, dict[str, tuple[int, ...]]] = {  # inputs that say how tokens are picked, with shapes
    "greedy": {},
    "temperature": {"key": (2,), "temperature": (1,)},
    "filters": {"key": (2,), "temperature": (1,), "top_p": (1,), "top_k": (1,), "min_p": (1,)},
}
DTYPES = {"key": mx.uint32, "temperature": mx.float32, "top_p": mx.float32, "min_p": mx.float32}  # or int32

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Function:
    """Reads ``chunk`` tokens of a prompt, or decodes a step of a ``shape`` with a way of ``sampling``."""

    chunk: int = 0
    shape: DraftShape = PLAIN
    sampling: str = "greedy"

    @property
    def name(self) -> str:
        """Of its files."""
        return f"prefill-{self.chunk}" if self.chunk else f"{shape_word(self.shape)}-{self.sampling}"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what it is given before the state."""
        return {"tokens": (1, self.chunk), "count": (1,)} if self.chunk else SAMPLINGS[self.sampling]

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what it gives before the state."""
        return {} if self.chunk else {"tokens": (1, self.shape.depth + 1), "count": (1,)}


class Functions:
    """The functions of one model.

    Args:
        runner: of the model, with its drafter.
        shapes: what the steps draft, besides those that draft nothing.
        context: tokens that a text may have.

    Attributes:
        every: all functions.
        capacities: rows that the buffers may have room for, ascending.
        weights: all arrays that the model and the drafter compute with, by name.
    """

    def __init__(self, runner: Runner, shapes: Sequence[DraftShape], context: int) -> None:
        self.target, self.drafter = runner.target, lean(runner.drafter)
        shapes = [PLAIN, *(shape if self.target.trees else shape.chain for shape in shapes)]
        self.shapes = [*dict.fromkeys(shapes)]
        # What recurrent layers note of a large chunk takes much memory.
        chunks = [size for size in CHUNKS if size == min(CHUNKS) or not self.target.has_states]
        self.every = [Function(chunk=size) for size in chunks]
        self.every += [Function(0, shape, way) for shape in self.shapes for way in SAMPLINGS]
        caches = self.target.make_cache()
        layers = self.target.layers_of([*caches, *self.target.make_memory(caches)])[1]
        self.branches = any(not shape.is_chain for shape in shapes)
        self.copies = any(shape.lookup for shape in shapes)
        self.has_history = self.copies or bool(self.drafter and self.drafter.config.rare_tokens)
        has_path = self.branches or layers.memory
        self.longest = max(shape.depth + 1 for shape in shapes) if has_path else 0  # rows of a path
        self.layers = replace(layers, room=2 * max(*chunks, *(shape.size for shape in shapes)))
        room = max(self.room(each) for each in self.every if each.chunk != max(CHUNKS))
        largest = -(-(context + room) // GRAIN) * GRAIN
        sizes = [size for i in range(largest.bit_length()) if (size := SMALLEST << i) < 0.8 * largest]
        shapes_of = {str([x.shape for x in self.start(size).values()]): size for size in [*sizes, largest]}
        self.capacities = [*shapes_of.values()]  # of those that change no buffer the largest
        arrays = [*self.target.weights, *arrays_of(self.drafter)]
        names = named_in(self.target.model)
        if self.drafter is not None:
            names |= named_in(self.drafter._drafter, "drafter.")
        unnamed = {id(x): f"array.{i}" for i, x in enumerate(arrays) if id(x) not in names}
        self.weights: Arrays = {(names | unnamed)[id(x)]: x for x in arrays}

    def room(self, function: Function) -> int:
        """Rows that the buffers must have after those of the text when the function is called."""
        return max(function.chunk + 1 if function.chunk else function.shape.room, self.longest)

    def fits(self, function: Function, capacity: int) -> bool:
        """Whether there is any text with which the function can be called."""
        return self.room(function) < capacity

    def example(self, function: Function, capacity: int) -> list[mx.array]:
        """Zeros as its inputs, and the weights."""
        own = [mx.zeros(shape, DTYPES.get(name, mx.int32)) for name, shape in function.inputs.items()]
        return [*own, *self.start(capacity).values(), *self.weights.values()]

    def start(self, capacity: int) -> Arrays:
        """The state before anything is known, by names; the program puts the first token into it."""
        one, history = mx.zeros((1,), mx.int32), mx.zeros((1, capacity), mx.int32)
        rows, paths = [], []
        for number, arrays in enumerate(self.layers.rows):
            size = self.layers.size(number, capacity)
            rows.append([mx.zeros((*x.shape[:2], size, *x.shape[3:]), x.dtype) for x in arrays])
            is_memory = self.layers.memory and number == len(self.layers.rows) - 1
            paths.append([x[:, :, :1] for x in rows[-1]] if self.branches or is_memory else [])
        states = [[mx.zeros_like(x) for x in arrays] for arrays in self.layers.states]
        layers = replace(self.layers, rows=rows, path=paths, path_start=one, states=states)
        context, record = mx.zeros_like(self.target.no_context()), mx.zeros_like(first_record(1))
        return self.named(State(one, context, one, layers, history, record, one))

    def named(self, state: State) -> Arrays:
        """A state as arrays; those that no function reads are left out."""
        found, layers = {"token": state.token, "rows": state.rows}, state.layers
        found |= {"context": state.context} if self.drafter else {}
        found |= {"history": state.history} if self.has_history else {}
        found |= {"record": state.record} if self.copies else {}
        if self.longest:
            assert layers.path_start is not None
            found["path_start"] = layers.path_start
        found |= numbered("layer", layers.rows) | numbered("recurrent", layers.states)
        found |= numbered("path", [[self._as_long(x) for x in rows] for rows in layers.path])
        return found

    def _as_long(self, path: mx.array) -> mx.array:
        """The rows of a path, and zeros in the places of a longer one's, which nobody reads."""
        return mx.pad(path, [(0, 0), (0, 0), (0, self.longest - path.shape[2]), (0, 0)])

    def state(self, found: Arrays, capacity: int) -> State:
        """The state of which these are the arrays."""
        layers = replace(
            self.layers,
            rows=collected("layer", self.layers.rows, found),
            path=collected("path", self.layers.rows, found),
            path_start=found.get("path_start"),
            states=collected("recurrent", self.layers.states, found),
        )
        token, rows = found["token"], found["rows"]
        history = found.get("history", mx.zeros((1, capacity), mx.int32))
        record = mx.where(rows[:, None, None] == 0, first_record(1), found.get("record", first_record(1)))
        return State(
            token,
            found.get("context", self.target.no_context()),
            rows,
            layers,
            write_tokens(history, token[:, None], rows),
            record,
            mx.zeros((1, 2), mx.uint32),
        )

    def call(self, function: Function, capacity: int, *arrays: mx.array) -> list[mx.array]:
        """What is exported: a function's inputs, the state, the weights -> its outputs, the state."""
        names = [*function.inputs, *self.start(capacity)]
        own = dict(zip(function.inputs, arrays, strict=False))
        found = dict(zip(names[len(own) :], arrays[len(own) :], strict=False))
        with_inputs = copy.copy(self)
        with_inputs._take(dict(zip(self.weights, arrays[len(names) :], strict=True)))
        return with_inputs._run(function, View(capacity), own, self.state(found, capacity))

    def _take(self, given: Arrays) -> None:
        """Compute with other arrays in the places of the weights."""
        arrays = {id(self.weights[name]): array for name, array in given.items()}
        target = self.target.with_weights([arrays[id(x)] for x in self.target.weights])
        if self.drafter is not None:
            self.drafter = with_arrays(self.drafter, [arrays[id(x)] for x in arrays_of(self.drafter)])
        if target.memory is not None:
            target.memory = self.drafter
        self.target = target

    def _run(self, function: Function, shown: View, own: Arrays, state: State) -> list[mx.array]:
        if function.chunk:
            return [*self.named(self._prefill(state, shown, **own)).values()]
        if own:
            key = own.pop("key")
            state.seeds = mx.random.randint(0, 1 << 32, shape=(1, 2), dtype=mx.uint32, key=key)  # a text's
            state.sampling = settings_of(self.target.vocabulary, own)
        state, proposed, seen = look_ahead(self.target, self.drafter, function.shape, state, shown)
        if self.branches:  # then every call leaves a path of all layers
            proposed = replace(proposed, tree=replace(proposed.tree, is_chain=False))
        after, output = conclude(pick, function.shape, state, proposed, seen)
        return [output.tokens, output.count, *self.named(after).values()]

    def _prefill(self, state: State, shown: View, tokens: mx.array, count: mx.array) -> State:
        """The state after the first ``count`` [1] of ``tokens`` [1, T], of which the last is not read yet."""
        start, layers, last = state.rows, commit(state.layers), count - 1  # last: of the nodes
        drafts = Candidates(tokens, tokens, tokens, [0] * tokens.shape[1])  # a chain has no use for the rest
        seen = self.target.verify(build_chain(state.token, drafts, tokens.shape[1]), layers, start, shown)
        rows, nodes = [*seen.rows], [*seen.nodes]
        if layers.memory:
            pairs = zip(rows[-1], nodes[-1], strict=True)
            rows[-1] = [write_rows(buffer, part, start, layers.windows[-1]) for buffer, part in pairs]
        layers = replace(layers, rows=rows, path=[], path_start=None, states=seen.states(last))
        if self.longest:  # its first row is that of the last token read, and what comes after is nobody's
            path = mx.minimum(last[:, None] + mx.arange(self.longest), tokens.shape[1] - 1)
            nodes = nodes if self.branches else [*[[]] * (len(nodes) - 1), nodes[-1]]
            layers = leave_path(layers, nodes, path, start + last)
        context = mx.take_along_axis(seen.context, last[:, None, None], axis=1)[:, 0]
        token = mx.take_along_axis(tokens, last[:, None], axis=1)[:, 0]
        history = write_tokens(state.history, tokens, start + 1)
        after = replace(state, token=token, context=context, rows=start + count)
        return replace(after, layers=layers, history=history)


def shape_word(shape: DraftShape) -> str:
    """A draft shape as it is written on a command line: WIDTHxLENGTH+LOOKUP@NODES."""
    if shape == PLAIN:
        return "plain"
    copied = f"+{shape.lookup}" if shape.lookup else ""
    return f"{shape.width}x{shape.length}{copied}" + (f"@{shape.nodes}" if shape.nodes else "")


def named_in(module: nn.Module, prefix: str = "") -> dict[int, str]:
    """The names of a module's parameters by their identity."""
    parameters: Any = tree_flatten(module.parameters())
    return {id(array): prefix + name for name, array in parameters}


def numbered(kind: str, lists: Sequence[Sequence[mx.array]]) -> Arrays:
    """Arrays by their kind, and their numbers."""
    return {f"{kind}.{n}.{i}": x for n, arrays in enumerate(lists) for i, x in enumerate(arrays)}


def collected(kind: str, like: Sequence[Sequence[mx.array]], found: Arrays) -> list[list[mx.array]]:
    """The arrays of a kind that are there."""
    return [
        [found[name] for i in range(len(arrays)) if (name := f"{kind}.{n}.{i}") in found]
        for n, arrays in enumerate(like)
    ]


def lean(drafter: Any) -> Any:
    """A drafter as it decodes, without the layers that it has in another form."""
    if drafter is None:
        return None
    drafter = copy.copy(drafter)
    drafter._drafter = copy.copy(drafter._drafter)
    for name, other in (("input_proj", drafter._of_context), ("rnn_u", drafter._joint)):
        if other is not None:
            drafter._drafter.pop(name)
    return drafter


def arrays_of(drafter: Any) -> list[mx.array]:
    """All that a drafter computes with."""
    return [] if drafter is None else [x for x in parts(dict(vars(drafter))) if isinstance(x, mx.array)]


def with_arrays(drafter: Any, arrays: Sequence[mx.array]) -> Any:
    """A twin that computes with others in their places."""
    twin = copy.copy(drafter)
    vars(twin).update(view(dict(vars(drafter)), Tape(), iter(arrays)))
    return twin


def settings_of(vocabulary: int, given: Arrays) -> Arrays:
    """What ``draw`` is to know [1] of the numbers [1] that a program gives, whose meanings are mlx-lm's."""
    if "top_p" not in given:
        return given
    top_p, top_k = given["top_p"], given["top_k"]
    return given | {
        "top_p": mx.where((top_p > 0) & (top_p < 1), top_p, 1.0),
        "top_k": mx.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary),
        "min_p": mx.log(given["min_p"]),
    }
