"""Training data that the model writes itself: the Magpie recipe (arXiv 2406.08464), in full batches.

Given its chat template up to an empty user turn, a chat model writes the user's message, then the
answer, and so on. Every row of a batch is one such conversation of exactly ``length`` tokens, and all
rows advance by one token per step: what the template dictates is fed, all else is sampled.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..chat import Message, rendered
from ..decoding.topk import top_k
from ..models.target import Target
from .data import Conversation, special_tokens
from .streams import Workers

USER, ANSWER = "USERSENTINEL", "ANSWERSENTINEL"  # stand for contents in a rendered template
STOP_TOKENS = 8  # at most, how much of a plain-text piece a model must write for its turn to be over
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


# --- The chat template ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """How a turn ends: with one of the tokens ``ends``, or with the beginning of what follows."""

    ends: frozenset[int]  # special tokens that end it
    never_first: frozenset[int]  # tokens that would make the turn empty
    then: tuple[int, ...]  # tokens of the template that follow it, the end-of-turn token (if any) included

    @classmethod
    def before(cls, piece: str, tokenizer: TokenizerWrapper) -> "Turn":
        """The turn that ``piece`` of the template follows."""
        then = _follow(piece, tokenizer)
        words = [token for token in then if tokenizer.decode([token]).strip()]
        ends = special_tokens(tokenizer).intersection(words[:1]) | set(tokenizer.eos_token_ids)
        first = words[:1] if words[:1] == then[:1] else []  # a space may begin any turn
        return cls(frozenset(ends), frozenset(ends.union(first)), tuple(then))

    def said(self, turn: Sequence[int]) -> int | None:
        """How many tokens of ``then`` a turn that is over has said; None if it goes on.

        A special end that is not the template's own (end of text, say) stands for that.
        """
        if turn[-1] in self.then and turn[-1] in self.ends:
            return self.then.index(turn[-1]) + 1
        if turn[-1] in self.ends:
            return next((i + 1 for i, token in enumerate(self.then) if token in self.ends), 0)
        stop = self.then[:STOP_TOKENS]
        marked = not self.ends.isdisjoint(stop)
        return len(stop) if stop and not marked and tuple(turn[-len(stop) :]) == stop else None


@dataclass(frozen=True)
class Template:
    """A chat template, taken apart.

    Where the model writes a user's turn itself, the piece before it loses the spaces at its end, which
    in most vocabularies belong to the first word.
    """

    tokenizer: TokenizerWrapper = field(repr=False)
    before_user: str  # before the first user turn, BOS and the template's own system prompt included
    assistant_to_user: str  # text between an answer and the next user turn
    user: Turn  # how it ends; ``then`` is what an answer is prompted with
    assistant: Turn

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> "Template":
        """Find a tokenizer's template by rendering sentinels with it.

        Raises:
            ValueError: it has none, or one that does not show what was said.
        """
        question, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        before, after = _around([question], tokenizer, prompt=True)
        _, talk = _around([question, answer, question], tokenizer)
        between, found, _ = talk.partition(ANSWER)[2].partition(USER)
        if not found:
            raise ValueError("The chat template leaves out earlier turns: give training data instead.")
        assistant = Turn.before(between.rstrip(" "), tokenizer)
        return cls(tokenizer, before, between, Turn.before(after, tokenizer), assistant)

    def begin(self, system: str | None, text: str = "") -> list[int]:
        """Tokens up to the first user turn and, if given, the ``text`` it starts with.

        Raises:
            ValueError: a system prompt is given, and the template takes none.
        """
        before = self.before_user if system is None else self._with_system(system)
        before = before + text if text else before.rstrip(" ")
        return _encode(before, self.tokenizer) or _first(self.tokenizer)

    def ask(self, text: str) -> list[int]:
        """Tokens after an answer up to the next one, with the user's ``text`` between them."""
        return [*_follow(self.assistant_to_user + text, self.tokenizer), *self.user.then]

    def _with_system(self, system: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": USER}]
        try:
            before, _ = _around(messages, self.tokenizer, prompt=True)
        except ValueError:
            before = ""
        if system.strip() not in before:
            raise ValueError(f"The chat template takes no system prompt ({system[:40]!r}): give none.")
        return before


def _around(messages: list[Message], tokenizer: TokenizerWrapper, prompt: bool = False) -> tuple[str, str]:
    """The rendered text before and after the user's first sentinel."""
    before, found, after = rendered(messages, tokenizer, prompt).partition(USER)
    if not found:
        raise ValueError("The chat template does not show the user's text: give prompts or other data.")
    return before, after


def _encode(text: str, tokenizer: TokenizerWrapper) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _follow(piece: str, tokenizer: TokenizerWrapper) -> list[int]:
    """Tokens of a piece that comes after a word (some tokenizers add a space at the start of a text)."""
    word = _encode("a", tokenizer)
    tokens = _encode("a" + piece, tokenizer)
    return tokens[len(word) :] if tokens[: len(word)] == word else _encode(piece, tokenizer)


# --- Rows ----------------------------------------------------------------------------------------------


class _Row:
    """A conversation between a model and itself."""

    def __init__(self, template: Template, recipe: Recipe, start: list[int], questions: list[str]) -> None:
        self.template, self.recipe = template, recipe
        self.queue, self.questions = deque(start), deque(questions)  # the queue is dictated next
        self.tokens: list[int] = []  # of the conversation so far
        self.trained: list[bool] = []
        self.turn: list[int] = []  # what was sampled in this turn
        self.answering = False  # who speaks when the queue is empty

    @classmethod
    def written(cls, template: Template, recipe: Recipe, rng: np.random.Generator) -> "_Row":
        """A row whose first user turn the model writes too."""
        system, opening = _drawn(recipe.systems, rng), _drawn(recipe.openings, rng)
        start = template.begin(system, opening if opening and rng.random() < recipe.opened else "")
        return cls(template, recipe, start, [])

    @classmethod
    def asked(cls, template: Template, recipe: Recipe, rng: np.random.Generator, turns: list[str]) -> "_Row":
        """A row whose first user turns are given."""
        start = [*template.begin(_drawn(recipe.systems, rng), turns[0]), *template.user.then]
        row = cls(template, recipe, start, turns[1:])
        row.answering = True
        return row

    @property
    def temperature(self) -> float:
        return self.recipe.temperature if self.answering else self.recipe.user_temperature

    @property
    def forbidden(self) -> frozenset[int]:
        """Tokens that must not come next, because they would make the turn empty."""
        return frozenset() if self.turn else self._speaker().never_first

    def advance(self, sampled: int) -> None:
        """Take the next token: the dictated one if there is one, else ``sampled``."""
        dictated = bool(self.queue)
        self.tokens.append(self.queue.popleft() if dictated else sampled)
        self.trained.append(self.answering and not dictated)
        if not dictated:
            self.turn.append(sampled)
            self._hand_over()

    def _speaker(self) -> Turn:
        return self.template.assistant if self.answering else self.template.user

    def _hand_over(self) -> None:
        """Let the other one speak if the turn is over."""
        speaker = self._speaker()
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
    def begun(cls, tokenizer: TokenizerWrapper, recipe: Recipe, text: str) -> "_Text":
        """A row that starts with BOS (or EOS) and the first tokens of ``text``.

        Raises:
            ValueError: there is nothing to start with.
        """
        words = _encode(text, tokenizer)[:SEED_TOKENS]
        start = [] if words and tokenizer.bos_token_id is None else _first(tokenizer)
        again = [token for token in start if token not in tokenizer.eos_token_ids]
        ends = frozenset(tokenizer.eos_token_ids)
        turn = Turn(ends, ends, tuple(again))
        row = cls(Template(tokenizer, "", "", turn, turn), recipe, start + words, [])
        row.answering = True
        return row

    def _hand_over(self) -> None:
        if self.turn[-1] in self.template.assistant.ends:
            self.queue.extend(self.template.assistant.then)
            self.turn = []


def _first(tokenizer: TokenizerWrapper) -> list[int]:
    """A token that a text can start with: BOS or, where there is none, EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ValueError("The model has neither a chat template's start nor a BOS token: give it prompts.")


def _drawn(texts: Sequence[str], rng: np.random.Generator) -> str | None:
    return texts[int(rng.integers(len(texts)))] if texts else None


def _rows(
    tokenizer: TokenizerWrapper, recipe: Recipe, batch_index: int, prompts: Sequence[list[str]]
) -> list[_Row]:
    """A batch's rows: first those with the batch's share of the prompts, then self-written ones."""
    rng = np.random.default_rng([recipe.seed, batch_index])
    given = prompts[batch_index * recipe.batch :][: recipe.batch]
    others = recipe.batch - len(given)
    if not tokenizer.has_chat_template:
        return [_Text.begun(tokenizer, recipe, text) for text in [*(p[0] for p in given), *[""] * others]]
    template = Template.of(tokenizer)
    asked = [_Row.asked(template, recipe, rng, turns) for turns in given]
    return asked + [_Row.written(template, recipe, rng) for _ in range(others)]


def check(tokenizer: TokenizerWrapper, recipe: Recipe, prompts: Sequence[list[str]]) -> None:
    """Raise the ``ValueError`` that ``generate`` would because of the template or the system prompts."""
    for system in recipe.systems or (None,):
        _rows(tokenizer, replace(recipe, batch=1, systems=(system,) if system else ()), 0, prompts)


# --- Generation ----------------------------------------------------------------------------------------


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
        workers: each computes a group of the rows; which one does not matter to the result.
        progress: called with the tokens per row written so far and their total; if it returns True, the
            conversations end there.

    Raises:
        ValueError: the template cannot be used, or takes no system prompt; or the logits are NaN.
    """
    if batch_index < 0:
        raise ValueError(f"batch index {batch_index} is not usable: give 0 or more.")
    workers = workers or Workers(1)
    rows = _rows(tokenizer, recipe, batch_index, prompts)
    groups = _groups(target, len(rows), min(workers.count, len(rows)), features)
    key = mx.random.key(int(np.random.default_rng([recipe.seed, batch_index]).integers(1 << 62)))
    _prefill(rows, groups, recipe.length, workers)
    while (done := len(rows[0].tokens)) < recipe.length:
        key, step_key = mx.random.split(key)
        for row, token in zip(rows, _next(rows, groups, recipe, step_key, workers), strict=True):
            row.advance(token)
        if progress is not None and progress(done + 1, recipe.length):
            break
    conversations = [Conversation(np.array(row.tokens, np.int32), np.array(row.trained)) for row in rows]
    return Generated(conversations, _features(rows, groups, workers) if features else None)


@dataclass
class _Group:
    """Rows that are computed together: their caches and, if kept, their hidden states."""

    target: Target
    rows: slice
    caches: list[KVCache]
    hidden: list[mx.array] | None  # each bfloat16 [b, n, F]

    def feed(self, tokens: mx.array) -> mx.array:
        """The next tokens [B, n] of all rows -> logits [b, n, V] of this group's."""
        logits, hidden = self.target.forward(tokens[self.rows], self.caches)
        if self.hidden is not None:
            self.hidden.append(hidden.astype(mx.bfloat16))
        return logits

    def kept(self) -> list[mx.array]:
        """The hidden states of the last tokens fed, to be computed with them."""
        return self.hidden[-1:] if self.hidden else []


def _groups(target: Target, batch: int, number: int, features: bool) -> list[_Group]:
    bounds = [batch * i // number for i in range(number + 1)]
    return [
        _Group(target, slice(*bound), target.make_cache(), [] if features else None)
        for bound in itertools.pairwise(bounds)
    ]


def _prefill(rows: list[_Row], groups: list[_Group], length: int, workers: Workers) -> None:
    """Feed what is dictated to all rows, except the last token; logits are not computed."""
    known = min(length, *(len(row.queue) for row in rows))
    for row in rows:
        for _ in range(known):
            row.advance(0)
    if known == 1:
        return
    tokens = mx.array([row.tokens[:-1] for row in rows])  # [B, n]

    def read(index: int) -> None:
        group = groups[index]
        group.feed(tokens)
        mx.eval(group.kept(), [cache.state for cache in group.caches])

    workers.map(read, len(groups))


def _next(
    rows: list[_Row], groups: list[_Group], recipe: Recipe, key: mx.array, workers: Workers
) -> list[int]:
    """Feed every row's last token and sample the next: one token for each of the B rows."""
    tokens = mx.array([row.tokens[-1:] for row in rows])  # [B, 1]
    temperatures = mx.array([[row.temperature] for row in rows])  # [B, 1]
    ends = sorted(frozenset[int]().union(*(row.forbidden for row in rows))) or [-1]
    forbidden = mx.array([[end in row.forbidden for end in ends] for row in rows])  # [B, E]
    mx.eval(key)

    def pick(index: int) -> list[int]:
        group = groups[index]
        logits = group.feed(tokens)[:, -1]  # [b, V]
        scores, ids = _candidates(logits, recipe, mx.array(ends, mx.int32), forbidden[group.rows])
        # Noise for all B rows, so that grouping changes nothing.
        noise = mx.random.gumbel((len(rows), scores.shape[-1]), key=key)[group.rows]  # [b, K]
        picks = _pick(scores, ids, temperatures[group.rows], noise)
        mx.eval(picks, group.kept())
        return [int(token) for token in np.array(picks)]

    return [token for picks in workers.map(pick, len(groups)) for token in picks]


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
    most = min(recipe.top_k or vocabulary, vocabulary)
    if recipe.top_k == 0 and recipe.top_p == 1:
        scores, index = logits, mx.broadcast_to(mx.arange(vocabulary), logits.shape)  # [b, V]
    else:
        scores, index = _best(logits, min(most + ends.size, vocabulary))  # [b, K]
    allowed = mx.logical_not(((index[..., None] == ends) & forbidden[:, None]).any(axis=-1))  # [b, K]
    allowed = allowed & (mx.cumsum(allowed.astype(mx.int32), axis=-1) <= most)
    scores = mx.where(allowed, scores.astype(mx.float32), NEVER)
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


def _features(rows: list[_Row], groups: list[_Group], workers: Workers) -> mx.array:
    """Hidden states bfloat16 [B, T, F], after the last tokens were fed."""
    tokens = mx.array([row.tokens[-1:] for row in rows])  # [B, 1]

    def join(index: int) -> mx.array:
        group = groups[index]
        group.feed(tokens)
        joined = mx.concatenate(group.hidden or [], axis=1)
        mx.eval(joined)
        return joined

    features = mx.concatenate(workers.map(join, len(groups)))
    mx.eval(features)
    return features
