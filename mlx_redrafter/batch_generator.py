"""mlx-lm's ``BatchGenerator`` with drafts: programs that use that class change one import."""

import contextlib
import copy
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from .decoding.layers import Layers
from .engine.engine import Request
from .engine.loop import Emitted, Processor, Sampler
from .model import SpeculativeModel
from .models.prompt_caches import to_prompt_cache

try:
    from mlx_lm.generate import BatchGenerator as PlainBatchGenerator
    from mlx_lm.generate import (
        GenerationBatch,
        PromptProcessingBatch,
        StopSequences,
        generation_stream,
        maybe_set_recommended_wired_limit,
    )
    from mlx_lm.generate_utils import BatchCounters, BatchCountersSnapshot, BatchStats
except ImportError as error:
    raise ValueError("BatchGenerator needs mlx-lm 0.32.2 or newer (Python 3.11): update it.") from error

Response = GenerationBatch.Response
PromptResponse = PromptProcessingBatch.Response


@dataclass(eq=False)
class _Sequence:
    """A text from its insertion until it has been handed out."""

    uid: int
    tokens: list[int]  # that its cache holds, those of the caller's cache included
    prompt: list[int]
    caches: list[KVCache] | None
    matcher: Any
    read: int = 0  # prompt tokens
    ready: deque[tuple[int, mx.array, str | None]] = field(
        default_factory=deque
    )  # token, log-probabilities, end
    layers: Layers | None = None  # once it has ended

    def keep(self, layers: Layers, rows: int) -> None:
        """Take the layers of the finished text, unless it was ended before."""
        self.layers = self.layers or layers


class BatchGenerator:
    """Continuous batching with the methods, arguments and responses of ``mlx_lm.generate.BatchGenerator``.

    Every text's tokens have exactly the distribution that mlx-lm's class gives them; ``next`` hands out one
    token of each text, as that does, though a step may have given several. A model that cannot verify drafts
    is decoded by mlx-lm's own class.

    Args:
        model: from ``load``, or any mlx-lm model (drafts are then copied from the texts).
        stop_tokens: sequences of token ids that end a text, and belong to it.
        completion_batch_size: the most texts decoded at once.
        prefill_batch_size: accepted, as by mlx-lm; prompts are read one after the other here.
        prefill_step_size: prompt tokens read between two steps.
        Others are as in mlx-lm.
    """

    model: SpeculativeModel

    def __new__(cls, model: SpeculativeModel | nn.Module, **options: Any) -> Any:
        own = model if isinstance(model, SpeculativeModel) else SpeculativeModel(model, None)
        if own.prepare_or_tell() is None or options.get("max_kv_size") is not None:
            return PlainBatchGenerator(own.model, **options)
        made = super().__new__(cls)
        made.model = own
        return made

    def __init__(
        self,
        model: SpeculativeModel | nn.Module,
        *,
        max_tokens: int = 128,
        stop_tokens: Sequence[Sequence[int]] | None = None,
        sampler: Sampler | None = None,
        logits_processors: Sequence[Processor] | None = None,
        completion_batch_size: int = 32,
        prefill_batch_size: int = 8,
        prefill_step_size: int = 2048,
        max_kv_size: int | None = None,
        stream: Any = None,
    ) -> None:
        self.max_tokens, self.sampler = max_tokens, sampler
        self.logits_processors = list(logits_processors or [])
        self.stream = stream or generation_stream
        self._stop = StopSequences(stop_tokens or None)
        texts = max(completion_batch_size, prefill_batch_size)
        self._engine = self.model.engine(self.model.make_policy(), prefill_step_size, texts=texts)
        self._sequences: dict[int, _Sequence] = {}  # by uid
        self._numbers: dict[int, int] = {}  # the engine's number of a text -> its uid
        self._progress: list[PromptResponse] = []
        self._count, self._last_read = 0, 0.0
        self._counters = BatchCounters()
        self._old_wired_limit = maybe_set_recommended_wired_limit()

    def insert(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int] | None = None,
        *args: Any,
        **options: Any,
    ) -> list[int]:
        """Take in prompts and return their numbers. Arguments are ``insert_segments``'s."""
        return self.insert_segments([[prompt] for prompt in prompts], max_tokens, *args, **options)

    def insert_segments(
        self,
        segments: Sequence[Sequence[Sequence[int]]],
        max_tokens: Sequence[int] | None = None,
        caches: Sequence[list[KVCache] | None] | None = None,
        all_tokens: Sequence[list[int]] | None = None,
        samplers: Sequence[Sampler | None] | None = None,
        logits_processors: Sequence[Sequence[Processor] | None] | None = None,
        stop_sequences: Sequence[StopSequences] | None = None,
    ) -> list[int]:
        """Take in prompts that are given in parts; reading one pauses at the end of each part.

        Args:
            segments: for each prompt its parts, token ids.
            max_tokens: for each prompt, as all that follow.
            caches: mlx-lm caches of what comes before.
            all_tokens: the tokens that these hold.
            samplers: functions from log-probabilities [n, V] to tokens [n].
            logits_processors: functions of tokens [T] and logits [1, V].
            stop_sequences: what ends a text.

        Raises:
            ValueError: an option has not one entry per prompt, a prompt is empty, or a limit is not positive;
                nothing is taken in then.
        """
        count = len(segments)
        given: dict[str, Sequence[Any]] = {
            "max_tokens": max_tokens or [self.max_tokens] * count,
            "caches": caches or [None] * count,
            "all_tokens": all_tokens or [[] for _ in segments],
            "samplers": samplers or [None] * count,
            "logits_processors": logits_processors or [self.logits_processors] * count,
            "stop_sequences": stop_sequences or [self._stop] * count,
        }
        for name, values in given.items():
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} prompts: give one for each.")
        made = []
        for uid, (parts, *each) in enumerate(zip(segments, *given.values(), strict=True), self._count):
            made.append(self._made(uid, parts, *each))
        for sequence, request in made:
            self._sequences[sequence.uid] = sequence
            self._numbers[self._engine.submit(request)] = sequence.uid
        self._count += count
        return [sequence.uid for sequence, _ in made]

    def next(self) -> tuple[list[PromptResponse], list[Response]]:
        """Go on: what was read of prompts, and one more token of each text, as far as there are any."""
        with mx.stream(self.stream):
            if not any(sequence.ready for sequence in self._sequences.values()):
                self._step()
            progress, self._progress = self._progress, []
            ready = [sequence for sequence in self._sequences.values() if sequence.ready]
            return progress, [self._response(sequence) for sequence in ready]

    def next_generated(self) -> list[Response]:
        """One more token of each text; [] once there are none."""
        while True:
            progress, responses = self.next()
            if responses or not (progress or self._engine.is_busy):
                return responses

    def remove(self, uids: Sequence[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        """Drop texts; with ``return_prompt_caches``, what ``extract_cache`` says of them."""
        caches = self.extract_cache(uids) if return_prompt_caches else {}
        for number, uid in list(self._numbers.items()):
            if uid in set(uids):
                self._engine.cancel(number)
                del self._numbers[number]
        for uid in uids:
            self._sequences.pop(uid, None)
        return caches

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[list[KVCache] | None, list[int]]]:
        """For each text its mlx-lm caches and the tokens that they hold."""
        found = {}
        for number, uid in self._numbers.items():
            if uid in set(uids):
                found[uid] = self._extract(number, self._sequences[uid])
        return found

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of all buffers in which texts are decoded."""
        return self._engine.nbytes

    @contextlib.contextmanager
    def stats(self) -> Iterator[BatchStats]:
        """What is done while the block runs."""
        stats, start = BatchStats(), BatchCountersSnapshot(**asdict(self._counters))
        try:
            yield stats
        finally:
            stats += BatchCountersSnapshot.between(start, BatchCountersSnapshot(**asdict(self._counters)))

    def close(self) -> None:
        """Let all texts go."""
        self.remove(list(self._sequences))
        if self._old_wired_limit is not None:
            mx.synchronize(self.stream)
            mx.set_wired_limit(self._old_wired_limit)
            self._old_wired_limit = None

    def _made(
        self,
        uid: int,
        parts: Sequence[Sequence[int]],
        max_tokens: int,
        caches: list[KVCache] | None,
        all_tokens: list[int],
        sampler: Sampler | None,
        processors: Sequence[Processor] | None,
        stop: StopSequences,
    ) -> tuple[_Sequence, Request]:
        """A text and the engine's request for it."""
        ends = [len(part) for part in parts if len(part)]
        if not ends:
            raise ValueError(f"prompt {uid} is empty: give some tokens.")
        if max_tokens < 1:
            raise ValueError(f"max tokens {max_tokens} of prompt {uid} is not usable: give 1 or more.")
        caches = (
            None if caches is None else [_copied(cache) for cache in caches]
        )  # the caller's stay as they are
        sequence = _Sequence(uid, [*all_tokens], [t for part in parts for t in part], caches, stop.matcher())
        sampler = sampler or self.sampler
        request = Request(
            sequence.prompt,
            max_tokens,
            processors=processors or (),
            sampler=sampler,
            caches=caches,
            release=sequence.keep,
            progress=lambda done, total: self._read(sequence, done, total, pauses),
            pauses=(pauses := set(itertools.accumulate(ends))),
        )
        return sequence, request

    def _read(self, sequence: _Sequence, done: int, total: int, pauses: set[int]) -> None:
        if done == sequence.read:
            return
        self._counters.prompt_tokens += done - sequence.read
        sequence.read, self._last_read = done, time.perf_counter()
        if done == total:
            sequence.tokens += sequence.prompt
        self._progress.append(PromptResponse(sequence.uid, (done, total), done in pauses, done == total))

    def _step(self) -> None:
        """One step of the engine; what it gave waits to be handed out."""
        self._last_read = start = time.perf_counter()
        emitted = self._engine.step()
        self._counters.prompt_time += self._last_read - start
        self._counters.decode_time += time.perf_counter() - self._last_read
        self._counters.generation_tokens += sum(len(each.tokens) for each in emitted)
        self._counters.generation_steps += bool(emitted)
        for each in emitted:
            self._take(self._sequences[self._numbers[each.number]], each)

    def _take(self, sequence: _Sequence, emitted: Emitted) -> None:
        if emitted.error is not None:
            self.remove([sequence.uid])
            raise vars(emitted).pop("error")  # this frame must not hold what holds it
        assert emitted.logits is not None
        finish = None
        for place, token in enumerate(emitted.tokens):
            ended = place == len(emitted.tokens) - 1 and emitted.finish is not None
            finish = "stop" if sequence.matcher.advance(token) else "length" if ended else None
            logits = emitted.logits[place]
            sequence.ready.append((token, logits - mx.logsumexp(logits, keepdims=True), finish))
            if finish is not None:
                break
        if finish is not None and emitted.finish is None:
            sequence.layers = self._engine.layers_of(emitted.number)
            self._engine.cancel(emitted.number)
        if finish is not None:
            del self._numbers[emitted.number]

    def _response(self, sequence: _Sequence) -> Response:
        token, logprobs, finish = sequence.ready.popleft()
        sequence.tokens.append(token)
        caches, tokens = None, None
        if finish is not None:
            del self._sequences[sequence.uid]
            caches, tokens = self._caches(sequence), sequence.tokens
        return Response(sequence.uid, token, logprobs, finish, caches, tokens)

    def _caches(self, sequence: _Sequence) -> list[KVCache]:
        """mlx-lm caches that hold all tokens that were handed out, the last one included."""
        target = self._engine.target
        assert sequence.layers is not None
        caches = target.make_cache()
        to_prompt_cache(sequence.layers, len(sequence.tokens) - 1, caches)
        target.forward(mx.array([sequence.tokens[-1:]]), caches)
        return caches

    def _extract(self, number: int, sequence: _Sequence) -> tuple[list[KVCache] | None, list[int]]:
        if (layers := self._engine.layers_of(number)) is not None:
            sequence.layers = layers
            return self._caches(sequence), sequence.tokens
        caches = self._engine.caches_of(number) or sequence.caches  # it is being read, or waits
        return caches and [_copied(cache) for cache in caches], sequence.tokens + sequence.prompt[
            : sequence.read
        ]


def _copied(cache: Any) -> Any:
    """A cache of the same rows or states; writing to it leaves the other as it is."""
    twin: Any = copy.copy(cache)
    if isinstance(twin, CacheList):
        twin.caches = tuple(map(_copied, twin.caches))
    elif isinstance(twin, ArraysCache):
        twin.cache = [*twin.cache]
    elif twin.offset:
        twin.keys, twin.values = (part[..., : twin.offset, :] for part in (twin.keys, twin.values))
    return twin
