"""Where a step's time goes.

Each phase is evaluated by itself here, which takes time that decoding does not spend; so this is a pass
of its own. Every second step is evaluated as a whole, to say how much of it the phases explain.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import mlx.core as mx

from ..decoding.sampling import Sampling
from ..decoding.state import DraftShape, Output, State
from ..engine.engine import Request
from ..engine.loop import Fixed
from ..model import SpeculativeModel
from .tables import Table

PHASES = ("draft", "verify", "accept")  # the commit of the step before is part of "verify"
WARM_UP = 3  # steps of each answer that are not timed, the prompt's last among them


@dataclass
class Times:
    """Seconds of each phase of every second step, and of each of the other steps as a whole."""

    phases: list[dict[str, float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def profile(
    model: SpeculativeModel,
    sampling: Sampling,
    shape: DraftShape,
    prompts: Iterable[Sequence[int]],
    max_tokens: int,
    stop: frozenset[int],
    chunk: int,
    tick: Callable[[], object] = lambda: None,
) -> Times:
    """Decode the answers to ``prompts``, up to ``max_tokens`` each, timing every step.

    Args:
        model: decodes them.
        sampling: how a token is picked.
        shape: how much is drafted.
        prompts: token ids.
        max_tokens: per answer.
        stop: token ids that end an answer.
        chunk: prompt tokens processed at once.
        tick: called after each answer.
    """
    times = Times()
    for ids in prompts:
        engine = model.engine(Fixed(shape), chunk, hand_over=_Stopwatch(times))
        engine.submit(Request(ids, max_tokens, sampling, 0, stop))
        while engine.is_busy:
            engine.step()
        tick()
    return times


class _Stopwatch:
    """Evaluates the steps that it is given at once: as a whole, or phase by phase, in turn."""

    def __init__(self, times: Times) -> None:
        self.times, self.number = times, 0

    def __call__(self, state: State, output: Output) -> None:
        self.number += 1
        arrays = {**vars(state), "layers": vars(state.layers)}, vars(output)
        parts = [output.drafted, output.verified, arrays] if self.number % 2 else [arrays]
        times = [time.perf_counter()]
        for part in parts:
            mx.eval(part)
            times.append(time.perf_counter())
        took = [after - before for before, after in pairwise(times)]
        if self.number <= WARM_UP:
            return
        if len(took) > 1:
            self.times.phases.append(dict(zip(PHASES, took, strict=True)))
        else:
            self.times.steps += took


def summarise(times: Times, shape: dict[str, Any]) -> dict[str, Any] | None:
    """What the report says of the phases; None if no step was timed both ways."""
    if not times.phases or not times.steps:
        return None
    whole = median(times.steps)
    return {
        "shape": shape,
        "steps": len(times.phases),
        "seconds": {name: median(phases[name] for phases in times.phases) for name in PHASES},
        "step_seconds": whole,
        "explained": median(sum(phases.values()) for phases in times.phases) / whole,
    }


def phase_table(report: dict[str, Any]) -> Table:
    """Milliseconds per phase."""
    found = report["phases"]
    total = sum(found["seconds"].values())
    rows = [[name, f"{1000 * s:.2f}", f"{100 * s / total:.0f} %"] for name, s in found["seconds"].items()]
    rows.append(["a whole step", f"{1000 * found['step_seconds']:.2f}", ""])
    waits = report["overall"]["device_waits"]
    notes = [
        f"Medians of {found['steps']} steps, evaluated phase by phase, in turn with as many whole ones: the "
        f"phases add up to {100 * found['explained']:.0f} % of a step."
    ]
    if waits is not None:
        notes.append(f"In normal decoding the device waits for the host {100 * waits:.1f} % of the time.")
    return Table("Time per step", ["phase", "ms", "share"], rows, notes)
