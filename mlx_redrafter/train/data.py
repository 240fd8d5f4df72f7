"""Training data: conversations as token ids, from files of many formats, cleaned.

Only what the model itself says is trained on, so every token carries a flag. Self-written conversations
are kept in shards (``write_shard``), which ``read_given`` reads as well as what users bring.
"""

import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..chat import Message, rendered
from ..conversations import Row, from_first_user, is_whole, read_rows, read_text, tell
from ..loading.files import atomic_file

Array = npt.NDArray[Any]

NO_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
SHINGLE = 8  # tokens per shingle, to find near-duplicates
MOST_SEEN = 0.7  # share of shingles seen before from which a conversation is a duplicate
LOOP_GRAM = 4
LEAST_DISTINCT = 0.3  # share of distinct 4-grams below which a conversation is a loop
LOOP_TOKENS = 32  # fewer trained tokens than this are no loop
TABLE_BITS = 26


@dataclass
class Conversation:
    """A conversation of T tokens."""

    tokens: Array  # int32 [T]
    trained: Array  # bool [T]; True where the model itself speaks, its end-of-turn token included


@dataclass
class Given:
    """What a file holds."""

    conversations: list[Conversation] = field(default_factory=list)  # each with at least one trained token
    prompts: list[list[str]] = field(default_factory=list)  # a conversation's user turns, to be answered
    unusable: int = 0  # rows that were left out, because nothing in them could be trained on
    unread: set[str] = field(default_factory=set)  # keys of the prompts' rows that were not read


@dataclass
class Dropped:
    """How many conversations cleaning dropped, and why."""

    duplicates: int = 0
    loops: int = 0

    def __str__(self) -> str:
        return f"dropped: {self.duplicates} near-duplicates, {self.loops} loops"


# --- Shards ------------------------------------------------------------------------------------------


def write_shard(path: Path, conversations: Sequence[Conversation]) -> None:
    """Write conversations to a .npz file that appears whole or not at all.

    Its arrays: ``toks`` (uint16, or uint32 for large ids) and ``role`` (uint8, 1 is trained), the
    conversations one after another, and their ``lengths`` (int32).
    """
    tokens = np.concatenate([np.zeros(0, np.int32), *(c.tokens for c in conversations)])
    trained = np.concatenate([np.zeros(0, bool), *(c.trained for c in conversations)])
    lengths = np.array([len(c.tokens) for c in conversations], np.int32)
    small = tokens.size == 0 or int(tokens.max()) < 65536
    toks = tokens.astype(np.uint16 if small else np.uint32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, toks=toks, role=trained.astype(np.uint8), lengths=lengths)


def read_shard(path: Path, vocab_size: int | None = None) -> list[Conversation]:
    """Read a .npz file of conversations, also one whose ``toks`` and ``role`` are [rows, T].

    Args:
        vocab_size: if given, token ids must be below it.

    Raises:
        ValueError: the file is missing or damaged, or its arrays do not fit each other or the model.
    """
    arrays = _load_arrays(path)
    toks, role, lengths = (arrays.get(name) for name in ("toks", "role", "lengths"))
    if toks is None or role is None:
        raise ValueError(f"{path} has no arrays toks and role: give a shard that `train` wrote.")
    if lengths is None and toks.ndim == 2:
        lengths = np.full(len(toks), toks.shape[1], np.int32)
    problem = _problem(toks, role, lengths, vocab_size)
    if problem or lengths is None:
        raise ValueError(f"{path}: {problem or 'lengths is missing'}: make the shard again.")
    ends = np.cumsum(lengths, dtype=np.int64)[:-1]
    tokens = np.split(toks.reshape(-1).astype(np.int32), ends)
    trained = np.split(role.reshape(-1) == 1, ends)
    return list(map(Conversation, tokens, trained)) if len(lengths) else []


def _load_arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: name a .npz, .jsonl, .json or .txt file.") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"{path} is no .npz file that can be read: delete it or get it again.") from error
    except Exception as error:
        if type(error).__module__ not in ("zlib", "struct"):  # what a damaged zip file raises besides
            raise
        raise ValueError(f"{path} is damaged: delete it or get it again.") from error


def _problem(toks: Array, role: Array, lengths: Array | None, vocab_size: int | None) -> str | None:
    """What is wrong with a shard's arrays, in a few words; None if nothing is."""
    if toks.dtype.kind not in "ui" or role.dtype.kind not in "uib":
        return f"toks is {toks.dtype} and role {role.dtype}, not integers"
    if toks.shape != role.shape or toks.ndim not in (1, 2):
        return f"toks has shape {toks.shape} and role {role.shape}"
    if lengths is None or lengths.dtype.kind not in "ui" or lengths.ndim != 1:
        return "lengths is no 1-D array of integers"
    if (lengths < 1).any() or int(lengths.sum()) != toks.size:
        return f"lengths do not add up to its {toks.size} tokens"
    most = np.iinfo(np.int32).max if vocab_size is None else vocab_size - 1
    if toks.size and not 0 <= int(toks.min()) <= int(toks.max()) <= most:
        return f"token {int(toks.max())} is not in the model's vocabulary of {most + 1}"
    return None


# --- Files that users give -----------------------------------------------------------------------------


def read_given(path: Path, tokenizer: TokenizerWrapper, max_length: int) -> Given:
    """Read conversations, prompts or plain text.

    - ``.npz``: shards.
    - ``.jsonl`` and ``.json``: what ``conversations.read_rows`` reads. Messages without an assistant's are a
      prompt; what is said before the user's first message is left out.
    - ``.txt``: paragraphs between blank lines, joined up to ``max_length`` tokens.

    Conversations are rendered with the chat template, and only the assistant's tokens are trained. Warns
    of what is unusable.

    Args:
        max_length: tokens after which conversations are cut.

    Raises:
        ValueError: the file cannot be read, or nothing in it can be used.
    """
    if max_length < 2:
        raise ValueError(f"{max_length} tokens are too few for a conversation: give 2 or more.")
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".txt", ".jsonl", ".json"):
        raise ValueError(
            f"{path} is no training data: name a .npz, .jsonl, .json or .txt file (unpack an archive first, "
            "and write Parquet or CSV as JSON lines)."
        )
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a .npz, .jsonl, .json or .txt file.")
    given, texts, unusable = Given(), list[str](), list[str]()
    if suffix == ".npz":
        shard = read_shard(path, len(tokenizer))
        rows = [Conversation(row.tokens[:max_length], row.trained[:max_length]) for row in shard]
        given.conversations = [row for row in rows if row.trained.any()]
        reason = f"nothing to train on within {max_length} tokens."
        unusable = [f"row {n}: {reason}" for n, row in enumerate(rows, 1) if not row.trained.any()]
    elif suffix == ".txt":
        paragraphs = list(_paragraphs(read_text(path)))
        texts = [text for text in paragraphs if is_whole(text)]
        reason = "not UTF-8: correct it."
        unusable = [f"paragraph {n}: {reason}" for n, text in enumerate(paragraphs, 1) if not is_whole(text)]
    else:
        take = partial(_take, tokenizer=tokenizer, max_length=max_length, given=given)
        texts = [text for text in read_rows(path, take, unusable) if text]
    if suffix in (".npz", ".txt"):
        tell(path, unusable, len(given.conversations) + len(texts))
    _pack(texts, tokenizer, max_length, given)
    given.unusable = len(unusable)
    return given


def _take(row: Row, tokenizer: TokenizerWrapper, max_length: int, given: Given) -> str:
    """Add a row's conversation or prompt; returns its text, which is packed with others."""
    messages = from_first_user(row.messages)
    if any(message["role"] == "assistant" for message in messages[1:]):
        given.conversations.append(tokenize(messages, tokenizer, max_length))
    elif not row.text:
        turns = row.turns or ["\n\n".join(message["content"] for message in row.asked())]
        if tokenizer.has_chat_template and len(tokenizer.encode(turns[0])) >= max_length:
            raise ValueError(f"after the prompt, no token is left of {max_length} for an answer: shorten it.")
        given.prompts.append(turns)
        given.unread.update(row.unread)
    return row.text


# --- Tokens ----------------------------------------------------------------------------------------------


def tokenize(messages: Sequence[Message], tokenizer: TokenizerWrapper, max_length: int) -> Conversation:
    """A conversation as the chat template renders it, up to the last answer.

    An answer begins where the prompt before it ends (the rendered messages up to there, with the
    generation prompt) and runs through its end-of-turn token. Where a template renders earlier messages
    differently (without their thoughts, say), it is looked for after what both renderings share.

    Raises:
        ValueError: the model has no chat template, or its tokenizer does not say where tokens stand; the
            template refuses the messages or rewrites the answers; or no token of them is left to train on.
    """
    if not tokenizer.has_chat_template:
        raise ValueError("The model has no chat template for conversations: give plain text (.txt).")
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    messages = _with_system(messages[: last + 1], tokenizer)
    text = rendered(messages, tokenizer)
    tokens, offsets = _encode_with_offsets(text, tokenizer)  # [T], [T, 2]
    trained = np.zeros(len(tokens), bool)
    end = int(offsets[:max_length, 1].max(initial=0))
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not (message["content"].strip() and message.get("weight", 1)):
            continue
        span = _locate(message["content"], rendered(messages[:i], tokenizer, prompt=True), text)
        if span is None:
            raise ValueError("the chat template rewrites the answers: they cannot be found in its text.")
        inside = (offsets[:, 1] > span[0]) & (offsets[:, 0] < span[1])  # [T]
        trained |= inside
        trained[_ending(tokens, int(inside.nonzero()[0][-1]) + 1, tokenizer)] = True
        if span[1] > end:  # the others are cut
            break
    if not trained[:max_length].any():
        raise ValueError(f"nothing to train on: no answer has text within {max_length} tokens.")
    return Conversation(tokens[:max_length], trained[:max_length])


def special_tokens(tokenizer: TokenizerWrapper) -> set[int]:
    """Ids of tokens that are no text: special and added ones, and all that end generation."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {index for index, token in added.items() if str(token).strip()}
    return marks | set(tokenizer.all_special_ids) | set(tokenizer.eos_token_ids)


def _locate(content: str, prompt: str, text: str) -> tuple[int, int] | None:
    """First and last character + 1 of an answer in the conversation's text; None if it is not found."""
    shared = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
    if thought := NO_THOUGHT.match(text, shared):  # some templates put an empty one before answers
        shared = thought.end()
    whole, answer = content.strip(), content.split("</think>")[-1].strip()
    across = max(0, shared - len(whole) + 1)  # the prompt may hold the answer's first words (<think>)
    for wanted, place in ((whole, shared), (whole, across), (answer, shared)):
        start = text.find(wanted, place)
        if wanted and start >= 0:
            gap = text[shared:start].strip()
            if gap and not text.startswith(prompt):  # neither the prompt's end nor the answer's start is sure
                return None
            return (start if gap else shared), start + len(wanted)
    return None


def _ending(tokens: Array, start: int, tokenizer: TokenizerWrapper) -> slice:
    """The tokens from ``start`` through the special one that ends the turn; none if text comes first."""
    special = special_tokens(tokenizer)
    for i in range(start, len(tokens)):
        if int(tokens[i]) in special:
            return slice(start, i + 1)
        if tokenizer.decode([int(tokens[i])]).strip():
            break
    return slice(start, start)


def _encode_with_offsets(text: str, tokenizer: TokenizerWrapper) -> tuple[Array, Array]:
    """Token ids [T] and the characters [T, 2] they stand for."""
    inner: Any = tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer
    if not inner.is_fast:
        raise ValueError("The model's tokenizer has no tokenizer.json, so answers cannot be found: add it.")
    encoded = inner(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int32), offsets


def _with_system(messages: Sequence[Message], tokenizer: TokenizerWrapper) -> Sequence[Message]:
    """The messages, the system's put into the first user's where the template refuses them."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    try:
        rendered(messages[:2], tokenizer)
    except ValueError:
        first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return [first, *messages[2:]]
    return messages


def _paragraphs(text: str) -> Iterator[str]:
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []


def first_tokens(tokenizer: TokenizerWrapper) -> list[int]:
    """What the tokenizer puts before a text: the BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else []


def _pack(texts: Iterable[str], tokenizer: TokenizerWrapper, max_length: int, given: Given) -> None:
    """Join texts to conversations of up to ``max_length`` tokens, all trained but the BOS token."""
    start = first_tokens(tokenizer)
    room = max_length - len(start)
    joined: list[int] = []
    for text in texts:
        tokens = list(tokenizer.encode(text.strip() + "\n\n", add_special_tokens=False))
        if joined and len(joined) + len(tokens) > room:
            given.conversations.append(_plain(start, joined))
            joined = []
        joined += tokens
        while len(joined) > room:
            given.conversations.append(_plain(start, joined[:room]))
            joined = joined[room:]
    if joined:
        given.conversations.append(_plain(start, joined))


def _plain(start: list[int], tokens: list[int]) -> Conversation:
    trained = np.array([False] * len(start) + [True] * len(tokens))
    return Conversation(np.array([*start, *tokens], np.int32), trained)


# --- Cleaning ------------------------------------------------------------------------------------------


class Cleaner:
    """Drops near-duplicates and loops from a stream of conversations, in time linear in their tokens.

    A conversation is a near-duplicate if 70 % of its shingles (runs of 8 trained tokens) occurred in
    those kept before. They are remembered as marks in a table of 2^26 hash values: with 10 million
    tokens kept, a new shingle is taken for a known one in 14 % of all cases, far from 70 %. A loop is one
    whose runs of 4 trained tokens are to less than ``least_distinct`` distinct; it is dropped whole.
    """

    def __init__(self, least_distinct: float = LEAST_DISTINCT) -> None:
        self.dropped = Dropped()
        self._least_distinct = least_distinct
        self._seen = np.zeros(1 << TABLE_BITS, bool)

    def keep(self, conversation: Conversation) -> bool:
        """Whether to keep the conversation; counted in ``dropped`` if not, remembered if so."""
        spoken = conversation.tokens[conversation.trained]
        if len(spoken) >= LOOP_TOKENS and _distinct(spoken) < self._least_distinct:
            self.dropped.loops += 1
            return False
        places = _hashes(spoken, SHINGLE) >> np.uint64(64 - TABLE_BITS)
        if len(places) and self._seen[places].mean() >= MOST_SEEN:
            self.dropped.duplicates += 1
            return False
        self._seen[places] = True
        return True


def clean(conversations: Iterable[Conversation]) -> tuple[list[Conversation], Dropped]:
    """The conversations that are neither near-duplicates nor loops, in order (see ``Cleaner``)."""
    cleaner = Cleaner()
    return [c for c in conversations if cleaner.keep(c)], cleaner.dropped


def _distinct(tokens: Array) -> float:
    grams = _hashes(tokens, LOOP_GRAM)
    return len(np.unique(grams)) / len(grams)


def _hashes(tokens: Array, size: int) -> npt.NDArray[np.uint64]:
    """Hashes uint64 of all runs of ``size`` tokens; of the whole if there are fewer."""
    size = min(size, len(tokens))
    if size == 0:
        return np.zeros(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), size)  # [n, size]
    hashes: npt.NDArray[np.uint64] = np.full(len(runs), size, np.uint64)
    for column in range(size):
        hashes = (hashes ^ (runs[:, column] + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes


# --- Counting ------------------------------------------------------------------------------------------


def count_tokens(conversations: Iterable[Conversation], vocab_size: int) -> npt.NDArray[np.int64]:
    """How often the model says each token, and in how many conversations: int64 [2, vocab_size].

    Raises:
        ValueError: a token is outside the vocabulary.
    """
    counts = np.zeros((2, vocab_size), np.int64)
    for conversation in conversations:
        spoken = conversation.tokens[conversation.trained]
        if spoken.size and int(spoken.max()) >= vocab_size:
            raise ValueError(
                f"token {int(spoken.max())} is not in the vocabulary of {vocab_size}: "
                "use data of the same model."
            )
        times = np.bincount(spoken, minlength=vocab_size)
        counts += np.stack([times, times > 0])
    return counts
