"""Conversations that a response may go on from, though the client does not send them again."""

import json
from collections import OrderedDict
from typing import Any

from .errors import BadRequest

REMEMBERED = 64 << 20  # bytes of conversations, roughly

Messages = list[dict[str, Any]]


class Memory:
    """Conversations by the ids of the responses that ended them; the oldest go first."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[str, tuple[Messages, int]] = OrderedDict()

    def keep(self, name: str, messages: Messages) -> None:
        """Remember a conversation."""
        size = len(json.dumps(messages))
        self._kept[name], self._size = (messages, size), self._size + size
        while self._size > self._limit:
            self._size -= self._kept.popitem(last=False)[1][1]

    def find(self, name: str) -> Messages:
        """The conversation; ``BadRequest`` if it is not known."""
        if name not in self._kept:
            text = f"previous_response_id: {name[:100]!r} is not known (any more): send the conversation."
            raise BadRequest(text, 400, "previous_response_not_found", "previous_response_id")
        return self._kept[name][0]
