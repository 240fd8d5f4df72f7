"""From a model to a drafter: write or read data, compute hidden states, train, evaluate.

Everything on the way is kept in a work folder beside the output, so a run can be interrupted anywhere:

    run.json                what was asked for, and what has been done
    data/a000000.npz        conversations (a: given, b: written), ``SHARD_ROWS`` per file
    features/               hidden states, for one file of conversations each
    checkpoint.safetensors  weights and the optimizer's state
    best.safetensors        the weights with the best held-out score
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
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
from ..models.drafter import Drafter, DrafterConfig
from ..models.identity import BaseIdentity, identity_of
from ..models.save import write_drafter
from ..models.target import Target
from .card import Facts, environment, model_card
from .data import (
    Cleaner,
    Conversation,
    Dropped,
    Given,
    clean,
    count_tokens,
    read_given,
    read_shard,
    write_shard,
)
from .evaluate import Measured, evaluate
from .features import Features, extract, load_tensors, read_features, select, write_features
from .loss import Score
from .selfgen import Recipe, check, generate
from .streams import Workers
from .trainer import Data, Settings, Shards, Trainer, initial_drafter, steps_of, with_memory, with_vocabulary

SHARD_ROWS = 16
HELD_OUT = 24  # one shard in this many is held out
COVERAGE = 0.96  # share of the data's tokens that the default draft vocabulary has
VOCAB_STEP = 1024  # the default draft vocabulary is a multiple of it
DATA_TIME = 0.6  # share of a time budget that goes to writing and reading data
EVALUATION_TIME = 0.12
DEFAULT_TOKENS = 2_000_000
MOST_EPOCHS = 10.0
SCORES = 12  # held-out scores in a run
SAVE_SECONDS = 120.0
UNLIMITED = 1 << 62
CHAT_FLAGS = ("--user-temp", "--system-prompt", "--openings", "--opened")  # of no use to base models
SHORTEST_CUT = 96  # tokens of a conversation that is cut because the time is up
ANSWERS = 0.6  # the usual share of a conversation's tokens
STALE = 3  # batches in a row with hardly anything new end the writing
HELD_OUT_PROMPTS = 16


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    data: tuple[str, ...] = ()  # files to train on, or to take prompts from
    # Trained tokens that the model writes itself, besides ``data``; None: none if conversations are given,
    # else as many as the time allows, or ``DEFAULT_TOKENS``.
    tokens: int | None = None
    recipe: Recipe = field(default_factory=Recipe)  # how it writes them
    settings: Settings = field(default_factory=Settings)  # of training; epochs give way to seconds
    draft_vocab: int | None = None  # None: those of start_from, or chosen by coverage; 0: all
    exit_dim: int | None = None  # None is H
    blocks: int = 2  # residual blocks of the head
    cell: str = "simple"  # or gru, or none
    memory_heads: int = 0  # 0: no memory, or that of start_from
    context_layers: tuple[int, ...] | None = None  # None: a low, a middle and a high one; empty: Apple's
    start_from: str | None = None  # a drafter to train on, or auto: that of the model this one was made from
    upload_repo: str | None = None  # where it will be published, for the card
    seconds: float | None = None  # for everything together
    cache: str = "auto"  # disk keeps hidden states, off computes them in every epoch, auto chooses
    license: str = ""  # of the drafter, for the card
    workers: int | None = None  # None is one per core on a CPU, one on a GPU
    writing: tuple[str, ...] = ()  # the user's own options of the recipe, to warn where they change nothing

    def __post_init__(self) -> None:
        if self.draft_vocab is not None and self.draft_vocab < 0:
            size = f"a draft vocabulary of {self.draft_vocab} tokens"
            raise ValueError(f"{size} is not usable: give 1 or more, or 0 for all.")


@dataclass
class Work:
    """The work folder and its run.json."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, asked: dict[str, Any]) -> "Work":
        """The run that the folder holds, or a new one; nothing is written before ``begin``.

        Raises:
            ValueError: it holds a run that was asked for otherwise.
        """
        work = cls(folder)
        if (folder / "run.json").is_file():
            work.facts = read_facts(folder)
            before = work.facts["asked"]
            if before != asked:
                changed = [name for name in sorted({*asked, *before}) if asked.get(name) != before.get(name)]
                raise ValueError(
                    f"{folder} holds a run with other options ({', '.join(changed)}): give the same ones, or "
                    "only --output with --resume; or delete that folder to start again."
                )
        work.facts["asked"] = asked
        return work

    def check(self, read: dict[str, str]) -> None:
        """Raise ``ValueError`` if what is read (a digest for each name) is not what the run began with."""
        before = self.facts.setdefault("read", read)
        for name in read:
            gone = not read[name] and "data_done" in self.facts  # which does no harm then
            if read[name] != before.get(name) and not gone:
                raise ValueError(
                    f"{name} has changed since the run in {self.folder} began: put back what it was, or "
                    "delete the folder to start again."
                )

    @contextmanager
    def begin(self, command: str) -> Iterator[None]:
        """Make what is not there yet of the folder, and note the command line; within, nobody else may.

        Raises:
            ValueError: another run works in the folder.
        """
        for name in ("data", "features"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.note(commands=[*self.facts.get("commands", []), command])
            yield
        except BlockingIOError as error:
            raise ValueError(
                f"another run works in {self.folder}: wait for its end, or name another output folder."
            ) from error
        finally:
            os.close(folder)

    def note(self, **facts: Any) -> None:
        """Add to run.json."""
        self.facts.update(facts, seconds=self.elapsed)
        self.began = time.monotonic()
        with atomic_file(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(self.facts, indent=1) + "\n")

    @property
    def elapsed(self) -> float:
        """Seconds of work, those of interrupted runs included."""
        return float(self.facts.get("seconds", 0.0)) + time.monotonic() - self.began

    def shards(self) -> list[Path]:
        return sorted((self.folder / "data").glob("[ab]*.npz"))

    def features(self, shard: Path) -> Path:
        return self.folder / "features" / f"{shard.stem}.safetensors"


def read_facts(folder: Path) -> dict[str, Any]:
    """The run.json of a work folder.

    Raises:
        ValueError: it is not there, or damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: there is no run to resume; leave --resume out.")
    try:
        facts = dict(json.loads(path.read_text("utf-8")))
        return {**facts, "asked": dict(facts["asked"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete {folder} and start again.") from error


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
        _config(target, request)  # which may be refused
    elif request.memory_heads and not start.config.memory_heads:
        start = with_memory(start, target, request.memory_heads, request.settings.seed)
    elif request.memory_heads not in (0, start.config.memory_heads):
        raise ValueError(
            f"{request.start_from} has {start.config.memory_heads} memory heads, not {request.memory_heads}: "
            "leave --memory-heads out."
        )
    request = replace(request, memory_heads=start.config.memory_heads if start else request.memory_heads)
    given, dropped = (Given(), Dropped()) if work.facts.get("data_done") else read_all(request, tokenizer)
    with work.begin(command):  # from here on, a mistake in the command would be in the way of its correction
        workers = Workers(request.workers)
        set_blas_threads(1 if workers.count > 1 else os.cpu_count() or 1)
        keep_given(work, given, dropped)
        make_data(work, target, tokenizer, request, given, workers)
        data = make_features(work, target, request, workers)
        trainer = fit(work, target, data, request, workers, start)
        drafter = best_drafter(trainer, work)
        fast = SpeculativeModel(model.model, drafter, model.context_length)
        measured = evaluation.run(fast, tokenizer, work, request, workers)
        card = describe(work, trainer, drafter, identity, request, measured, output.name)
        stored = cast(drafter.weights(), mx.bfloat16)
        write_drafter(output, drafter.config, stored, identity, {"training": work.facts["trained"]}, card)
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


# --- Data ------------------------------------------------------------------------------------------------


def read_all(request: Request, tokenizer: TokenizerWrapper) -> tuple[Given, Dropped]:
    """What all the files hold that the user gave, cleaned.

    Raises:
        ValueError: one of them cannot be used, or the model cannot write what is wanted besides.
    """
    whole = Given()
    for name in request.data:
        given = read_given(Path(name).expanduser(), tokenizer, request.recipe.length)
        whole.conversations += given.conversations
        whole.prompts += given.prompts
        whole.unusable += given.unusable
        whole.unread |= given.unread
    wanted = _wanted(request, whole)
    _warn_of_idle(request, whole, wanted, tokenizer.has_chat_template)
    whole.conversations, dropped = clean(whole.conversations)
    if wanted:
        check(tokenizer, request.recipe, whole.prompts)
    elif len(whole.conversations) < 2:
        raise ValueError(f"too few conversations to train on ({dropped}): give or generate more of them.")
    return whole, dropped


def _warn_of_idle(request: Request, given: Given, wanted: int, chat: bool) -> None:
    """Warn of flags and prompts that are of no use, and of what is not read beside prompts."""
    why = "without a chat template" if wanted else "where the model writes nothing: see --tokens"
    for flag in request.writing:
        if not wanted or (flag in CHAT_FLAGS and not chat):
            warnings.warn(f"{flag} does nothing {why}.", stacklevel=1)
    if given.prompts and not wanted:
        unanswered = f"prompts that are not answered, because of --tokens 0: {len(given.prompts)}."
        warnings.warn(unanswered, stacklevel=1)
    if given.unread:
        keys = ", ".join(sorted(given.unread))
        warnings.warn(f"not read, beside the prompts that the model answers: {keys}.", stacklevel=1)


def _wanted(request: Request, given: Given) -> int:
    """How many trained tokens the model is to write itself."""
    if request.tokens is not None:
        return request.tokens
    if given.conversations and not given.prompts:
        return 0
    return UNLIMITED if request.seconds else DEFAULT_TOKENS


def keep_given(work: Work, given: Given, found: Dropped) -> None:
    """Write given conversations as shards, once."""
    kept = given.conversations
    if not kept or "given" in work.facts:
        return
    rows = max(1, min(SHARD_ROWS, len(kept) // 2))
    for number, start in enumerate(range(0, len(kept), rows)):
        write_shard(work.folder / "data" / f"a{number:06d}.npz", kept[start : start + rows])
    dropped = _dropped(work, found)
    work.note(given=len(kept), unusable=given.unusable, dropped=dropped)
    print(
        f"Data: {len(kept)} conversations, dropped {dropped['duplicates']} near-duplicates, "
        f"{dropped['loops']} loops, {given.unusable} unusable."
    )


def make_data(
    work: Work, target: Target, tokenizer: TokenizerWrapper, request: Request, given: Given, workers: Workers
) -> None:
    """Let the model write conversations until they have the wanted trained tokens or time is up.

    Fills ``data/``, and ``features/`` with what generating computed anyway.
    """
    if work.facts.get("data_done"):
        return
    prompts, wanted, cleaner = given.prompts, _wanted(request, given), Cleaner()
    batch, stale, duration = int(work.facts.get("batches", 0)), 0, 0.0
    trained = _read_written(work, cleaner, batch)
    limit = math.inf if request.seconds is None else DATA_TIME * request.seconds
    total = None if wanted == UNLIMITED else wanted
    with tqdm(total=total, initial=trained, unit="tok", desc="Writing data") as bar:
        while trained < wanted and work.elapsed + duration < limit:
            if request.tokens is None and prompts and batch * request.recipe.batch >= len(prompts):
                break
            started = work.elapsed
            generated = generate(
                target,
                tokenizer,
                request.recipe,
                batch,
                prompts=prompts,
                features=request.cache != "off" and _has_room(work),
                workers=workers,
                progress=partial(_advance, bar, request.recipe, work, limit),
            )
            whole = request.memory_heads > 0
            kept = _keep(work, generated.conversations, generated.features, cleaner, batch, whole)
            trained += sum(int(row.trained.sum()) for row in kept)
            batch, duration = batch + 1, work.elapsed - started
            work.note(batches=batch, dropped=_dropped(work, cleaner.dropped))
            cleaner.dropped = Dropped()
            bar.n = trained
            bar.refresh()
            stale = stale + 1 if len(kept) * 8 < request.recipe.batch else 0
            if stale == STALE:
                bar.write("The model only repeats itself: going on with what it wrote so far.")
                break
    if batch:
        dropped = work.facts["dropped"]
        print(
            f"Data: {trained:,} tokens written, dropped {dropped['duplicates']} near-duplicates and "
            f"{dropped['loops']} loops."
        )
    if len(work.shards()) < 2:
        raise ValueError("there are too few conversations to train on: give or generate more of them.")
    work.note(data_done=True)


def _read_written(work: Work, cleaner: Cleaner, batches: int) -> int:
    """Trained tokens in the first ``batches`` batches, which the cleaner gets to know; others are deleted."""
    trained = 0
    for shard in work.shards():
        if shard.name >= f"b{batches:06d}":  # of a batch that was interrupted while it was written
            shard.unlink()
        elif shard.name.startswith("b"):
            for conversation in read_shard(shard):
                cleaner.keep(conversation)
                trained += int(conversation.trained.sum())
    cleaner.dropped = Dropped()
    return trained


def _advance(bar: Any, recipe: Recipe, work: Work, limit: float, done: int, total: int) -> bool:
    """Show a batch's progress, and say when the time is up.

    What part of it is the model's answers is known only at the end.
    """
    bar.update(round(ANSWERS * recipe.batch))
    if limit < math.inf:
        bar.set_postfix_str(f"{max(0.0, limit - work.elapsed):.0f} s left", refresh=False)
    return work.elapsed > limit and done >= SHORTEST_CUT


def _has_room(work: Work) -> bool:
    """Whether all hidden states on disk take less than is still free there."""
    used = sum(path.stat().st_size for path in (work.folder / "features").iterdir())
    return used < shutil.disk_usage(work.folder).free


def _dropped(work: Work, found: Dropped) -> dict[str, int]:
    """The counts so far and those found now together."""
    before = work.facts.get("dropped", {})
    return {name: before.get(name, 0) + count for name, count in vars(found).items()}


def _keep(
    work: Work,
    rows: list[Conversation],
    hidden: mx.array | None,
    cleaner: Cleaner,
    batch: int,
    whole: bool,
) -> list[Conversation]:
    """Write the usable ones of a batch's conversations."""
    kept = [i for i, row in enumerate(rows) if row.trained[1:].any() and cleaner.keep(row)]
    per_shard = max(1, min(SHARD_ROWS, len(kept) // 2))
    for start in range(0, len(kept), per_shard):
        chosen = kept[start : start + per_shard]
        shard = work.folder / "data" / f"b{batch:06d}-{start:03d}.npz"
        part = [rows[i] for i in chosen]
        if hidden is not None:
            write_features(work.features(shard), select(hidden[mx.array(chosen)], part, whole))
        write_shard(shard, part)
    return [rows[i] for i in kept]


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
    settings = replace(request.settings, epochs=_epochs(work, target, drafter, data, request, workers))
    trainer = Trainer(target, drafter, data, settings, workers)
    checkpoint = work.folder / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.restore(checkpoint)
    if trainer.progress.step < trainer.steps:
        _run(trainer, work, checkpoint)
    return trainer


def _new_drafter(target: Target, data: Data, request: Request) -> Drafter:
    config = _config(target, request)
    some = _some(data, config.vocab_size)
    config = replace(config, draft_vocab_size=None if some is None else len(some))
    return initial_drafter(target, config, some, request.settings.seed)


def _config(target: Target, request: Request) -> DrafterConfig:
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


def _some(data: Data, vocabulary: int) -> np.ndarray[Any, Any] | None:
    """The draft tokens; None if they are all."""
    return None if len(data.draft_to_target) == vocabulary else data.draft_to_target


def _epochs(
    work: Work, target: Target, drafter: Drafter, data: Data, request: Request, workers: Workers
) -> float:
    """The epochs asked for, or as many as the rest of the time allows, measured on a few steps."""
    if request.seconds is None:
        return request.settings.epochs
    if "epochs" in work.facts:
        return float(work.facts["epochs"])
    twin = Drafter(drafter.config, drafter.weights().get("draft_to_target"))
    twin.update(drafter.parameters())
    trial = Trainer(target, twin, data, request.settings, workers)
    times = [time.monotonic() for _ in islice(trial.run(), 4)]
    per_step = (times[-1] - times[0]) / max(1, len(times) - 1) or 1.0
    left = (1 - EVALUATION_TIME) * request.seconds - work.elapsed
    per_epoch = steps_of(data.train.sizes, replace(request.settings, epochs=1.0), data.train.rows)
    scoring = 1.1  # held-out scores and checkpoints take their part
    epochs = min(max(left / (per_step * scoring * per_epoch), 1 / per_epoch), MOST_EPOCHS)
    work.note(epochs=epochs)
    return epochs


def _run(trainer: Trainer, work: Work, checkpoint: Path) -> None:
    """Train to the end with a progress bar; Ctrl-C saves and stops."""
    every = max(1, trainer.steps // SCORES)
    saved, found = time.monotonic(), None
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
                work.note(scores=[*work.facts.get("scores", []), [step, asdict(found)]])
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
    scores = dict(work.facts.get("scores", []))
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
                left = max(20.0, request.seconds - work.elapsed)
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
    )
    return model_card(shown)
