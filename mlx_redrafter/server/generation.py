"""The texts of one request, from their submission to what is told of them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .output import Reader, Update
from .worker import Job, Reading, Said, Served, Worker

KEEP_ALIVE = 5.0  # seconds without a word after which a stream says that it is still there


@dataclass
class Usage:
    """What a request took, all its texts together."""

    prompt_tokens: int = 0  # of each prompt once
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # of these
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0  # after the first token

    @property
    def extensions(self) -> dict[str, Any]:
        """What OpenAI's usage has no words for."""
        found: dict[str, Any] = {
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "steps": self.steps,
        }
        later = self.completion_tokens - 1
        if self.steps and later > 0:
            found["tokens_per_step"] = round(later / self.steps, 3)
            found["tokens_per_second"] = round(later / max(self.seconds, 1e-9), 2)
        if self.first_token_seconds is not None:
            found["first_token_seconds"] = round(self.first_token_seconds, 4)
        return found


class Generation:
    """Runs the texts of a request.

    Args:
        texts: for each a job without a receiver yet, and the reader of what it says.
    """

    def __init__(
        self, worker: Worker, served: Served, texts: Sequence[tuple[Callable[..., Job], Reader]]
    ) -> None:
        self._worker, self._served = worker, served
        self.readers = [reader for _, reader in texts]
        self._queue: asyncio.Queue[tuple[int, Said | Reading]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def receiver(number: int) -> Callable[[Said | Reading], None]:
            def deliver(event: Said | Reading) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                    loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

            return deliver

        self._jobs = [make(deliver=receiver(number)) for number, (make, _) in enumerate(texts)]
        self._cached: dict[int, int] = {}
        self._begun = time.monotonic()
        self._first: float | None = None
        self._last = self._begun

    async def updates(self) -> AsyncGenerator[tuple[int, Update] | Reading | None, None]:
        """What is added to which text; how far a prompt has been read; None after a while without news."""
        waiting = len(self._jobs)
        for job in self._jobs:
            self._worker.submit(self._served, job)
        while waiting:
            try:
                number, event = await asyncio.wait_for(self._queue.get(), KEEP_ALIVE)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Reading):
                self._cached.setdefault(number, event.done)
                yield event
                continue
            reader = self.readers[number]
            if reader.ended:
                continue
            self._last = time.monotonic()
            if self._first is None and event.tokens:
                self._first = self._last
            update = reader.take(event)
            if update.finish:
                waiting -= 1
                if not event.finish:  # a stop text, which the engine does not know
                    self._worker.cancel(self._served, self._jobs[number])
            yield number, update

    def close(self) -> None:
        """Drop the texts that have not ended."""
        for job, reader in zip(self._jobs, self.readers, strict=True):
            if not reader.ended:
                self._worker.cancel(self._served, job)

    def stop(self, why: str = "the server is shutting down.") -> None:
        """End all texts at once: the server leaves."""
        self.close()
        for number in range(len(self._jobs)):  # those that have ended take no more
            self._queue.put_nowait((number, Said(finish="error", error=why, status=503)))

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        prompts = {tuple(job.prompt): len(job.prompt) for job in self._jobs}
        return Usage(
            sum(prompts.values()),
            min(self._cached.values(), default=0) if len(prompts) == 1 else sum(self._cached.values()),
            sum(reader.tokens for reader in self.readers),
            sum(reader.reasoning for reader in self.readers),
            sum(reader.offered for reader in self.readers),
            sum(reader.accepted for reader in self.readers),
            sum(reader.steps for reader in self.readers),
            None if self._first is None else self._first - self._begun,
            0.0 if self._first is None else self._last - self._first,
        )
