"""The JSON record of a generation."""

import json
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from .decoding.state import DraftShape
from .engine import backend
from .loading.find import DEFAULT_MODEL
from .text import Response

OTHERS = ("run", "ranks", "command", "json")  # no settings


def describe_shape(shape: DraftShape) -> dict[str, int]:
    """A draft shape in the words of the flags."""
    names = ("beam_width", "beam_length", "max_nodes", "lookup")
    return dict(zip(names, (shape.width, shape.length, shape.size, shape.lookup), strict=True))


def print_record(responses: Iterator[Response], settings: dict[str, Any]) -> None:
    """Print the record, also of a generation that was interrupted."""
    received: list[Response] = []
    interrupt = None
    try:
        for response in responses:
            received.append(response)
    except KeyboardInterrupt as error:
        interrupt = error
    if received:
        print(json.dumps(_record(received, settings), allow_nan=False))
    if interrupt is not None:
        raise interrupt


def _record(received: list[Response], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON record of a finished generation, with the ``settings`` in force."""
    last = received[-1]
    drafted = last.steps > 0
    file = settings["prompt_cache_file"]
    settings = {name: value for name, value in settings.items() if name not in OTHERS}
    settings |= {"model": settings["model"] or DEFAULT_MODEL, "prompt_cache_file": file and str(file)}
    return {
        "text": "".join(response.text for response in received),
        "tokens": [response.token for response in received],
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": last.prompt_tps,
        "generation_tokens": last.generation_tokens,
        "generation_tps": last.generation_tps,
        "steps": last.steps if drafted else last.generation_tokens,
        "tokens_per_step": last.tokens_per_step if drafted else 1.0,
        "acceptance": list(last.acceptance),
        "copied_tokens": last.copied,
        "shapes": [{**describe_shape(shape), "steps": steps} for shape, steps in last.shapes.items()],
        "peak_memory_gb": last.peak_memory,
        "finish_reason": last.finish_reason,
        "settings": settings,
        "device": {"backend": backend.current().name, "chip": backend.chip()},
        "versions": {name: metadata.version(name) for name in ("mlx-redrafter", "mlx", "mlx-lm")},
    }
