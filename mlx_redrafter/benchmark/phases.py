"""Where a step's time goes.

Each phase is evaluated by itself here, which takes time that decoding does not spend; so this is a pass
of its own. Every second step is evaluated as a whole, to say how much of it the phases explain.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import mlx.core as mx

from .. import backend
from ..decoding.beam import Drafter
from ..decoding.cache import Cache, View, commit
from ..decoding.loop import until_end, view, with_room
from ..decoding.step import DraftShape, Output, Pick, State, begin, conclude, propose, step
from ..target import Target, from_prompt_cache
from .tables import Table

PHASES = ("draft", "verify", "accept and commit")


@dataclass
class Times:
    """Seconds of each phase of every second step, and of each of the other steps as a whole."""

    phases: list[dict[str, float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def profile(
    target: Target,
    drafter: Drafter | None,
    pick: Pick,
    shape: DraftShape,
    prompts: Iterable[Sequence[int]],
    max_tokens: int,
    stop: frozenset[int],
    chunk: int,
    tick: Callable[[], object] = lambda: None,
) -> Times:
    """Decode the answers to ``prompts``, up to ``max_tokens`` each, timing every step.

    Args:
        target: the model.
        drafter: its drafter; None if the shape has no beams.
        pick: how a token is picked.
        shape: how much is drafted.
        prompts: token ids.
        max_tokens: per answer.
        stop: token ids that end an answer.
        chunk: prompt tokens processed at once.
        tick: called after each answer.
    """
    times = Times()
    for ids in prompts:
        state, rows, left = _start(target, pick, list(ids), chunk), len(ids), max_tokens - 1
        number = 0
        while left > 0:
            grain = backend.current().grain
            state = with_room(state, rows, shape)
            shown = view(state, rows, shape, grain)
            box = [state]
            del state  # the step must hold the only reference, or buffers would be copied
            timed = _phases if number % 2 else _whole
            state, output = timed(target, drafter, pick, shape, box, shown, times if number > 1 else Times())
            tokens: Any = output.tokens[0, : output.count.item()].tolist()
            kept = until_end(tokens, left, stop)
            rows, left, number = rows + len(tokens), left - len(kept), number + 1
            if kept[-1] in stop:
                break
        tick()
    return times


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


def _start(target: Target, pick: Pick, ids: list[int], chunk: int) -> State:
    caches = target.make_cache()
    logits, context = target.read_prompt(ids, chunk, lambda done, total: None, caches)
    key, first_key = mx.random.split(mx.random.key(0))
    return begin(pick(logits, first_key), context, from_prompt_cache(caches), [ids], [len(ids)], key)


def _whole(
    target: Target,
    drafter: Drafter | None,
    pick: Pick,
    shape: DraftShape,
    box: list[State],
    shown: View,
    times: Times,
) -> tuple[State, Output]:
    _evaluate(box[0])
    start = time.perf_counter()
    state, output = step(target, drafter, pick, shape, box.pop(), shown)
    _evaluate(state, output)
    times.steps.append(time.perf_counter() - start)
    return state, output


def _phases(
    target: Target,
    drafter: Drafter | None,
    pick: Pick,
    shape: DraftShape,
    box: list[State],
    shown: View,
    times: Times,
) -> tuple[State, Output]:
    _evaluate(box[0])
    state = box.pop()
    start = time.perf_counter()
    cache = commit(state.cache)
    state = replace(state, cache=Cache([], []))
    mx.eval(vars(cache))
    committed = time.perf_counter()
    proposed = propose(target, drafter, shape, state)
    mx.eval(vars(proposed.tree), vars(proposed.found) if proposed.found else None)
    drafted = time.perf_counter()
    seen = target.verify(proposed.tree, cache, state.length, shown)
    del cache
    mx.eval(vars(seen))
    verified = time.perf_counter()
    state, output = conclude(pick, shape, state, proposed, seen)
    del seen
    _evaluate(state, output)
    end = time.perf_counter()
    seconds = (drafted - committed, verified - drafted, committed - start + end - verified)
    times.phases.append(dict(zip(PHASES, seconds, strict=True)))
    return state, output


def _evaluate(state: State, output: Output | None = None) -> None:
    arrays = {**vars(state), "cache": vars(state.cache)}
    mx.eval(arrays, vars(output) if output else None)
