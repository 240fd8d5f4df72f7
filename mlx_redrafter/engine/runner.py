"""Steps of every draft shape for one model, compiled once each."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import mlx.core as mx

from ..decoding.beam import Proposer
from ..decoding.layers import Layers, View, commit
from ..decoding.state import DraftShape, Output, State
from ..decoding.step import Pick, pick, step
from ..models.target import Target

Arrays = dict[str, Any]
FlatStep = Callable[[Arrays, list[mx.array], int], tuple[Arrays, Arrays]]
_serial = count()
TRIALS = 2  # steps of a shape and a view that are not worth a trace, which takes as long as several


class Runner:
    """Runs steps of one model with one way of picking tokens.

    Args:
        target: the language model. Its weights may change in place; compiled steps have all else, and the
            drafter's weights, built in.
        drafter: None if no shape has beams.
        pick: how the target picks a token; compiled, it may use no other random numbers than the state's.
        compiled: trace each combination of a shape and a view that is used more than ``TRIALS`` times
            once, instead of building every step's graph anew.

    Attributes:
        traces: how many times a step's graph was built; grows with each new combination if compiled.
    """

    def __init__(
        self, target: Target, drafter: Proposer | None, pick: Pick = pick, compiled: bool = False
    ) -> None:
        self.target, self.drafter, self.pick, self.compiled = target, drafter, pick, compiled
        self.traces = 0
        # MLX may keep a trace when its function is gone, and find it for another one at the same address.
        self._serial = next(_serial)
        self._uses: Counter[Any] = Counter()
        self._steps: dict[tuple[DraftShape, View], FlatStep] = {}

    def __call__(self, shape: DraftShape, state: State, view: View) -> tuple[State, Output]:
        """One step (``step.py``), whose attention is shown the ``view`` of the buffers.

        If the target verifies chains only, the shape's chain takes the place of its tree.
        """
        shape = shape if self.target.trees else shape.chain
        if not self.compiled:
            return self._step(self.target, shape, state, view)
        kind = shape, view, state.token.size, tuple(state.sampling)
        self._uses[kind] += 1
        if self._uses[kind] <= TRIALS:
            return self._step(self.target, shape, state, view)
        layers = state.layers
        if layers.path_start is not None and layers.path and layers.path[-1][0].shape[2] != shape.depth + 1:
            state = replace(state, layers=commit(layers))  # so that traces know paths of one length only
        if (shape, view) not in self._steps:
            self._steps[shape, view] = mx.compile(self._flat_step(shape, view))
        try:
            after, output = self._steps[shape, view](_flatten(state), self.target.weights, self._serial)
        except ValueError as error:
            if "eval" not in str(error):
                raise
            self.compiled = False  # the model's code asks for values, which a trace does not have
            return self._step(self.target, shape, state, view)
        return _unflatten(after), Output(**output)

    def _step(self, target: Target, shape: DraftShape, state: State, view: View) -> tuple[State, Output]:
        self.traces += 1
        return step(target, self.drafter, self.pick, shape, state, view)

    def _flat_step(self, shape: DraftShape, view: View) -> FlatStep:
        def run(arrays: Arrays, weights: list[mx.array], _: int) -> tuple[Arrays, Arrays]:
            target = self.target.with_weights(weights)
            after, output = self._step(target, shape, _unflatten(arrays), view)
            return _flatten(after), dict(vars(output))

        return run


def _flatten(state: State) -> Arrays:
    """Arrays only, as ``mx.compile`` wants it: what is absent is left out."""
    layers = {name: value for name, value in vars(state.layers).items() if value is not None}
    return {**vars(state), "layers": layers}


def _unflatten(arrays: Arrays) -> State:
    return State(**{**arrays, "layers": Layers(**arrays["layers"])})
