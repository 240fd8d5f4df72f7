"""Texts that are decoded together: keep the device one step ahead, choose the shape, make room, stop.

While the device runs one step, the host builds the next; it hands that over once the first is done, because
buffers are updated in place only when nothing else reads them. A step is handed over in two parts: on a CPU,
MLX's hand-over waits until nearly all operations are done, so the many small ones after the logits come once
the next step has been built.
"""

import atexit
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from ..decoding.layers import ROOM, Layers, Quantization, View, commit, one_text
from ..decoding.sampling import Sampling, filter_settings
from ..decoding.state import PLAIN, DraftShape, Output, State, join, take, with_capacity
from ..decoding.tree import Tree

if TYPE_CHECKING:
    from .grammar import Follower

GRAIN = 256  # rows: the smallest unit by which buffers grow
FIRST_LAYERS = 2  # are handed over first, enough work for a device while the host does the rest
# As a thread ends, MLX frees objects of Python's, and aborts if Python has ended meanwhile: let it be last.
atexit.register(time.sleep, 0.05)

Step = Callable[[DraftShape, State, View], tuple[State, "Output | Unfinished"]]
Processor = Callable[[mx.array, mx.array], mx.array]  # tokens [T], logits [1, V] -> logits [1, V]
HandOver = Callable[[State, "Output | Unfinished"], None]
Sampler = Callable[[mx.array], mx.array]  # log-probabilities [n, V] -> tokens [n]


@dataclass(eq=False)
class Text:
    """One text that is decoded, as the host knows it.

    Attributes:
        number: its name.
        sampling: how its tokens are picked.
        stop: token ids that end it.
        left: tokens that it may still emit.
        rows: tokens that the layers hold of it: all but the last.
        processors: functions that change its logits, as mlx-lm's; and the ``sampler`` that takes the place of
            ``sampling``, if there is one.
        grammar: that it follows, and its place in it.
        release: is given the committed layers (of this text alone) and its rows when it leaves.
        kept: how its layers are quantized; None: they are not.
        turn: how they are to be quantized once they hold ``turn.start`` tokens, which they do not yet.
        is_new: whether it has had no step yet, so that the drafter knows nothing of it.
        error: what a function of its raised; it ends with that.
        said: the tokens that it has emitted.
        nodes: the most that a step of its had.
    """

    number: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    left: int = 1 << 62
    rows: int = 0
    processors: Sequence[Processor] = ()
    sampler: Sampler | None = None
    grammar: "Follower | None" = None
    release: Callable[[Layers, int], None] | None = None
    kept: Quantization | None = None
    turn: Quantization | None = None
    is_new: bool = True
    error: Exception | None = None
    said: list[int] = field(default_factory=list)
    nodes: int = 0

    @property
    def asks_host(self) -> bool:
        """Whether a grammar, or functions that are not ours, have a say in its tokens."""
        return bool(self.processors) or self.sampler is not None or self.grammar is not None

    def turns(self, rows: int) -> bool:
        """Whether its layers are to be quantized once they hold ``rows`` tokens more."""
        return self.turn is not None and self.rows + rows >= self.turn.start


@dataclass
class Unfinished:
    """A step whose tokens the host has a say in: it is finished while the device verifies."""

    tree: Tree
    verified: mx.array  # as in ``Output``
    finish: Callable[[State], tuple[State, Output]]


@dataclass
class Emitted:
    """What a text got of one step; all tokens but the last were drafted, unless a stop cut them short."""

    number: int  # of the text
    tokens: list[int]
    drafted: int  # how many of `tokens`, from the first, were drafted
    logits: mx.array | None = None  # [L+1, V], lazy: from which the tokens were picked
    shape: DraftShape = PLAIN
    ranks: list[int] = field(default_factory=list)  # of the drafted tokens: their beams, -1: copied
    waited: float = 0.0  # seconds between the step before and handing this one over
    finish: str | None = None  # "stop", "length", "error", or None: it goes on
    error: Exception | None = None  # of the text's own functions, or its prompt


class Chooser(Protocol):
    """Which draft shape to use next, one for all texts of a batch."""

    def choose(self, rows: int, texts: Sequence[int]) -> DraftShape:
        """The next step's shape, after texts of at most ``rows`` tokens; the last outcome may be unknown."""
        ...

    def observe(
        self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float, away: float
    ) -> None:
        """A step came out, ``seconds`` after the one before; the host had other work for ``away`` of them.

        ``ranks`` has for each text the beams that its accepted tokens came from; -1: copied from the text.
        """
        ...


@dataclass(frozen=True)
class Fixed:
    """The policy that always uses one shape."""

    shape: DraftShape

    def choose(self, rows: int, texts: Sequence[int] = ()) -> DraftShape:
        """The shape."""
        return self.shape

    def observe(
        self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float = 0, away: float = 0
    ) -> None:
        """Nothing to learn."""


def begin_step(state: State, output: Output | Unfinished) -> None:
    """Hand the heavy part of a step over to the device: its first layers at once.

    MLX walks all of a graph before it hands over the first operation, so with the first layers going ahead,
    the device need not wait for the walk through the others.
    """
    mx.async_eval(state.layers.rows[:FIRST_LAYERS][-1:])
    mx.async_eval(output.verified)


class Batch:
    """B texts that share every step.

    Args:
        runner: gives the function that runs a step for these texts.
        policy: chooses each step's draft shape.
        vocabulary: V.
        grain: rows by which attention's view of the buffers grows, while it is short; 1: always one by one.
        padded: how many texts a step is made for, given how many there are.
        hand_over: lets the device begin a step.
        eager: begin the next step before what the last one gave is returned; else with the next call.
    """

    def __init__(
        self,
        runner: Callable[[Sequence[Text]], Step],
        policy: Chooser,
        vocabulary: int,
        grain: int = GRAIN,
        padded: Callable[[int], int] = int,
        hand_over: HandOver = begin_step,
        eager: bool = True,
    ) -> None:
        self._hand_over, self._eager = hand_over, eager
        self.texts: list[Text] = []
        self.policy, self.grain = policy, grain
        self._runner, self._vocabulary, self._padded = runner, vocabulary, padded
        self._run: Step | None = None
        self._state: State | None = None  # after the running step; the only reference to it
        self._running: tuple[DraftShape, Output | Unfinished] | None = None
        # To follow: its shape, and itself if it is built.
        self._next: tuple[DraftShape, tuple[State, Output | Unfinished] | None] | None = None
        self._joining: list[tuple[Text, State]] = []
        self._ended: set[Text] = set()
        self.turned: list[tuple[Text, State]] = []  # have left, for their layers are quantized now
        self._is_chosen = False  # whether the policy chose the running step's shape
        self._waited = self._busy = self._arrived = 0.0

    @property
    def capacity(self) -> int:
        """C, the room of every text."""
        return 0 if self._state is None else self._state.capacity

    @property
    def everyone(self) -> list[Text]:
        """The texts, those that wait to join included."""
        return self.texts + [text for text, _ in self._joining]

    def layers_of(self, text: Text) -> Layers:
        """The committed layers of one text; the next step copies them, so that they stay as they are."""
        assert self._state is not None
        return one_text(commit(self._state.layers), self.texts.index(text))

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' buffers."""
        return sum(state.layers.nbytes for state in self._states)

    def nbytes_of(self, rows: int) -> int:
        """Bytes of the buffers that a text of so many rows needs."""
        return self._states[0].layers.nbytes_of(rows)

    @property
    def _states(self) -> list[State]:
        return [state for _, state in self._joining] + ([self._state] if self._state else [])

    def join(self, text: Text, state: State) -> None:
        """Let a text take part from the next step on; the caller must not keep its state."""
        self._joining.append((text, state))

    def leave(self, text: Text) -> None:
        """Take a text out: what the running step gives it is lost."""
        for other, state in self._joining:
            if other is text and text.release is not None:
                text.release(state.layers, text.rows)
        self._joining = [(other, state) for other, state in self._joining if other is not text]
        self._ended |= {text} & set(self.texts)
        if self._running is None or self._ended == set(self.texts):
            self._running = None
            self._compose()

    def step(self) -> list[Emitted]:
        """One step for all texts: what each one got. Those that ended leave, those that wait join."""
        if self._running is None:
            is_first = self._changes or self._next is None
            if is_first:
                self._compose()
                if not self.texts:
                    return []
                self._next, self._arrived = (self._first_shape(), None), time.perf_counter()
            self._begin_next()
            self._busy = 0.0 if is_first else self._busy
        assert self._running is not None and self._state is not None
        shape, output = self._running
        if isinstance(output, Unfinished):
            self._state, output = output.finish(self._state)
        following, ahead = None, None
        if not (self._changes or any(text.is_new for text in self.texts)):  # a first token must not wait
            following = self._choose(shape)
            if self._has_room(following, shape):
                ahead = self._step(following, shape)
        built = time.perf_counter()
        enqueue(self._state, output)
        emitted = self._read(shape, output)
        self._running, arrived = None, time.perf_counter()
        took, self._arrived = arrived - self._arrived, arrived
        away = took  # the first step may be like no other
        if self._busy:
            away -= self._busy + arrived - built
        learn, self._is_chosen = self._is_chosen and bool(emitted), True
        if self._changes or following is None:
            ahead = None
            self._compose()
            following = self._first_shape() if self.texts else None
        if following is not None:
            self._next = following, ahead
            if self._eager:
                self._begin_next()
        if learn:
            self.policy.observe(shape, {each.number: each.ranks for each in emitted}, took, away)
        return emitted

    def _begin_next(self) -> None:
        assert self._next is not None
        begun, (shape, ahead), self._next = time.perf_counter(), self._next, None
        self._start(shape, ahead)
        self._waited, self._busy = begun - self._arrived, time.perf_counter() - begun

    @property
    def _changes(self) -> bool:
        return bool(self._joining or self._ended)

    def _rows(self, shape: DraftShape | None = None) -> int:
        """Rows of the longest text; at most, after a running step of the ``shape``."""
        return max(text.rows for text in self.texts) + (shape.depth + 1 if shape else 0)

    def _has_room(self, shape: DraftShape, running: DraftShape | None = None) -> bool:
        """Whether there is room for a step as things are, or after a running one."""
        assert self._state is not None
        fits = self._rows(running) + shape.room <= self.capacity
        return fits and self._state.layers.has_room(shape.size)

    def _choose(self, running: DraftShape | None = None) -> DraftShape:
        shape = self.policy.choose(self._rows(running), [text.number for text in self.texts])
        rows = sum(each.depth + 1 for each in (running, shape) if each)  # at most, after both steps
        return PLAIN if any(text.turns(rows) for text in self.texts) else shape

    def _first_shape(self) -> DraftShape:
        """The shape after texts have joined or left; plain if the drafter knows nothing of any."""
        self._is_chosen = not all(text.is_new for text in self.texts)
        return self._choose() if self._is_chosen else PLAIN

    def _step(
        self, shape: DraftShape, running: DraftShape | None = None
    ) -> tuple[State, Output | Unfinished]:
        """Build a step, to follow a running one of another shape if there is one."""
        assert self._run is not None and self._state is not None
        rows = self._rows(running)
        columns = min(bucket(rows + shape.size, self.grain), self.capacity)
        known = (running is None or running.depth == 0) and columns == rows + shape.size
        return self._run(shape, self._state, View(columns, known and self._state.token.size == 1))

    def _start(self, shape: DraftShape, built: tuple[State, Output | Unfinished] | None = None) -> None:
        """Hand a step over to the device, one that is built already or a new one."""
        assert self._state is not None
        if built is None:
            if not self._has_room(shape):
                capacity = max(bucket(self._rows() + shape.room), self.capacity)
                self._state = with_capacity(self._state, capacity, bucket(2 * shape.size, ROOM))
            built = self._step(shape)
        self._state, output = built
        if isinstance(output, Unfinished):  # first what the host reads while the device does the rest
            mx.async_eval(output.tree.tokens, output.tree.parents, output.tree.ancestors)
        self._hand_over(self._state, output)
        self._running = shape, output
        for text in self.texts:
            text.nodes = max(text.nodes, shape.size)

    def _read(self, shape: DraftShape, output: Output) -> list[Emitted]:
        """What each text gets of a step: the only wait for the device."""
        tokens: Any = output.tokens.tolist()
        counts: Any = output.count.tolist()
        ranks: Any = output.ranks.tolist()
        found = []
        for i, text in enumerate(self.texts):
            if text in self._ended:
                continue
            said = until_end(tokens[i][: counts[i]], text.left, text.stop)
            drafted = min(len(said), counts[i] - 1)
            text.left -= len(said)
            text.rows += len(said)
            text.said += said
            text.is_new = False
            finish = "stop" if said[-1] in text.stop else None if text.left else "length"
            if text.error is not None:
                said, finish = [], "error"
            if finish:
                text.turn = None
            if finish or text.turns(0):
                self._ended.add(text)
            came_from = ranks[i][1 : 1 + drafted]
            logits = output.logits[i]
            each = Emitted(
                text.number, said, drafted, logits, shape, came_from, self._waited, finish, text.error
            )
            found.append(each)
        return found

    def _compose(self) -> None:
        """Let go of texts that have ended and take in those that wait."""
        if not self._changes:
            return
        self._next = None  # it was for the texts as they were
        keep = [i for i, text in enumerate(self.texts) if text not in self._ended]
        for number, text in enumerate(self.texts):
            if text.turns(0):
                from ..decoding.quantized import quantize

                assert text.turn is not None and self._state is not None
                self.turned.append((text, quantize(self._state, number, text.turn)))
                text.kept, text.turn = replace(text.turn, start=0), None
            elif text in self._ended and text.release is not None:
                text.release(self.layers_of(text), text.rows)
        texts = [self.texts[i] for i in keep] + [text for text, _ in self._joining]
        states = [state for _, state in self._joining]
        needed, room = bucket(max((text.rows for text in texts), default=0) + 1), self.capacity
        capacity = room if keep and needed <= room < 2 * needed else needed
        if keep:
            assert self._state is not None
            if len(keep) < self._state.token.size:
                self._state = take(self._state, keep, capacity)
            states.insert(0, self._state)
        self.texts, self._joining, self._ended, self._state = texts, [], set(), None
        if not texts:
            return
        state = states[0] if len(states) == 1 else join(states, capacity)
        del states  # a step must have the only reference
        pads = self._padded(len(texts)) - len(texts)
        if pads:
            state = take(state, [*range(len(texts)), *[0] * pads], state.capacity)
        samplings = [text.sampling for text in texts] + [Sampling()] * pads
        settings = filter_settings(samplings, self._vocabulary)
        if any(sampling.penalises for sampling in samplings):
            from ..decoding.penalties import penalty_settings

            settings |= penalty_settings(samplings)
        self._state = replace(state, sampling=settings)
        self._run = self._runner(texts)


def enqueue(state: State, output: Output) -> None:
    """Hand over what remains of a step."""
    parts = {**vars(state), "layers": vars(state.layers)}
    mx.async_eval(output.tokens, output.count, output.ranks, parts)


def bucket(rows: int, grain: int = GRAIN) -> int:
    """The next larger of the sizes in use: multiples of ``grain``, at most 32 for each doubling.

    So a text of T tokens meets few of them, and wastes no more than a 32nd, if more than ``grain`` rows.
    With a ``grain`` of 1, all sizes are in use.
    """
    unit = max(grain, 1 << max(rows.bit_length() - 6, 0)) if grain > 1 else 1
    return -(-rows // unit) * unit


def until_end(tokens: list[int], limit: int, stop: frozenset[int]) -> list[int]:
    """The first ``limit`` tokens, up to the first of the ``stop`` tokens."""
    tokens = tokens[:limit]
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


class Origin(Exception):
    """Where an error was raised, in words."""


def without_frames(error: Exception) -> Exception:
    """The error with its traceback in words: the frames that led to it hold arrays of all texts."""
    origin = Origin("\n" + "".join(traceback.format_exception(error)))
    error.__cause__, error.__context__ = origin, None
    return error.with_traceback(None)
