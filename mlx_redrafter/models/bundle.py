"""The drafter on disk: a folder with ``config.json`` and ``model.safetensors``.

Tensor names are Apple's. A bundle that this package wrote has an ``mlx_redrafter`` section in its
config.json: which base model it belongs to, and which tensors nothing reads. A folder without that
section is a checkpoint in Apple's layout and loads too, in one file or sharded, under each of the
names in use. Every value is checked on the way in; weights are only ever read from safetensors.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map_with_path
from safetensors import SafetensorError, safe_open

from ..loading.files import atomic_folder
from .drafter import Drafter, DrafterConfig

MODEL_TYPE = "recurrent_drafting_drafter"
SECTION = "mlx_redrafter"  # of config.json
FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "drafters"
UNUSED = ("emb_norm.weight",)  # in Apple's checkpoints; nothing reads it
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ALIASES = {r"^lm_heads\.": "lm_head.", r"^0\.": "lm_head.", r"^input_projs\.": "input_proj."}

DIGEST_ROWS = 64
DIGEST_BITS = 4 * DIGEST_ROWS
SAME_MODEL = 0.2  # of the digest's bits may differ between two precisions of one model
EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings")


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model a drafter belongs to, whatever its precision.

    Args:
        model_type: the architecture, as in the base's config.json; told to people, not compared.
        hidden_size: H.
        vocab_size: V, the rows of the embedding.
        embedding_digest: 64 hexadecimal digits, see ``embedding_digest``.
        name: where the model came from; told to people, not compared.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    embedding_digest: str
    name: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(f"[0-9a-f]{{{DIGEST_BITS // 4}}}", str(self.embedding_digest)):
            raise ValueError(f"embedding_digest is {self.embedding_digest!r}: convert the drafter again.")

    def matches(self, other: "BaseIdentity") -> bool:
        """Whether both are the same model, in any precision."""
        same_sizes = (self.hidden_size, self.vocab_size) == (other.hidden_size, other.vocab_size)
        differing = (int(self.embedding_digest, 16) ^ int(other.embedding_digest, 16)).bit_count()
        return same_sizes and differing <= SAME_MODEL * DIGEST_BITS

    def __str__(self) -> str:
        return (
            f"{self.name or 'a model'} ({self.model_type}, hidden size {self.hidden_size}, "
            f"vocabulary {self.vocab_size}, embedding {self.embedding_digest[:8]})"
        )


def digest_rows(vocab_size: int) -> list[int]:
    """The 64 evenly spaced token ids whose embeddings identify a model."""
    return [row * vocab_size // DIGEST_ROWS for row in range(DIGEST_ROWS)]


def embedding_digest(rows: np.ndarray[Any, Any]) -> str:
    """A 256-bit sketch of an embedding that survives quantization: signs of random projections.

    The sign of a projection changes only where rounding turns a vector by more than its angle to a
    random plane, so few bits differ between precisions of one model and half of them between models.
    The mean row is taken out first, because the rows of one model share a direction.

    Args:
        rows: float [64, H], the embeddings of ``digest_rows``.
    Returns:
        64 hexadecimal digits.
    """
    rows = np.asarray(rows, np.float32)  # [64, H]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    rows = rows - rows.mean(axis=0)
    planes = np.random.RandomState(0).standard_normal((rows.shape[1], DIGEST_BITS // DIGEST_ROWS))  # [H, 4]
    return np.packbits(rows @ planes.astype(np.float32) > 0).tobytes().hex()


def identity_of(model: nn.Module, name: str = "") -> BaseIdentity:
    """The identity of an mlx-lm model, quantized or not.

    Raises:
        ValueError: it has no token embedding.
    """
    embedding = token_embedding(model)
    if embedding is None:
        raise ValueError(f"{name or type(model).__name__} has no token embedding: it cannot have a drafter.")
    vocab_size = embedding.weight.shape[0]
    rows = np.array(embedding(mx.array(digest_rows(vocab_size))).astype(mx.float32))  # [64, H]
    args = getattr(model, "args", None)
    model_type = getattr(model, "model_type", None) or getattr(args, "model_type", "?")
    return BaseIdentity(str(model_type), rows.shape[1], vocab_size, embedding_digest(rows), name)


def token_embedding(model: nn.Module) -> Any | None:
    """The token embedding of an mlx-lm model: one with a usual name, else the one with the most rows."""
    embeddings = [
        (path.rsplit(".", 1)[-1] in EMBEDDING_NAMES, module.weight.shape[0], module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    ]
    return max(embeddings, key=lambda found: found[:2])[-1] if embeddings else None


def write_drafter(
    folder: str | Path,
    config: DrafterConfig,
    weights: Mapping[str, mx.array],
    base: BaseIdentity | None = None,
    extra: Mapping[str, Any] | None = None,
    card: str = "",
) -> None:
    """Write a bundle; it appears whole or not at all.

    Args:
        folder: must not exist.
        weights: by name, as ``Drafter.weights`` gives them; tensors that nothing reads may be among them.
        base: the model it belongs to, if known.
        extra: further entries of the ``mlx_redrafter`` section.
        card: the text of README.md; none is written if empty.
    Raises:
        ValueError: a tensor is missing or has another shape, or ``folder`` exists.
        OSError: the disk is full or not writable.
    """
    unused = check_shapes(config, weights)
    section = {"format": FORMAT, "base": base and asdict(base), "unused_tensors": unused, **(extra or {})}
    raw = {"model_type": MODEL_TYPE, **config.to_dict(), SECTION: section}
    with atomic_folder(Path(folder)) as temporary:
        (temporary / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
        mx.save_safetensors(str(temporary / "model.safetensors"), dict(weights), {"format": "mlx"})
        if card:
            (temporary / "README.md").write_text(card, "utf-8", "replace")


def load_drafter(
    source: str | Path | None, target: BaseIdentity | None = None, dtype: mx.Dtype | None = None
) -> Drafter:
    """Load a drafter for a base model.

    Args:
        source: a folder, the name of a drafter that ships, a Hugging Face repository, or None for the
            drafter that ships for ``target``.
        target: the base model; None skips the comparison.
        dtype: of every float tensor in memory, the scales of quantized layers included; None keeps
            what is on disk. A drafter whose dtype is not the base model's slows it or breaks it.
    Raises:
        ValueError: the drafter cannot be found or is damaged, or belongs to another base model.
    """
    folder = resolve_drafter(source, target)
    raw = read_config(folder)
    config = parse_config(folder, raw)
    if target is not None:
        check_base(folder, config, base_of(raw), target)
    weights = read_weights(folder)
    unused = {*UNUSED, *raw.get(SECTION, {}).get("unused_tensors", [])}
    if unknown := sorted(set(check_shapes(config, weights, folder)) - unused):
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(f"{folder} holds tensors that no drafter of its config.json has: {names}.")
    weights = cast({name: weights[name] for name in config.shapes()}, dtype)
    check_values(folder, config, weights)
    drafter = Drafter(config, weights.pop("draft_to_target", None))
    drafter.load_weights(list(weights.items()))
    return drafter


def find_drafter(identity: BaseIdentity) -> Path | None:
    """The folder of the drafter that ships for this base model, if there is one."""
    for folder in shipped_drafters():
        base = base_of(read_config(folder))
        if base is not None and base.matches(identity):
            return folder
    return None


def shipped_drafters() -> list[Path]:
    """The folders of all drafters that ship with the package."""
    return sorted(path.parent for path in SHIPPED.glob("*/config.json"))


def resolve_drafter(source: str | Path | None, target: BaseIdentity | None = None) -> Path:
    """The local folder of a drafter, downloaded if need be; arguments and errors as ``load_drafter``."""
    if source is None:
        found = find_drafter(target) if target is not None else None
        if found is None:
            raise ValueError(f"no drafter ships for {target or 'this model'}: name one, or train one.")
        return found
    path = Path(os.path.expanduser(source))
    if path.is_file():
        refuse_pickles([path])
        raise ValueError(f"{path} is a file: name the folder that holds config.json and model.safetensors.")
    if path.is_dir():
        return path
    shipped = {folder.name: folder for folder in shipped_drafters()}
    return shipped[str(source)] if str(source) in shipped else download(str(source))


def download(
    repo: str, revision: str | None = None, patterns: tuple[str, ...] = ("*.json", "*.safetensors")
) -> Path:
    """The local snapshot of a Hugging Face repository, only the files that match ``patterns``.

    Raises:
        ValueError: there is no such repository, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith("."):
        raise ValueError(f"{repo} does not exist: name a folder or a Hugging Face repository (owner/name).")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"{repo} is no folder here, and cannot be downloaded from Hugging Face ({reason}): "
            "check the name, the network, the disk, and for private models `hf auth login`."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a drafter.

    Raises:
        ValueError: it is missing, is not a JSON object, or is not a drafter's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: name the folder of a drafter.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): fetch or convert the drafter again."
        ) from error
    found = raw.get("model_type") if isinstance(raw, dict) else None
    if found != MODEL_TYPE:
        raise ValueError(
            f"{path} has model_type {found!r}, not {MODEL_TYPE!r}: name the folder of a drafter."
        )
    section = raw.get(SECTION, {})
    known = isinstance(section, dict) and section.get("format", FORMAT) == FORMAT
    names = section.get("unused_tensors", []) if known else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is of a format that this version cannot read: update mlx-redrafter.")
    return dict(raw)


def base_of(raw: Mapping[str, Any]) -> BaseIdentity | None:
    """The base model that a drafter's parsed config.json records, if any.

    Raises:
        ValueError: the record is damaged.
    """
    base = raw.get(SECTION, {}).get("base")
    if base is None:
        return None
    try:
        return BaseIdentity(**base)
    except TypeError as error:
        raise ValueError(f"the drafter records a damaged base model ({error}): convert it again.") from error


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All tensors of a drafter under their canonical names, from one file or several; read lazily.

    Raises:
        ValueError: there are none, a file is damaged, or a tensor occurs twice.
    """
    weights: dict[str, mx.array] = {}
    for path in _weight_files(folder):
        for name, value in _read_safetensors(path).items():
            canonical = name
            for pattern, replacement in ALIASES.items():
                canonical = re.sub(pattern, replacement, canonical)
            if canonical in weights:
                raise ValueError(
                    f"{path} holds {name}, which is {canonical} a second time: keep one of them."
                )
            weights[canonical] = value
    return weights


def check_shapes(
    config: DrafterConfig, weights: Mapping[str, mx.array], where: object = "the drafter"
) -> list[str]:
    """Names of the tensors that nothing reads, after checking that all others fit the config.

    Raises:
        ValueError: a tensor is missing, or has another shape or type.
    """
    if config.num_draft_layers > len(weights):
        raise ValueError(f"{where} has {len(weights)} tensors, too few for {config.num_draft_layers} layers.")
    shapes = config.shapes()
    for name, expected in shapes.items():
        if name not in weights:
            raise ValueError(
                f"{where} lacks the tensor {name} {list(expected)}: it is damaged or config.json is wrong."
            )
        found = tuple(weights[name].shape)
        if found != expected:
            raise ValueError(
                f"{where}: the tensor {name} has shape {list(found)}, but its config.json asks for "
                f"{list(expected)}: fetch or convert it again."
            )
        allowed = [mx.int32] if name == "draft_to_target" else [mx.float32, mx.float16, mx.bfloat16]
        if f"{name.removesuffix('weight')}scales" in shapes:
            allowed = [mx.uint32]
        if (dtype := weights[name].dtype) not in allowed:
            types = " or ".join(map(_dtype_name, allowed))
            raise ValueError(f"{where}: the tensor {name} is {_dtype_name(dtype)}, not {types}: convert it.")
    return sorted(set(weights) - set(shapes))


def refuse_pickles(paths: list[Path]) -> None:
    """Raise ``ValueError`` if one of the files is of a kind that can run code when it is read."""
    for path in paths:
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run code when opened: save the drafter as safetensors where "
                "it was trained (safetensors.torch.save_file(drafter.state_dict(), 'model.safetensors'))."
            )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in _shards(index)]
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickles(sorted(folder.iterdir()))
        raise ValueError(f"{folder} has no model.safetensors: fetch or convert the drafter again.")
    return files


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: fetch the drafter again.") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is not a safetensors file beside it.")
    return names


def _read_safetensors(path: Path) -> dict[str, mx.array]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: fetch or convert the drafter again.")
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the size of the file
            return dict(mx.load(str(path)))  # type: ignore[arg-type]
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch or convert the drafter again.") from error


def check_base(folder: Path, config: DrafterConfig, base: BaseIdentity | None, target: BaseIdentity) -> None:
    """Raise ``ValueError`` if a drafter is not for ``target``; only sizes count if it records no base."""
    if (config.hidden_size, config.vocab_size) != (target.hidden_size, target.vocab_size):
        found = base or f"hidden size {config.hidden_size} and vocabulary {config.vocab_size}"
    elif base is not None and not base.matches(target):
        found = base
    else:
        return
    raise ValueError(f"the drafter {folder} is for {found}, not for {target}: use the drafter of this model.")


def parse_config(folder: Path, raw: Mapping[str, Any]) -> DrafterConfig:
    """The sizes in a parsed config.json; ``ValueError`` names the file."""
    try:
        return DrafterConfig.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def cast(weights: Any, dtype: mx.Dtype | None, allowed: Callable[[str], bool] = lambda _: True) -> Any:
    """A tree of arrays, floats of ``allowed`` paths in ``dtype``; integers and packed weights as they are."""

    def one(path: str, x: mx.array) -> mx.array:
        return x.astype(dtype) if dtype and allowed(path) and mx.issubdtype(x.dtype, mx.floating) else x

    return tree_map_with_path(one, weights)


def check_values(folder: Path, config: DrafterConfig, weights: Mapping[str, mx.array]) -> None:
    """Raise ``ValueError`` if a weight is not finite or ``draft_to_target`` is not a set of token ids."""
    finite = {
        name: mx.isfinite(value).all()
        for name, value in weights.items()
        if mx.issubdtype(value.dtype, mx.floating)
    }
    mx.eval(list(weights.values()), finite)
    for name, fine in finite.items():
        if not fine.item():
            dtype = _dtype_name(weights[name].dtype)
            raise ValueError(
                f"{folder}: the tensor {name} holds NaN or infinity in {dtype}: train or convert it again."
            )
    if "draft_to_target" in weights:
        ids = np.array(weights["draft_to_target"])  # [Vd]
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ValueError(
                f"{folder}: draft_to_target names ids outside 0…{config.vocab_size - 1}: convert it again."
            )
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{folder}: draft_to_target names an id twice: convert it again.")


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
