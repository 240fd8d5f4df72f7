"""A chat template, taken apart: what stands before, between and after the turns, and how turns end."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..chat import Message, rendered
from .data import special_tokens

USER, ANSWER = "USERSENTINEL", "ANSWERSENTINEL"  # stand for contents in a rendered template
STOP_TOKENS = 8  # at most, how much of a plain-text piece a model must write for its turn to be over


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
        return token_ids(before, self.tokenizer) or first_token(self.tokenizer)

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


def token_ids(text: str, tokenizer: TokenizerWrapper) -> list[int]:
    """A text's tokens, without those that the tokenizer adds."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def _follow(piece: str, tokenizer: TokenizerWrapper) -> list[int]:
    """Tokens of a piece that comes after a word (some tokenizers add a space at the start of a text)."""
    word = token_ids("a", tokenizer)
    tokens = token_ids("a" + piece, tokenizer)
    return tokens[len(word) :] if tokens[: len(word)] == word else token_ids(piece, tokenizer)


def first_token(tokenizer: TokenizerWrapper) -> list[int]:
    """A token that a text can start with: BOS or, where there is none, EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ValueError("The model has neither a chat template's start nor a BOS token: give it prompts.")
