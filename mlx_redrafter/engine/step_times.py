"""Which draft shapes a model may use, and how long a step takes with each on this machine.

Step times are measured at first use, in a few seconds, and kept in the cache folder: what decides them is
the chip, the weights (and how they are quantized) and the versions. What is damaged or old is measured again.
"""

import contextlib
import functools
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from ..blas import blas_threads, load_blas
from ..decoding.state import PLAIN, DraftShape
from ..loading.cache import read_note, versions, write_note
from ..models.identity import identity_of
from . import backend
from .loop import Chooser, Fixed
from .policy import Policies, StepTimes, policy_for, reason, times_for
from .runner import Runner

OLD, DOUBTED = 7 * 24 * 3600.0, 3600.0  # seconds after which times are measured anew, and doubtful ones


def make_policy(runner: Callable[[], Runner], lookup: int | None = None) -> Chooser:
    """The policy for a model on this machine; copies at most ``lookup`` tokens per step.

    Where step times cannot be had, for whatever reason, it decodes plainly, with a warning.

    Args:
        runner: gives what runs the model's steps; asked for again whenever something is to be measured.
    """
    shapes = candidates(runner(), lookup)
    if len(shapes) == 1:
        return Fixed(shapes[0])
    measured = functools.cache(lambda texts: step_times(runner(), shapes, texts))  # kept or not
    made = Policies(lambda texts, known: policy_for(shapes, times_for(measured, texts), known))
    try:
        made.of(1)
    except Exception as error:
        warnings.warn(f"{reason(error)}: decoding plainly.", stacklevel=2)
        return Fixed(shapes[0])
    return made


def candidates(runner: Runner | None, lookup: int | None = None) -> list[DraftShape]:
    """The device's shapes that the model can use, plain decoding first.

    Args:
        runner: of the model; without a drafter, shapes with beams are left out. None: plain decoding only.
        lookup: tokens to be copied from the text per step at most; None: as the device's shapes say.
    """
    if runner is None:
        return [PLAIN]
    drafter: Any = runner.drafter
    known = drafter.config.head_outputs if drafter else 0
    usable = backend.current().shapes_for(runner.target.weights)
    shapes = [shape for each in usable if (shape := _fit(each, known, lookup)) is not None]
    return list(dict.fromkeys(shapes if runner.target.trees else [shape.chain for shape in shapes]))


def _fit(shape: DraftShape, known: int, lookup: int | None) -> DraftShape | None:
    """The shape with at most ``known`` beams and ``lookup`` copied tokens; None if it may have no beams."""
    if shape.width and not known:
        return None
    width = min(shape.width, known)
    copied = shape.lookup if lookup is None else min(shape.lookup, lookup)
    nodes = shape.nodes and min(shape.nodes, 1 + width * shape.length + copied)
    return replace(shape, width=width, lookup=copied, nodes=nodes)


def step_times(runner: Runner, shapes: Sequence[DraftShape], texts: int = 1) -> StepTimes:
    """What a step takes with each shape: read from the cache folder, or measured now and kept there."""
    if (found := _read(runner, shapes, texts)) is None:
        from .stopwatch import calibrate

        calibration = calibrate(runner, shapes, texts=texts)
        found = calibration.times
        keep(runner, shapes, found, texts, age=OLD if calibration.steady else DOUBTED)
    return found


def keep(
    runner: Runner, shapes: Sequence[DraftShape], times: StepTimes, texts: int = 1, **more: Any
) -> Path | None:
    """Keep step times, and what ``more`` is known, in the cache folder; the file, or None if it cannot be."""
    seconds = [value if value < math.inf else None for value in times.seconds]
    known = conditions(runner, shapes, texts)
    return write_note("step-times", known, seconds=seconds, per_row=times.per_row, **more)


def conditions(runner: Runner, shapes: Sequence[DraftShape], texts: int = 1) -> dict[str, Any]:
    """All that step times depend on, as JSON."""
    blas, model = load_blas(), runner.target.model
    drafter: Any = runner.drafter
    return {
        "chip": backend.chip(),
        "backend": backend.current().name,
        "cores": os.cpu_count(),
        "blas": blas and Path(blas).name,
        "blas_path": blas,
        "blas_threads": blas_threads(),
        "model": identity_of(model).embedding_digest,
        "weights": weight_bytes(model.parameters()),
        "drafter": drafter and drafter.config.to_dict(),
        "drafter_weights": drafter and weight_bytes(drafter.weights()),
        "shapes": [list(astuple(shape)) for shape in shapes],
        "texts": texts,
        "versions": versions(),
        **({"machines": runner.target.leader.machines} if runner.target.leader else {}),
    }


def weight_bytes(parameters: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weights by their type, which tells quantizations apart."""
    count: Counter[str] = Counter()
    named: Any = tree_flatten(parameters)
    for _, value in named:
        count[str(value.dtype)] += value.nbytes
    return dict(sorted(count.items()))


def _read(runner: Runner, shapes: Sequence[DraftShape], texts: int) -> StepTimes | None:
    """The step times that were kept; None if there are none, or old ones, or not what they should be."""
    with contextlib.suppress(Exception):  # anything may be there
        report = read_note("step-times", conditions(runner, shapes, texts), OLD)
        seconds = [math.inf if value is None else float(value) for value in report["seconds"]]
        per_row = [float(value) for value in report["per_row"]]
        usable = all(x > 0 for x in seconds) and all(0 <= x < math.inf for x in per_row)
        if usable and len(seconds) == len(per_row) == len(shapes) and seconds[0] < math.inf:
            return StepTimes(seconds, per_row)
    return None
