"""One benchmark from its flags to its report; the report is there for whatever was finished."""

import argparse
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import wired_limit
from tqdm import tqdm

from ..calibrate import candidates
from ..decoding.step import DraftShape
from ..generate_command import check_decoding, choose_drafter, describe_shape, load_model, sampling_of
from ..model import DEFAULT_MODEL
from ..prompts import usable
from ..stream import check_shape
from . import phases, report, sweep
from .contenders import mlx_lm_contender, our_contender
from .energy import find_meter
from .machine import describe
from .measure import Asked, Contender, Plan, measure, settle, turns_of, warm_up
from .sources import encode_conversation, load_prompts, sample
from .statistics import ratio, shapes_used

NOT_SETTINGS = ("run", "command", "words", "compare", "json", "markdown", "plots", "max_nodes")
SAVE_EVERY = 30.0  # seconds


class Session:
    """Measures what the flags ask for.

    Attributes:
        report: what was finished; empty before the first prompt was.
        finished: prompts.

    Raises:
        ValueError: a flag, a file or a model is not usable.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.grid = sweep.Grid(args.sweep_widths, args.sweep_lengths, args.sweep_nodes)
        if args.lookup is not None:
            self.grid = replace(self.grid, lookup=args.lookup)
        self.shape = check_decoding(args)
        self.prompts = sample(load_prompts(args.prompts), args.limit)
        self.drafter = choose_drafter(args, self.shape)
        self.report: dict[str, Any] = {}
        self.asked: list[Asked] = []

    @property
    def finished(self) -> int:
        """Prompts whose answers were all timed."""
        return len(self.asked)

    def measure(self) -> None:
        """Load the model, and make all passes."""
        self.machine = describe()
        _warn_if_busy(self.machine)
        self.model, self.tokenizer = load_model(self.args, self.drafter)
        self.meter, self.energy = find_meter(self.machine["backend"])
        self.encode = partial(encode_conversation, tokenizer=self.tokenizer, args=self.args)
        self.prompts, self.first_turns = usable(self.prompts, lambda prompt: self.encode(turns_of(prompt)[0]))
        self.model.check_prompts(self.first_turns)
        self._check_passes()
        self.plan = self._plan()
        self._main_pass()
        if self.args.profile:
            self._profile()
        if self.args.sweep:
            self._sweep()
        if self.args.cost_curve:
            self._cost_curve()

    def wait(self) -> None:
        """Until nothing is being computed any more: ending sooner aborts the process."""
        settle()

    def _plan(self) -> Plan:
        args = self.args
        contenders = [self._plain(), self._ours(self.shape)]
        if args.draft_model is not None:
            contenders.append(self._plain(draft_model=True))
        return Plan(
            contenders,
            self.encode,
            args.max_tokens,
            args.turns,
            args.trials,
            exact=args.temp == 0,
            longest=self.model.context_length,
        )

    def _plain(self, draft_model: bool = False) -> Contender:
        return mlx_lm_contender(self.model, self.tokenizer, self.args, draft_model)

    def _ours(self, shape: DraftShape | None) -> Contender:
        return our_contender(self.model, self.tokenizer, self.args, shape)

    def _main_pass(self) -> None:
        turns = sum(len(turns_of(prompt)[: self.args.turns]) for prompt in self.prompts)
        warm_up(self.plan, self.first_turns[0], self.args.warm_up)
        saved = time.monotonic()
        try:
            with _bar("Measuring", turns * self.plan.runs_per_turn) as bar:
                for asked in measure(self.plan, self.prompts, self.meter, bar.update):
                    self.asked.append(asked)
                    bar.set_postfix_str(f"{self.finished} prompts, speed-up {self._so_far()}")
                    if time.monotonic() - saved > SAVE_EVERY:
                        self._save()
                        saved = time.monotonic()
        finally:
            self._summarise()

    def _so_far(self) -> str:
        """The median of the ratios so far."""
        ratios = [ratio(asked, report.OURS, report.BASELINE) for asked in self.asked]
        known = [x for x in ratios if x is not None]
        return f"{median(known):.2f}" if known else "unknown"

    def _summarise(self) -> None:
        if self.asked:
            settings = _settings(self.args, self.shape, self.model.model, self.energy)
            self.report |= report.build(self.plan, self.asked, self.machine, settings, len(self.prompts))

    def _save(self) -> None:
        """Write what there is, in case this process is killed."""
        if self.args.json not in (None, "-"):
            self._summarise()
            report.write(self.report, Path(self.args.json))

    def _profile(self) -> None:
        if self.model.target is None or (shape := self._usual_shape()) is None:
            return
        prompts = sample(self.first_turns, self.args.profile)
        most = self.args.max_tokens if self.args.max_tokens > 0 else 256
        pick = sampling_of(self.args).pick
        with _bar("Profiling", len(prompts), "prompt") as bar, wired_limit(self.model.model):
            times = phases.profile(
                self.model.target,
                self.model.drafter,
                pick,
                shape,
                prompts,
                most,
                frozenset(self.tokenizer.eos_token_ids),
                self.args.prefill_step_size,
                bar.update,
            )
        if found := phases.summarise(times, describe_shape(shape)):
            self.report["phases"] = found

    def _sweep(self) -> None:
        prompts = sample(self.first_turns, self.args.sweep_limit)
        shapes = [None, *dict.fromkeys((*self.grid.shapes(), *candidates(self.model, self.args.lookup)))]
        found: list[sweep.Swept] = []
        try:
            with _bar("Sweep", len(prompts) * len(shapes)) as bar:
                for swept in sweep.sweep(
                    self._plain(), self._ours, shapes, prompts, self.args.max_tokens, self.meter, bar.update
                ):
                    found.append(swept)
        finally:
            if found:
                self.report["sweep"] = sweep.summarise(self.grid, found)

    def _cost_curve(self) -> None:
        assert self.model.target is not None
        with _bar("Cost curve", sweep.ROUNDS + 1, "round") as bar, wired_limit(self.model.model):
            self.report["cost_curve"] = sweep.cost_curve(
                self.model.target, sweep.SIZES, sweep.ROUNDS, bar.update
            )

    def _usual_shape(self) -> DraftShape | None:
        """The shape that was used most; plain decoding only if there was no other. None: not even that."""
        used = shapes_used([run for asked in self.asked for run in asked.runs(report.OURS)])
        return max(used, key=lambda shape: (shape.size > 1, used[shape]), default=None)

    def _check_passes(self) -> None:
        """Refuse passes that the model or its drafter cannot do, before anything is measured."""
        if self.args.cost_curve and self.model.target is None:
            raise ValueError("--cost-curve needs a model that can verify drafts, and this one cannot.")
        if not self.args.sweep:
            return
        if self.model.drafter is None:
            raise ValueError("--sweep tries shapes of a drafter, and there is none: name one with --drafter.")
        for shape in self.grid.shapes():
            check_shape(shape, self.model.drafter.config.head_outputs)


def _settings(
    args: argparse.Namespace, shape: DraftShape | None, model: nn.Module, energy: str
) -> dict[str, Any]:
    """The flags, as JSON, and what they came to."""
    given = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_SETTINGS}
    return {
        **given,
        "model": args.model or DEFAULT_MODEL,
        "prompts": args.prompts if args.prompts == "-" else Path(args.prompts).name,
        "weights": weights(model),
        "shape": "automatic" if shape is None else sweep.shape_name(describe_shape(shape)),
        "energy": energy,
    }


def weights(model: nn.Module) -> str:
    """The precision of a model's weights, such as "float32" or "4 bits, bfloat16"."""
    bits = {layer.bits for layer in model.modules() if hasattr(layer, "bits")}
    flat: Any = tree_flatten(model.parameters())
    types = {x.dtype for _, x in flat if mx.issubdtype(x.dtype, mx.floating)}
    return ", ".join(
        [*(f"{n} bits" for n in sorted(bits)), *sorted(str(t).rpartition(".")[2] for t in types)]
    )


def _warn_if_busy(machine: dict[str, Any]) -> None:
    if machine["load"] > machine["cores"] / 2:
        warnings.warn(
            f"this machine is busy (load {machine['load']} on {machine['cores']} cores): times will scatter.",
            stacklevel=1,
        )


def _bar(what: str, total: int, unit: str = "answer") -> Any:
    """A progress bar with the time that is left."""
    return tqdm(total=total, desc=what, unit=unit)
