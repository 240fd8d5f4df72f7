"""How recurrent layers, whose code runs unmodified, are watched in a view (``hooks.py``) of a model.

They keep only their state after the last token. What they read is noted, from which follows their state after
any number of a chain's nodes: rows that go into a convolution (``Window``), and calls of the functions in
``RECURRENCES``. The layers' classes are replaced by ones whose code is the same but finds watched functions
under these names. So is code that counts from its cache's offset, which is an array here (``Places``).

If mlx-lm's code changes so that what is noted does not fit what the layers store, ``Notes.stop`` raises
``ValueError``, and what fits but is not right shows in ``Target.check``: such a model is decoded plainly.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from .hooks import NodeRope, StandIn, States, Tape

WINDOW_TYPES = ("Conv1d", "TokenShift")

After = Callable[[mx.array], mx.array]  # a state after the first `count` [B] nodes
Function = Callable[
    ..., tuple[mx.array, mx.array]
]  # of a recurrence: outputs and the state after all of them


class Notes(Tape):
    """What the recurrent layers of one view read while they verify a chain of N nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = 0  # N while something is noted
        self.kinds: dict[type, type] = {}  # a class -> the one that takes its place

    def start(self, tokens: mx.array, is_noted: bool, offset: mx.array | None, columns: int) -> None:
        """Note what is read from now on; of a single node nothing is of interest."""
        self.tokens, size = tokens, tokens.shape[1]
        self.nodes = size if is_noted and size > 1 else 0
        self.offset, self.columns = offset, columns
        self.windows: list[mx.array] = []  # [B, K - 1 + N, ...]: rows before, and the nodes'
        self.moves: dict[int, tuple[mx.array, After]] = {}  # by the identity of a state after all nodes
        self.paths: dict[int, list[mx.array]] = {}  # the states that led to one, by its identity

    def seen(self, states: list[mx.array]) -> "StatesView":
        """What a layer sees of its states."""
        return StatesView(states)

    def note(self, state: mx.array, after: After) -> None:
        """``state`` is the one after all nodes."""
        self.moves[id(state)] = state, after

    def stop(self, caches: Sequence["StatesView"]) -> Callable[[mx.array], States]:
        """The states after the first ``count`` [B] nodes, of the caches that the layers were given.

        Raises:
            ValueError: what was noted does not fit what the layers stored.
        """
        nodes, self.nodes, self.offset = self.nodes, 0, None
        if not nodes:
            return lambda count: [list(cache.cache) for cache in caches]
        windows, moves = iter(self.windows), self.moves
        found = []
        for cache in caches:
            ways = [partial(lambda state, count: state, state) for state in cache.cache]
            for slot, state in cache.stored:
                if id(state) in moves:
                    way = moves[id(state)][1]
                elif mx.issubdtype(state.dtype, mx.integer):  # the last token ids
                    ids = mx.concatenate([cache.before[slot], self.tokens.astype(state.dtype)], axis=1)
                    way = _slide(ids, state, nodes)
                else:
                    way = _slide(next(windows, None), state, nodes)
                ways[slot] = partial(lambda way, count: way(count), way)
            found.append(ways)
        if next(windows, None) is not None:
            raise ValueError("its convolutions are not those of its recurrent layers")
        self.windows, self.moves, self.paths = [], {}, {}
        return lambda count: [[way(count) for way in ways] for ways in found]


class StatesView(ArraysCache):  # type: ignore[misc]
    """What a recurrent layer sees of its memory while it reads a chain: the states, and no padding."""

    def __init__(self, states: list[mx.array]) -> None:
        super().__init__(len(states))
        self.before = states
        self.cache: list[Any] = [*states]
        self.stored: list[tuple[int, mx.array]] = []

    def __setitem__(self, slot: int, state: mx.array) -> None:
        self.cache[slot] = state
        self.stored.append((slot, state))


def _slide(rows: mx.array | None, state: mx.array, nodes: int) -> After:
    """Of rows K - 1 + N along one axis, the last K - 1 after the first ``count`` nodes, as in ``state``."""
    shapes = ((), ()) if rows is None else (rows.shape, state.shape)
    differ = [axis for axis, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b]
    if rows is None or len(differ) != 1 or rows.shape[differ[0]] - state.shape[differ[0]] != nodes:
        raise ValueError(
            f"how it computes a state of shape {state.shape} is not known, so that it cannot be rolled back"
        )
    axis, width = differ[0], state.shape[differ[0]]

    def after(count: mx.array) -> mx.array:
        shape = [width if i == axis else -1 if i == 0 else 1 for i in range(state.ndim)]
        places = (count[:, None] + mx.arange(width)).reshape(shape)
        return mx.take_along_axis(rows, places, axis=axis).astype(state.dtype)

    return after


def _convolution(tape: Notes, function: Callable[..., mx.array], given: dict[str, Any]) -> mx.array:
    """A convolution of values ``u`` [B, H, N, Dh] that is given its last rows before as ``state``."""
    tape.windows.append(mx.concatenate([given["state"], given["u"]], axis=2))
    return function(**given)


class Window(StandIn):
    """Stands for a convolution, whose input begins with the last rows before, unless it is given them too."""

    def __init__(self, inner: Any, tape: Notes) -> None:
        super().__init__(inner)
        self.tape = tape

    def __call__(self, x: mx.array, *before: Any, **named: Any) -> Any:
        if self.tape.nodes:
            states = [state for state in (*before, *named.values()) if isinstance(state, mx.array)]
            self.tape.windows.append(mx.concatenate([*states, x], axis=1))
        return self.inner(x, *before, **named)


def _masked(tape: Notes, function: Function, given: dict[str, Any]) -> tuple[mx.array, mx.array]:
    """A recurrence that takes a mask: run again with that of the accepted nodes."""
    nodes, outcome = tape.nodes, function(**given)

    def after(count: mx.array) -> mx.array:
        accepted: dict[str, mx.array] = {"mask": mx.arange(nodes) < count[:, None]}  # [B, N]
        if "lengths" in inspect.signature(function).parameters:
            accepted["lengths"] = count
        return function(**{**given, **accepted})[1]

    tape.note(outcome[1], after)
    return outcome


def _neutral(
    neutral: dict[str, float], tape: Notes, function: Function, given: dict[str, Any]
) -> tuple[mx.array, mx.array]:
    """A recurrence that some inputs [B, N, ...] leave as it is: run again with these for all other nodes."""
    nodes, outcome = tape.nodes, function(**given)

    def after(count: mx.array) -> mx.array:
        accepted = mx.arange(nodes) < count[:, None]  # [B, N]
        inputs = {}
        for name, value in neutral.items():
            shown = accepted.reshape(*accepted.shape, *[1] * (given[name].ndim - 2))
            inputs[name] = mx.where(shown, given[name], mx.array(value, given[name].dtype))
        return function(**{**given, **inputs})[1]

    tape.note(outcome[1], after)
    return outcome


def _by_node(
    axes: dict[str, int], state: str, tape: Notes, function: Function, given: dict[str, Any]
) -> tuple[mx.array, mx.array]:
    """A recurrence that is run node by node; all states are kept."""
    axis = next(iter(axes.values()))
    split = given[next(iter(axes))].ndim > 2  # else it is called for each node
    parts = [mx.split(given[name], tape.nodes, axis=place) for name, place in axes.items()] if split else []
    outputs, now = [], given[state]
    for part in zip(*parts, strict=True) if split else [[given[name] for name in axes]]:
        before = tape.paths.pop(id(now), [])
        output, now = function(**{**given, **dict(zip(axes, part, strict=True)), state: now})
        outputs.append(output)
        tape.paths[id(now)] = [*before, now]

    path = tape.paths[id(now)]

    def after(count: mx.array) -> mx.array:
        states = mx.stack(path, axis=1)  # [B, N, ...]
        place = (count - 1).reshape(-1, 1, *[1] * (states.ndim - 2))
        return mx.take_along_axis(states, place, axis=1)[:, 0]

    tape.note(now, after)
    return (mx.concatenate(outputs, axis=axis) if split else outputs[0]), now


# Functions and methods by which mlx-lm's layers move a state on; how each is watched.
RECURRENCES: dict[str, Callable[..., Any]] = {
    "gated_delta_update": _masked,  # gated delta net, KDA
    "ssm_update": _masked,  # Mamba-2
    "recurrent_gla": _masked,  # lightning attention
    "ssm_step": partial(_by_node, {"x": 1}, "state"),  # Mamba-1
    "_wkv7": partial(_neutral, {"w": 1.0, "k": 0.0, "b": 0.0}),  # RWKV7
    "rnn_scan": partial(_neutral, {"a": 1.0, "x": 0.0}),  # RG-LRU
    "_custom_convolution": _convolution,  # of keys and values
}
UNMASKED = {"recurrent_gla": partial(_by_node, {"q": 2, "k": 2, "v": 2}, "h")}  # an older form of it


class Places(StandIn):
    """Stands for ``mlx.core`` in code that counts from and to its cache's offset, here an array [1]."""

    def __init__(self, tape: Notes) -> None:
        super().__init__(mx)
        self.tape = tape

    def arange(self, *bounds: Any, **named: Any) -> mx.array:
        start, stop = (0, *bounds)[-2:]
        if not isinstance(stop, mx.array):
            return mx.arange(*bounds, **named)
        if stop.size > 1:
            raise ValueError("it counts the places of one text only")
        if isinstance(start, mx.array):
            return start + mx.arange(self.tape.tokens.shape[1])
        return mx.arange(self.tape.columns)


class FirstToken(Places):
    """Stands for ``mlx.core`` in RG-LRU's code, which takes the root of a text's first token as 1.

    It knows the first token by the lack of a state, but what is verified has one from the beginning.
    """

    def sqrt(self, x: mx.array) -> mx.array:
        root, start = mx.sqrt(x), self.tape.offset
        if start is None:
            return root
        first = (start == 0)[:, None] & (mx.arange(x.shape[1]) == 0)  # [B, N]
        return mx.where(first[..., None], mx.ones_like(root), root)


def _watched(tape: Notes, name: str, function: Function) -> Function:
    """A function of ``RECURRENCES`` that notes what moves the state on, if anything is to be noted."""
    signature, how = inspect.signature(function), RECURRENCES[name]
    if how is _masked and "mask" not in signature.parameters:
        how = UNMASKED.get(name, how)

    def call(*args: Any, **named: Any) -> Any:
        if not tape.nodes:
            return function(*args, **named)
        given = dict(signature.bind(*args, **named).arguments)
        own = given.pop("self", None)
        return how(tape, function if own is None else partial(function, own), given)

    return call


def watch(module: Any, tape: Notes) -> None:
    """Let the modules of a view note on ``tape`` what moves their states on."""
    if isinstance(module, list | tuple):
        for item in module:
            watch(item, tape)
    if not isinstance(module, nn.Module):
        return
    kind = getattr(type(module), "unwatched", type(module))
    if kind not in tape.kinds:
        methods = _rebound(kind, tape)
        named = {**methods, "unwatched": kind}
        tape.kinds[kind] = type(kind.__name__, (kind,), named) if methods else kind
    module.__class__ = tape.kinds[kind]
    for name, child in module.items():
        if type(child).__name__ in WINDOW_TYPES and isinstance(child, nn.Module):
            module[name] = Window(child, tape)
        elif not isinstance(child, NodeRope):
            watch(child, tape)


def _rebound(kind: type, tape: Notes) -> dict[str, Any]:
    """The methods of a class that call watched functions, made to find watched ones; and watched methods."""
    found: dict[str, Any] = {}
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if not isinstance(method, FunctionType) or name in found:
                continue
            if name in RECURRENCES:
                found[name] = _watched(tape, name, method)
                continue
            code = method.__code__.co_names
            used = [f for f in code if f in RECURRENCES and f in method.__globals__]
            names: dict[str, Any] = {f: _watched(tape, f, method.__globals__[f]) for f in used}
            if "rnn_scan" in used:
                names["mx"] = FirstToken(tape)
            if "arange" in code and "offset" in code:
                names["mx"] = Places(tape)
            if names:
                twin = FunctionType(
                    method.__code__,
                    {**method.__globals__, **names},
                    name,
                    method.__defaults__,
                    method.__closure__,
                )
                twin.__kwdefaults__ = method.__kwdefaults__
                found[name] = twin
    return found
