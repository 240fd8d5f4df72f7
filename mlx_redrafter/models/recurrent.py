"""How recurrent layers, whose code runs unmodified, are watched in a view (``hooks.py``) of a model.

They keep only their state after the last token. What they read is noted, from which follows their state after
any node: rows that go into a convolution (``Window``), and calls of the functions in ``RECURRENCES``. These
are run again up to a chain's last accepted node. Along a tree, and along a chain where mlx-lm has no kernel,
those in ``CLOSED`` are computed in closed form, in which a matrix says what nodes read of their ancestors.

The layers' classes are replaced by ones whose code is the same but finds watched functions under these names.
So is code that counts from its cache's offset, which is an array here (``Places``).

If mlx-lm's code changes so that what is noted does not fit what the layers store, ``Notes.stop`` raises
``ValueError``, and what fits but is not right shows in ``Target.check``: such a model is decoded plainly.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from ..decoding.tree import Tree
from .hooks import NodeRope, StandIn, States, Tape

WINDOW_TYPES = ("Conv1d", "TokenShift")

After = Callable[[mx.array], mx.array]  # a state after a node [B] of each text
Function = Callable[
    ..., tuple[mx.array, mx.array]
]  # of a recurrence: outputs and the state after all of them


class Notes(Tape):
    """What the recurrent layers of one view read while they verify N nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = 0  # N while something is noted
        self.kinds: dict[type, type] = {}  # a class -> the one that takes its place

    def start(self, tokens: mx.array, tree: Tree | None, offset: mx.array | None, columns: int) -> None:
        """Note what is read from now on; of a single node nothing is of interest."""
        self.tokens, size = tokens, tokens.shape[1]
        self.nodes = size if tree and size > 1 else 0
        self.tree, self.branches = tree, tree is not None and not tree.is_chain
        self.above = cache(partial(_above, tree))  # for all layers, by the width
        super().start(tokens, tree, offset, columns)
        self.columns = columns
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
        """The states after a node [B] of each text, of the caches that the layers were given.

        Raises:
            ValueError: what was noted does not fit what the layers stored.
        """
        super().stop(caches)
        nodes, self.nodes = self.nodes, 0
        if not nodes:
            return lambda last: [list(cache.cache) for cache in caches]
        windows, moves = iter(self.windows), self.moves
        found = []
        for seen in caches:
            ways = [partial(lambda state, last: state, state) for state in seen.cache]
            for slot, state in seen.stored:
                if id(state) in moves:
                    way = moves[id(state)][1]
                elif mx.issubdtype(state.dtype, mx.integer) and not self.branches:  # the last token ids
                    ids = mx.concatenate([seen.before[slot], self.tokens.astype(state.dtype)], axis=1)
                    way = _slide(ids, state, nodes)
                else:
                    way = _slide(next(windows, None), state, nodes, self.above if self.branches else None)
                ways[slot] = partial(lambda way, last: way(last), way)
            found.append(ways)
        if next(windows, None) is not None:
            raise ValueError("its convolutions are not those of its recurrent layers")
        self.windows, self.moves, self.paths = [], {}, {}
        return lambda last: [[way(last) for way in ways] for ways in found]


class StatesView(ArraysCache):  # type: ignore[misc]
    """What a recurrent layer sees of its memory while it reads a chain: the states, and no padding."""

    def __init__(self, states: list[mx.array]) -> None:
        super().__init__(len(states))
        self.before = states
        self.cache: list[Any] = [*states]
        self.stored: list[tuple[int, mx.array]] = []

    def __setitem__(self, slot: int, state: mx.array) -> None:
        self.cache[slot] = state
        if all(slot != known for known, _ in self.stored):  # else the same, which waits for what is sent
            self.stored.append((slot, state))


def _slide(
    rows: mx.array | None, state: mx.array, nodes: int, above: Callable[[int], mx.array] | None = None
) -> After:
    """Of rows K - 1 + N along one axis, the last K - 1 after a node, as in ``state``."""
    shapes = ((), ()) if rows is None else (rows.shape, state.shape)
    differ = [axis for axis, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b]
    if rows is None or len(differ) != 1 or rows.shape[differ[0]] - state.shape[differ[0]] != nodes:
        raise ValueError(
            f"how it computes a state of shape {state.shape} is not known, so that it cannot be rolled back"
        )
    axis, width = differ[0], state.shape[differ[0]]

    def after(last: mx.array) -> mx.array:
        shape = [width if i == axis else -1 if i == 0 else 1 for i in range(state.ndim)]
        if above is None:
            places = last[:, None] + 1 + mx.arange(width)
        else:
            places = mx.take_along_axis(above(width + 1), last[:, None, None], axis=1)[:, 0, 1:]
        return mx.take_along_axis(rows, places.reshape(shape), axis=axis).astype(state.dtype)

    return after


def _above(tree: Tree | None, width: int) -> mx.array:
    """Of rows K - 1 + N, those [B, N, K] that each node comes after, itself the last; ``width`` is K."""
    assert tree is not None
    node, found = mx.broadcast_to(mx.arange(tree.tokens.shape[1]), tree.tokens.shape), []
    for up in range(width):
        found.append(width - 1 + mx.where(up <= tree.depths, node, tree.depths - up))
        node = mx.take_along_axis(tree.parents, node, axis=1)
    return mx.stack(found[::-1], axis=-1)


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
        if self.tape.nodes and self.tape.branches:
            if before or named:
                raise ValueError(UNBRANCHED)
            size, nodes, width = x.shape[0], self.tape.nodes, x.shape[1] - self.tape.nodes + 1
            places = self.tape.above(width).reshape(size, -1, 1)
            x = mx.take_along_axis(x, places, axis=1).reshape(size * nodes, width, -1)
            return self.inner(x).reshape(size, nodes, -1)  # of each node's window
        return self.inner(x, *before, **named)


def _masked(tape: Notes, function: Function, given: dict[str, Any]) -> tuple[mx.array, mx.array]:
    """A recurrence that takes a mask: run again with that of the accepted nodes."""
    nodes, outcome = tape.nodes, function(**given)

    def after(last: mx.array) -> mx.array:
        accepted: dict[str, mx.array] = {"mask": mx.arange(nodes) <= last[:, None]}  # [B, N]
        if "lengths" in inspect.signature(function).parameters:
            accepted["lengths"] = last + 1
        return function(**{**given, **accepted})[1]

    tape.note(outcome[1], after)
    return outcome


def _neutral(
    neutral: dict[str, float], tape: Notes, function: Function, given: dict[str, Any]
) -> tuple[mx.array, mx.array]:
    """A recurrence that some inputs [B, N, ...] leave as it is: run again with these for all other nodes."""
    nodes, outcome = tape.nodes, function(**given)

    def after(last: mx.array) -> mx.array:
        accepted = mx.arange(nodes) <= last[:, None]  # [B, N]
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

    def after(last: mx.array) -> mx.array:
        states = mx.stack(path, axis=1)  # [B, N, ...]
        place = last.reshape(-1, 1, *[1] * (states.ndim - 2))
        return mx.take_along_axis(states, place, axis=1)[:, 0]

    tape.note(now, after)
    return (mx.concatenate(outputs, axis=axis) if split else outputs[0]), now


def _gated_delta(tape: Notes, given: dict[str, Any]) -> tuple[mx.array, mx.array]:
    """Gated delta net and KDA along a tree: what a node writes depends on what its ancestors wrote."""
    values, rate, strength = given["v"], mx.exp(given["A_log"].astype(mx.float32)), mx.sigmoid(given["b"])
    if given.get("allow_neg_eigval"):
        strength = 2 * strength
    if given.get("lower_bound") is None:
        decay = -rate * nn.softplus(given["a"] + given["dt_bias"])
    else:
        decay = given["lower_bound"] * mx.sigmoid(rate * (given["a"].astype(mx.float32) + given["dt_bias"]))
    return _along(tape, decay, given["q"], given["k"], values, given["state"], strength)


def _mamba2(tape: Notes, given: dict[str, Any]) -> tuple[mx.array, mx.array]:
    """Mamba-2 along a tree."""
    x, (low, high) = given["hidden_states"], given.get("time_step_limit", (0.001, 100.0))
    step = mx.clip(nn.softplus(given["dt"].astype(mx.float32) + given["dt_bias"]), low, high)  # [B, N, H]
    decay = -mx.exp(given["A_log"]) * step
    y, state = _along(tape, decay, given["C"], given["B"], step[..., None] * x, given["state"])
    return (y + x * given["D"][:, None]).astype(x.dtype), state


def _along(
    tape: Notes,
    decay: mx.array,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    state: mx.array,
    strength: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """S = exp(decay) S + w k^T and y = S q along a tree, in closed form, so that no node needs a state.

    Args:
        decay: [B, N, H], or [B, N, H, Dk] by channel, logarithms.
        q, k: [B, N, Hk, Dk].
        v: [B, N, H, Dv]; w is v, or ``strength`` [B, N, H] times what v differs by from exp(decay) S k.
        state: S before, [B, H, Dv, Dk].

    Returns:
        y [B, N, H, Dv], and what stands for the state after all nodes.
    """
    assert tape.tree is not None
    above = tape.tree.ancestors[:, None]  # [B, 1, N, N]
    q, k = (mx.repeat(x, v.shape[2] // x.shape[2], axis=2).swapaxes(1, 2).astype(mx.float32) for x in (q, k))
    w, before = v.swapaxes(1, 2).astype(mx.float32), state.astype(mx.float32).swapaxes(-1, -2)
    decay = decay[..., None] if decay.ndim < 4 else decay
    total = above.astype(mx.float32) @ decay.swapaxes(1, 2).astype(
        mx.float32
    )  # [B, H, N, D], from the root on
    between = total[:, :, :, None] - total[:, :, None]  # [B, H, N, N, D]
    left, first = mx.exp(mx.where(above[..., None], between, -mx.inf)), mx.exp(total)

    def products(x: mx.array) -> mx.array:  # with each ancestor's key, as far as it has not decayed
        if left.shape[-1] == 1:
            return (x @ k.swapaxes(-1, -2)) * left[..., 0]
        return (x[:, :, :, None] * k[:, :, None] * left).sum(axis=-1)

    if strength is not None:
        strength = strength.swapaxes(1, 2)[..., None].astype(mx.float32)
        w = strength * (w - (k * first) @ before)
        taken = -strength * products(k) * (1 - mx.eye(tape.nodes))  # by what ancestors wrote
        for _ in range((tape.nodes - 1).bit_length()):  # w + taken w + taken^2 w + ..., which ends
            w, taken = w + taken @ w, taken @ taken
    y = (q * first) @ before + products(q) @ w

    def after(last: mx.array) -> mx.array:
        at = last[:, None, None, None]
        kept = mx.take_along_axis(first, at, axis=2)  # [B, H, 1, D]
        weights = mx.take_along_axis(left, at[..., None], axis=2)[:, :, 0]  # [B, H, N, D]
        return (kept * state + w.swapaxes(-1, -2) @ (weights * k)).astype(state.dtype)

    unused = mx.zeros_like(state)
    tape.note(unused, after)
    return y.swapaxes(1, 2).astype(v.dtype), unused


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
CLOSED = {"gated_delta_update": _gated_delta, "ssm_update": _mamba2}  # how they are run along a tree
UNBRANCHED = "how its recurrent layers run along a tree is not known"
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
        has_kernel = mx.metal.is_available() and mx.default_device() == mx.gpu
        if name in CLOSED and (tape.branches or not has_kernel):
            return CLOSED[name](tape, given)
        if tape.branches:
            raise ValueError(UNBRANCHED)
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
