"""One benchmark from its options to its report; the report is there for whatever was finished."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import wired_limit
from tqdm import tqdm

from ..conversations import Prompt, usable
from ..engine.loop import Fixed
from ..engine.step_times import candidates
from ..loading.find import DEFAULT_MODEL
from ..options import (
    DecodingOptions,
    ModelOptions,
    PromptOptions,
    check_range,
    choose_drafter,
    load_model,
    warn_of_idle,
)
from ..plain import load_draft_model
from ..record import describe_shape
from ..text import check_shape
from . import lengths, phases, report, sweep
from .concurrency import Crowd, compare
from .contenders import mlx_lm_contender, our_contender
from .energy import find_meter
from .machine import describe
from .measure import Asked, Plan, measure, turns_of, warm_up
from .sources import load_prompts, sample
from .statistics import ratio, shapes_used
from .sweep import Grid

if TYPE_CHECKING:
    from ..engine.ranks import Ranks

SAVE_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class BenchmarkOptions:
    """What decodes, what is asked, how often, and which passes are made; named like the flags.

    Raises:
        ValueError: a value is not usable.
    """

    model: ModelOptions
    prompting: PromptOptions
    decoding: DecodingOptions
    prompts: str
    limit: int | None
    turns: int | None
    trials: int
    warm_up: int
    profile: int
    cost_curve: bool
    sweep: bool
    grid: Grid  # of the sweep's shapes
    sweep_limit: int
    concurrency: Sequence[int]
    arrive_every: Sequence[float]
    lengths: Sequence[int]
    padding: str | None

    def __post_init__(self) -> None:
        for name in ("limit", "turns", "trials", "warm_up", "sweep_limit"):
            check_range(name, getattr(self, name), 1)
        check_range("profile", self.profile, 0)
        for name, least in (("concurrency", 1), ("arrive_every", 0), ("lengths", 1)):
            for value in getattr(self, name):
                check_range(name, value, least)
        if self.concurrency and (self.decoding.temp or self.decoding.max_tokens < 1):
            raise ValueError("--concurrency needs greedy texts and a limit: no --temp, and --max-tokens.")
        if not self.concurrency and any(self.arrive_every):
            raise ValueError("--arrive-every says how the texts of --concurrency arrive: give that too.")
        if self.lengths and self.decoding.temp:
            raise ValueError("--lengths needs greedy texts, whose outputs can be compared: no --temp.")
        if self.padding is not None and not self.lengths:
            raise ValueError("--padding is the text of --lengths: give that too.")
        if self.decoding.max_tokens == 1:
            raise ValueError("--max-tokens 1 leaves nothing to time after the first token: give 2 or more.")


class Session:
    """Measures what is asked for; ``ValueError`` if an option, a file or a model is not usable.

    The report says the ``settings``, and is saved as ``file`` now and then, in case this process is killed.
    With ``ranks``, all machines measure together.
    """

    def __init__(
        self,
        options: BenchmarkOptions,
        settings: dict[str, Any],
        file: Path | None,
        ranks: "Ranks | None" = None,
    ) -> None:
        self.ranks = ranks
        self.options, self.decoding, self.grid = options, options.decoding, options.grid
        self.settings, self.file = settings, file
        prompts = load_prompts(options.prompts)
        self.prompts = sample(prompts, options.limit)
        self.padding = _padding(options.padding, prompts) if options.lengths else ""
        self.drafter = choose_drafter(options.model, options.decoding)
        self.report: dict[str, Any] = {}  # what was finished; empty before the first prompt was
        self.asked: list[Asked] = []  # prompts whose answers were all timed

    def measure(self) -> None:
        """Load the model, and make all passes."""
        options, decoding = self.options, self.decoding
        self.machine = describe()
        _warn_if_busy(self.machine)
        self.model, self.tokenizer = load_model(options.model, self.drafter, ranks=self.ranks)
        warn_of_idle(options.model, options.prompting, decoding, self.tokenizer)
        self.meter, self.energy = find_meter(self.machine["backend"])
        encode = partial(options.prompting.encode, tokenizer=self.tokenizer)
        self.prompts, self.first_turns = usable(self.prompts, lambda prompt: encode(turns_of(prompt)[0]))
        self.model.check_prompts(self.first_turns)
        self._check_passes()
        self.padded = self._padded(encode)
        self.plain = partial(mlx_lm_contender, self.model, self.tokenizer, decoding)
        self.ours = partial(our_contender, self.model, self.tokenizer, decoding)
        contenders, asked = [self.plain(), self.ours(decoding.shape)], options.model
        if (draft_model := load_draft_model(asked.draft_model, asked.dtype, self.tokenizer)) is not None:
            contenders.append(self.plain(draft_model))
        exact, longest = decoding.temp == 0, self.model.context_length
        turns, trials = options.turns, options.trials
        self.plan = Plan(contenders, encode, decoding.max_tokens, turns, trials, exact, longest)
        self._main_pass()
        if options.profile:
            self._profile()
        if options.sweep:
            self._sweep()
        if options.cost_curve:
            self._cost_curve()
        if options.concurrency:
            self._concurrency()
        if options.lengths:
            self._lengths()

    def _main_pass(self) -> None:
        turns = sum(len(turns_of(prompt)[: self.options.turns]) for prompt in self.prompts)
        warm_up(self.plan, self.first_turns[0], self.options.warm_up)
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
        """What was asked for, and what it came to."""
        prompts, shape = self.options.prompts, self.decoding.shape
        return {
            **self.settings,
            "model": self.options.model.model or DEFAULT_MODEL,
            "prompts": prompts if prompts == "-" else Path(prompts).name,
            "weights": weights(self.model.model),
            "shape": sweep.shape_name(describe_shape(shape)) if shape else "automatic",
            "energy": self.energy,
            **({"machines": self.ranks.size} if self.ranks else {}),
        }

    def _save(self) -> None:
        """Write what there is."""
        if self.file is not None:
            self._summarise()
            report.write(self.report, self.file)

    def _profile(self) -> None:
        used = shapes_used([run for asked in self.asked for run in asked.runs(report.OURS)])
        if self.model.prepare() is None or not used:
            return
        shape = max(used, key=lambda shape: (shape.size > 1, used[shape]))  # plain only if there is no other
        prompts, sampling = sample(self.first_turns, self.options.profile), self.decoding.sampling
        most = self.decoding.max_tokens if self.decoding.max_tokens > 0 else 256
        chunk = self.decoding.prefill_step_size
        stop = frozenset(self.tokenizer.eos_token_ids)
        with tqdm(desc="Profiling", total=len(prompts), unit="prompt") as bar, wired_limit(self.model.model):
            times = phases.profile(self.model, sampling, shape, prompts, most, stop, chunk, bar.update)
        if found := phases.summarise(times, describe_shape(shape)):
            self.report["phases"] = found

    def _sweep(self) -> None:
        prompts, most = sample(self.first_turns, self.options.sweep_limit), self.decoding.max_tokens
        drafted = candidates(self.model.prepare(), self.decoding.lookup)
        shapes = [None, *dict.fromkeys((*self.grid.shapes(), *drafted))]
        found: list[sweep.Swept] = []
        try:
            with tqdm(desc="Sweep", total=len(prompts) * len(shapes), unit="answer") as bar:
                for swept in sweep.sweep(
                    self.plain(), self.ours, shapes, prompts, most, self.meter, bar.update
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
        options, shape = self.options, self.decoding.shape
        crowds = [Crowd(texts, every) for texts in options.concurrency for every in options.arrive_every]
        if shape is not None:
            self.model.use_policy(Fixed(shape))
        found = self.report["concurrency"] = list[dict[str, Any]]()
        total = sum(len(self.first_turns) // crowd.texts for crowd in crowds)
        stop, most = self.tokenizer.eos_token_ids, self.decoding.max_tokens
        with tqdm(desc="Several texts", total=total, unit="crowd") as bar, wired_limit(self.model.model):
            for crowd in crowds:
                found.append(compare(self.model, crowd, self.first_turns, most, stop, bar.update))

    def _padded(self, encode: lengths.Encode) -> dict[int, list[list[int]]]:
        """The first turns after other text, by their lengths; those that are longer are left out."""
        if not self.options.lengths:
            return {}
        padding = lengths.Padding(self.padding, self.tokenizer, encode)
        padded = {}
        for length in self.options.lengths:
            turns = (turns_of(prompt)[0] for prompt in self.prompts)
            found = [padding.before(turn, length, number) for number, turn in enumerate(turns)]
            padded[length] = [ids for ids in found if ids is not None]
            if not padded[length]:
                raise ValueError(f"--lengths {length} is shorter than every prompt: give more.")
            self.model.check_prompts(padded[length])
        return padded

    def _lengths(self) -> None:
        contenders, most = [self.plain(), self.ours(self.decoding.shape)], self.decoding.max_tokens
        found = self.report["lengths"] = list[dict[str, Any]]()
        total = sum(map(len, self.padded.values()))
        with tqdm(desc="Lengths", total=total, unit="prompt") as bar:
            for length, prompts in self.padded.items():
                pairs = list(lengths.compare(contenders, prompts, most, self.meter, bar.update))
                found.append(lengths.summarise(length, pairs))

    def _check_passes(self) -> None:
        """Refuse passes that the model or its drafter cannot do, before anything is measured."""
        for flag in ("cost_curve", "concurrency"):
            if getattr(self.options, flag) and self.model.prepare() is None:
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} needs a model that can verify drafts, and this one cannot.")
        if self.options.concurrency and max(self.options.concurrency) > len(self.first_turns):
            raise ValueError(
                f"--concurrency {max(self.options.concurrency)} needs as many prompts, and there are "
                f"{len(self.first_turns)}: give more."
            )
        if not self.options.sweep:
            return
        if self.model.drafter is None:
            raise ValueError("--sweep tries shapes of a drafter, and there is none: name one with --drafter.")
        for shape in self.grid.shapes():
            check_shape(shape, self.model.drafter.config.head_outputs)


def _padding(file: str | None, prompts: Sequence[Prompt]) -> str:
    """The text to put before prompts: of a file, or of the prompts."""
    if file is None:
        return "\n\n".join(str(m["content"]) for prompt in prompts for turn in turns_of(prompt) for m in turn)
    try:
        return Path(file).expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--padding {file} cannot be read ({error}): name a text file.") from error


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
