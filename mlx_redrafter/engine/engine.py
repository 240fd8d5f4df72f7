"""The engine: texts come and go, and share the steps of one model."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..decoding.layers import Layers, Quantization, in_order
from ..decoding.sampling import Sampling
from ..decoding.state import State, begin
from ..models.target import kept_as, read_rows
from . import backend
from .loop import (
    Batch,
    Chooser,
    Emitted,
    HandOver,
    Processor,
    Sampler,
    Step,
    Text,
    begin_step,
    bucket,
    without_frames,
)
from .runner import Runner

if TYPE_CHECKING:
    from .grammar import Grammar
    from .prefixes import Prefixes

CHUNK = 2048  # prompt tokens read at once, mlx-lm's default
UNLIMITED = 1 << 62  # tokens
WASTE = 1.25  # a batch may take this many times the memory that its texts need,
SPARE, MOST_SPARE = 1 / 6, 1 << 28  # or this share of the weights' more: a batch apart reads these once more


@dataclass(eq=False)
class Request:
    """What to say after a prompt.

    Attributes:
        prompt: token ids, one or more.
        max_tokens: the most tokens to say.
        sampling: how tokens are picked.
        seed: makes sampling repeatable, alone and in any company; without one it is drawn from MLX's global
            random state.
        stop: token ids that end the text, and belong to it.
        processors, sampler: functions of the user's, as mlx-lm's (``Text``).
        grammar: what the text must be; when it is complete, an end of text comes, which ``stop`` should have.
        caches: mlx-lm caches that hold an earlier part of the text; they take the prompt in, and in the list
            quantized ones may take their places.
        kv: how keys and values are quantized, exactly when mlx-lm does so.
        release: is given the layers at the end (``Text``).
        progress: called with prompt tokens read and their total.
        pauses: prompt tokens after which reading pauses until the next step.
        checkpoints: prompt tokens after which what has been read is kept for reuse (``Prefixes``), such as
            those of a system prompt.
        cached_tokens: of the prompt that were not read, since they were kept; known once reading begins.

    Raises:
        ValueError: an empty prompt, or a number out of range.
    """

    prompt: Sequence[int]
    max_tokens: int = UNLIMITED
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: frozenset[int] = frozenset()
    processors: Sequence[Processor] = ()
    sampler: Sampler | None = None
    grammar: "Grammar | None" = None
    caches: list[Any] | None = None
    kv: Quantization | None = None
    release: Callable[[Layers, int], None] | None = None
    progress: Callable[[int, int], None] = lambda done, total: None
    pauses: Collection[int] = ()
    checkpoints: Collection[int] = ()
    cached_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("the prompt is empty: give some text.")
        if self.max_tokens < 1:
            raise ValueError(f"max tokens {self.max_tokens} is not usable: give 1 or more.")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed {self.seed} is not usable: give 0 to {(1 << 64) - 1}.")
        # Now, since each thread has a random state of its own.
        seed = None if self.seed is None else mx.random.key(self.seed)
        self.seeds = mx.random.randint(0, 1 << 32, shape=(2,), dtype=mx.uint32, key=seed)
        mx.eval(self.seeds)


@dataclass(eq=False)
class _Prompt:
    """A prompt that waits, or is being read."""

    text: Text
    request: Request
    caches: list[Any] | None = None  # once it is being read
    memory: list[Any] = field(default_factory=list)  # the cache of the drafter's memory, if it has one
    read: int = 0  # of its tokens

    @property
    def left(self) -> int:
        """Tokens to read; the last one is the first step's."""
        return len(self.request.prompt) - 1 - self.read

    @property
    def all_caches(self) -> list[Any]:
        """The model's and the drafter's, while it is being read."""
        return [*(self.caches or []), *self.memory]


class Engine:
    """Decodes any number of texts with one model, many at once.

    One thread at a time may call it.

    Args:
        runner: runs the model's steps.
        policy: chooses draft shapes; one for all batches.
        chunk: the most prompt tokens that are read between two steps.
        texts: the most texts that are decoded at once; others wait.
        max_memory: bytes that the layers may need; a text that does not fit waits, unless it is alone.
        longest: rows that a text without a limit is assumed to need.
        grain: rows by which attention's view grows.
        padded: how many texts a step is made for, given how many there are.
        hand_over: lets the device begin a step.
        eager: as ``Batch``'s.
        prefixes: texts kept for reuse, of this model.
        most: of the bytes that texts need here and on other machines, the most.
    """

    def __init__(
        self,
        runner: Runner,
        policy: Chooser,
        chunk: int = CHUNK,
        texts: int = 16,
        max_memory: int | None = None,
        longest: int = 1 << 13,
        grain: int = 1,
        padded: Callable[[int], int] = int,
        hand_over: HandOver = begin_step,
        eager: bool = True,
        prefixes: "Prefixes | None" = None,
        most: Callable[[int], int] = int,
    ) -> None:
        if chunk < 1 or texts < 1:
            raise ValueError(f"chunk {chunk} and texts {texts} are not usable: give 1 or more.")
        self.chunk, self.texts, self.max_memory = chunk, texts, max_memory
        self.target, self.runner, self._longest = runner.target, runner, longest
        self.prefixes, self._most = prefixes, most
        if prefixes is not None:
            prefixes.belong_to(self.target.memory)
        # No reference to the engine itself: a cycle would keep the buffers until Python looks for cycles.
        self._new_batch = partial(
            Batch,
            partial(_runner_for, runner),
            policy,
            runner.target.vocabulary,
            grain,
            padded,
            hand_over,
            eager,
        )
        self._waiting: deque[_Prompt] = deque()
        self._batches: list[Batch] = []
        self._begun: dict[int, Request] = {}  # those of texts that have had no step yet
        self._count = 0

    def submit(self, request: Request) -> int:
        """Take in a text and return its number.

        Raises:
            ValueError: the model's keys and values cannot be quantized as the request wants it, or the caches
                keep other rows than the model needs.
        """
        if request.caches is not None and not self.target.suits(request.caches):
            raise ValueError("the caches have other windows than the model: use mlx-lm's make_prompt_cache.")
        if request.kv is not None:
            from ..models.prompt_caches import check_quantized

            check_quantized(self.target, request.kv)
        self._count += 1
        text = Text(
            self._count,
            request.sampling,
            request.stop,
            request.max_tokens,
            processors=request.processors,
            sampler=request.sampler,
            grammar=None if request.grammar is None else request.grammar.follower(),
            release=request.release,
        )
        if (prefixes := self._prefixes_for(request)) is not None:
            text.release = partial(_keep, prefixes, request, text)
        self._waiting.append(_Prompt(text, request))
        return text.number

    def resume(self, state: State, rows: int) -> int:
        """Go on with a text whose layers hold ``rows`` tokens, without a limit; nobody may keep its state."""
        self._count += 1
        self._place(Text(self._count, rows=rows, is_new=False), state)
        return self._count

    def step(self) -> list[Emitted]:
        """Read at most one chunk of prompts, then decode one step of all texts: what they got, by number."""
        emitted = self._read_prompts()
        for batch in self._batches:
            emitted += batch.step()
        for batch in list(self._batches):
            while batch.turned:
                self._place(*batch.turned.pop())
        for each in emitted:  # a prompt has been read once its first tokens are there
            if (request := self._begun.pop(each.number, None)) is not None:
                request.progress(len(request.prompt), len(request.prompt))
        self._batches = [batch for batch in self._batches if batch.everyone]
        return sorted(emitted, key=lambda each: each.number)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._batches)

    def layers_of(self, number: int) -> Layers | None:
        """The committed layers of a text that is decoded; None if it is not."""
        found = [
            batch.layers_of(text) for batch in self._batches for text in batch.texts if text.number == number
        ]
        return found[0] if found else None

    def caches_of(self, number: int) -> list[KVCache] | None:
        """The mlx-lm caches into which a prompt is being read; None if that is not so."""
        found = [prompt.caches for prompt in self._waiting if prompt.text.number == number]
        return list(found[0]) if found and found[0] is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers in which texts are decoded."""
        return sum(batch.nbytes for batch in self._batches)

    def cancel(self, number: int) -> None:
        """Drop a text, whatever has become of it."""
        self._begun.pop(number, None)
        self._waiting = deque(prompt for prompt in self._waiting if prompt.text.number != number)
        for batch in self._batches:
            for text in [text for text in batch.everyone if text.number == number]:
                batch.leave(text)
        self._batches = [batch for batch in self._batches if batch.everyone]

    def close(self) -> None:
        """Drop all texts."""
        for number in [prompt.text.number for prompt in self._waiting]:
            self.cancel(number)
        for number in [text.number for batch in self._batches for text in batch.everyone]:
            self.cancel(number)

    def _read_prompts(self) -> list[Emitted]:
        """Read prompts in their order, one chunk of tokens at most; texts that failed."""
        left = self.chunk
        while self._waiting and left > 0:
            prompt = self._waiting[0]
            if prompt.caches is None and not self._has_room(prompt):
                break
            if prompt.request.kv and left < min(self.chunk, prompt.left):
                break  # the ends of chunks decide where it is quantized: they must be where they are alone
            try:
                left -= max(self._read(prompt, left), 1)
                if prompt.read in prompt.request.pauses:
                    left = 0
            except (ValueError, TypeError, RuntimeError, IndexError) as error:  # this request's alone
                self._waiting.popleft()
                return [Emitted(prompt.text.number, [], 0, finish="error", error=without_frames(error))]
            if prompt.left == 0:
                self._waiting.popleft()
                self._join(prompt)
        return []

    def _read(self, prompt: _Prompt, most: int) -> int:
        """Read up to ``most`` tokens of a prompt; how many."""
        request, total = prompt.request, len(prompt.request.prompt)
        if prompt.caches is None:
            prompt.caches = self.target.make_cache() if request.caches is None else request.caches
            prompt.memory = self.target.make_memory(prompt.caches)
            self._begun[prompt.text.number] = request
            if (prefixes := self._prefixes_for(request)) is not None:
                request.cached_tokens = prompt.read = prefixes.restore(request.prompt[:-1], prompt.all_caches)
            request.progress(prompt.read, total)
        ends = [end for end in (*request.pauses, *request.checkpoints) if end > prompt.read]
        count = min(prompt.left, most, *(end - prompt.read for end in ends))
        if count:
            tokens, passage = request.prompt[prompt.read : prompt.read + count], backend.current().passage
            for start in range(0, count, passage):
                self.target.forward(mx.array([list(tokens[start : start + passage])]), prompt.all_caches)
                mx.eval([cache.state for cache in prompt.all_caches])
            if request.kv is not None:
                from ..models.prompt_caches import quantize

                quantize(prompt.caches, request.kv)
                mx.eval([cache.state for cache in prompt.all_caches])
            mx.clear_cache()
            prompt.read += count
            if prompt.read in request.checkpoints or any(self.target.windows):  # which will forget them
                self._keep_prompt(request, prompt.read, read_rows(prompt.all_caches))
            request.progress(prompt.read, total)
        return count

    def _join(self, prompt: _Prompt) -> None:
        """Let a text whose prompt has been read take part in steps, in a batch of texts of like length."""
        text, request = prompt.text, prompt.request
        text.rows, layers = self.target.layers_of(prompt.all_caches)
        self._keep_prompt(request, text.rows, in_order(layers, text.rows))
        text.kept = kept_as(prompt.all_caches[0])
        if request.kv is not None and text.kept is None:  # not before the first step, as in mlx-lm
            text.turn = replace(request.kv, start=max(request.kv.start, text.rows + 1))
        prompt.caches, prompt.memory = None, []  # steps must have the only references, or the caller
        state = begin(request.prompt, text.rows, layers, self.target.no_context(), request.seeds)
        del layers
        self._place(text, state)

    def _prefixes_for(self, request: Request) -> "Prefixes | None":
        """Where what is read of the request may be kept; None: nowhere."""
        return self.prefixes if request.caches is None and request.kv is None else None

    def _keep_prompt(self, request: Request, rows: int, layers: Layers) -> None:
        if (prefixes := self._prefixes_for(request)) is not None:
            prefixes.keep(request.prompt[:rows], layers)

    def _place(self, text: Text, state: State) -> None:
        batch = next((batch for batch in self._batches if self._suits(text, batch)), None)
        if batch is None:
            self._batches.append(batch := self._new_batch())
        batch.join(text, state)

    def _suits(self, text: Text, batch: Batch) -> bool:
        """Whether a text may join: it must not make the others' buffers much larger than they need."""
        if not self.target.batches:
            return False
        everyone = [*batch.everyone, text]
        needs = [bucket(each.rows + 1) for each in everyone]
        padded = max(batch.capacity, *needs)
        fits = len(everyone) * padded <= WASTE * sum(needs)
        if not fits and not self.target.leader:  # machines must decide the same, whatever weights they have
            wasted = sum(batch.nbytes_of(padded) - batch.nbytes_of(rows) for rows in needs)
            fits = wasted <= min(SPARE * sum(weight.nbytes for weight in self.target.weights), MOST_SPARE)
        alike = (text.asks_host, text.kept)  # steps that ask the host are not compiled, and wait for it
        return fits and all((each.asks_host, each.kept) == alike for each in batch.everyone)

    def _has_room(self, prompt: _Prompt) -> bool:
        """Whether another text may be admitted."""
        running = [text for batch in self._batches for text in batch.everyone]
        if not running or self.max_memory is None:
            return len(running) < self.texts
        own = self._rows_in_the_end(prompt.text, len(prompt.request.prompt))
        needed = max(batch.nbytes_of(own) for batch in self._batches)
        for batch in self._batches:
            needed += sum(batch.nbytes_of(self._rows_in_the_end(x, x.rows)) for x in batch.everyone)
        return len(running) < self.texts and self._most(needed) <= self.max_memory

    def _rows_in_the_end(self, text: Text, rows: int) -> int:
        return bucket(min(rows + text.left, max(self._longest, rows)))


def engine_here(runner: Runner, policy: Chooser, chunk: int = CHUNK, **options: Any) -> Engine:
    """An engine as it suits MLX's default device; ``options`` are ``Engine``'s."""
    device = backend.current()
    prefixes: Prefixes | None = options.get("prefixes")
    kept = max(prefixes.limit - prefixes.nbytes, 0) if prefixes else 0  # bytes it may still take
    usual: dict[str, Any] = {name: getattr(device, name) for name in ("grain", "padded", "eager")}
    usual["max_memory"] = max(backend.free_memory() - kept, 0)
    make: type[Engine] = Engine if runner.target.leader is None else runner.target.leader.engine
    return make(runner, policy, chunk, **{**usual, **options})


def _keep(prefixes: "Prefixes", request: Request, text: Text, layers: Layers, rows: int) -> None:
    """Keep a text that leaves for reuse."""
    if request.release is not None:
        request.release(layers, rows)
    tokens = [*request.prompt, *text.said][:rows]
    prefixes.keep(tokens, in_order(layers, rows, text.nodes), exact=False)  # a stop may have cut it


def _runner_for(usual: Runner, texts: Sequence[Text]) -> Step:
    """What runs the texts' steps: the usual runner, unless the host has a say in them."""
    if not any(text.asks_host for text in texts):
        return usual
    from .host import host_step

    return partial(host_step, usual, texts)
