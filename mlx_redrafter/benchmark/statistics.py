"""Ratios of speeds and how sure they are, from timed answers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

import numpy as np

from ..decoding.state import DraftShape
from ..record import describe_shape
from .measure import Asked, Run

RESAMPLES = 10_000  # of the bootstrap
CONFIDENCE = 95  # per cent


@dataclass(frozen=True)
class Interval:
    """A median and the 95 % bootstrap interval around it; None where nothing was measured."""

    median: float | None = None
    low: float | None = None
    high: float | None = None


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The median of P prompts' values, and its interval for other prompts of the same kind.

    The interval holds 95 % of the medians of P prompts drawn with replacement (percentile bootstrap).
    """
    if not values:
        return Interval()
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))  # [R, P]
    medians = np.median(np.asarray(values, float)[draws], axis=1)  # [R]
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Interval(median(values), float(low), float(high))


def ratio(asked: Asked, name: str, baseline: str) -> float | None:
    """How many times the baseline's speed ``name`` had on one prompt, all turns together.

    Each trial gives one ratio, of answers that were timed next to each other; this is their median.
    None if an answer had no second token to time.
    """
    ratios = []
    for trial in sorted({repeat.trial for repeat in asked.repeats}):
        mine, theirs = (speed(asked.runs(contender, trial)) for contender in (name, baseline))
        if mine is not None and theirs is not None:
            ratios.append(mine / theirs)
    return median(ratios) if ratios else None


def speed(runs: Sequence[Run]) -> float | None:
    """Tokens after each first one per second, of all runs together; None if there were none."""
    tokens, seconds = sum(run.generated for run in runs), sum(run.seconds for run in runs)
    return tokens / seconds if tokens and seconds > 0 else None


def summary(asked: Sequence[Asked], name: str, baseline: str, exact: bool) -> dict[str, Any]:
    """What the report says of prompts: how contender ``name`` fared, and ``baseline``.

    ``identical`` is None unless ``exact``, where both had to say the same.
    """
    mine = [run for prompt in asked for run in prompt.runs(name)]
    theirs = [run for prompt in asked for run in prompt.runs(baseline)]
    ratios = [r for prompt in asked if (r := ratio(prompt, name, baseline)) is not None]
    return {
        "prompts": len(asked),
        "speedup": asdict(interval(ratios)),
        "tokens_per_step": tokens_per_step(mine),
        "acceptance": acceptance(mine),
        **{key: figure(mine) for key, figure in FIGURES.items()},
        **{f"baseline_{key}": figure(theirs) for key, figure in FIGURES.items()},
        "copied_tokens": sum(run.copied for run in mine),
        "shapes": [{**describe_shape(x), "steps": n} for x, n in shapes_used(mine).most_common()],
        "device_waits": device_waits(mine),
        **equality(asked, name, exact),
    }


def tokens_per_step(runs: Sequence[Run]) -> float:
    """Tokens that steps emitted per step; 1 where every step emits one."""
    steps = sum(run.steps for run in runs)
    return sum(run.generated for run in runs if run.steps) / steps if steps else 1.0


def acceptance(runs: Sequence[Run]) -> list[float]:
    """For each depth, the share of all steps that emitted the token drafted there."""
    steps = sum(run.steps for run in runs)
    depths = zip_longest(*(run.accepted for run in runs if run.steps), fillvalue=0.0)
    return [sum(hits) / steps for hits in depths]


def device_waits(runs: Sequence[Run]) -> float | None:
    """The share of the time in which the device waited for the host; None where that is not known."""
    known = [(run.waited, run.seconds) for run in runs if run.waited is not None]
    seconds = sum(whole for _, whole in known)
    return sum(waited for waited, _ in known) / seconds if seconds > 0 else None


def shapes_used(runs: Sequence[Run]) -> Counter[DraftShape]:
    """How many steps used each draft shape."""
    return sum((Counter(run.shapes) for run in runs), Counter())


def prompt_speed(runs: Sequence[Run]) -> float | None:
    """Prompt tokens processed per second, all runs together."""
    seconds = sum(run.first for run in runs)
    return sum(run.prompt_tokens for run in runs) / seconds if seconds > 0 else None


def energy_per_token(runs: Sequence[Run]) -> float | None:
    """Joules per token after the first, all runs together; None where the machine cannot say."""
    known = [(run.joules, run.generated) for run in runs if run.joules is not None]
    tokens = sum(n for _, n in known)
    return sum(joules for joules, _ in known) / tokens if tokens else None


def equality(asked: Sequence[Asked], name: str, exact: bool) -> dict[str, Any]:
    """Whether all outputs were the baseline's, and how those that were not differed."""
    if not exact:
        return {"identical": None, "divergence": None}
    repeats = [repeat for prompt in asked for repeat in prompt.repeats if repeat.contender == name]
    found = [repeat.divergence for repeat in repeats if repeat.divergence is not None]
    same = sum(len(r.run.tokens) if r.divergence is None else r.divergence.place for r in repeats)
    compared = same + len(found)
    return {
        "identical": not found,
        "divergence": {
            "outputs": len(repeats),
            "diverged": len(found),
            "tokens_compared": compared,
            "per_1000_tokens": 1000 * len(found) / compared if compared else 0.0,
            "logit_gaps": sorted(d.gap for d in found if d.gap is not None),
        },
    }


FIGURES: dict[str, Callable[[Sequence[Run]], float | None]] = {  # of both contenders
    "tps": speed,
    "prompt_tps": prompt_speed,
    "time_to_first_token": lambda runs: median(run.first for run in runs) if runs else None,
    "peak_memory_gb": lambda runs: max((run.peak_memory for run in runs), default=None),
    "energy_per_token": energy_per_token,
}
