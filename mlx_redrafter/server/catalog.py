"""Which models there are, and which are loaded: by name, when asked for; the least recently used go."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..engine import backend
from ..engine.prefix_folder import PrefixFolder, prefix_identity
from ..engine.prefixes import Prefixes
from ..loading.find import DEFAULT_MODEL
from ..loading.library import Entry, find, library
from ..model import SpeculativeModel
from ..options import DecodingOptions, ModelOptions, choose_drafter, load_model, never_dropped
from .errors import BadRequest
from .prompts import control_tokens
from .worker import Helper, Served, Worker

if TYPE_CHECKING:
    from ..engine.ranks import Ranks

LISTED = 30.0  # seconds for which a list of the models on this machine is good


@dataclass(frozen=True)
class ServingOptions:
    """How models are kept, and decode; ``ValueError`` if a value is not usable.

    Attributes:
        model_dir: folders with models, besides those of other programs.
        texts: that are decoded at once; others wait.
        chunk: prompt tokens read between two steps.
        models: that are loaded at once.
        prompt_cache_bytes: of texts kept for reuse, of each model; None: a quarter of what is free.
        prompt_cache_dir: where these are kept on the disk too, and found after a restart; None: nowhere.
        prompt_cache_dir_bytes: that may be kept there.
        idle_unload: seconds after which a model that nobody asks for is let go; None: never.
    """

    model_dir: Sequence[Path] = ()
    texts: int = 16
    chunk: int = 512
    models: int = 2
    prompt_cache_bytes: int | None = None
    prompt_cache_dir: Path | None = None
    prompt_cache_dir_bytes: int = 20 << 30
    idle_unload: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("texts", 1), ("chunk", 1), ("models", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is not usable: give {least} or more.")
        for folder in self.model_dir:
            if not folder.is_dir():
                raise ValueError(f"--model-dir {folder} is no folder: name one.")


@dataclass(eq=False)
class Loaded:
    """A model in memory, by what a request needs of it."""

    name: str
    served: Served
    model: SpeculativeModel
    tokenizer: TokenizerWrapper
    xtc_special: tuple[int, ...]

    @property
    def context(self) -> int:
        """Tokens that a text may have."""
        return self.model.context_length or 1 << 17


class Catalog:
    """The models.

    Args:
        default: the model that is meant where a request names none.
        ranks: machines that have a part of each model.
    """

    def __init__(
        self, worker: Worker, default: ModelOptions, options: ServingOptions, ranks: "Ranks | None" = None
    ) -> None:
        self._worker, self._default, self._options = worker, default, options
        self._ranks = ranks
        self.default_name = default.model or DEFAULT_MODEL
        self.loaded: dict[str, Loaded] = {}
        self._loading = asyncio.Lock()
        self._helper = Helper("loading")
        # Several machines compute in the same order: one thread does all that computes.
        self._loader: Helper = self._helper if ranks is None else worker
        self._listed: tuple[float, list[Entry]] = (-LISTED, [])

    async def get(self, name: str | None) -> Loaded:
        """The model of this name, loaded if it is not.

        Raises:
            BadRequest: there is no such model, it cannot be loaded, or there is no room for it.
        """
        options = await self._find(name)
        assert options.model is not None
        async with self._loading:
            if (found := self.loaded.get(options.model)) is None:
                await self._make_room(options.model)
                found = self.loaded[options.model] = await self._load(options, name)
            found.served.used = time.monotonic()
            return found

    async def names(self) -> list[str]:
        """The names of all models, the default one first."""
        entries = await self._entries()
        usable = [each.name for each in entries if not (each.is_drafter or each.problem)]
        return list(dict.fromkeys([self.default_name, *usable]))

    @property
    def texts(self) -> int:
        """How many texts are decoded, or wait to be, by all models."""
        return sum(loaded.served.texts for loaded in list(self.loaded.values()))

    async def unload_idle(self) -> None:
        """Let go of models that nobody has asked for in a while."""
        limit = self._options.idle_unload
        async with self._loading:
            for loaded in list(self.loaded.values()):
                idle = time.monotonic() - loaded.served.used
                if limit is not None and idle > limit and not loaded.served.texts:
                    await self._unload(loaded)

    async def _find(self, name: str | None) -> ModelOptions:
        folder = Path(self.default_name).name
        if name in (None, "", "default", "default_model", self.default_name, folder):
            return replace(self._default, model=self.default_name)
        assert name is not None
        if (entry := await self._apart(partial(find, name, self._options.model_dir))) is None:
            text = f"there is no model {name[:200]!r} here: GET /v1/models lists those there are."
            raise BadRequest(text, 404, "model_not_found", "model")
        return ModelOptions(str(entry.path), dtype=self._default.dtype)

    async def _entries(self) -> list[Entry]:
        when, entries = self._listed
        if time.monotonic() - when > LISTED:
            entries = await self._apart(partial(library, self._options.model_dir))
            self._listed = time.monotonic(), entries
        return entries

    async def _load(self, options: ModelOptions, asked: str | None) -> Loaded:
        try:
            loading = self._loader.do(partial(_load, options, self._ranks))
            model, tokenizer = await asyncio.wrap_future(loading)
            make = partial(self._begin, model, tokenizer)
            served = await asyncio.wrap_future(self._worker.do(make))
        except (ValueError, OSError) as error:
            # Why, names folders of this machine: that is for the log.
            text = f"the model {(asked or 'default')[:200]!r} cannot be loaded: the server's log says why."
            raise BadRequest(text, 503, "model_not_loaded", "model") from error
        name = str(options.model)
        return Loaded(name, served, model, tokenizer, tuple(never_dropped(tokenizer)))

    def _begin(self, model: SpeculativeModel, tokenizer: TokenizerWrapper) -> Served:
        options, folder = self._options, None
        if options.prompt_cache_dir is not None:
            identity = prefix_identity(model.model, model.drafter)
            folder = PrefixFolder(options.prompt_cache_dir, identity, options.prompt_cache_dir_bytes)
        prefixes = Prefixes(options.prompt_cache_bytes, folder)
        served = Served(model, tokenizer, prefixes, folder, options.chunk, options.texts)
        self._worker.serve(served)
        return served

    async def _make_room(self, path: str) -> None:
        """Let go of the models that were used longest ago, until another one may be loaded."""
        needed = _weight_bytes(Path(path)) // (self._ranks.size if self._ranks else 1)
        while self.loaded:
            fits = needed <= backend.free_memory() and len(self.loaded) < self._options.models
            idle = [each for each in self.loaded.values() if not each.served.texts]
            if fits:
                return
            if not idle:
                raise BadRequest("no room for another model while those loaded are busy: ask later.", 503)
            await self._unload(min(idle, key=lambda each: each.served.used))

    async def _unload(self, loaded: Loaded) -> None:
        del self.loaded[loaded.name]
        await asyncio.wrap_future(self._worker.do(partial(self._worker.release, loaded.served)))

    async def _apart(self, work: Callable[[], Any]) -> Any:
        """What takes long is done in a thread of its own, one thing after the other."""
        return await asyncio.wrap_future(self._helper.do(work))


def _weight_bytes(path: Path) -> int:
    """Of a model on the disk; 0 if it is not there yet."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def _load(options: ModelOptions, ranks: "Ranks | None") -> tuple[SpeculativeModel, TokenizerWrapper]:
    drafter = choose_drafter(options, DecodingOptions())
    if ranks is None:
        model, tokenizer = load_model(options, drafter)
    else:
        ranks.tell_load(options, drafter)
        model, tokenizer = ranks.load(partial(load_model, options, drafter, ranks=ranks))
    for part in filter(None, (model.model, model.drafter)):  # other threads cannot compute what this one left
        mx.eval(part.parameters())
    tokenizer.chat_control_tokens = control_tokens(tokenizer)
    return model, tokenizer
