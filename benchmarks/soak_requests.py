"""Two thousand short requests through one engine: does each one get its own text, and is memory given back?

    uv run benchmarks/soak_requests.py                    # of a tiny random model
    uv run benchmarks/soak_requests.py --requests 400 --seed 7

Requests of random lengths and settings come at random times, and each step has a random draft shape. Some
requests end at a stop token or a stop text, some are cancelled: before they begin, while their prompts are
read, or later. Each one must get what it gets alone, decoded plainly; a cancelled one, the beginning of that.
Whenever all of a round have gone, nothing of a text may be left, and memory must be what it was before.
"""

import gc
import math
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
from tqdm import tqdm

from mlx_redrafter.decoding.layers import Layers
from mlx_redrafter.decoding.sampling import Sampling
from mlx_redrafter.decoding.state import PLAIN, DraftShape, State
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.loop import Emitted, Fixed, Text
from mlx_redrafter.model import SpeculativeModel
from mlx_redrafter.stop_texts import until
from mlx_redrafter.text import Response, Writer

import mlx.core as mx  # isort: skip
from mlx_lm.sample_utils import make_logits_processors  # isort: skip

ROUND = 200  # requests between two looks at memory
VOCABULARY = 64  # of the tiny model: random drafts are right at times
SHAPES = [PLAIN, *(DraftShape(*shape) for shape in ((0, 0, None, 3), (1, 3), (2, 3, 5, 4), (4, 4, 9, 2)))]
ARRIVALS = (0, 0, 0, 0, 0, 1, 1, 2, 5)  # requests before a step, one of these
PIECES = (State, Layers, Text, Request, Emitted)  # of which nothing may be left


@dataclass(eq=False)
class Ask:
    """A request, what it gets alone, and what it got."""

    request: Request
    alone: list[int]
    ends: str | None  # how it ends alone
    stop: list[str]
    patience: float  # steps after which it is cancelled
    inbox: deque[Emitted] = field(default_factory=deque)
    said: list[int] = field(default_factory=list)
    drafted: int = 0  # of them
    text: str = ""
    finish: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether it got what it gets alone."""
        whole = letters([token for token in self.alone if token not in self.request.stop])
        places = [whole.index(stop) for stop in self.stop if stop in whole]
        if self.finish == "cancelled":
            return self.said == self.alone[: len(self.said)] and whole.startswith(self.text)
        if places:
            found = self.said == self.alone[: len(self.said)] and self.finish == "stop"
            return found and self.text == whole[: min(places)]
        return (self.said, self.text, self.finish) == (self.alone, whole, self.ends)


class OneLetterEach:
    """Stands in for a tokenizer and its detokenizer."""

    def __init__(self, ends: frozenset[int]) -> None:
        self.eos_token_ids, self._unread = ends, ""

    @property
    def detokenizer(self) -> "OneLetterEach":
        return self

    def add_token(self, token: int) -> None:
        self._unread += letters([token])

    def finalize(self) -> None:
        pass

    @property
    def last_segment(self) -> str:
        segment, self._unread = self._unread, ""
        return segment


def letters(tokens: Sequence[int]) -> str:
    """A text with a letter for each token."""
    return "".join(chr(ord("A") + token) for token in tokens)


class Random:
    """A policy that chooses at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def choose(self, rows: int, texts: Sequence[int]) -> DraftShape:
        return self.rng.choice(SHAPES)

    def observe(self, *outcome: Any) -> None:
        pass


def main() -> None:
    parser = harness.parser(__doc__, "soak_requests.json", harness.TINY)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = harness.tiny(vocabulary=VOCABULARY) if args.model == harness.TINY else harness.load(args)
    report = soak(model, args.requests, args.seed)
    print("{requests} requests ({ends}) got {tokens} tokens, {drafted} of them".format(**report))
    print("drafted, in {steps} steps. {wrong} got another text than alone;".format(**report))
    print("{left} objects are left, memory grew by {grown} bytes:".format(**report), end=" ")
    print("passed." if report["passed"] else "FAILED.")
    harness.write(args, report)
    sys.exit(not report["passed"])


def soak(model: SpeculativeModel, requests: int, seed: int = 0, size: int = ROUND) -> dict[str, Any]:
    """Send ``requests`` through one engine in rounds of ``size``; what became of them."""
    rng, before = random.Random(seed), pieces()
    engine = model.engine(Random(rng), 64, texts=12)
    engine.max_memory = 10 * 512 * bytes_per_row(engine)  # at times some wait for it
    ends: Counter[str | None] = Counter()
    wrong, active, left, tokens, drafted, steps, seconds = [], [], 0, 0, 0, 0, 0.0
    for first in tqdm(range(0, requests, size), unit="round", disable=None):
        asks = [make(model, rng) for _ in range(min(size, requests - first))]
        start = time.perf_counter()
        steps += together(engine, asks, rng)
        seconds += time.perf_counter() - start
        wrong += [f"{first + i}: {vars(ask)}" for i, ask in enumerate(asks) if not ask.is_right]
        ends += Counter(ask.finish for ask in asks)
        tokens += sum(len(ask.said) for ask in asks)
        drafted += sum(ask.drafted for ask in asks)
        del asks
        mx.synchronize()
        active.append(mx.get_active_memory())
        left = max(left, pieces() - before)
    grown = max(active[1:], default=0) - active[0] if len(active) > 1 else 0
    return {
        "requests": requests,
        "passed": not wrong and not left and grown <= 0,
        "wrong": len(wrong),
        "first_wrong": wrong[:3],
        "left": left,
        "grown": grown,
        "active_bytes": active,
        "tokens": tokens,
        "drafted": drafted,
        "steps": steps,
        "seconds": round(seconds, 1),
        "ends": dict(ends),
    }


def pieces() -> int:
    """Objects that belong to texts; the garbage collector is not asked to free any first."""
    return sum(type(found) in PIECES for found in gc.get_objects())


def bytes_per_row(engine: Engine) -> int:
    """Of one text's layers."""
    layers = engine.target.layers_of(engine.target.make_cache())[1]
    return sum(part.nbytes // part.shape[2] for rows in layers.rows for part in rows)


def make(model: SpeculativeModel, rng: random.Random) -> Ask:
    """A random request, which has been decoded alone."""
    vocabulary = model.vocabulary or VOCABULARY
    some = lambda most: [rng.randrange(vocabulary) for _ in range(rng.randint(1, most))]  # noqa: E731
    prompt = some(rng.choice((3, 30, 300)))
    if rng.random() < 0.3:  # something to copy
        prompt = (prompt[:8] * 40)[: len(prompt)]
    options: dict[str, Any] = {
        "max_tokens": rng.choice((1, rng.randint(2, 20), rng.randint(20, 80))),
        "sampling": random_sampling(rng, vocabulary),
        "seed": rng.randrange(1 << 64),
        "stop": frozenset(some(4) if rng.random() < 0.3 else ()),
    }
    if rng.random() < 0.1:
        options["processors"] = make_logits_processors({rng.randrange(vocabulary): 2.0}, 1.2)
    (alone,) = decode(model.engine(Fixed(PLAIN)), Request(prompt, **options))
    text, stop = letters([each for each in alone[0] if each not in options["stop"]]), []
    if rng.random() < 0.4 and text:
        place = rng.randrange(len(text))
        stop = [text[place : place + rng.randint(1, 4)], letters(some(3))]
    patience = rng.choice((0, 1, 3, 10, 30)) if rng.random() < 0.2 else math.inf
    return Ask(Request(prompt, **options), *alone, stop, patience)


def random_sampling(rng: random.Random, vocabulary: int) -> Sampling:
    """How tokens are picked: each setting is used now and then."""
    settings = {
        "top_p": rng.uniform(0.5, 1),
        "top_k": rng.randint(1, 2 * vocabulary),
        "min_p": rng.uniform(0, 0.3),
        "repetition_penalty": rng.uniform(1, 1.5),
        "presence_penalty": rng.uniform(-1, 1),
        "frequency_penalty": rng.uniform(-1, 1),
        "logit_bias": ((rng.randrange(vocabulary), rng.uniform(-5, 5)),),
    }
    used = {name: value for name, value in settings.items() if rng.random() < 0.2}
    return Sampling(rng.choice((0.0, 0.0, 0.5, 1.0, 1.5)), **used)


def decode(engine: Engine, request: Request) -> Iterator[tuple[list[int], str | None]]:
    """Its tokens and how it ended."""
    engine.submit(request)
    said: list[int] = []
    while engine.is_busy:
        for emitted in engine.step():
            said += emitted.tokens
            if emitted.finish:
                yield said, emitted.finish


def together(engine: Engine, asks: Sequence[Ask], rng: random.Random) -> int:
    """Decode them all: they come at random times, and go when they are over, or lose patience; steps."""
    waiting, running, steps = deque(asks), {}, 0
    while waiting or engine.is_busy:
        for _ in range(min(rng.choice(ARRIVALS), len(waiting))):
            ask = waiting.popleft()
            running[engine.submit(ask.request)] = ask, responses(ask)
        for emitted in engine.step():
            ask, stream = running[emitted.number]
            ask.inbox.append(emitted)
            for _ in emitted.tokens:
                response = next(stream)
                ask.said.append(response.token)
                ask.drafted += response.from_draft
                ask.text += response.text
                ask.finish = response.finish_reason
                if ask.finish:
                    engine.cancel(emitted.number)  # it need not know of the stop text
                    del running[emitted.number]
                    break
        for number, (ask, _) in list(running.items()):
            ask.patience -= 1
            if ask.patience < 0:
                engine.cancel(number)
                ask.finish = "cancelled"
                del running[number]
        steps += 1
    assert not running
    return steps


def responses(ask: Ask) -> Iterator[Response]:
    """One for each token of the steps in its inbox, up to a stop text."""
    writer = Writer(OneLetterEach(ask.request.stop), len(ask.request.prompt), ask.request.max_tokens)

    def written() -> Iterator[Response]:
        while not writer.finished:
            yield from writer.write(ask.inbox.popleft())

    return until(written(), ask.stop)


if __name__ == "__main__":
    main()
