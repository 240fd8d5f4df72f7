"""What the result of a self-check depends on, so that it can be remembered: all but the weights' values."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from types import CodeType, FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..loading.cache import versions
from .hooks import parts


def conditions(target: Any, device: str) -> dict[str, Any]:
    """All that decides whether a target's drafts are right on a device, as JSON."""
    found = parts(target.model)
    kinds = list(dict.fromkeys(type(part) for part in found if isinstance(part, nn.Module)))
    watching = vars(sys.modules[type(target.tape).__module__]).values()
    return {
        "device": device,
        "model": _name(type(target.model)),
        "parts": _digest([*map(_told, found), str((target.windows, target.layers_read))]),
        "code": _digest(sorted(_code(kinds, [type(target), *watching]))),
        "versions": versions(),
    }


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _told(part: Any) -> str:
    if isinstance(part, mx.array):
        return f"{part.shape} {part.dtype}"
    plain = part is None or isinstance(part, str | int | float | tuple) or is_dataclass(part)
    return repr(part) if plain else _name(type(part))


def _code(kinds: list[type], ours: list[Any]) -> Iterator[str]:
    """The code that the classes may come to, as it is in this process, followed through MLX's, mlx-lm's and
    this package's; and that of what was put there from elsewhere."""
    seen, todo = set[int](), [*kinds, *ours]
    while todo:
        item = todo.pop()
        item = getattr(item, "fget", None) or getattr(item, "__func__", item)  # of a property, a class method
        if not isinstance(item, type | FunctionType) or id(item) in seen:
            continue
        seen.add(id(item))
        followed = item.__module__.startswith("mlx") or item in kinds
        if isinstance(item, type):
            todo += [*item.__bases__, *vars(item).values()] if followed else []
            continue
        codes = [item.__code__]
        for code in codes:  # and those inside of it
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
            constants = [each for each in code.co_consts if isinstance(each, str | int | float)]
            yield f"{code.co_code.hex()} {code.co_names} {constants}"
            todo += [item.__globals__.get(name) for name in code.co_names] if followed else []
