"""The thread that decodes: it alone runs models; everyone else leaves it messages.

request ──► Job ──► Worker: engine.step(), again and again ──► job.deliver(Said) ──► the event loop
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.generate import maybe_set_recommended_wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..decoding.sampling import Sampling
from ..decoding.state import PLAIN
from ..engine.engine import Request
from ..engine.grammar import Grammar
from ..engine.loop import Emitted, Fixed
from ..engine.prefix_folder import PrefixFolder
from ..engine.prefixes import Prefixes
from ..model import SpeculativeModel
from ..plain import decode

T = TypeVar("T")
Logprobs = list[tuple[int, float]]  # tokens and their log-probabilities: the one said, then the likeliest


@dataclass
class Said:
    """What a text got of one step."""

    tokens: list[int] = field(default_factory=list)
    drafted: int = 0  # how many of `tokens`, from the first, were drafted
    offered: int = 0  # drafted tokens that were verified
    logprobs: list[Logprobs] = field(default_factory=list)  # for each token, if they are wanted
    finish: str | None = None  # "stop", "length", "error", or None: it goes on
    error: str = ""
    status: int = 500  # HTTP's, of an error


@dataclass
class Reading:
    """Tokens of a prompt that have been read; the first one tells how many did not have to be."""

    done: int
    total: int


@dataclass(eq=False)
class Job:
    """One text that is wanted.

    Attributes:
        prompt, max_tokens, sampling, seed, checkpoints, grammar: as of an engine's ``Request``.
        draft: False decodes plainly.
        logprobs: of how many of the likeliest tokens they are wanted, besides the one said; None: of none.
        deliver: called in the worker's thread with what happens; must be quick.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    deliver: Callable[[Said | Reading], None]
    seed: int | None = None
    checkpoints: tuple[int, ...] = ()
    grammar: Grammar | None = None
    draft: bool = True
    logprobs: int | None = None
    number: int = field(default=0, init=False)  # the engine's


class Decoding(Protocol):
    """What the worker needs of an engine."""

    @property
    def is_busy(self) -> bool: ...
    def submit(self, request: Request) -> int: ...
    def step(self) -> list[Emitted]: ...
    def cancel(self, number: int) -> None: ...
    def close(self) -> None: ...


class PlainEngine:
    """Stands in for an engine where a model cannot verify drafts: mlx-lm decodes its texts in turns."""

    def __init__(self, model: SpeculativeModel, tokenizer: TokenizerWrapper, chunk: int) -> None:
        self._together = model.ranks is not None
        self._decode = partial(
            decode,
            model.model,
            tokenizer,
            vocabulary=model.vocabulary or 1 << 30,
            ranks=model.ranks,
            prefill_step_size=chunk,
        )
        self._texts: dict[int, Iterator[Any]] = {}
        self._count = 0

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._texts)

    def submit(self, request: Request) -> int:
        """Take in a text and return its number."""
        self._count += 1
        self._texts[self._count] = self._decode(
            request=request, max_tokens=request.max_tokens, prompt_progress_callback=request.progress
        )
        return self._count

    def step(self) -> list[Emitted]:
        """One token of each text."""
        return [self._next(number, text) for number, text in list(self._texts.items())]

    def _next(self, number: int, responses: Iterator[Any]) -> Emitted:
        try:
            response = next(responses)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            if self._together:  # the others have begun what is not done here
                raise
            self.cancel(number)
            return Emitted(number, [], 0, finish="error", error=error)
        if response.finish_reason:
            self.cancel(number)
        return Emitted(
            number, [response.token], 0, response.logprobs[None], PLAIN, finish=response.finish_reason
        )

    def cancel(self, number: int) -> None:
        """Drop a text."""
        self._texts.pop(number, None)

    def close(self) -> None:
        """Drop all texts."""
        self._texts.clear()


class Served:
    """A loaded model, and the engines that decode its texts: with drafts, and without.

    Made and used in the worker's thread.
    """

    def __init__(
        self,
        model: SpeculativeModel,
        tokenizer: TokenizerWrapper,
        prefixes: Prefixes,
        folder: PrefixFolder | None,
        chunk: int,
        texts: int,
    ) -> None:
        self.model, self.tokenizer, self.prefixes, self.folder = model, tokenizer, prefixes, folder
        self._chunk, self._texts = chunk, texts
        self.used = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        engines: list[Decoding]
        runner = self.model.prepare()
        # Recurrent layers', which are known only where reading stopped.
        self.has_states = runner is not None and runner.target.has_states
        if runner is None:
            engines = [PlainEngine(self.model, self.tokenizer, self._chunk)]
        else:
            engines = [
                self.model.engine(policy, self._chunk, texts=self._texts, prefixes=self.prefixes)
                for policy in (self.model.make_policy(), Fixed(PLAIN))
            ]
        self._lanes: list[tuple[Decoding, dict[int, Job]]] = [(engine, {}) for engine in engines]

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return any(engine.is_busy for engine, _ in self._lanes)

    @property
    def texts(self) -> int:
        """How many texts are decoded, or wait to be."""
        return sum(len(jobs) for _, jobs in self._lanes)

    def submit(self, job: Job) -> None:
        """Begin a text."""
        self.used = time.monotonic()
        engine, jobs = self._lanes[0 if job.draft else -1]
        request = Request(
            job.prompt,
            job.max_tokens,
            job.sampling,
            job.seed,
            frozenset(self.tokenizer.eos_token_ids),
            progress=lambda done, total: job.deliver(Reading(done, total)),
            checkpoints=job.checkpoints,
            grammar=job.grammar,
        )
        job.number = engine.submit(request)
        jobs[job.number] = job

    def cancel(self, job: Job) -> None:
        """Drop a text, whatever has become of it."""
        engine, jobs = self._lanes[0 if job.draft else -1]
        if jobs.get(job.number) is job:
            del jobs[job.number]
            engine.cancel(job.number)

    def step(self) -> None:
        """One step of all texts."""
        self.used = time.monotonic()
        for engine, jobs in self._lanes:
            try:
                for emitted in engine.step() if engine.is_busy else []:
                    if emitted.number in jobs:
                        _deliver(emitted, jobs)
            except Exception as error:  # no memory, say: what was decoded is lost, the server goes on
                if self.model.ranks is not None:
                    self.model.ranks.end(error)
                lost = [job for _, jobs in self._lanes for job in jobs.values()]
                self.close()
                self._begin()
                for job in lost:
                    job.deliver(Said(finish="error", error=told(error)))
                return

    def close(self) -> None:
        """Drop all texts."""
        for engine, jobs in self._lanes:
            engine.close()
            jobs.clear()


def _deliver(emitted: Emitted, jobs: dict[int, Job]) -> None:
    job = jobs[emitted.number]
    if emitted.finish:
        del jobs[emitted.number]
    error = "" if emitted.error is None else told(emitted.error)
    status = 400 if isinstance(emitted.error, ValueError) else 500
    logprobs = []
    if job.logprobs is not None and emitted.logits is not None:
        logprobs = likeliest(emitted.logits, emitted.tokens, job.logprobs)
    offered = emitted.shape.size - 1
    job.deliver(Said(emitted.tokens, emitted.drafted, offered, logprobs, emitted.finish, error, status))


def told(error: BaseException) -> str:
    """An error in words."""
    return str(error) or type(error).__name__


def likeliest(logits: mx.array, tokens: list[int], count: int) -> list[Logprobs]:
    """For each of the tokens, its log-probability and those of the likeliest ones, by logits [n, V]."""
    rows = logits[: len(tokens)].astype(mx.float32)
    values = np.array(rows - mx.logsumexp(rows, axis=-1, keepdims=True))
    found = []
    for token, row in zip(tokens, values, strict=True):
        best = np.argpartition(-row, min(count, len(row) - 1))[:count]
        best = best[np.argsort(-row[best], kind="stable")]
        found.append([(int(each), float(row[each])) for each in (token, *best)])
    return found


class Helper:
    """A thread that does what it is asked, one thing after the other, and never ends.

    One that ends lets go of what MLX has compiled in it, which needs Python: that may be gone by then, and
    the process would be aborted.
    """

    def __init__(self, name: str) -> None:
        self._messages: SimpleQueue[Callable[[], None]] = SimpleQueue()
        Thread(target=self._run, name=name, daemon=True).start()

    def do(self, work: Callable[[], T]) -> "Future[T]":
        """Have something done in this thread."""
        done: Future[T] = Future()

        def act() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._messages.put(act)
        return done

    def _run(self) -> None:
        while True:
            self._messages.get()()


class Worker(Helper):
    """Runs the engines of all loaded models in one thread, step after step while any has texts.

    What it is asked to do, it does between two steps.
    """

    def __init__(self) -> None:
        self._served: list[Served] = []
        super().__init__("decoding")

    def stop(self) -> None:
        """Let go of all texts and models."""

        def release_all() -> None:
            for served in list(self._served):
                self.release(served)

        self.do(release_all).result()

    def serve(self, served: Served) -> None:
        """Decode this model's texts from now on; to be called in the worker's thread."""
        self._served.append(served)

    def release(self, served: Served) -> None:
        """Let go of a model and its texts; to be called in the worker's thread."""
        if served in self._served:
            self._served.remove(served)
        served.close()
        if served.folder is not None:
            served.folder.flush()
        served.prefixes.clear()
        if served.model.ranks is not None:
            served.model.ranks.release(served.model)
        mx.clear_cache()

    def submit(self, served: Served, job: Job) -> None:
        """Begin a text; an error comes as ``Said``."""

        def begin() -> None:
            try:
                if served not in self._served:
                    text = "the model was unloaded: ask again."
                    job.deliver(Said(finish="error", error=text, status=503))
                    return
                served.submit(job)
            except Exception as error:
                status = 400 if isinstance(error, ValueError) else 500
                job.deliver(Said(finish="error", error=told(error), status=status))

        self._messages.put(begin)

    def cancel(self, served: Served, job: Job) -> None:
        """Drop a text before the next step."""
        self._messages.put(lambda: served.cancel(job))

    def _run(self) -> None:
        maybe_set_recommended_wired_limit()
        while True:
            busy = [served for served in self._served if served.is_busy]
            self._take_messages(wait=not busy)
            for served in busy:
                served.step()

    def _take_messages(self, wait: bool) -> None:
        with contextlib.suppress(Empty):
            if wait:
                self._messages.get()()
            while True:
                self._messages.get_nowait()()
