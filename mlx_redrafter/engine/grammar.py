"""What a text must be: a grammar, and the tokens that it allows next, by the library llguidance.

grammar = Grammar.json(tokenizer, {"type": "object", "properties": {"age": {"type": "integer"}}})
engine.submit(Request(prompt, grammar=grammar, stop=frozenset(tokenizer.eos_token_ids)))
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from itertools import count
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LONGEST = 1 << 18  # characters of a grammar
DIGITS = 4  # of n in {n}: with more, a mask takes longer than a model's step
WRITTEN_OUT = 100_000  # characters of an expression with its repeats written out: 0.1 seconds
MOST_STATES = 100_000  # of a number read digit by digit: as many as the least common multiple of multipleOf
# Between two parts of JSON: a weak model would write it for ever. Indents ten levels by four.
WHITESPACE = r"[ \t\n\r]{1,41}"
DECIMALS = 12  # of multipleOf, before and after the point

# What expressions, and Lark's grammars, are made of: characters and classes, quantifiers, brackets. What is
# not closed ends with the text: to look for its end from everywhere would take too long.
_ATOMS = re.compile(r"\\[pPxuU]\{[^}]*\}?|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|\{[\d\s,]+\}|.", re.DOTALL)
_LARK = re.compile(
    r"""//[^\n]*|"(?:\\.|[^"\\\n])*"?|/(?:\\.|[^/\\\n])+/?|\w+|\{[\d\s,]+\}"""
    r"""|~\s*\d+(?:\s*\.\.\s*\d+)?|[()|\[\]]"""
)
_DEFINED = re.compile(r"^[?!]?(\w+)(?:\.-?\d+)?(?:\[[^\]\n]*\])?\s*:", re.MULTILINE)  # a name of Lark's

Masks = np.ndarray[Any, np.dtype[np.uint32]]
_tokenizers: WeakKeyDictionary[Any, "LLTokenizer"] = WeakKeyDictionary()  # by the fast tokenizer
_lock = Lock()


class Grammar:
    """Which texts a model may say, for the tokenizer that its tokens are of; ends of text come after them.

    Any number of requests may use one at once.

    Args:
        tokenizer: of the model; a fast one.
        text: what is to be followed, in the library's format.
        name: of what was given, in messages.

    Raises:
        ValueError: it is too long or too complex, cannot be read, or allows nothing; the tokenizer is of an
            unknown kind, or has no end of text; the library is not installed.
    """

    def __init__(self, tokenizer: TokenizerWrapper, text: str, name: str) -> None:
        library = _library()
        self.ends = frozenset(tokenizer.eos_token_ids)
        if not self.ends:
            raise ValueError("the tokenizer names no end of text, which must come after a grammar: add one.")
        known = _tokenizer_of(tokenizer)
        self.words = -(-max(known.vocab_size, *(end + 1 for end in self.ends)) // 32)
        self.only_ends = self._bits(self.ends)
        self._others = self._bits(set(range(known.vocab_size)) - self.ends - set(known.eos_tokens))
        # Where nothing may come: a token that the matcher will not take, and no end.
        self.nothing = self._bits({next(token for token in count() if token not in self.ends)})
        limits = library.LLParserLimits(verbose_errors=False)
        self.matcher: LLMatcher = library.LLMatcher(known, text, log_level=0, limits=limits)
        first = self.matcher.deep_copy()
        if first.is_error() or self.mask(first) is None:
            raise ValueError(f"the {name} is not usable: {_in_short(first.get_error())}.")

    def mask(self, matcher: "LLMatcher") -> Masks | None:
        """Bits [words] of the tokens that may come next; None if none may, or that takes too long to know."""
        mask = np.zeros(self.words, np.uint32)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self.words]  # it may have a word more
        mask[: len(bits)] = bits
        mask &= self._others
        if matcher.is_accepting():
            mask |= self.only_ends
        return None if matcher.is_error() or not mask.any() else mask

    @classmethod
    def json(cls, tokenizer: TokenizerWrapper, schema: Any = None) -> "Grammar":
        """JSON that a schema (a dictionary, or a boolean) describes; any object without one."""
        name = "JSON schema"
        try:
            schema = json.loads(json.dumps({"type": "object"} if schema is None else schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the {name} is not usable: it is no JSON ({error}).") from error
        if not isinstance(schema, dict | bool):
            raise ValueError(f"the {name} is not usable: it is {str(schema)[:50]!r}, no object.")
        text = json.dumps(schema)
        _check_size(text, name)
        _check_multiples((str(value) for key, value in _entries(schema) if key == "multipleOf"), name)
        for key, value in _entries(schema):
            if key in ("pattern", "patternProperties", "whitespace_pattern"):
                _check_repeats(" ".join(value) if isinstance(value, dict) else str(value), name)
        usual = None
        if isinstance(schema, dict) and "x-guidance" not in schema:  # the library's options, by who asks
            usual = {"whitespace_pattern": WHITESPACE}
        return cls(tokenizer, _library().LLMatcher.grammar_from_json_schema(text, usual), name)

    @classmethod
    def regex(cls, tokenizer: TokenizerWrapper, text: str) -> "Grammar":
        """A text that matches a regular expression from its beginning to its end."""
        name = "regular expression"
        _check_size(text, name)
        _check_repeats(text, name)
        return cls(tokenizer, _library().LLMatcher.grammar_from_regex(text), name)

    @classmethod
    def lark(cls, tokenizer: TokenizerWrapper, text: str) -> "Grammar":
        """A text of a context-free grammar in (llguidance's kind of) Lark's format."""
        name = "Lark grammar"
        _check_size(text, name)
        _check_repeats(text, name, is_lark=True)
        plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), text)
        _check_multiples(re.findall(r'"multipleOf"\s*:\s*([-+.\deE]+)', plain), name)
        return cls(tokenizer, _library().LLMatcher.grammar_from_lark(text), name)

    @classmethod
    def choice(cls, tokenizer: TokenizerWrapper, texts: Sequence[str]) -> "Grammar":
        """One of some texts."""
        name = "choice"
        if isinstance(texts, str) or not texts or not all(isinstance(each, str) and each for each in texts):
            raise ValueError(f"the {name} {str(texts)[:50]!r} is not usable: give a list of texts.")
        either = " | ".join(map(json.dumps, texts))
        return cls(tokenizer, _library().LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {either}"), name)

    def follower(self) -> "Follower":
        """At the beginning of a text."""
        return Follower(self)

    def processor(self) -> Callable[[mx.array, mx.array], mx.array]:
        """A logits processor as mlx-lm's (tokens [T], logits [1, V]), for one text in plain decoding."""
        follower, prompts = Follower(self), list[int]()  # tokens when it is asked first

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            prompts.append(tokens.size)
            said: Any = tokens[prompts[0] :].tolist()
            follower.follow(said)
            return masked(logits, mx.array(follower.masks([0], [0])))

        return process

    def _bits(self, tokens: Collection[int]) -> Masks:
        bits = np.zeros(32 * self.words, np.uint8)
        bits[[token for token in tokens if token < bits.size]] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)


class Follower:
    """One text's place in a grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._said = 0  # tokens that the matcher has taken in
        self._ended = False
        # Drafts of the last tree that nothing can follow, and why.
        self._dead: dict[tuple[int, ...], str] = {}

    def follow(self, said: Sequence[int]) -> None:
        """Go on after all tokens that the text has said, the earlier ones included.

        Raises:
            ValueError: the grammar does not allow them, or is too complex.
        """
        new = tuple(said[self._said :])
        for place, token in enumerate(new):
            self._ended = self._ended or token in self.grammar.ends
            if self._ended:
                break
            if new[:place] in self._dead or not self._matcher.consume_token(token):
                error = self._dead.get(new[:place]) or self._matcher.get_error()
                raise ValueError(f"the grammar cannot be followed: {_in_short(error)}.")
        self._said, self._dead = len(said), {}

    def masks(self, tokens: Sequence[int], parents: Sequence[int]) -> Masks:
        """Bits [N, words] of the tokens that may come after each of N nodes, by the drafts that lead to it.

        Args:
            tokens: [N] of a tree whose node 0 is the last token said.
            parents: [N], each of them before its children.
        """
        grammar = self.grammar
        found = np.tile(grammar.only_ends, (len(tokens), 1))  # what comes after an end, or after no text
        there: dict[int, LLMatcher] = {}  # by node that a text may get to
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if self._ended:
                break
            if node and (parent not in there or token in grammar.ends or not _has(found[parent], token)):
                continue
            here = (there[parent] if node else self._matcher).deep_copy()
            if node:
                here.consume_token(token)
            mask = grammar.mask(here)
            if mask is None:
                found[node] = grammar.nothing
                self._dead[_path(node, tokens, parents)] = here.get_error() or "no token may come"
            else:
                found[node], there[node] = mask, here
        return found


def masked(logits: mx.array, masks: mx.array) -> mx.array:
    """Logits [..., V]; -inf where the bits [..., words] are 0, and where there are none."""
    bits = (masks[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1  # [..., words, 32]
    bits = bits.reshape(*masks.shape[:-1], -1)[..., : logits.shape[-1]].astype(mx.bool_)
    missing = logits.shape[-1] - bits.shape[-1]
    bits = mx.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, missing)])
    return mx.where(bits, logits, -mx.inf)


def _has(mask: Masks, token: int) -> bool:
    return 0 <= token < 32 * len(mask) and bool(mask[token >> 5] >> (token & 31) & 1)


def _path(node: int, tokens: Sequence[int], parents: Sequence[int]) -> tuple[int, ...]:
    """The tokens from below the root to the node."""
    path = []
    while node:
        path.append(tokens[node])
        node = parents[node]
    return tuple(reversed(path))


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError("grammars need llguidance: pip install 'mlx-redrafter[server]'.") from error
    return llguidance


def _tokenizer_of(tokenizer: TokenizerWrapper) -> "LLTokenizer":
    """The library's view of a tokenizer, which takes a second to make: once."""
    fast = tokenizer._tokenizer
    with _lock:
        if fast not in _tokenizers:
            from llguidance.hf import from_tokenizer

            try:
                ends = [end for end in sorted(tokenizer.eos_token_ids) if end < len(fast)]
                _tokenizers[fast] = from_tokenizer(fast, eos_token=ends or None)
            except Exception as error:  # the library raises all kinds
                kind = type(fast).__name__
                raise ValueError(
                    f"grammars cannot use a tokenizer of the kind {kind} ({_in_short(str(error))}): give a "
                    "model with a fast one (tokenizer.json)."
                ) from error
        return _tokenizers[fast]


def _in_short(error: str) -> str:
    """The line of the library's message that says what is wrong."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["for no known reason"]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (named or lines)[0][:200].rstrip(".:")


def _check_size(text: str, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"the {name} {str(text)[:50]!r} is not usable: give a text.")
    if len(text) > LONGEST:
        raise ValueError(f"the {name} has {len(text)} characters: give at most {LONGEST}.")


def _check_repeats(text: str, name: str, is_lark: bool = False) -> None:
    for counts in re.findall(r"\{([\d\s,]*)\}|~([\d\s.]+)" if is_lark else r"\{([\d\s,]*)\}()", text):
        for times in re.split(r"[,.]", "".join("".join(counts).split())):
            if len(times.lstrip("0")) > DIGITS:
                raise ValueError(
                    f"the {name} repeats something {times[:20]} times: give at most {10**DIGITS - 1}."
                )
    if (_lark_size if is_lark else _size)(text) > WRITTEN_OUT:
        raise ValueError(
            f"the {name} is too big: its repeats multiply to more than {WRITTEN_OUT:,} characters: give less."
        )


def _size(pattern: str) -> int:
    """Characters of a regular expression with its repeats written out, such as 20 of ``(ab{4}){4}``."""
    return _written_out(_ATOMS.findall(pattern), lambda atom: 1)


def _lark_size(text: str) -> int:
    """Likewise of the largest definition of a grammar, with the terminals that it names."""
    parts = _DEFINED.split(text)
    bodies, known = dict(zip(parts[1::2], parts[2::2], strict=True)), dict[str, int]()

    def size(atom: str) -> int:
        if atom[0] in '"/':
            return len(atom) - 2 if atom[0] == '"' else _size(atom[1:-1])
        if atom not in bodies or atom.islower():  # rules are followed, not written out
            return 0 if atom.startswith("//") else 1
        if atom not in known:
            known[atom] = 1  # one that needs itself, which the library will name
            known[atom] = _written_out(_LARK.findall(bodies[atom]), size)
        return known[atom]

    try:
        return max((_written_out(_LARK.findall(body), size) for body in bodies.values()), default=0)
    except RecursionError:
        return 0  # which the library will name


def _written_out(parts: Iterable[str], size: Callable[[str], int]) -> int:
    """The sizes of all parts together, each as often as it is repeated."""
    groups, last = [0], 0  # of the open brackets, and of what a quantifier would repeat
    for part in parts:
        if part in ("(", "["):
            groups.append(0)
        elif part in (")", "]") and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif part[0] in "{~" and (counts := re.findall(r"\d+", part)):
            times = max(1, *(int(each.lstrip("0") or 0) for each in counts))
            groups[-1], last = groups[-1] + last * (times - 1), last * times
        else:
            last = size(part)
            groups[-1] += last
        groups[-1], last = min(groups[-1], 1 << 40), min(last, 1 << 40)  # more is more than enough
    return sum(groups)


def _check_multiples(values: Iterable[str], name: str) -> None:
    numbers = []
    for value in values:
        with contextlib.suppress(InvalidOperation):  # which the library will name
            numbers.append(Decimal(value))
    places = max((-int(number.as_tuple().exponent) for number in numbers), default=0)  # after the point
    large = places > DECIMALS or any(number.adjusted() > DECIMALS for number in numbers)
    if large or math.lcm(*(int(number.scaleb(places)) for number in numbers)) > MOST_STATES:
        found = ", ".join(map(str, numbers))[:50]
        raise ValueError(
            f"the {name} has multipleOf {found}, too much to keep track of: give rounder numbers."
        )


def _entries(schema: Any) -> Iterator[tuple[str, Any]]:
    """All keys of a schema and of what is in it, with their values."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
            left += value.values()
        elif isinstance(value, list):
            left += value
