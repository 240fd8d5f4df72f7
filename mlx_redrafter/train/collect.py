"""The conversations in the work folder: those that the user gave, and those that the model writes."""

import math
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ..models.target import Target
from .data import (
    Cleaner,
    Conversation,
    Dropped,
    Given,
    clean,
    read_given,
    read_shard,
    write_shard,
)
from .features import select, write_features
from .plan import DATA_TIME, foresee_written
from .selfgen import check, generate
from .streams import Workers
from .work import SHARD_ROWS, Request, Work

DEFAULT_TOKENS = 2_000_000
UNLIMITED = 1 << 62
CHAT_FLAGS = ("--user-temp", "--system-prompt", "--openings", "--opened")  # of no use to base models
MEASURED = 48  # tokens of each conversation after which it is known how long they take
SHORTEST_CUT = 96  # tokens of a conversation that is cut because the time is up
ANSWERS = 0.6  # the usual share of a conversation's tokens
STALE = 3  # batches in a row with hardly anything new end the writing


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
    tell = partial(foresee_written, work, request, *_positions(request, given))
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
                progress=partial(_advance, bar, request, work, limit, tell, []),
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


def _positions(request: Request, given: Given) -> tuple[int, int]:
    """How many there are, and how many are to be written."""
    wanted = _wanted(request, given)
    if request.tokens is None and given.prompts:
        wanted = min(wanted, int(ANSWERS * request.recipe.length * len(given.prompts)))
    return sum(int(row.trained[1:].sum()) for row in given.conversations), wanted


def _advance(
    bar: Any,
    request: Request,
    work: Work,
    limit: float,
    tell: Callable[[float], None],
    seen: list[tuple[int, float]],
    done: int,
    total: int,
) -> bool:
    """Show a batch's progress, tell what to expect, and say when the time is up.

    What part of it is the model's answers is known only at the end. ``seen`` gets the tokens per row and the
    time of every call, at the first of which only prompts have been read.
    """
    at_once = ANSWERS * request.recipe.batch
    bar.update(round(at_once))
    if limit < math.inf:
        bar.set_postfix_str(f"{max(0.0, limit - work.elapsed):.0f} s left", refresh=False)
    seen.append((done, work.elapsed))
    written, took = done - seen[0][0], seen[-1][1] - seen[0][1]
    if written and written >= min(MEASURED, total - seen[0][0]):
        tell(took / (at_once * written))
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
