"""What models are on this machine: in Hugging Face's cache, LM Studio's folders, and any others.

Only configs and headers are read, and nothing in them is trusted: a damaged model is listed, with the reason.
"""

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import safe_open

from ..models.bundle import MODEL_TYPE
from .base import find_shards, has_module
from .read import first_line, gguf_parts, read_object
from .search import LM_STUDIO, downloads

LEVELS = 2  # of folders below one of models: PUBLISHER/NAME
LARGEST = 1 << 26  # bytes of a JSON file
Facts = dict[str, Any]  # fields of an Entry
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names of what is usual
TASKS = ("CausalLM", "ConditionalGeneration", "LMHeadModel")  # end the names of language models' classes


@dataclass(frozen=True)
class Entry:
    """A model, or a drafter, on this machine.

    Attributes:
        name: ``publisher/name``, or the path below the folder of models that it was found in.
        path: the folder that holds config.json, or the GGUF file, of a split one the first.
        format: safetensors or gguf.
        bytes: of the weights.
        architecture: config.json's model_type, or the GGUF's general.architecture.
        precision: as in 4-bit, Q4_K_M, bfloat16.
        parameters: how many the headers tell of; 0 if they cannot be read.
        supported: there is code for this architecture.
        is_drafter: it is not a model but a drafter, of this package's or Apple's.
        problem: why it cannot be read; empty if it can.
    """

    name: str
    path: Path
    format: str
    bytes: int
    architecture: str = ""
    precision: str = ""
    parameters: int = 0
    supported: bool = False
    is_drafter: bool = False
    problem: str = ""


def library(folders: Sequence[Path] = ()) -> list[Entry]:
    """The models and drafters in ``folders``, in Hugging Face's cache and in LM Studio's folders, by name.

    Drafters that were found by themselves are among them.
    Of each of ``folders`` these are itself, its subfolders down to two levels, and the GGUF files in them.
    """
    places = [(root, "", LEVELS) for root in folders]
    places += [(folder, repo, 1) for repo, folder in _snapshots()]
    places += [(Path(os.path.expanduser(root)), "", LEVELS) for root in LM_STUDIO]
    with suppress(OSError):  # nothing says where the cache is
        places.append((downloads(), "", LEVELS))
    entries: dict[str, Entry] = {}  # by where their weights are
    for root, name, levels in places:
        for entry in _below(root, name, levels):
            entries.setdefault(os.path.realpath(entry.path), entry)
    return sorted(entries.values(), key=lambda entry: (entry.name.casefold(), entry.name))


def find(name: str, folders: Sequence[Path] = ()) -> Entry | None:
    """The entry of this name or, if it is one model's only, of this last part of a name.

    Upper and lower case count only where both are there, and ".gguf" may be left out. Of several models of
    one name, one in ``folders`` is taken. None: there is no such model, or it is not clear which is meant.
    """
    entries = [entry for entry in library(folders) if not entry.is_drafter]
    for same in (str, str.casefold):
        for first in (0, -1):  # part of a name from which on it has to be given
            found = [
                entry
                for entry in entries
                if same("/".join(entry.name.split("/")[first:])).removesuffix(".gguf")
                == same(name).removesuffix(".gguf")
            ]
            if found:
                return found[0] if len({entry.name for entry in found}) == 1 else None
    return None


def _snapshots() -> Iterator[tuple[str, Path]]:
    """Repositories in Hugging Face's cache and their folders: of the branch main, else the newest."""
    try:
        cache = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE)
    except (huggingface_hub.errors.CacheNotFound, OSError, ValueError):
        return
    for repo in cache.repos:
        if repo.repo_type == "model" and repo.revisions:
            newest = max(repo.revisions, key=lambda each: ("main" in each.refs, each.last_modified))
            yield repo.repo_id, newest.snapshot_path


def _below(folder: Path, name: str, levels: int) -> Iterator[Entry]:
    """Entries in a folder and in its subfolders, ``name`` being its own."""
    try:
        files = sorted(folder.iterdir())
        whole = (folder / "config.json").is_file()
    except (OSError, ValueError):  # it is missing, or may not be read
        return
    weights = [path for path in files if path.suffix == ".safetensors" and path.is_file()]
    if whole and weights:
        yield from _entry(name or folder.resolve().name, folder, "safetensors", weights)
    ggufs = [path for path in files if path.suffix.lower() == ".gguf" and path.is_file() and _is_first(path)]
    ggufs = [path for path in ggufs if not path.name.lower().startswith("mmproj")]  # which reads images
    for path in ggufs:
        file = re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", path.name, flags=re.IGNORECASE)
        own_name = f"{name}/{file}" if name else file
        parts = [part for part in gguf_parts(path) if part.is_file()]
        yield from _entry(name if name and ggufs == [path] and not whole else own_name, path, "gguf", parts)
    for path in () if whole or not levels else files:
        if not path.name.startswith(".") and path.is_dir():
            yield from _below(path, f"{name}/{path.name}" if name else path.name, levels - 1)


def _is_first(path: Path) -> bool:
    """Whether a GGUF file is not another part of one that is listed already."""
    return next((part for part in gguf_parts(path) if part.is_file()), path) == path


def _entry(name: str, path: Path, format: str, weights: Sequence[Path]) -> Iterator[Entry]:
    """The entry of a folder or of a GGUF file, if it is a language model's or a drafter's."""
    size, facts = 0, _folder_facts if format == "safetensors" else _gguf_facts
    try:
        known = [file.stat() for file in (*weights, *sorted(path.glob("*.json")))]
        size = sum(stat.st_size for stat in known[: len(weights)])
        told = _cached(facts, path, tuple((stat.st_mtime_ns, stat.st_size) for stat in known))
    except Exception as error:  # whatever else damaged files may cause
        told = {"problem": first_line(error, 1000)}
    if told is not None:
        yield Entry(name, path, format, size, **told)


@functools.lru_cache(1024)
def _cached(facts: Callable[[Path], Facts | None], path: Path, changed: object) -> Facts | None:
    return facts(path)


def _folder_facts(folder: Path) -> Facts | None:
    """What config.json and the headers of safetensors tell; None if this is no language model."""
    for path in folder.glob("*.json"):
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} is larger than {LARGEST >> 20} MiB")
    config = read_object(folder / "config.json")
    model_type, classes = config.get("model_type"), config.get("architectures")
    is_drafter, supported = model_type == MODEL_TYPE, has_module(str(model_type))
    speaks = isinstance(classes, list) and str(next(iter(classes), "")).endswith(TASKS)
    if not isinstance(model_type, str) or not (is_drafter or supported or speaks):
        return None
    told: Facts = {"architecture": model_type[:100], "supported": supported, "is_drafter": is_drafter}
    try:
        shards = sorted(folder.glob("*.safetensors")) if is_drafter else find_shards(folder)[0]
        tensors = {name: tensor for shard in shards for name, tensor in _tensors(shard).items()}
        return told | _sizes(config, tensors)
    except Exception as error:
        return told | {"problem": first_line(error, 1000)}


def _tensors(shard: Path) -> dict[str, tuple[str, list[int]]]:
    """The types and shapes of a file's tensors; an error if it is not whole."""
    with safe_open(shard, "numpy") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}


def _sizes(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int]]]) -> Facts:
    """The number of parameters, those that are quantized counted as before, and the precision."""
    how = config.get("quantization") or config.get("quantization_config")
    how = how if isinstance(how, dict) else {}
    counts: Counter[str] = Counter()
    for name, (dtype, shape) in tensors.items():
        module, _, part = name.rpartition(".")
        quantized = f"{module}.scales" in tensors
        if quantized and part == "scales":
            own = how.get(module)
            group = (own if isinstance(own, dict) else how).get("group_size", 64)
            counts["quantized"] += math.prod(shape) * (group if isinstance(group, int) else 64)
        elif not quantized or part not in ("weight", "biases"):
            counts[DTYPES.get(dtype, dtype)] += math.prod(shape)
    bits, method = how.get("bits"), how.get("mode", how.get("quant_method"))
    named = method if isinstance(method, str) and method != "affine" else ""
    precision = named or (f"{bits}-bit" if isinstance(bits, int) else "")
    usual = max(counts, key=lambda dtype: counts[dtype], default="")
    return {"parameters": counts.total(), "precision": precision[:20] or usual}


def _gguf_facts(path: Path) -> Facts | None:
    """What a GGUF file's header tells; None if this is no language model."""
    from gguf import LlamaFileType

    from .gguf.architectures import architecture_of
    from .gguf.reader import skim_gguf

    file = skim_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))[:100]
    if architecture == "clip" or file.metadata.get("general.type", "model") != "model":
        return None  # it reads images, or is an adapter
    bytes_of: Counter[str] = Counter()
    for tensor in file.tensors.values():
        bytes_of[tensor.type.name] += tensor.rows.nbytes
    precision = max(bytes_of, key=lambda kind: bytes_of[kind], default="")
    with suppress(KeyError, ValueError, TypeError):  # a type of later versions
        precision = LlamaFileType(file.metadata["general.file_type"]).name
    supported = True
    try:
        architecture_of(file)
    except ValueError:
        supported = False
    return {
        "architecture": architecture,
        "precision": precision.removeprefix("MOSTLY_").removeprefix("ALL_"),
        "parameters": sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        "supported": supported,
    }
