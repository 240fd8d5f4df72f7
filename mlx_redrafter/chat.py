"""Messages as a model's chat template renders them, and their token ids."""

import contextlib
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

Message = dict[str, Any]  # role and content; "weight" 0 if the message is not to be trained on


def render(tokenizer: TokenizerWrapper, messages: list[Message], **options: Any) -> str:
    """The messages in the model's chat template; in parts, where only that keeps what they say."""

    def apply(given: list[Any]) -> str:
        return str(tokenizer.apply_chat_template(given, tokenize=False, **options))

    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    texts: list[str] = []
    for given in (messages, parts):
        with contextlib.suppress(Exception):  # a template may refuse either
            texts.append(apply(given))
            if all(m["content"].strip() in texts[-1] for m in messages):
                return texts[-1]
    return texts[0] if texts else apply(messages)  # which says why


def rendered(messages: Sequence[Message], tokenizer: TokenizerWrapper, prompt: bool = False) -> str:
    """Messages as the chat template's text, with the generation prompt if ``prompt``.

    Raises:
        ValueError: the template refuses them.
    """
    try:
        return render(tokenizer, list(messages), add_generation_prompt=prompt)
    except Exception as error:
        raise refusal(messages, error) from error


def refusal(messages: Sequence[Message], error: Exception, remedy: str = "give others") -> ValueError:
    """A template is a program, and may refuse a role or the order of roles: what to tell the user."""
    roles = ", ".join(message["role"] for message in messages[:8])
    reason = str(error).strip().split("\n")[0]
    return ValueError(f"the chat template refuses messages of {roles} ({reason}): {remedy}.")


def encode_messages(messages: list[Message], tokenizer: TokenizerWrapper, text: str | None) -> list[int]:
    """Token ids of messages, rendered as ``text``; None: of what they say, with the usual special tokens.

    Raises:
        ValueError: nothing is left to say.
    """
    if text is None:
        ids = tokenizer.encode("\n".join(message["content"] for message in messages))
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"the prompt {messages[-1]['content']!r} has no tokens: give some text.")
    return list(ids)


def encode_text(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Token ids of a text as it is, with the usual special tokens unless it begins with one."""
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=special))


class Continuing(TokenizerWrapper):  # type: ignore[misc]
    """A tokenizer for output that goes on from a text: mlx-lm's drop a space that the output begins with."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        vars(self).update(vars(tokenizer))

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """One that has had a token already."""
        detokenizer: StreamingDetokenizer = super().detokenizer
        detokenizer.add_token(self.encode("a", add_special_tokens=False)[-1])
        _ = detokenizer.last_segment
        return detokenizer
