"""Sizes that fit the memory of this machine, and steps that fit the time: chosen once in a run."""

import math
import time
from dataclasses import replace
from itertools import islice

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..engine import backend
from ..models.drafter import Drafter, DrafterConfig
from ..models.target import Target
from .data import Conversation
from .features import extract
from .forecast import MOST_EPOCHS, forecast
from .streams import Workers
from .trainer import GROUP, Data, Settings, Shards, Trainer, steps_of
from .work import SHARD_ROWS, Request, Work

DATA_TIME = 0.6  # share of a time budget that goes to writing and reading data
EVALUATION_TIME = 0.12
SCORES = 12  # held-out scores in a run
SCORING = 0.1  # share of the time for training that they may take
FEW, MANY = 300, 8000  # steps below which a smaller batch is better, and above which a larger one is
SMALLEST, LARGEST = 256, 8192  # positions per step
LEAST_TRAINED = 100 * SMALLEST  # positions for which the drafter is made narrower, where time is short
NARROWEST = 256
ROWS_ON_GPU = 256
USUAL_VOCABULARY = 8192  # draft tokens, where the data decide
WEIGHT_BYTES = 24  # of each weight: itself, its gradient, two moments, and copies while it changes


def drafter_config(target: Target, request: Request) -> DrafterConfig:
    """The sizes of a new drafter that knows all tokens."""
    hidden = target.embed(mx.array([0])).shape[-1]
    return DrafterConfig(
        hidden_size=hidden,
        vocab_size=target.vocabulary,
        exit_dim=request.exit_dim or hidden,
        num_draft_layers=request.blocks,
        rnn=request.cell != "none",
        context_layers=target.layers_read,
        cell="simple" if request.cell == "none" else request.cell,
        memory_heads=request.memory_heads,
    )


# --- Memory --------------------------------------------------------------------------------------------


def fit_machine(
    work: Work, target: Target, request: Request, workers: Workers, start: Drafter | None
) -> Request:
    """The request with sizes for this machine in place of those that the user left open."""
    if "sizes" not in work.facts:
        sized = _in_memory(target, request, start)
        pace = _pace(target, sized, workers, start)
        time_left = (1 - DATA_TIME - EVALUATION_TIME) * (request.seconds or mx.inf)
        while time_left < LEAST_TRAINED * pace and (width := _narrower(target, sized, start)):
            sized = replace(sized, exit_dim=width)
            pace = _pace(target, sized, workers, start)
        settings = sized.settings
        sizes = {"exit_dim": sized.exit_dim, "rows": sized.recipe.batch}
        sizes |= {"batch": settings.batch, "group": settings.group}
        work.note(sizes=sizes, pace=pace, goes_on=start is not None)
    sizes = work.facts["sizes"]
    settings = replace(request.settings, batch=sizes["batch"], group=sizes["group"])
    recipe = replace(request.recipe, batch=sizes["rows"])
    return replace(request, exit_dim=sizes["exit_dim"], recipe=recipe, settings=settings)


def _in_memory(target: Target, request: Request, start: Drafter | None) -> Request:
    """Halve what the user left open until it fits: half of the free memory for weights and for texts that are
    written, a quarter for a batch and for the features among which it is drawn."""
    room, length = _room(request), request.recipe.length
    features = 2 * length * drafter_config(target, request).context_size  # bytes of a text
    while WEIGHT_BYTES * _weights(target, request) > room / 2:
        if not (width := _narrower(target, request, start)):
            break
        request = replace(request, exit_dim=width)
    rows, batch = request.recipe.batch, request.settings.batch
    if "rows" in request.left_open:
        rows = ROWS_ON_GPU if mx.default_device().type == mx.gpu else rows
        rows = _halved(rows, room / 2 / (_text_bytes(target, length) + 2 * features), least=8)
    if "batch" in request.left_open:
        batch = _halved(batch, _most_positions(target, request), SMALLEST)
    group = _halved(GROUP, room / 4 / (2 * SHARD_ROWS * features), 1)
    settings = replace(request.settings, batch=batch, group=group)
    return replace(request, recipe=replace(request.recipe, batch=rows), settings=settings)


def _room(request: Request) -> float:
    return min(backend.free_memory(), request.memory or mx.inf)


def _halved(size: int, most: float, least: int) -> int:
    while size > most and size // 2 >= least:
        size //= 2
    return size


def _narrower(target: Target, request: Request, start: Drafter | None) -> int:
    """Half of the drafter's width; 0 if it must stay as it is."""
    width = drafter_config(target, request).exit_dim // 2
    return width if start is None and "exit_dim" in request.left_open and width >= NARROWEST else 0


def _vocabulary(target: Target, request: Request) -> int:
    """Draft tokens, if the data have the usual ones."""
    usual = USUAL_VOCABULARY if request.draft_vocab is None else request.draft_vocab
    return min(usual or target.vocabulary, target.vocabulary)


def _weights(target: Target, request: Request) -> int:
    config = replace(drafter_config(target, request), draft_vocab_size=_vocabulary(target, request))
    return sum(math.prod(shape) for shape in config.shapes().values())


def _text_bytes(target: Target, length: int) -> int:
    """What the model's layers remember of one text."""
    caches = target.make_cache()
    target.forward(mx.array([[0, 0]]), caches)
    return target.layers_of(caches)[1].nbytes_of(length)


def _most_positions(target: Target, request: Request) -> float:
    """As many may be in a batch: each has a state, and what the blocks read and write, at every depth."""
    config, objective = drafter_config(target, request), request.settings.objective
    width = 4 * config.hidden_size + (4 + 2 * config.num_draft_layers) * config.exit_dim
    return _room(request) / 4 / (4 * (objective.length * width + 2 * config.context_size))


# --- Time ----------------------------------------------------------------------------------------------


def _pace(target: Target, request: Request, workers: Workers, start: Drafter | None) -> float:
    """Seconds that training takes for a position here, by a few small steps on random tokens."""
    length, whole = min(160, request.recipe.length), request.memory_heads > 0
    random = np.random.default_rng(0)
    rows = [
        Conversation(random.integers(target.vocabulary, size=length).astype(np.int32), np.ones(length, bool))
        for _ in range(-(-SMALLEST // length))
    ]
    features = extract(target, rows, workers, whole)
    if start is None:
        ids = np.arange(_vocabulary(target, request), dtype=np.int32)
        config = replace(drafter_config(target, request), draft_vocab_size=len(ids))
        start = Drafter(config, mx.array(ids))
    ids = np.array(start.to_target(mx.arange(start.config.head_outputs)), np.int32)
    shards = Shards([features.size], lambda _: features, [len(rows)] if whole else [])
    settings = replace(request.settings, batch=SMALLEST, epochs=4.0)
    trial = Trainer(target, _twin(start), Data(shards, shards, ids), settings, workers)
    return _step_time(trial) / features.size


def _step_time(trial: Trainer) -> float:
    """Seconds for one of the next steps, after the first, for which more is prepared."""
    times = [time.monotonic() for _ in islice(trial.run(), 4)]
    return (times[-1] - times[0]) / max(1, len(times) - 1) or 1e-6


def _twin(drafter: Drafter) -> Drafter:
    """A copy, which may be trained for a trial."""
    twin = Drafter(drafter.config, drafter.weights().get("draft_to_target"))
    twin.update(drafter.parameters())
    return twin


def fit_time(
    work: Work, target: Target, drafter: Drafter, data: Data, request: Request, workers: Workers
) -> tuple[Settings, int]:
    """The settings asked for, or batch and epochs for the rest of the time; and how often to score."""
    settings = request.settings
    if request.seconds is None:
        return settings, SCORES
    if "plan" not in work.facts:
        end = (1 - EVALUATION_TIME) * request.seconds
        known = sum(data.train.sizes)
        trained = min((end - work.elapsed) / work.facts["pace"], MOST_EPOCHS * known)
        batch = settings.batch
        if "batch" in request.left_open:
            batch = _halved(batch, trained / FEW, SMALLEST)
            while 2 * batch <= min(LARGEST, _most_positions(target, request)) and trained / batch > MANY:
                batch *= 2
        settings = replace(settings, batch=batch)
        began = time.monotonic()
        data.train.load(0)
        loading = time.monotonic() - began  # of each shard, in every epoch
        trial = Trainer(target, _twin(drafter), data, settings, workers)
        per_step = _step_time(trial)
        began = time.monotonic()
        trial.score()
        scoring = time.monotonic() - began
        left = end - work.elapsed
        scores = max(1, min(SCORES, int(SCORING * left / max(scoring, 1e-6))))
        steps = steps_of(data.train.sizes, replace(settings, epochs=1.0), data.train.rows)
        per_epoch = 1.03 * (per_step * steps + loading * len(data.train.sizes))  # with checkpoints
        epochs = min(max((left - scores * scoring) / per_epoch, 1 / steps), MOST_EPOCHS)
        work.note(plan={"batch": batch, "epochs": epochs, "scores": scores})
    plan = work.facts["plan"]
    return replace(settings, batch=plan["batch"], epochs=plan["epochs"]), plan["scores"]


# --- What to expect ------------------------------------------------------------------------------------


def foresee_written(work: Work, request: Request, given: int, wanted: int, seconds: float) -> None:
    """Say what may be expected of ``given`` positions, and of others that take ``seconds`` each to write."""
    pace, settings, total = work.facts["pace"], request.settings, request.seconds
    known = given + min(wanted, (DATA_TIME * total - work.elapsed) / max(seconds, 1e-9) if total else wanted)
    if total:
        trained = min((1 - DATA_TIME - EVALUATION_TIME) * total / pace, MOST_EPOCHS * known)
    else:
        trained = settings.epochs * known
    foresee(work, request, known, trained, total or work.elapsed + (known - given) * seconds + trained * pace)


def foresee(work: Work, request: Request, known: float, trained: float, seconds: float) -> None:
    """Say what may be expected of so many positions, once in a run."""
    if "forecast" in work.facts:
        return
    text = forecast(known, trained, seconds)
    if work.facts["goes_on"]:
        text = "none, because it goes on from another drafter."
    tqdm.write(f"Forecast: {text}")
    work.note(forecast=text)
