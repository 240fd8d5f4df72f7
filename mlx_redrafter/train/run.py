"""From a model to a drafter: write or read data, compute hidden states, train, evaluate.

What is done on the way is in the work folder (``work.py``).
"""

import hashlib
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ..blas import set_blas_threads
from ..conversations import Prompt, encode, usable
from ..decoding.sampling import Sampling
from ..decoding.state import DraftShape
from ..loading.files import atomic_file
from ..loading.find import drafter_folder, find_drafter
from ..loading.search import search_drafter
from ..model import SpeculativeModel
from ..models.bundle import base_of, cast, load_drafter, read_config
from ..models.drafter import Drafter
from ..models.identity import BaseIdentity, identity_of
from ..models.save import write_drafter
from ..models.target import Target
from . import curve
from .card import Facts, environment, model_card
from .collect import keep_given, make_data, read_all
from .data import Dropped, Given, count_tokens, read_shard
from .evaluate import Measured, evaluate
from .features import Features, extract, load_tensors, read_features, write_features
from .loss import Score
from .plan import drafter_config, fit_machine, fit_time, foresee
from .streams import Workers
from .trainer import Data, Shards, Trainer, initial_drafter, with_memory, with_rare, with_vocabulary
from .work import RARE_TOKENS, Request, Work

HELD_OUT = 24  # one shard in this many is held out
COVERAGE = 0.96  # share of the data's tokens that the default draft vocabulary has
VOCAB_STEP = 1024  # the default draft vocabulary is a multiple of it
SAVE_SECONDS = 120.0
HELD_OUT_PROMPTS = 16


def train(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    request: Request,
    output: Path,
    asked: dict[str, Any],
    name: str,
    evaluation: "Evaluation",
    command: str,
) -> dict[str, list[Measured]]:
    """Make a drafter for ``model`` and write it to ``output``.

    Args:
        asked: the options in JSON's types; a work folder with others is refused.
        name: of the base model, for the card.
        command: the command line, for the card.
    Returns:
        What its evaluation measured, for each set of prompts.
    Raises:
        ValueError: bad input; nothing is lost of an earlier run.
        KeyboardInterrupt: after all work so far was saved.
    """
    sets = {}
    for source, prompts in evaluation.prompts.items():  # bad ones are told before the work, not after
        sets[source], ids = usable(prompts, partial(encode, tokenizer=tokenizer))
        model.check_prompts(ids)
    evaluation = replace(evaluation, prompts=sets)
    for temperature in evaluation.temperatures:
        Sampling(temperature)
    work = Work.open(output.with_name(f"{output.name}.train"), asked)
    identity = identity_of(model.model, name)
    work.check({name: identity.embedding_digest, **{path: _mark(path) for path in request.data}})
    start = _start(request, identity, work)
    if model.prepare() is None:  # texts are written, and drafts would be verified, by an engine
        raise ValueError(model.refusal)
    target = Target(model.model, _layers(request, model) if start is None else start.config.context_layers)
    if start is None:
        drafter_config(target, request)  # which may be refused
    elif request.memory_heads and not start.config.memory_heads:
        start = with_memory(start, target, request.memory_heads, request.settings.seed)
    elif request.memory_heads not in (0, start.config.memory_heads):
        raise ValueError(
            f"{request.start_from} has {start.config.memory_heads} memory heads, not {request.memory_heads}: "
            "leave --memory-heads out."
        )
    request = replace(request, memory_heads=start.config.memory_heads if start else request.memory_heads)
    if request.rare_tokens and not request.memory_heads:
        raise ValueError(f"{request.rare_tokens} rare tokens need a memory: give --memory-heads too.")
    given, dropped = (Given(), Dropped()) if work.facts.get("data_done") else read_all(request, tokenizer)
    if not (drawn := curve.can_draw()):
        remedy = "pip install 'mlx-redrafter[benchmark]'"
        warnings.warn(f"no learning curve is drawn without {curve.PACKAGE}: {remedy}.", stacklevel=1)
    with work.begin(command):  # from here on, a mistake in the command would be in the way of its correction
        workers = Workers(request.workers)
        set_blas_threads(1 if workers.count > 1 else os.cpu_count() or 1)
        request = fit_machine(work, target, request, workers, start)
        keep_given(work, given, dropped)
        make_data(work, target, tokenizer, request, given, workers)
        data = make_features(work, target, request, workers)
        trainer = fit(work, target, data, request, workers, start)
        drafter = best_drafter(trainer, work)
        fast = SpeculativeModel(model.model, drafter, model.context_length)
        measured = evaluation.run(fast, tokenizer, work, request, workers)
        pictures = {curve.NAME: curve.draw(work.facts["scores"])} if drawn else {}
        card = describe(work, trainer, drafter, identity, request, measured, output.name, [*pictures])
        stored, extra = cast(drafter.weights(), mx.bfloat16), {"training": work.facts["trained"]}
        write_drafter(output, drafter.config, stored, identity, extra, card, others=pictures)
        shutil.rmtree(work.folder / "features", ignore_errors=True)
    return measured


def _mark(name: str) -> str:
    """A digest of a file; empty if there is none."""
    path = Path(name).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _start(request: Request, identity: BaseIdentity, work: Work) -> Drafter | None:
    """The drafter to train on: a named one, or one found when the run began; None for a new one."""
    if request.start_from == "auto":
        if "start" not in work.facts:
            work.facts["start"] = _known_start(identity)
        name = work.facts["start"]
        if name:
            print(f"Starting from {name}: --start-from none starts from nothing.")
    else:
        name = request.start_from
    if name in (None, "", "none"):
        return None
    drafter = load_drafter(drafter_folder(name), identity, mx.float32)
    if drafter.config.quantization is not None:
        raise ValueError(f"{name} is quantized: start from a drafter that is not.")
    return drafter


def _known_start(identity: BaseIdentity) -> str:
    """The folder of a drafter for the model that this one was fine-tuned from, by its embedding; or ""."""
    found = find_drafter(identity) or search_drafter(identity)
    raw = {} if found is None else read_config(found)
    base = base_of(raw)
    own = base is None or base.name == identity.name  # then another drafter for the same model is wanted
    return "" if own or "quantization" in raw else str(found)


def _layers(request: Request, model: SpeculativeModel) -> tuple[int, ...]:
    if request.context_layers is not None:
        return request.context_layers
    count = len(Target(model.model).layers)
    return tuple(sorted({max(1, round(count * share)) for share in (0.27, 0.53, 0.77)} - {count}))


# --- Features ----------------------------------------------------------------------------------------------


def make_features(work: Work, target: Target, request: Request, workers: Workers) -> Data:
    """Compute what ``features/`` lacks, unless it is computed in every epoch; choose the vocabulary."""
    shards = work.shards()
    held = shards[::HELD_OUT]
    train = [shard for shard in shards if shard not in held]
    rows, whole = {shard: read_shard(shard) for shard in shards}, request.memory_heads > 0
    vocabulary = int(target.embed.weight.shape[0])
    kept = [row for shard in train for row in rows[shard]]
    counts = count_tokens(kept, vocabulary)
    cached = _cached(work, target, request, shards, rows, workers)
    missing = [shard for shard in shards if not work.features(shard).exists()] if cached else []
    for shard in tqdm(missing, desc="Reading data", unit="shard", disable=not missing):
        write_features(work.features(shard), extract(target, rows[shard], workers, whole))
        mx.clear_cache()

    def shards_of(paths: list[Path]) -> Shards:
        def load(index: int) -> Features:
            path = work.features(paths[index])
            if path.exists():
                return read_features(path)
            return extract(target, rows[paths[index]], workers, whole)

        sizes = [sum(int(row.trained[1:].sum()) for row in rows[path]) for path in paths]
        return Shards(sizes, load, [len(rows[path]) for path in paths] if whole else [])

    tokens, trained = sum(len(row.tokens) for row in kept), int(counts[0].sum())
    held_out = sum(len(rows[shard]) for shard in held)
    counted = {"tokens": tokens, "conversations": len(kept), "held_out": held_out, "trained": trained}
    work.note(counted=counted)
    return Data(shards_of(train), shards_of(held), choose_vocabulary(counts, request.draft_vocab))


def _cached(
    work: Work, target: Target, request: Request, shards: list[Path], rows: dict[Path, Any], workers: Workers
) -> bool:
    """Whether hidden states are kept on disk: if they fit, and reading them is faster than computing them."""
    if request.cache != "auto":
        return request.cache == "disk"
    if all(work.features(shard).exists() for shard in shards):
        return True
    first = shards[0]
    start = time.monotonic()
    features = extract(target, rows[first], workers, request.memory_heads > 0)
    computing = time.monotonic() - start
    write_features(work.features(first), features)
    start = time.monotonic()
    mx.eval(vars(read_features(work.features(first))))
    reading = time.monotonic() - start
    missing = sum(not work.features(shard).exists() for shard in shards)
    fits = work.features(first).stat().st_size * missing <= shutil.disk_usage(work.folder).free // 2
    return fits and reading < computing and request.settings.epochs > 1


def choose_vocabulary(counts: np.ndarray[Any, Any], size: int | None) -> np.ndarray[Any, Any]:
    """The draft tokens, in ascending order: those of the most conversations.

    They cover more of other texts than those said most often, which may all be one conversation's.

    Args:
        counts: [2, V], how often the model said each token, and in how many conversations.
        size: how many; None takes as many as cover ``COVERAGE`` of the data; 0 takes all.
    Returns:
        int32 [Vd].
    """
    said, conversations = counts
    order = np.lexsort((-said, -conversations))
    if size is None:
        covered = np.cumsum(said[order]) / max(1, said.sum())
        needed = int(np.searchsorted(covered, COVERAGE)) + 1
        size = -(-needed // VOCAB_STEP) * VOCAB_STEP
    return np.sort(order[: size or len(order)]).astype(np.int32)


# --- Training ----------------------------------------------------------------------------------------------


def fit(
    work: Work, target: Target, data: Data, request: Request, workers: Workers, start: Drafter | None
) -> Trainer:
    """Train ``start`` or a new drafter, or go on training, until the last step."""
    if start is None:
        drafter = _new_drafter(target, data, request)
    elif request.draft_vocab is None:
        drafter, ids = start, start.to_target(mx.arange(start.config.head_outputs))
        data = replace(data, draft_to_target=np.array(ids, np.int32))
    else:
        drafter = with_vocabulary(start, target, _some(data, start.config.vocab_size), request.settings.seed)
    if start is not None and request.rare_tokens is not None and drafter.config.draft_vocab_size:
        drafter = with_rare(drafter, target, request.rare_tokens, request.settings.seed)
    settings, scores = fit_time(work, target, drafter, data, request, workers)
    trainer = Trainer(target, drafter, data, settings, workers)
    checkpoint = work.folder / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.restore(checkpoint)
    if trainer.progress.step < trainer.steps:
        known, positions = sum(data.train.sizes), trainer.steps * settings.batch
        left = positions * work.facts["pace"]
        foresee(work, request, known, positions, request.seconds or work.elapsed + left)
        _run(trainer, work, checkpoint, max(1, trainer.steps // scores))
    return trainer


def _new_drafter(target: Target, data: Data, request: Request) -> Drafter:
    config = drafter_config(target, request)
    some = _some(data, config.vocab_size)
    usual = RARE_TOKENS if config.memory_heads else 0
    rare = 0 if some is None else usual if request.rare_tokens is None else request.rare_tokens
    config = replace(config, draft_vocab_size=None if some is None else len(some), rare_tokens=rare)
    return initial_drafter(target, config, some, request.settings.seed)


def _some(data: Data, vocabulary: int) -> np.ndarray[Any, Any] | None:
    """The draft tokens; None if they are all."""
    return None if len(data.draft_to_target) == vocabulary else data.draft_to_target


def _run(trainer: Trainer, work: Work, checkpoint: Path, every: int) -> None:
    """Train to the end with a progress bar, scoring every so many steps; Ctrl-C saves and stops."""
    saved, found = time.monotonic(), None
    # Of a process that was killed, those after the checkpoint come again.
    scores = [score for score in work.facts.get("scores", []) if score["step"] <= trainer.progress.step]
    bar = tqdm(total=trainer.steps, initial=trainer.progress.step, unit="step", desc="Training")
    with bar, _interrupted() as interrupted:
        for step, losses in trainer.run():
            last = step == trainer.steps
            if not np.isfinite(losses).all():
                raise ValueError(
                    f"training diverged at step {step}: start again with a lower --learning-rate."
                )
            if step % every == 0 or last:
                found = trainer.score()
                if trainer.progress.best_step == step:
                    with atomic_file(work.folder / "best.safetensors") as temporary:
                        mx.save_safetensors(str(temporary), trainer.weights())
                place = {"step": step, "positions": step * trainer.settings.batch, "seconds": work.elapsed}
                scores.append({**place, **asdict(found)})
                work.note(scores=scores)
            if last or interrupted() or time.monotonic() - saved > SAVE_SECONDS:
                trainer.save(checkpoint)
                work.note()
                saved = time.monotonic()
            bar.set_postfix_str(_postfix(losses, found), refresh=False)
            bar.update()
            if interrupted() and not last:
                bar.close()
                raise KeyboardInterrupt


def _postfix(losses: np.ndarray[Any, Any], found: Score | None) -> str:
    text = f"loss {losses.mean():.3f}"
    if found is None:
        return text
    shares = " ".join(f"{share:.2f}" for share in found.top1)
    return f"{text}, held out: top-1 {shares}, tokens/step {found.tokens_per_step:.3f}"


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Within the block, the first Ctrl-C (or SIGTERM) is only remembered; the second one interrupts."""
    seen = Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(handlers: Mapping[signal.Signals, Any]) -> None:
        with suppress(ValueError):  # not the main thread, which alone gets signals
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def remember(*_: Any) -> None:
        seen.set()
        handle(before)

    handle(dict.fromkeys(before, remember))
    try:
        yield seen.is_set
    finally:
        handle(before)


def best_drafter(trainer: Trainer, work: Work) -> Drafter:
    """The drafter with the weights of the best held-out score, as it will be stored."""
    weights, _ = load_tensors(work.folder / "best.safetensors")
    scores = {score["step"]: score for score in work.facts.get("scores", [])}
    best = scores.get(trainer.progress.best_step, {})
    work.note(
        trained={
            "steps": trainer.steps,
            "epochs": round(trainer.settings.epochs, 3),
            "best_step": trainer.progress.best_step,
            "held_out": best,
            "settings": asdict(trainer.settings),
        }
    )
    drafter = Drafter(trainer.drafter.config, weights.pop("draft_to_target", None))
    dtype = trainer.target.embed(mx.array([0])).dtype
    drafter.load_weights(list(cast(cast(weights, mx.bfloat16), dtype).items()))
    mx.eval(drafter.weights())
    return drafter


# --- Evaluation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """How the result is measured by real decoding."""

    prompts: Mapping[
        str, Sequence[Prompt]
    ]  # by their sources; held-out conversations' beginnings come besides
    shapes: Sequence[DraftShape]  # how much is drafted; no wider than the drafter has tokens
    temperatures: Sequence[float]  # 0 is greedy
    tokens: int  # per answer, at most; 0 leaves the evaluation out
    batch: int = 8  # prompts decoded at once

    def run(
        self, model: SpeculativeModel, tokenizer: Any, work: Work, request: Request, workers: Workers
    ) -> dict[str, list[Measured]]:
        """Decode the answers to each set of prompts, within the time that is left."""
        held_out = _held_out_prompts(work)
        sets = {**self.prompts, **({"held-out conversations": held_out} if held_out else {})}
        known = model.drafter.config.head_outputs if model.drafter else 1
        shapes = [s if s.width <= known else DraftShape(known, s.length) for s in self.shapes]
        options: Any = {"max_tokens": self.tokens, "batch": self.batch, "workers": workers}
        found = {}
        for done, (name, prompts) in enumerate(sets.items() if self.tokens else ()):
            deadline = None
            if request.seconds is not None:
                left = request.seconds - work.elapsed
                deadline = time.monotonic() + left / (len(sets) - done)
            found[name] = evaluate(
                model, tokenizer, prompts, shapes, self.temperatures, deadline=deadline, **options
            )
        return found


def _held_out_prompts(work: Work) -> list[Prompt]:
    """The beginnings of held-out conversations, up to the model's first answer."""
    prompts = []
    for shard in work.shards()[::HELD_OUT]:
        for row in read_shard(shard):
            first = int(row.trained.argmax())
            if first:
                prompts.append(Prompt([], ids=row.tokens[:first].tolist()))
    return prompts[:HELD_OUT_PROMPTS]


def describe(
    work: Work,
    trainer: Trainer,
    drafter: Drafter,
    identity: BaseIdentity,
    request: Request,
    measured: Mapping[str, list[Measured]],
    name: str,
    pictures: Sequence[str],
) -> str:
    """The model card."""
    facts, config = work.facts, drafter.config
    counted = facts["counted"]
    best = facts["trained"]["held_out"]
    parameters = sum(x.size for key, x in drafter.weights().items() if key != "draft_to_target")
    once = 0 if config.head_inputs == config.exit_dim else config.context_size * config.exit_dim
    sources = [Path(path).name for path in request.data]
    if facts.get("batches"):
        written = f"{facts['batches']} batches of {request.recipe.batch} rows"
        sources.append(f"written by the model itself, {written}")
    shown = Facts(
        base=identity.name,
        drafter=request.upload_repo or name,
        identity=str(identity),
        tags=identity.tags(),
        license=request.license,
        license_note="A drafter is derived from its base model: that model's license applies to it.",
        commands=list(dict.fromkeys(facts["commands"])),
        sizes=config.to_dict(),
        parameters=parameters,
        bytes_per_step=2 * (parameters - once),
        conversations=counted["conversations"],
        tokens=counted["tokens"],
        trained_tokens=counted["trained"],
        **facts.get("dropped", {}),
        held_out=counted["held_out"],
        sources=sources,
        seeds={"data": request.recipe.seed, "training": request.settings.seed},
        versions=environment(),
        steps=trainer.steps,
        epochs=trainer.settings.epochs,
        seconds=facts["seconds"],
        loss=best.get("loss", ()),
        top1=best.get("top1", ()),
        measured=measured,
        pictures=pictures,
    )
    return model_card(shown)
