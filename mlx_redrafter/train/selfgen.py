"""Training data that the model writes itself: the Magpie recipe (arXiv 2406.08464), in full batches.

Given its chat template up to an empty user turn, a chat model writes the user's message, then the
answer, and so on. Every row of a batch is one such conversation of exactly ``length`` tokens, and all
rows advance by one token per step of an engine: its picks are what the template dictates, else sampled.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..decoding.chance import noise_at, seeds_at
from ..decoding.layers import fit_rows, one_text
from ..decoding.state import PLAIN, State, begin
from ..decoding.topk import top_k
from ..decoding.tree import Tree
from ..engine.engine import Engine
from ..engine.loop import Fixed
from ..engine.runner import Runner
from ..models.target import Target
from .data import Conversation
from .streams import Workers
from .template import Template, Turn, first_token, token_ids

SEED_TOKENS = 16  # of a prompt, that a base model continues
ROWS = 128  # of the grid in which the largest logits are searched
NEVER = -1e30  # a score that loses against every other


@dataclass(frozen=True)
class Recipe:
    """How conversations are written; ``ValueError`` if a value is out of range."""

    length: int = 512  # tokens per conversation, the template's included
    batch: int = 32  # conversations written at once
    temperature: float = 0.7  # of answers (0: the likeliest token)
    user_temperature: float = 1.0  # of the user's turns
    # Keep the likeliest candidates that together have this share of all candidates' probability at
    # temperature 1.
    top_p: float = 0.95
    # Candidates, the likeliest tokens; 0 takes the whole vocabulary, which is exact, but sorts it for every
    # token unless ``top_p`` is 1.
    top_k: int = 40
    seed: int = 0  # decides everything, together with a batch's index
    systems: tuple[str, ...] = ()  # system prompts to draw from; empty leaves it to the template
    openings: tuple[str, ...] = ()  # beginnings of the first user turn
    opened: float = 0.65  # share of conversations that start with one of them
    longest_user_turn: int = 160  # sampled tokens after which a user's turn is ended

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("batch", 1), ("top_k", 0), ("seed", 0), ("longest_user_turn", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is not usable: give {least} or more.")
        for name in ("temperature", "user_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value} is not usable: give 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not usable: give more than 0, at most 1.")
        if not 0 <= self.opened <= 1:
            raise ValueError(f"opened {self.opened} is no share: give 0 to 1.")
        if not all(text.strip() for text in (*self.systems, *self.openings)):
            raise ValueError("an empty system prompt or opening is not usable: leave it out.")


@dataclass
class Generated:
    """A batch of B conversations of exactly T tokens, the recipe's ``length`` unless they were cut."""

    conversations: list[Conversation]  # B; one whose prompt alone fills the row has no trained token
    # bfloat16 [B, T, F], the target's hidden state at every token, the last one included, if asked for.
    features: mx.array | None


def read_openings(path: Path | None = None) -> tuple[str, ...]:
    """Beginnings of a user's turn, one per line of a file; None reads those that ship.

    Raises:
        ValueError: the file cannot be read or holds none.
    """
    source = files(__package__) / "openings.txt" if path is None else path
    try:
        lines = source.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read ({error}): give a text file.") from error
    openings = tuple(line.strip() for line in lines if line.strip())
    if not openings:
        raise ValueError(f"{source} holds no openings: give one per line.")
    return openings


# --- Rows ----------------------------------------------------------------------------------------------


class _Row:
    """A conversation between a model and itself."""

    def __init__(self, template: Template, recipe: Recipe, start: list[int], questions: list[str]) -> None:
        self.template, self.recipe = template, recipe
        self.seed = 0  # of its random numbers
        self.queue, self.questions = deque(start), deque(questions)  # the queue is dictated next
        self.tokens: list[int] = []  # of the conversation so far
        self.trained: list[bool] = []
        self.turn: list[int] = []  # what was sampled in this turn
        self.answering = False  # who speaks when the queue is empty

    @classmethod
    def begun(cls, template: Template, recipe: Recipe, rng: np.random.Generator, turns: list[str]) -> "_Row":
        """A row whose first user turns are given, if any; the model writes the others too."""
        system = _drawn(recipe.systems, rng)
        if turns:
            row = cls(template, recipe, [*template.begin(system, turns[0]), *template.user.then], turns[1:])
            row.answering = True
            return row
        opening = _drawn(recipe.openings, rng)
        start = template.begin(system, opening if opening and rng.random() < recipe.opened else "")
        return cls(template, recipe, start, [])

    @property
    def speaker(self) -> Turn:
        return self.template.assistant if self.answering else self.template.user

    @property
    def temperature(self) -> float:
        return self.recipe.temperature if self.answering else self.recipe.user_temperature

    @property
    def forbidden(self) -> frozenset[int]:
        """Tokens that must not come next, because they would make the turn empty."""
        return frozenset() if self.turn else self.speaker.never_first

    def advance(self, sampled: int) -> None:
        """Take the next token: the dictated one if there is one, else ``sampled``."""
        dictated = bool(self.queue)
        self.tokens.append(self.queue.popleft() if dictated else sampled)
        self.trained.append(self.answering and not dictated)
        if not dictated:
            self.turn.append(sampled)
            self._hand_over()

    def _hand_over(self) -> None:
        """Let the other one speak if the turn is over."""
        speaker = self.speaker
        said = speaker.said(self.turn)
        if said is None and not self.answering and len(self.turn) >= self.recipe.longest_user_turn:
            said = 0
        if said is None:
            return
        self.turn = []
        if self.answering and self.questions:
            self.queue.extend(self.template.ask(self.questions.popleft())[said:])
        else:
            self.queue.extend(speaker.then[said:])
            self.answering = not self.answering


class _Text(_Row):
    """A text that a base model writes; when it ends one, the next begins."""

    @classmethod
    def continued(cls, tokenizer: TokenizerWrapper, recipe: Recipe, text: str) -> "_Text":
        """A row that starts with BOS (or EOS) and the first tokens of ``text``.

        Raises:
            ValueError: there is nothing to start with.
        """
        words = token_ids(text, tokenizer)[:SEED_TOKENS]
        start = [] if words and tokenizer.bos_token_id is None else first_token(tokenizer)
        ends = frozenset(tokenizer.eos_token_ids)
        turn = Turn(ends, ends, tuple(token for token in start if token not in ends))
        row = cls(Template(tokenizer, "", "", turn, turn), recipe, start + words, [])
        row.answering = True
        return row

    def _hand_over(self) -> None:
        if self.turn[-1] in self.template.assistant.ends:
            self.queue.extend(self.template.assistant.then)
            self.turn = []


def _drawn(texts: Sequence[str], rng: np.random.Generator) -> str | None:
    return texts[int(rng.integers(len(texts)))] if texts else None


def _rows(
    tokenizer: TokenizerWrapper, recipe: Recipe, batch_index: int, prompts: Sequence[list[str]]
) -> list[_Row]:
    """A batch's rows: first those with the batch's share of the prompts, then self-written ones."""
    rng = np.random.default_rng([recipe.seed, batch_index])
    given = prompts[batch_index * recipe.batch :][: recipe.batch]
    turns = [*given, *[list[str]()] * (recipe.batch - len(given))]
    if tokenizer.has_chat_template:
        template = Template.of(tokenizer)
        rows = [_Row.begun(template, recipe, rng, texts) for texts in turns]
    else:
        rows = [_Text.continued(tokenizer, recipe, "".join(texts[:1])) for texts in turns]
    for row in rows:
        row.seed = int(rng.integers(1 << 62))
    return rows


def check(tokenizer: TokenizerWrapper, recipe: Recipe, prompts: Sequence[list[str]]) -> None:
    """Raise the ``ValueError`` that ``generate`` would because of the template or the system prompts."""
    for system in recipe.systems or (None,):
        _rows(tokenizer, replace(recipe, batch=1, systems=(system,) if system else ()), 0, prompts)


# --- Writing -------------------------------------------------------------------------------------------


def generate(
    target: Target,
    tokenizer: TokenizerWrapper,
    recipe: Recipe,
    batch_index: int,
    *,
    prompts: Sequence[list[str]] = (),
    features: bool = False,
    workers: Workers | None = None,
    progress: Callable[[int, int], bool | None] | None = None,
) -> Generated:
    """Let the model write one batch of conversations; its seed and index decide everything.

    Args:
        batch_index: 0 or more; the next one continues where this one ended.
        prompts: conversations' user turns. Batch n answers the n-th ``recipe.batch`` of them; when a
            prompt's turns are used up, or all prompts are, the model goes on by itself. A base model
            without a chat template continues the first tokens of a prompt.
        features: also return the hidden states.
        workers: each writes a part of the rows; which one does not matter to the result.
        progress: called with the tokens per row written so far and their total; if it returns True, the
            conversations end there.

    Raises:
        ValueError: the template cannot be used, or takes no system prompt.
    """
    if batch_index < 0:
        raise ValueError(f"batch index {batch_index} is not usable: give 0 or more.")
    workers = workers or Workers(1)
    rows = _rows(tokenizer, recipe, batch_index, prompts)
    known = min(recipe.length, *(len(row.queue) for row in rows))
    count = min(workers.count, len(rows))
    bounds = itertools.pairwise(len(rows) * i // count for i in range(count + 1))
    parts = [_Part(rows[start:end], recipe, features) for start, end in bounds]
    engines = workers.map(lambda part: parts[part].begin(target, known), count)

    def step(part: int) -> None:
        engines[part].step()

    for done in range(known, recipe.length + 1):
        workers.map(step, count)
        if progress is not None and progress(done, recipe.length):
            break
    conversations = [
        Conversation(np.array(row.tokens[:done], np.int32), np.array(row.trained[:done])) for row in rows
    ]
    hidden = workers.map(lambda part: parts[part].features(done), count) if features else None
    return Generated(conversations, mx.concatenate(hidden) if hidden else None)


class _Part:
    """Rows that are texts of one engine, whose steps ask them what comes next.

    So no text joins or leaves, and the hidden states need no second pass.
    """

    def __init__(self, rows: list[_Row], recipe: Recipe, features: bool) -> None:
        self.rows, self.recipe = rows, recipe
        self.hidden: list[mx.array] | None = [] if features else None  # each bfloat16 [b, n, F]

    def begin(self, target: Target, known: int) -> Engine:
        """An engine that has read all but the last of the ``known`` tokens that all rows begin with."""
        for row in self.rows:
            for _ in range(known - 1):
                row.advance(0)
        caches, context = (
            target.make_cache(),
            mx.repeat(target.no_context(), len(self.rows), axis=0),
        )  # [b, F]
        if known > 1:
            _, hidden = target.forward(mx.array([row.tokens for row in self.rows]), caches)
            context = hidden[:, -1]
            self._keep(hidden[:, :-1])
            mx.eval(context, self.hidden or [], [cache.state for cache in caches])
        read, layers = target.layers_of(caches)
        layers = fit_rows(layers, known)  # mlx-lm's caches may be full
        engine = Engine(Runner(target, None, self.pick), Fixed(PLAIN))
        for i, row in enumerate(self.rows):
            text, key = one_text(layers, i), mx.random.key(row.seed)
            engine.resume(begin([row.queue[0]], read, text, context[i : i + 1], key), read)
        return engine

    def pick(
        self, tree: Tree, state: State, logits: mx.array, _: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """A ``Pick`` that waits for the last tokens, then asks the rows: logits [b, 1, V], tokens [b, 1]."""
        self._keep(state.context[:, None])
        mx.eval(tree.tokens, self.hidden[-1:] if self.hidden else [])
        tokens: Any = tree.tokens[:, 0].tolist()
        for row, token in zip(self.rows, tokens, strict=True):
            row.advance(token)
        ends = sorted(frozenset[int]().union(*(row.forbidden for row in self.rows))) or [-1]
        forbidden = mx.array([[end in row.forbidden for end in ends] for row in self.rows])  # [b, E]
        scores, index = _candidates(logits[:, 0], self.recipe, mx.array(ends, mx.int32), forbidden)
        seeds = seeds_at(state.seeds, state.rows[:, None])[:, 0]  # [b, 2]
        noise = noise_at(seeds, scores.shape[1])  # [b, K]
        sampled = _pick(scores, index, mx.array([[row.temperature] for row in self.rows]), noise)
        dictated = mx.array([row.queue[0] if row.queue else -1 for row in self.rows])
        return logits, mx.where(dictated < 0, sampled, dictated)[:, None].astype(mx.int32)

    def features(self, length: int) -> mx.array:
        """Hidden states bfloat16 [b, T, F] of the tokens read so far, ``length`` = T."""
        joined = mx.concatenate(self.hidden or [], axis=1)[:, -length:]  # less what precedes the first token
        mx.eval(joined)
        return joined

    def _keep(self, hidden: mx.array) -> None:
        if self.hidden is not None:
            self.hidden.append(hidden.astype(mx.bfloat16))


def _candidates(
    logits: mx.array, recipe: Recipe, ends: mx.array, forbidden: mx.array
) -> tuple[mx.array, mx.array]:
    """The tokens that may be sampled.

    Args:
        logits: [b, V].
        ends: [E] tokens that may be forbidden, and ``forbidden`` [b, E] whether they are.

    Returns:
        Scores float32 [b, K] (``NEVER`` for those that may not) and token ids [b, K].
    """
    vocabulary = logits.shape[-1]
    scores = logits.astype(mx.float32)
    scores[:, ends] = mx.where(forbidden, NEVER, scores[:, ends])
    if recipe.top_k == 0 and recipe.top_p == 1:
        return scores, mx.broadcast_to(mx.arange(vocabulary), scores.shape)
    scores, index = _best(scores, min(recipe.top_k or vocabulary, vocabulary))  # [b, K]
    if recipe.top_p < 1:
        probabilities = mx.softmax(scores, axis=-1)
        likelier = mx.cumsum(probabilities, axis=-1) - probabilities  # mass of likelier candidates
        scores = mx.where(likelier < recipe.top_p, scores, NEVER)
    return scores, index


def _best(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The ``k`` largest logits and their tokens [b, k], best first.

    As ``decoding.topk.top_k``, a fourth of its time on a CPU for dozens of candidates: token i is in
    column i mod C, all of the k largest are in the k columns with the largest maxima, and these are
    partitioned before the best are sorted.
    """
    batch, vocabulary = logits.shape
    columns = -(-vocabulary // ROWS)
    if columns <= k:
        return top_k(logits, k)
    padding = [(0, 0), (0, ROWS * columns - vocabulary)]
    grid = mx.pad(logits, padding, constant_values=-mx.inf).reshape(batch, ROWS, columns)
    chosen = mx.argpartition(-grid.max(axis=1), k - 1, axis=-1)[:, :k]  # [b, k]
    pool = mx.take_along_axis(grid, chosen[:, None], axis=2).reshape(batch, ROWS * k)
    place = mx.argpartition(-pool, k - 1, axis=-1)[:, :k]  # [b, k]
    scores, order = top_k(mx.take_along_axis(pool, place, axis=-1), k)
    place = mx.take_along_axis(place, order, axis=-1)
    index = place // k * columns + mx.take_along_axis(chosen, place % k, axis=-1)
    return scores, index


def _pick(scores: mx.array, index: mx.array, temperatures: mx.array, noise: mx.array) -> mx.array:
    """A token for each row, by the Gumbel-max trick: [b]. Temperature 0 takes the best."""
    best = mx.argmax(scores + temperatures * noise, axis=-1, keepdims=True)  # [b, 1]
    return mx.take_along_axis(index, best, axis=-1)[:, 0]
