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

from ..commands.generate import check_decoding, choose_drafter, describe_shape, load_model, sampling_of
from ..conversations import usable
from ..engine.loop import Fixed
from ..engine.step_times import candidates
from ..model import DEFAULT_MODEL
from ..text import check_shape
from . import phases, report, sweep
from .concurrency import Crowd, compare
from .contenders import mlx_lm_contender, our_contender
from .energy import find_meter
from .machine import describe
from .measure import Asked, Plan, measure, turns_of, warm_up
from .sources import encode_conversation, load_prompts, sample
from .statistics import ratio, shapes_used

NOT_SETTINGS = ("run", "command", "words", "compare", "json", "markdown", "plots", "max_nodes")
SAVE_EVERY = 30.0  # seconds


class Session:
    """Measures what the flags ask for; ``ValueError`` if a flag, a file or a model is not usable."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.grid = sweep.Grid(args.sweep_widths, args.sweep_lengths, args.sweep_nodes)
        if args.lookup is not None:
            self.grid = replace(self.grid, lookup=args.lookup)
        self.shape = check_decoding(args)
        self.prompts = sample(load_prompts(args.prompts), args.limit)
        self.drafter = choose_drafter(args, self.shape)
        self.report: dict[str, Any] = {}  # what was finished; empty before the first prompt was
        self.asked: list[Asked] = []  # prompts whose answers were all timed

    def measure(self) -> None:
        """Load the model, and make all passes."""
        args = self.args
        self.machine = describe()
        _warn_if_busy(self.machine)
        self.model, self.tokenizer = load_model(self.args, self.drafter)
        self.meter, self.energy = find_meter(self.machine["backend"])
        encode = partial(encode_conversation, tokenizer=self.tokenizer, args=args)
        self.prompts, self.first_turns = usable(self.prompts, lambda prompt: encode(turns_of(prompt)[0]))
        self.model.check_prompts(self.first_turns)
        self._check_passes()
        self.plain = partial(mlx_lm_contender, self.model, self.tokenizer, args)
        self.ours = partial(our_contender, self.model, self.tokenizer, args)
        contenders = [self.plain(), self.ours(self.shape)]
        if args.draft_model is not None:
            contenders.append(self.plain(draft_model=True))
        exact, longest = args.temp == 0, self.model.context_length
        self.plan = Plan(contenders, encode, args.max_tokens, args.turns, args.trials, exact, longest)
        self._main_pass()
        if args.profile:
            self._profile()
        if args.sweep:
            self._sweep()
        if args.cost_curve:
            self._cost_curve()
        if args.concurrency:
            self._concurrency()

    def _main_pass(self) -> None:
        turns = sum(len(turns_of(prompt)[: self.args.turns]) for prompt in self.prompts)
        warm_up(self.plan, self.first_turns[0], self.args.warm_up)
        saved = time.monotonic()
        try:
            with tqdm(desc="Measuring", total=turns * self.plan.runs_per_turn, unit="answer") as bar:
                for asked in measure(self.plan, self.prompts, self.meter, bar.update):
                    self.asked.append(asked)
                    bar.set_postfix_str(f"{len(self.asked)} prompts, speed-up {self._so_far()}")
                    if time.monotonic() - saved > SAVE_EVERY:
                        self._save()
                        saved = time.monotonic()
        finally:
            self._summarise()

    def _so_far(self) -> str:
        """The median of the ratios so far."""
        ratios = (ratio(asked, report.OURS, report.BASELINE) for asked in self.asked)
        known = [x for x in ratios if x is not None]
        return f"{median(known):.2f}" if known else "unknown"

    def _summarise(self) -> None:
        if self.asked:
            settings = self._settings()
            self.report |= report.build(self.plan, self.asked, self.machine, settings, len(self.prompts))

    def _settings(self) -> dict[str, Any]:
        """The flags, as JSON, and what they came to."""
        args = self.args
        return {
            **{name: value for name, value in sorted(vars(args).items()) if name not in NOT_SETTINGS},
            "model": args.model or DEFAULT_MODEL,
            "prompts": args.prompts if args.prompts == "-" else Path(args.prompts).name,
            "weights": weights(self.model.model),
            "shape": sweep.shape_name(describe_shape(self.shape)) if self.shape else "automatic",
            "energy": self.energy,
        }

    def _save(self) -> None:
        """Write what there is, in case this process is killed."""
        if self.args.json not in (None, "-"):
            self._summarise()
            report.write(self.report, Path(self.args.json))

    def _profile(self) -> None:
        args = self.args
        used = shapes_used([run for asked in self.asked for run in asked.runs(report.OURS)])
        if self.model.prepare() is None or not used:
            return
        shape = max(used, key=lambda shape: (shape.size > 1, used[shape]))  # plain only if there is no other
        prompts, sampling = sample(self.first_turns, args.profile), sampling_of(args)
        most, chunk = args.max_tokens if args.max_tokens > 0 else 256, args.prefill_step_size
        stop = frozenset(self.tokenizer.eos_token_ids)
        with tqdm(desc="Profiling", total=len(prompts), unit="prompt") as bar, wired_limit(self.model.model):
            times = phases.profile(self.model, sampling, shape, prompts, most, stop, chunk, bar.update)
        if found := phases.summarise(times, describe_shape(shape)):
            self.report["phases"] = found

    def _sweep(self) -> None:
        prompts = sample(self.first_turns, self.args.sweep_limit)
        shapes = [
            None,
            *dict.fromkeys((*self.grid.shapes(), *candidates(self.model.prepare(), self.args.lookup))),
        ]
        found: list[sweep.Swept] = []
        try:
            with tqdm(desc="Sweep", total=len(prompts) * len(shapes), unit="answer") as bar:
                for swept in sweep.sweep(
                    self.plain(), self.ours, shapes, prompts, self.args.max_tokens, self.meter, bar.update
                ):
                    found.append(swept)
        finally:
            if found:
                self.report["sweep"] = sweep.summarise(self.grid, found)

    def _cost_curve(self) -> None:
        runner, rounds = self.model.prepare(), sweep.ROUNDS
        assert runner is not None
        with tqdm(desc="Cost curve", total=rounds + 1, unit="round") as bar, wired_limit(self.model.model):
            self.report["cost_curve"] = sweep.cost_curve(runner.target, sweep.SIZES, rounds, bar.update)

    def _concurrency(self) -> None:
        crowds = [Crowd(texts, every) for texts in self.args.concurrency for every in self.args.arrive_every]
        if self.shape is not None:
            self.model.use_policy(Fixed(self.shape))
        found = self.report["concurrency"] = list[dict[str, Any]]()
        total = sum(len(self.first_turns) // crowd.texts for crowd in crowds)
        stop, most = self.tokenizer.eos_token_ids, self.args.max_tokens
        with tqdm(desc="Several texts", total=total, unit="crowd") as bar, wired_limit(self.model.model):
            for crowd in crowds:
                found.append(compare(self.model, crowd, self.first_turns, most, stop, bar.update))

    def _check_passes(self) -> None:
        """Refuse passes that the model or its drafter cannot do, before anything is measured."""
        for flag in ("cost_curve", "concurrency"):
            if getattr(self.args, flag) and self.model.prepare() is None:
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} needs a model that can verify drafts, and this one cannot.")
        if self.args.concurrency and max(self.args.concurrency) > len(self.first_turns):
            raise ValueError(
                f"--concurrency {max(self.args.concurrency)} needs as many prompts, and there are "
                f"{len(self.first_turns)}: give more."
            )
        if not self.args.sweep:
            return
        if self.model.drafter is None:
            raise ValueError("--sweep tries shapes of a drafter, and there is none: name one with --drafter.")
        for shape in self.grid.shapes():
            check_shape(shape, self.model.drafter.config.head_outputs)


def weights(model: nn.Module) -> str:
    """The precision of a model's weights, such as "float32" or "4 bits, bfloat16"."""
    bits = {layer.bits for layer in model.modules() if hasattr(layer, "bits")}
    flat: Any = tree_flatten(model.parameters())
    types = {str(x.dtype).rpartition(".")[2] for _, x in flat if mx.issubdtype(x.dtype, mx.floating)}
    return ", ".join([*(f"{n} bits" for n in sorted(bits)), *sorted(types)])


def _warn_if_busy(machine: dict[str, Any]) -> None:
    if machine["load"] > machine["cores"] / 2:
        warnings.warn(
            f"this machine is busy (load {machine['load']} on {machine['cores']} cores): times will scatter.",
            stacklevel=1,
        )
