"""Find a model and its drafter, and load both."""

import operator
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .engine import backend
from .engine.engine import CHUNK, Engine, engine_here
from .engine.loop import Chooser
from .engine.runner import Runner
from .loading.base import LOAD_ERRORS, as_floats, load_base
from .loading.find import DEFAULT_MODEL, drafter_folder, find_drafter, model_folder
from .loading.read import check_finite
from .loading.tokenizer import load_tokenizer
from .models.bundle import load_drafter
from .models.drafter import Drafter
from .models.fused import FusedDrafter
from .models.hooks import ERRORS, parts
from .models.identity import identity_of, token_embedding
from .models.target import Target

DTYPES = ("auto", "stored", "float32", "float16", "bfloat16")


class SpeculativeModel:
    """An mlx-lm model with a drafter at its side; used as a model, it is the mlx-lm model.

    Both may be changed or replaced while nothing is generated: the next text comes from the changed model.

    Attributes:
        model: the mlx-lm model.
        drafter: None where there is none; then tokens are only copied from the text itself.
        refusal: why the model cannot verify drafts, as far as is known; empty if it can.
        context_length: tokens the model was made for, or None if its config does not say.
    """

    ranks: Any = None  # machines that have a part of the model each (``engine/ranks.py``)

    def __init__(self, model: nn.Module, drafter: Drafter | None, context_length: int | None = None) -> None:
        self.model = model
        self.drafter = drafter
        self.context_length = context_length
        self.refusal = self._told = ""
        self._given_policies: dict[int | None, Chooser] = {}
        self._policies: dict[int | None, Chooser] = {}
        self._runner: Runner | None = None
        self._parts: list[Any] = []  # of which these were made
        self._kinds: list[Any] = []
        self._lock = RLock()

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding; None where there is no such thing."""
        embedding = token_embedding(self.model)
        return None if embedding is None else int(embedding.weight.shape[0])

    def prepare(self) -> Runner | None:
        """What runs the steps of the model as it is now; None if it cannot verify drafts (``refusal``).

        After a change of the model or the drafter, it is tried out anew.
        """
        with self._lock:
            found = [backend.current(), *parts(self.model), *parts(self.drafter)]
            if len(found) != len(self._parts) or not all(map(operator.is_, found, self._parts)):
                self._take_in(found)
            return self._runner

    def prepare_or_tell(self) -> Runner | None:
        """As ``prepare``; a model that cannot verify drafts is told, with the reason, once."""
        runner, told = self.prepare(), self._told
        self._told = self.refusal
        if self.refusal and self.refusal != told:
            what = "drafts" if self.drafter is None else "the drafter"
            warnings.warn(f"decoding without {what}: {self.refusal}", stacklevel=4)
        return runner

    def _take_in(self, found: list[Any]) -> None:
        """Start anew with the model and the drafter as they are now, of these parts."""
        mx.eval([x for x in found if isinstance(x, mx.array)])  # what this thread left to be computed
        kinds = [(x.shape, x.dtype) if isinstance(x, mx.array) else type(x) for x in found]
        same = kinds == self._kinds  # only values differ: steps take as long, and drafts can be verified
        drafter: Any = self.drafter
        try:
            drafter, memory = _as_it_decodes(drafter)
            target = Target(self.model, drafter.config.context_layers if drafter else (), memory)
            if self.refusal or not same:
                _check_fit(self.drafter, target.embed)
                device = f"{backend.current().name} {backend.chip()} {self.ranks.place if self.ranks else ''}"
                target.check(device, getattr(self.ranks, "first_problem", str))
            elif self._runner is not None:
                target.trees, target.batches = self._runner.target.trees, self._runner.target.batches
            self._runner, self.refusal = Runner(target, drafter, compiled=backend.current().compiled), ""
        except ERRORS as error:  # mlx-lm's code may have changed
            self._runner, self.refusal = None, str(error).partition("\n")[0] or type(error).__name__
        if self.ranks is not None:
            self._runner, self.refusal = self.ranks.agree_on(self._runner, self.refusal)
        self._parts, self._kinds = found, kinds
        self._policies = self._policies if same else dict(self._given_policies)

    def check_prompts(self, prompts: Sequence[Sequence[int]], held: int = 0, name: str = "") -> None:
        """Raise ``ValueError`` for the first of the prompts' token ids that the model cannot read.

        Args:
            held: tokens before them, in a cache.
            name: of each of them, in messages; by default its number.
        """
        for number, prompt in enumerate(prompts, 1):
            what = name or f"prompt {number}"
            known, size = self.vocabulary, held + len(prompt)
            if bad := [token for token in prompt if token < 0 or (known is not None and token >= known)]:
                raise ValueError(
                    f"{what} has token {bad[0]}, but the model knows {known} tokens: use its own tokenizer."
                )
            if self.context_length is not None and size > self.context_length:
                raise ValueError(
                    f"{what} has {size} tokens, more than the model's context of {self.context_length}: "
                    "shorten it, or set --context-length."
                )

    def use_policy(self, policy: Chooser, lookup: int | None = None) -> None:
        """Let this policy choose draft shapes from now on."""
        self._given_policies[lookup] = self._policies[lookup] = policy

    def make_policy(self, lookup: int | None = None) -> Chooser:
        """What chooses draft shapes that copy at most ``lookup`` tokens, and remembers how drafts have fared.

        Made once, which may take the seconds in which step times are measured.
        """
        with self._lock:  # one thread alone measures
            self._prepared()
            if lookup not in self._policies:
                from .engine.step_times import make_policy

                there: Any = weakref.ref(self)  # which has the policy, and shall be gone with its last user
                self._policies[lookup] = make_policy(lambda: there()._prepared(), lookup)
            return self._policies[lookup]

    def engine(self, policy: Chooser, chunk: int = CHUNK, **options: Any) -> Engine:
        """An engine for the model as it is now; ``options`` are ``Engine``'s.

        Raises:
            ValueError: the model cannot verify drafts.
        """
        return engine_here(self._prepared(), policy, chunk, **options)

    def _prepared(self) -> Runner:
        if (runner := self.prepare()) is None:
            raise ValueError(self.refusal)
        return runner

    def __setattr__(self, name: str, value: Any) -> None:
        part = name != "model" and name in vars(self).get("model", ())  # of the mlx-lm model, as its head
        (setattr if part else object.__setattr__)(self.model if part else self, name, value)

    def __reduce__(self) -> Any:  # copies and pickles: locks and compiled steps are made anew
        return SpeculativeModel, (self.model, self.drafter, self.context_length)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # of an object that is just being copied
            raise AttributeError(name)
        return getattr(self.model, name)


def load(
    path_or_hf_repo: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    drafter: str | Path | None = "auto",
    dtype: str = "auto",
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    ranks: Any = None,
) -> tuple[SpeculativeModel, TokenizerWrapper]:
    """Load a model with its drafter, and the tokenizer: stands in for ``mlx_lm.load``.

    Args:
        path_or_hf_repo: a folder, a GGUF file or a Hugging Face repository; None is the default model.
        tokenizer_config: options of the tokenizer, such as ``{"eos_token": "</s>"}``.
        drafter: a folder, a shipped drafter's name or a Hugging Face repository; "auto" takes the one
            that ships for the model, or is found on this machine or on the hub, if any; None loads none.
        dtype: auto (float32 on a CPU, elsewhere as stored), stored, float32, float16 or bfloat16. A float
            type dequantizes a quantized model.
        model_config: entries that take the place of those in config.json.
        adapter_path: LoRA adapters to apply.
        revision: branch, tag or commit of the repository.
        trust_remote_code: let the tokenizer and the model run code of their repository.
        ranks: machines that all load it now, each a part of it.

    Raises:
        ValueError: something is missing, damaged, or does not fit; one line that says what.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not known: choose one of {', '.join(DTYPES)}.")
    name = str(DEFAULT_MODEL if path_or_hf_repo is None else path_or_hf_repo)
    if drafter is not None and drafter != "auto":
        drafter = drafter_folder(drafter)  # before the model, which takes longer
    folder = model_folder(name, revision)
    model, config = load_base(folder, trust_remote_code, check_values=False, model_config=model_config)
    context_length = _context_length(config, folder)
    tokenizer = load_tokenizer(
        folder,
        name=name,
        eos_token_ids=config.get("eos_token_id"),
        trust_remote_code=trust_remote_code,
        options=tokenizer_config,
    )
    if adapter_path is not None:
        from .loading.adapters import apply_adapters

        model = apply_adapters(model, adapter_path)
    _read_weights(model, folder) if ranks is None else ranks.split(model, folder, name, dtype)
    if (wanted := backend.current().dtype if dtype == "auto" else dtype) is not None:
        as_floats(model, wanted)
        weights: Any = tree_flatten(model.parameters())
        for _, weight in weights:
            mx.eval(weight)  # one at a time: dequantizing takes several times its memory
    _try_out(model, folder)
    loaded = drafter_for(model, name, drafter)
    speculative = SpeculativeModel(model, loaded, context_length)
    if ranks is not None:
        ranks.take(speculative, tokenizer)
    if loaded is not None and speculative.prepare() is None:
        if drafter == "auto" and find_drafter(identity_of(model)) is None:  # nobody asked for it
            speculative.prepare_or_tell()
            speculative.drafter = None
            speculative.prepare()
            return speculative, tokenizer
        remedy = "load it without one, as with --drafter none."
        raise ValueError(f"{speculative.refusal.removesuffix('.')}: {remedy}")
    return speculative, tokenizer


def _as_it_decodes(drafter: Any) -> tuple[Any, Any]:
    """A drafter as steps use it, and the same if it has a memory."""
    if isinstance(drafter, Drafter) and drafter.config.memory_heads:
        from .models.memory import MemoryDrafter

        return (with_memory := MemoryDrafter(drafter)), with_memory
    return FusedDrafter(drafter) if isinstance(drafter, Drafter) else drafter, None


def _check_fit(drafter: Drafter | None, embed: Any) -> None:
    rows, width = embed.weight.shape[0], embed(mx.array([0])).shape[-1]
    config = drafter.config if isinstance(drafter, Drafter) else None
    if config is not None and (config.vocab_size > rows or config.hidden_size != width):
        raise ValueError(
            f"the drafter is for hidden size {config.hidden_size} and vocabulary {config.vocab_size}, the "
            f"model has {width} and {rows}: set model.drafter to its own drafter, or to None."
        )


def _read_weights(model: nn.Module, folder: Path) -> None:
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error}): get the model again.") from error
    check_finite(folder, dict(tree_flatten(model.parameters())))


def _try_out(model: nn.Module, folder: Path) -> None:
    """Refuse a model that cannot run: its weights have the right shapes by now, its config may be wrong."""
    try:
        logits = model(mx.array([[0, 0]]), cache=make_prompt_cache(model))
        nan = bool(mx.isnan(logits).any().item())
    except LOAD_ERRORS as error:
        raise ValueError(
            f"{folder} cannot run ({error}): its config.json does not fit its weights."
        ) from error
    if nan:
        raise ValueError(f"{folder} computes NaN: its config.json is damaged, or it needs another --dtype.")


def drafter_for(model: nn.Module, name: str, drafter: str | Path | None) -> Drafter | None:
    """The drafter of a model of this name; ``ValueError`` if it is missing or does not fit."""
    if drafter is None:
        return None
    identity = identity_of(model, name)
    embedding: Any = token_embedding(model)
    dtype = embedding(mx.array([0])).dtype
    source = find_drafter(identity) if drafter == "auto" else drafter_folder(drafter)
    if source is not None:
        return load_drafter(source, identity, dtype)
    from .loading.search import search_drafter

    found = search_drafter(identity)
    try:
        return None if found is None else load_drafter(found, identity, dtype)
    except ValueError as error:  # nobody asked for it
        warnings.warn(f"decoding without the drafter that was found: {error}", stacklevel=1)
        return None


def _context_length(config: dict[str, Any], folder: Path) -> int | None:
    nested = config.get("text_config")
    stated = {key: value for key, value in config.items() if value is not None}
    config = {**(nested if isinstance(nested, dict) else {}), **stated}
    length = config.get("max_position_embeddings")
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(
            f"{folder}: max_position_embeddings is {length!r} in config.json: it must be a positive integer."
        )
    ropes = [rope for key in ("rope_scaling", "rope_parameters") if isinstance(rope := config.get(key), dict)]
    ropes += [entry for rope in ropes for entry in rope.values() if isinstance(entry, dict)]  # by layer type
    return length and max([length, *(_scaled_context(length, rope, config) for rope in ropes)])


def _scaled_context(length: int, rope: dict[str, Any], config: dict[str, Any]) -> int:
    """The context after rotary scaling, where ``length`` may be the one before."""
    key, factor, kind = "original_max_position_embeddings", rope.get("factor"), rope.get("type")
    original = rope.get(key) or config.get(key)
    unscaled = (kind or rope.get("rope_type")) in ("linear", "dynamic", "yarn")
    if original is None and unscaled and not str(config.get("model_type")).startswith("gemma3"):
        original = length
    if type(original) is int and isinstance(factor, int | float) and 1 <= factor < 1 << 20:
        return int(original * factor)
    return length
