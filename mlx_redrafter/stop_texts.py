"""Texts that end an output."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


def until(responses: Iterator[Any], stop: Sequence[str]) -> Iterator[Any]:
    """Pass ``responses`` on up to the first of the ``stop`` texts.

    Text that may be the beginning of a stop text is held back until it is clear, so the output does
    not depend on how the text is cut into tokens.
    """
    held = ""
    with contextlib.closing(responses):  # type: ignore[type-var]
        for response in responses:
            held += response.text
            clear = len(held) if response.finish_reason else certain(held, stop)
            found = min((place for text in stop if (place := held.find(text)) >= 0), default=None)
            if found is not None and found <= clear:
                response.text, response.finish_reason = held[:found], "stop"
                yield response
                return
            response.text, held = held[:clear], held[clear:]
            yield response


def check_stop(stop: str | Sequence[str]) -> list[str]:
    """The stop texts as a list; ``ValueError`` if one is empty."""
    texts = [stop] if isinstance(stop, str) else list(stop)
    if "" in texts:
        raise ValueError("an empty stop text would end the output at once: leave it out.")
    return texts


def certain(text: str, stop: Sequence[str]) -> int:
    """How many of the first characters of ``text`` cannot be part of a stop text that is yet to end."""
    unclear = (n for phrase in stop for n in range(1, len(phrase)) if text.endswith(phrase[:n]))
    return len(text) - max(unclear, default=0)
