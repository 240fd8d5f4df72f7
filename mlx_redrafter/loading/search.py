"""A drafter for a model, where none is named and none ships: on this machine, then on Hugging Face's hub."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import huggingface_hub

from ..models.bundle import MODEL_TYPE, base_of, read_config
from ..models.identity import BaseIdentity
from .cache import LARGEST, cache_folder, read_note, write_note

SWITCH = "MLX_REDRAFTER_SEARCH"  # off: the hub is not asked
LM_STUDIO = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
NONE_THERE, NO_ANSWER = 86_400.0, 3_600.0  # seconds until the hub is asked again
KIND = "drafter-searches"  # of notes


def search_drafter(identity: BaseIdentity) -> Path | None:
    """A drafter that records this base model, downloaded if need be: its folder, or None.

    The hub has a second to answer (see ``loading/hub_drafters.py``). It is not asked for a day after it had
    none, for an hour after it did not answer or what it had was of no use, and where ``HF_HUB_OFFLINE`` is
    set or ``MLX_REDRAFTER_SEARCH`` is ``off``.
    """
    if found := local_drafter(identity):
        return found
    if not may_ask():
        return None
    asked = {"base": asdict(identity), "endpoint": huggingface_hub.constants.ENDPOINT}
    if read_note(KIND, asked, NONE_THERE).get("answered") or read_note(KIND, asked, NO_ANSWER):
        return None
    from .hub_drafters import hub_drafter

    found, answered = None, False
    with suppress(OSError):  # nothing says where the cache is
        found, answered = hub_drafter(identity, downloads())
    if found is None:
        write_note(KIND, asked, answered=answered)
    return found


def may_ask() -> bool:
    """Whether the hub may be asked for drafters that nobody named."""
    switch = os.environ.get(SWITCH, "").lower()
    return not huggingface_hub.constants.HF_HUB_OFFLINE and switch not in ("off", "0")


def local_drafter(identity: BaseIdentity) -> Path | None:
    """The newest drafter for this base model in the places that ``mlx-redrafter models`` lists."""
    found = []
    for config in _configs():
        with suppress(OSError, ValueError, TypeError):
            known = config.stat()
            small = known.st_size <= LARGEST and MODEL_TYPE in config.read_text("utf-8")
            base = base_of(read_config(config.parent)) if small else None  # a model's own is not parsed
            if base is not None and base.matches(identity) and any(config.parent.glob("*.safetensors")):
                found.append((known.st_mtime_ns, config.parent))
    return max(found)[1] if found else None


def downloads() -> Path:
    """Where drafters from the hub are kept that were found by themselves, as ``OWNER/NAME``."""
    return cache_folder() / "drafters"


def _configs() -> Iterator[Path]:
    places = [(Path(os.path.expanduser(root)), "*/*") for root in LM_STUDIO]
    places += [(Path(huggingface_hub.constants.HF_HUB_CACHE), "models--*/snapshots/*")]
    with suppress(OSError):  # nothing says where the cache is
        places.append((downloads(), "*/*"))
    for root, folders in places:
        with suppress(OSError):
            yield from root.glob(f"{folders}/config.json")
