"""Training data: conversations as token ids, from files of many formats, cleaned.

Only what the model itself says is trained on, so every token carries a flag. Self-written conversations
are kept in shards (``write_shard``), which ``read_given`` reads as well as what users bring.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..files import atomic_file
from ..prompts import Message, parse_messages, parse_text

Array = npt.NDArray[Any]

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
NO_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
SHINGLE = 8  # tokens per shingle, to find near-duplicates
MOST_SEEN = 0.7  # share of shingles seen before from which a conversation is a duplicate
LOOP_GRAM = 4
LEAST_DISTINCT = 0.3  # share of distinct 4-grams below which a conversation is a loop
LOOP_TOKENS = 32  # fewer trained tokens than this are no loop
TABLE_BITS = 26


@dataclass
class Conversation:
    """A conversation of T tokens.

    Attributes:
        tokens: int32 [T].
        trained: bool [T]; True where the model itself speaks, its end-of-turn token included.
    """

    tokens: Array
    trained: Array


@dataclass
class Given:
    """What a file holds.

    Attributes:
        conversations: to train on, each with at least one trained token.
        prompts: user texts that the model still has to answer; each a conversation's user turns.
        unusable: conversations that were left out, because nothing in them could be trained on.
    """

    conversations: list[Conversation] = field(default_factory=list)
    prompts: list[list[str]] = field(default_factory=list)
    unusable: int = 0

    def add(self, conversation: Conversation | None) -> None:
        """Take a conversation, or count it where it is None or has no trained token."""
        if conversation is None or not conversation.trained.any():
            self.unusable += 1
        else:
            self.conversations.append(conversation)


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
    pairs = zip(tokens, trained, strict=True) if len(lengths) else ()
    return [Conversation(*pair) for pair in pairs]


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
    - ``.jsonl`` (an object per line) and ``.json`` (a list of objects): ``{"messages": [{"role": ...,
      "content": ...}]}``, ``{"conversations": [{"from": "human", "value": ...}]}``, ``{"prompt": ...}``
      (with ``"completion"``: a conversation), ``{"turns": [...]}`` (a conversation's user turns),
      ``{"text": ...}``. Messages without an assistant's are a prompt.
    - ``.txt``: paragraphs between blank lines, joined up to ``max_length`` tokens.

    Conversations are rendered with the chat template, and only the assistant's tokens are trained.

    Args:
        max_length: tokens after which conversations are cut.

    Raises:
        ValueError: the file, or a line of it, cannot be read, or the model has no chat template.
    """
    if max_length < 2:
        raise ValueError(f"{max_length} tokens are too few for a conversation: give 2 or more.")
    suffix = path.suffix.lower()
    given = Given()
    if suffix == ".npz":
        for conversation in read_shard(path, len(tokenizer)):
            given.add(Conversation(conversation.tokens[:max_length], conversation.trained[:max_length]))
    elif suffix == ".txt":
        _pack(_paragraphs(_read_text(path)), tokenizer, max_length, given)
    elif suffix in (".jsonl", ".json"):
        _read_objects(path, suffix, tokenizer, max_length, given)
    else:
        raise ValueError(f"{path} is no training data: name a .npz, .jsonl, .json or .txt file.")
    if not (given.conversations or given.prompts):
        raise ValueError(f"{path} holds nothing to train on ({given.unusable} unusable): give other data.")
    return given


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: name a .npz, .jsonl, .json or .txt file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give a UTF-8 file.") from error


def _read_objects(
    path: Path, suffix: str, tokenizer: TokenizerWrapper, max_length: int, given: Given
) -> None:
    texts: list[str] = []
    for place, item in _objects(path, suffix):
        try:
            messages, prompt, text = _parse(item)
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
        if messages:
            given.add(tokenize(messages, tokenizer, max_length))
        if prompt:
            given.prompts.append(prompt)
        if text:
            texts.append(text)
    _pack(texts, tokenizer, max_length, given)


def _objects(path: Path, suffix: str) -> Iterator[tuple[str, Any]]:
    """The file's objects, each with its place in the file."""
    text = _read_text(path)
    if suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _decode(path, f"line {number}", line)
        return
    items = _decode(path, "the whole", text)
    if not isinstance(items, list):
        raise ValueError(f"{path} is no list of conversations: give [...], or a .jsonl file.")
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


def _decode(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, {place}: no JSON ({error}): correct it.") from error


def _parse(item: Any) -> tuple[list[Message], list[str], str]:
    """An object's conversation, prompt (user texts) or plain text; the other two are empty."""
    if not isinstance(item, dict):
        raise ValueError('no JSON object: give {"messages": [...]} or {"prompt": "..."}.')
    if "messages" in item or "conversations" in item:
        return _sorted_messages(parse_messages(item.get("messages", item.get("conversations"))))
    if "completion" in item and "prompt" in item:
        pair = [("user", item["prompt"]), ("assistant", item["completion"])]
        return [{"role": role, "content": parse_text(x, role)} for role, x in pair], [], ""
    if "prompt" in item:
        return [], [parse_text(item["prompt"], "prompt")], ""
    if isinstance(item.get("turns"), list) and item["turns"]:
        return [], [parse_text(turn, "a turn") for turn in item["turns"]], ""
    if "text" in item:
        return [], [], parse_text(item["text"], "text")
    raise ValueError(
        f"keys {sorted(item)} are not known: give messages, conversations, prompt, turns or text."
    )


def _sorted_messages(messages: list[Message]) -> tuple[list[Message], list[str], str]:
    """Messages as a conversation, or as a prompt if the assistant says nothing; a last question is cut."""
    if all(message["role"] != "assistant" for message in messages):
        if messages[-1]["role"] != "user":
            raise ValueError("no message of the user at the end: give one.")
        return [], ["\n\n".join(message["content"] for message in messages)], ""
    while messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return messages, [], ""


# --- Tokens ----------------------------------------------------------------------------------------------


def tokenize(
    messages: Sequence[Message], tokenizer: TokenizerWrapper, max_length: int
) -> Conversation | None:
    """A conversation as the chat template renders it; None where the answers cannot be found in it.

    An answer begins where the prompt before it ends (the rendered messages up to there, with the
    generation prompt) and runs through its end-of-turn token. Where a template renders earlier messages
    otherwise (without their thoughts, say), it is looked for behind what both renderings share.

    Raises:
        ValueError: the model has no chat template, or its tokenizer does not say where tokens stand.
    """
    if not tokenizer.has_chat_template:
        raise ValueError("The model has no chat template for conversations: give plain text (.txt).")
    try:
        return _tokenize(_with_system(messages, tokenizer), tokenizer, max_length)
    except TEMPLATE_ERRORS as error:
        if isinstance(error, _Slow):
            raise
        return None


def render(messages: Sequence[Message], tokenizer: TokenizerWrapper, prompt: bool = False) -> str:
    """Messages as the chat template's text, with the generation prompt if ``prompt``."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def special_tokens(tokenizer: TokenizerWrapper) -> set[int]:
    """Ids of tokens that are no text: special and added ones, and all that end generation."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {index for index, token in added.items() if str(token).strip()}
    return marks | set(tokenizer.all_special_ids) | set(tokenizer.eos_token_ids)


class _Slow(ValueError):
    """A tokenizer without offsets."""


def _tokenize(
    messages: Sequence[Message], tokenizer: TokenizerWrapper, max_length: int
) -> Conversation | None:
    text = render(messages, tokenizer)
    tokens, offsets = _encode_with_offsets(text, tokenizer)  # [T], [T, 2]
    trained = np.zeros(len(tokens), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip():
            span = _locate(message["content"], render(messages[:i], tokenizer, prompt=True), text)
            if span is None:
                return None
            inside = (offsets[:, 1] > span[0]) & (offsets[:, 0] < span[1])  # [T]
            trained |= inside
            trained[_ending(tokens, int(inside.nonzero()[0][-1]) + 1, tokenizer)] = True
    return Conversation(tokens[:max_length], trained[:max_length])


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
        raise _Slow("The model's tokenizer has no tokenizer.json, so answers cannot be found: add it.")
    encoded = inner(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int32), offsets


def _with_system(messages: Sequence[Message], tokenizer: TokenizerWrapper) -> Sequence[Message]:
    """The messages, the system's put into the first user's where the template refuses them."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    try:
        render(messages[:2], tokenizer)
    except TEMPLATE_ERRORS:
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
            given.add(_plain(start, joined))
            joined = []
        joined += tokens
        while len(joined) > room:
            given.add(_plain(start, joined[:room]))
            joined = joined[room:]
    if joined:
        given.add(_plain(start, joined))


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
