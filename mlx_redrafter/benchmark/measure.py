"""Contenders answer the same prompts in turn, each answer timed from its first token on."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, zip_longest
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream

from ..chat import Message
from ..conversations import Prompt
from ..decoding.state import DraftShape
from ..text import Response

Answer = Callable[[list[int], int], Iterator[Any]]  # token ids, tokens at most -> responses like mlx-lm's


class Meter:
    """Measures energy; this one is for machines that cannot say."""

    def begin(self) -> None:
        """Start anew."""

    def end(self) -> float | None:
        """Joules since ``begin``; None where the machine cannot say."""
        return None


@dataclass(frozen=True)
class Contender:
    """A way to decode."""

    name: str
    answer: Answer


@dataclass(frozen=True)
class Run:
    """One timed answer."""

    tokens: list[int]  # what was said, a stop token included
    text: str  # the same as text
    prompt_tokens: int  # how many were read
    first: float  # seconds until the first token
    seconds: float  # from the first token to the last
    peak_memory: float = 0.0  # GB
    steps: int = 0  # verification steps; 0 where nothing was drafted
    accepted: tuple[float, ...] = ()  # for each depth, the steps that emitted the token drafted there
    joules: float | None = None  # from the first token to the last; None where the machine cannot say
    waited: float | None = None  # of the seconds, the device's wait for the host; None: that is not known
    copied: int = 0  # tokens that came from the text itself where the drafter had none
    shapes: Mapping[DraftShape, int] = field(default_factory=dict)  # how many steps used each draft shape

    @property
    def generated(self) -> int:
        """Tokens that ``seconds`` were spent on."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Divergence:
    """Where an answer first differs from the baseline's."""

    place: int  # tokens that are the same before
    gap: float | None  # the baseline's logit of its own token less that of the other; None: an answer ends


@dataclass(frozen=True)
class Repeat:
    """One contender's answer to one turn."""

    turn: int
    trial: int
    contender: str
    run: Run
    divergence: Divergence | None = None


@dataclass
class Asked:
    """A prompt and all answers to it."""

    number: int
    prompt: Prompt
    repeats: list[Repeat] = field(default_factory=list)

    def runs(self, contender: str, trial: int | None = None) -> list[Run]:
        """The answers of a contender, of all trials or one."""
        return [x.run for x in self.repeats if x.contender == contender and trial in (None, x.trial)]


@dataclass(frozen=True)
class Plan:
    """How prompts are asked."""

    contenders: Sequence[Contender]  # the first one is the baseline
    encode: Callable[[list[Message]], list[int]]  # a conversation's token ids, up to where the model goes on
    max_tokens: int  # per answer; -1 is no limit
    turns: int | None = None  # of each prompt at most; None asks all
    trials: int = 1  # how often each turn is answered
    exact: bool = True  # whether all have to say what the baseline says
    longest: int | None = None  # tokens that a prompt may have (None: any); later turns beyond are left out

    @property
    def runs_per_turn(self) -> int:
        """Answers timed for each turn."""
        return len(self.contenders) * self.trials


def measure(
    plan: Plan, prompts: Sequence[Prompt], meter: Meter, tick: Callable[[], object] = lambda: None
) -> Iterator[Asked]:
    """Ask every prompt; yield each when it is finished.

    Contenders take turns, in the order A B C, then C B A, so that a drift of the machine's speed cancels.
    Every contender gets the same conversation, whose history are the baseline's first answers.

    Args:
        tick: called after each answer.
    """
    rounds = count()
    for number, prompt in enumerate(prompts):
        asked = Asked(number, prompt)
        history: list[Message] = []
        for turn, messages in enumerate(turns_of(prompt)[: plan.turns]):
            history += messages
            ids = plan.encode(history)
            if turn and plan.longest is not None and len(ids) > plan.longest:
                break
            for trial in range(plan.trials):
                asked.repeats += _compete(plan, ids, turn, trial, next(rounds), meter, tick)
            history.append({"role": "assistant", "content": asked.runs(plan.contenders[0].name, 0)[-1].text})
        yield asked


def turns_of(prompt: Prompt) -> list[list[Message]]:
    """What is added to the conversation before each answer; given ``messages`` are one turn."""
    if prompt.messages is not None:
        return [prompt.messages]
    return [[{"role": "user", "content": text}] for text in prompt.turns]


def warm_up(plan: Plan, ids: list[int], tokens: int) -> None:
    """Let every contender decode a little, so that what happens once is over."""
    for contender in plan.contenders:
        for _ in contender.answer(ids, tokens):
            pass
    settle()


def time_answer(contender: Contender, ids: list[int], max_tokens: int, meter: Meter) -> Run:
    """Time one answer."""
    settle()
    mx.reset_peak_memory()
    start = time.perf_counter()
    with contextlib.closing(contender.answer(ids, max_tokens)) as responses:  # type: ignore[type-var]
        last = next(responses)
        first = time.perf_counter()
        meter.begin()
        said = [(last.token, last.text, last.from_draft)]
        for last in responses:
            said.append((last.token, last.text, last.from_draft))
        end = time.perf_counter()
        joules = meter.end()
    tokens, texts, drafted = map(list, zip(*said, strict=True))
    peak = mx.get_peak_memory() / 1e9
    run = Run(tokens, "".join(texts), len(ids), first - start, end - first, peak, joules=joules)
    if not isinstance(last, Response):  # but mlx-lm's
        return replace(run, steps=drafted.count(False) if any(drafted) else 0)
    accepted = tuple(share * last.steps for share in last.acceptance)
    run = replace(run, steps=last.steps, accepted=accepted, copied=last.copied, shapes=dict(last.shapes))
    return replace(run, waited=last.waited) if last.steps else run


def settle() -> None:
    """Wait for what is still being computed (mlx-lm is always a token ahead), and forget free buffers."""
    mx.synchronize()
    mx.synchronize(generation_stream)
    mx.clear_cache()


def _compete(
    plan: Plan, ids: list[int], turn: int, trial: int, number: int, meter: Meter, tick: Callable[[], object]
) -> list[Repeat]:
    """One answer of each contender."""
    runs: dict[str, Run] = {}
    for contender in plan.contenders if number % 2 == 0 else reversed(plan.contenders):
        runs[contender.name] = time_answer(contender, ids, plan.max_tokens, meter)
        tick()
    baseline = plan.contenders[0]
    return [
        Repeat(turn, trial, name, run, _diverged(baseline, ids, runs[baseline.name], run, plan.exact))
        for name, run in runs.items()
    ]


def _diverged(baseline: Contender, ids: list[int], wanted: Run, found: Run, exact: bool) -> Divergence | None:
    pairs = enumerate(zip_longest(wanted.tokens, found.tokens))
    place = next((i for i, (x, y) in pairs if x != y), None)
    if place is None or not exact:
        return None
    if place >= min(len(wanted.tokens), len(found.tokens)):
        return Divergence(place, None)
    *_, last = baseline.answer(ids, place + 1)  # again, for the logits that were not kept
    logits = last.logprobs.astype(mx.float32)
    return Divergence(place, float(logits[wanted.tokens[place]] - logits[found.tokens[place]]))
