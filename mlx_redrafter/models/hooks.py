"""How an unmodified mlx-lm model is watched: in a *view*, a copy of its modules that shares all weights.

- Outputs of the inner model and of single layers (hidden states) are recorded on their way (``Recorder``).
- Rotary embeddings take one offset per batch row only; they get a tree's nodes as batch rows (``NodeRope``).
- Recurrent layers keep only their state after the last token. What they read is noted on a ``Tape``, from
  which follows their state after any number of a chain's nodes: rows that go into a convolution
  (``Window``), and calls of the functions in ``RECURRENCES``. The layers' classes are replaced by ones
  whose code is the same but finds watched functions under these names.

A view does not see what is put into the model later, but ``parts`` tells that something was. If mlx-lm's
code changes so that what is noted does not fit what the layers store, ``Tape.stop`` raises ``ValueError``,
and what fits but is not right shows in ``Target.check``: such a model is decoded plainly.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList

ROPE_NAMES = ("rope", "rotary_emb")
WINDOW_TYPES = ("Conv1d", "TokenShift")
ERRORS = (ValueError, TypeError, AttributeError, LookupError, RuntimeError)  # of code that does not fit

States = list[list[mx.array]]  # of each recurrent layer, arrays [B, ...]
After = Callable[[mx.array], mx.array]  # a state after the first `count` [B] nodes
Function = Callable[
    ..., tuple[mx.array, mx.array]
]  # of a recurrence: outputs and the state after all of them


class NodeRope:
    """A rotary embedding that also takes one position per node: offset [B, N] for x [B, Hq or Hkv, N, Dh].

    While nodes are verified, a number as the offset comes from the buffers' shape, which says nothing.
    """

    def __init__(self, inner: Callable[..., mx.array]) -> None:
        self.inner = inner
        self.tape: Tape | None = None

    def __call__(self, x: mx.array, offset: int | mx.array = 0, **kwargs: Any) -> mx.array:
        if isinstance(offset, int) and offset and self.tape and self.tape.offset is not None:
            offset = self.tape.offset
        if not isinstance(offset, mx.array) or offset.ndim < 2:
            rotated: mx.array = self.inner(x, offset=offset, **kwargs)
            return rotated
        batch, heads, nodes, size = x.shape
        x = x.transpose(0, 2, 1, 3).reshape(batch * nodes, heads, 1, size)
        x = self.inner(x, offset=offset.reshape(-1), **kwargs)
        return x.reshape(batch, nodes, heads, size).transpose(0, 2, 1, 3)  # [B, Hq or Hkv, N, Dh]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Recorder:
    """Stands for a part of a view and keeps its last output, the hidden states."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._output: Any = None
        self._instead: mx.array | None = None

    @classmethod
    def put_into(cls, owner: Any, name: Any) -> "Recorder":
        owner[name] = recorder = cls(owner[name])
        return recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._instead is not None:
            output, self._instead = self._instead, None
            return output
        self._output = self.inner(*args, **kwargs)
        return self._output

    def take(self) -> mx.array:
        output, self._output = self._output, None
        output = output[0] if isinstance(output, tuple) else output  # what else a layer hands on
        if not isinstance(output, mx.array) or output.ndim != 3:
            raise ValueError("its hidden states cannot be read")
        return output

    def play(self, output: mx.array) -> None:
        """Give ``output`` at the next call instead of running."""
        self._instead = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Tape:
    """What the recurrent layers of one view read while they verify a chain of N nodes."""

    def __init__(self) -> None:
        self.nodes = 0  # N while something is noted
        self.offset: mx.array | None = None  # positions while nodes are verified
        self.kinds: dict[type, type] = {}  # a class -> the one that takes its place

    def start(self, nodes: int, offset: mx.array | None = None) -> None:
        """Note what is read from now on; of a single node nothing is of interest."""
        self.nodes, self.offset = nodes if nodes > 1 else 0, offset
        self.windows: list[mx.array] = []  # [B, K - 1 + N, ...]: rows before, and the nodes'
        self.moves: dict[int, tuple[mx.array, After]] = {}  # by the identity of a state after all nodes
        self.paths: dict[int, list[mx.array]] = {}  # the states that led to one, by its identity

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
                way = moves[id(state)][1] if id(state) in moves else _slide(next(windows, None), state, nodes)
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


def _convolution(tape: Tape, function: Callable[..., mx.array], given: dict[str, Any]) -> mx.array:
    """A convolution of values ``u`` [B, H, N, Dh] that is given its last rows before as ``state``."""
    tape.windows.append(mx.concatenate([given["state"], given["u"]], axis=2))
    return function(**given)


class Window:
    """Stands for a convolution, whose input begins with the last rows before, unless it is given them too."""

    def __init__(self, inner: Any, tape: Tape) -> None:
        self.inner, self.tape = inner, tape

    def __call__(self, x: mx.array, *before: Any, **named: Any) -> Any:
        if self.tape.nodes:
            states = [state for state in (*before, *named.values()) if isinstance(state, mx.array)]
            self.tape.windows.append(mx.concatenate([*states, x], axis=1))
        return self.inner(x, *before, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _masked(tape: Tape, function: Function, given: dict[str, Any]) -> tuple[mx.array, mx.array]:
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
    neutral: dict[str, float], tape: Tape, function: Function, given: dict[str, Any]
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
    axes: dict[str, int], state: str, tape: Tape, function: Function, given: dict[str, Any]
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


class FirstToken:
    """Stands for ``mlx.core`` in RG-LRU's code, which takes the root of a text's first token as 1.

    It knows the first token by the lack of a state, but what is verified has one from the beginning.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def sqrt(self, x: mx.array) -> mx.array:
        root, start = mx.sqrt(x), self.tape.offset
        if start is None:
            return root
        first = (start == 0)[:, None] & (mx.arange(x.shape[1]) == 0)  # [B, N]
        return mx.where(first[..., None], mx.ones_like(root), root)

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def _watched(tape: Tape, name: str, function: Function) -> Function:
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


def watch(module: Any, tape: Tape) -> None:
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
        elif isinstance(child, NodeRope):
            child.tape = tape
        else:
            watch(child, tape)


def _rebound(kind: type, tape: Tape) -> dict[str, Any]:
    """The methods of a class that call watched functions, made to find watched ones; and watched methods."""
    found: dict[str, Any] = {}
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if not isinstance(method, FunctionType) or name in found:
                continue
            if name in RECURRENCES:
                found[name] = _watched(tape, name, method)
                continue
            used = [f for f in method.__code__.co_names if f in RECURRENCES and f in method.__globals__]
            if used:
                names: dict[str, Any] = {f: _watched(tape, f, method.__globals__[f]) for f in used}
                if "rnn_scan" in used:
                    names["mx"] = FirstToken(tape)
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


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """mlx-lm's caches, those in lists of caches one by one."""
    for cache in caches:
        yield from leaves(cache.caches) if isinstance(cache, CacheList) else [cache]


def with_each(caches: Iterable[Any], stand_in: Callable[[Any], Any]) -> list[Any]:
    """What stands for each of mlx-lm's caches, in lists as they are."""
    # A local function that calls itself would be a cycle, and keep the buffers that it knows.
    return [
        CacheList(*with_each(cache.caches, stand_in)) if isinstance(cache, CacheList) else stand_in(cache)
        for cache in caches
    ]


def parts(module: Any) -> list[Any]:
    """All that decides what a module computes: it is as it was if each part is the same object as before."""
    if isinstance(module, list | tuple):
        return [part for item in module for part in parts(item)]
    if not isinstance(module, dict):
        return [module]
    own = vars(module).values() if isinstance(module, nn.Module) else ()
    return [module, *own, *module, *(part for item in module.values() for part in parts(item))]


def view(module: Any, weights: Iterator[mx.array] | None = None) -> Any:
    """A twin of ``module``, with its own arrays or these ``weights``, whose rotary embeddings take nodes."""
    if isinstance(module, mx.array):
        return module if weights is None else next(weights)
    if isinstance(module, Recorder | Window):
        return view(module.inner, weights)
    if isinstance(module, list | tuple):
        return type(module)(view(item, weights) for item in module)
    if not isinstance(module, dict):
        return module
    twin = copy.copy(module)
    for name, child in module.items():
        child = child.inner if isinstance(child, NodeRope) else child
        twin[name] = NodeRope(child) if name in ROPE_NAMES and callable(child) else view(child, weights)
    return twin
