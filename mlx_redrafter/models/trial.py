"""Whether a target's chains and trees say what the model itself says, tried out on a short text."""

import contextlib
import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from ..decoding.layers import Layers, commit, fit_rows, join_rows, leave_path
from ..decoding.step import Verified
from ..decoding.tree import Tree, build_chain, make_tree
from .hooks import ERRORS, States, leaves

TRIED_WINDOW = 6  # tokens, in a trial: all windows act as they do in a long text
TRIED = 13  # tokens of a trial's prompt
UNTOLD = 3.0  # seconds after which it is said what takes so long


class Telling:
    """Says on standard error, at one of its calls, what takes long; the first one of several machines does.

    Args:
        what: that is done once for a machine and a model.
        at_once: do not wait, if that is a terminal.
    """

    def __init__(self, what: str, at_once: bool = False) -> None:
        self._what, self._begun, self._patience = what, time.monotonic(), UNTOLD
        with contextlib.suppress(ValueError, AttributeError):  # it may be closed
            self._patience *= not (at_once and sys.stderr.isatty())
        self()

    def __call__(self) -> None:
        if time.monotonic() - self._begun >= self._patience and os.environ.get("MLX_RANK", "0") == "0":
            self._patience = math.inf
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(f"{self._what} (once for this machine and model) ...", file=sys.stderr, flush=True)


def try_out(target: Any, name: str, agree: Callable[[str], str] = str) -> None:
    """Set ``trees`` and ``batches`` of a target; ``ValueError``, by its name, if its chains differ."""
    trial, failed = begin(target)
    trial.agree = agree
    if failed := agree(failed or failure(trial.chains)):
        raise ValueError(f"{name} cannot verify drafts: {failed}.")
    target.trees = not agree(failure(trial.tree)) and target.trees
    target.batches = not agree(failure(trial.batch))


def begin(target: Any) -> "tuple[Trial, str]":
    """A trial, in which windows are short; or why there is none."""
    try:
        try:
            return Trial(copy.copy(target), TRIED_WINDOW), ""
        except ERRORS:
            return Trial(copy.copy(target), None), ""  # mlx-lm's code may know its window from elsewhere
    except ERRORS as reason:
        return Trial.__new__(Trial), str(reason) or type(reason).__name__


def failure(part: Callable[[], Iterable[tuple[mx.array, mx.array]]]) -> str:
    """Why a trial's logits differ from sequential decoding; "": they do not."""
    try:
        pairs = [(found, wanted.astype(mx.float32)) for found, wanted in part()]
        differences = [mx.abs(mx.where(found == wanted, 0, found - wanted)) for found, wanted in pairs]
        error = float(mx.stack([each.max() for each in differences]).max())  # tokens may be at -inf
        scale = max(float(mx.where(mx.isinf(wanted), 0, mx.abs(wanted)).max()) for _, wanted in pairs)
    except ERRORS as reason:
        return str(reason) or type(reason).__name__
    tolerance = 1e-3 if pairs[0][0].dtype == mx.float32 else 0.1
    differ = f"its logits differ by {error:.2g} (of {scale:.2g}) from sequential decoding"
    return "" if error <= tolerance * scale else differ


class Trial:
    """Logits of a target's chains and trees, and of mlx-lm's sequential decoding at the same places.

    All that depends on length takes part: a prompt beyond any window, buffers longer than the text, a
    rollback, growth, two texts of unlike length, and a text of a single token.

    Args:
        target: its windows are made no longer than ``window``, if that is given.

    Attributes:
        agree: as of ``Target.check``. Machines that have other layers each must compute the same, in the same
            order: so one forward pass after the other is, and only once all have built it.
    """

    agree: Callable[[str], str] = str

    def __init__(self, target: Any, window: int | None) -> None:
        self.target = target
        self._tell = Telling("Trying out whether its drafts are right")
        caches = make_prompt_cache(target.model)
        if window is not None:
            target.windows = [each and min(each, window) for each in target.windows]
            for cache in leaves(caches):
                if isinstance(cache, RotatingKVCache):
                    cache.max_size = min(cache.max_size, window)
        size = target.vocabulary
        self.text = [(7919 * i + 13) % size for i in range(TRIED + 6)]
        self.other = [(7919 * i + 13) % size for i in range(TRIED + 6, TRIED + 8)]  # after the text's second

        def say(tokens: list[int], caches: list[Any]) -> mx.array:
            logits: mx.array = target.model(mx.array([tokens]), cache=caches)[0]
            mx.eval(logits)
            self._tell()
            return logits

        read = say(self.text[:TRIED], caches)
        said = []
        for place in range(TRIED, TRIED + 6):
            if place == TRIED + 2:
                branch = copy.deepcopy(caches)
            said.append(say(self.text[place : place + 1], caches)[-1])
        self.said = mx.stack(said)  # [6, V] after each token from the prompt's end on
        self.branched = mx.stack([say([token], branch)[-1] for token in self.other])
        self.first = read[:3]
        self.caches = target.make_cache()
        target.forward(mx.array([self.text[:TRIED]]), self.caches)
        mx.eval([cache.state for cache in self.caches])

    def _prompt(self) -> Layers:
        return fit_rows(self.target.layers_of(self.caches)[1], TRIED + 11)

    def _chain(
        self, tokens: list[list[int]], layers: Layers, start: list[int], count: list[int]
    ) -> tuple[mx.array, Layers]:
        """Logits [B, N, V] of chains, and the layers after the first ``count`` nodes."""
        tree = build_chain(mx.array(tokens)[:, 0], None, 1)
        if len(tokens[0]) > 1:
            parents = mx.array([[max(i - 1, 0) for i in range(len(tokens[0]))]] * len(tokens))
            tree = make_tree(mx.array(tokens), parents, len(tokens[0]) - 1)
            tree.is_chain = True
        seen, states = self._verify(tree, layers, mx.array(start, mx.int32), mx.array(count, mx.int32) - 1)
        return seen.logits, replace(layers, rows=seen.rows, states=states)

    def _verify(self, tree: Tree, layers: Layers, start: mx.array, last: mx.array) -> tuple[Verified, States]:
        """What the target says of a tree, and the states after the ``last`` accepted node."""
        problem = ""
        try:
            seen = self.target.verify(tree, layers, start)
            states = seen.states(last)
        except ERRORS as error:
            problem = str(error) or type(error).__name__
        if problem := self.agree(problem):
            raise ValueError(problem)
        mx.eval(seen.logits, seen.rows, seen.nodes, states)
        self._tell()
        return seen, states

    def chains(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Pairs of logits, found and wanted: from nothing, then after the prompt."""
        text = self.text[TRIED:]
        layers = fit_rows(self.target.layers_of(self.target.make_cache())[1], 9)
        found, layers = self._chain([self.text[:1]], layers, [0], [1])
        yield found[0], self.first[:1]
        found, _ = self._chain([self.text[1:3]], layers, [1], [1])
        yield found[0], self.first[1:]
        found, layers = self._chain([text[:1]], self._prompt(), [TRIED], [1])
        yield found[0], self.said[:1]
        found, layers = self._chain([[text[1], text[2], self.other[0]]], layers, [TRIED + 1], [2])
        yield found[0, :2], self.said[1:3]
        found, _ = self._chain([text[3:6]], fit_rows(layers, TRIED + 17), [TRIED + 3], [1])
        yield found[0], self.said[3:6]

    def batch(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Pairs of logits of two texts, found and wanted."""
        text, other = self.text[TRIED:], self.other
        _, longer = self._chain([text[:1]], self._prompt(), [TRIED], [1])
        layers = join_rows([self._prompt(), longer])
        found, layers = self._chain([[*text[:2], other[0]], text[1:4]], layers, [TRIED, TRIED + 1], [2, 2])
        yield found[0, :2], self.said[:2]
        yield found[1], self.said[1:4]
        found, _ = self._chain([text[2:5], text[3:6]], layers, [TRIED + 2, TRIED + 3], [1, 1])
        yield found[0], self.said[2:5]
        yield found[1], self.said[3:6]

    def tree(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Pairs of logits of a branching tree, found and wanted."""
        #  0 - 1 - 2 - 3    the text
        #      +- 4 - 5    the other one
        text, (g, h) = self.text[TRIED:], self.other
        parents, start = mx.array([[0, 0, 1, 2, 1, 4]], mx.int32), mx.array([TRIED], mx.int32)
        tree = make_tree(mx.array([[*text[:4], g, h]], mx.int32), parents, depth=3)
        layers = self._prompt()
        seen, states = self._verify(tree, layers, start, mx.array([4]))
        yield seen.logits[0, :4], self.said[:4]
        yield seen.logits[0, 4:], self.branched
        path = mx.array([[0, 1, 4, 0]], mx.int32)
        layers = replace(layers, rows=seen.rows, states=states)
        layers = commit(leave_path(layers, seen.nodes, path, start))
        found, _ = self._chain([[h]], fit_rows(layers, TRIED + 17), [TRIED + 3], [1])
        yield found[0], self.branched[1:]
