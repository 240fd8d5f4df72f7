"""The tokens that end a text: those that a model's configs name, and the one that ends a turn of a chat."""

import re
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .read import read_object

# Special tokens that end a turn or a text, whatever the metadata calls the end.
ENDS = re.compile(
    r"<\|(im_end|eo[tm](_id)?|end|end_?of_?(turn|text)|return)\|>|<end_of_(turn|utterance)>|</s>|<eos>"
    r"|▁?<EOT>|\[EOT\]|<｜end▁of▁sentence｜>"
)
_QUESTION, _ANSWER = {"role": "user", "content": "6 x 9?"}, {"role": "assistant", "content": "Forty-two"}


def named_ends(folder: Path, given: Any) -> list[int]:
    """The ids ``given`` and those of config.json, in place of which mlx-lm takes generation_config.json's."""
    config = read_object(folder / "config.json", optional=True)
    nested = config.get("text_config")
    values = (given, config.get("eos_token_id"), nested.get("eos_token_id") if type(nested) is dict else None)
    ids = [i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None]
    if all(type(i) is int for i in ids):
        return [i for i in ids if i >= 0]
    raise ValueError(f"{folder}: eos_token_id is {ids!r} in its configs: give token ids.")


def ends_of_turn(tokenizer: TokenizerWrapper) -> set[int]:
    """The token that follows an answer in the chat template, and special ones that are known by name.

    A name that the template writes before an answer but not after it ends none: gpt-oss has one between
    the messages of a single answer. Without a template the ends are mlx-lm's.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    marks = {token.content: i for i, token in added if token.special or ENDS.fullmatch(token.content)}
    if not (marks and tokenizer.has_chat_template):
        return set()
    longest_first = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
    for turns in (2, 3):  # the last answer may be left open
        try:
            text = tokenizer.apply_chat_template([_QUESTION, _ANSWER, _QUESTION][:turns], tokenize=False)
            before, after = text.split(_ANSWER["content"])
        except Exception:  # a template is a program; the prompt will show what is wrong
            before = after = ""
        if end := re.match(rf"\s*({longest_first})(?=[<\[\s]|$)", after):  # no word follows, such as a role
            break
    special = [token.content for _, token in added if token.special and token.content not in before]
    return {marks[mark] for mark in filter(ENDS.fullmatch, special)} | ({marks[end[1]]} if end else set())


def token_text(token: Any) -> str | None:
    """Return the text of a special token, which configs give as a string or as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token
