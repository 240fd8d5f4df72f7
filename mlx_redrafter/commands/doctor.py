"""``mlx-redrafter doctor``."""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from packaging.requirements import Requirement

from ..blas import load_blas, packaged
from ..engine import backend
from ..loading.base import as_floats, load_base
from ..loading.cache import cache_folder
from ..loading.files import check_writable
from ..loading.find import PACKAGED, find_model
from ..loading.fit import KnownDrafter, drafter_of, known_drafter, known_drafters
from ..loading.library import find, library
from ..loading.tokenizer import load_tokenizer
from ..model import drafter_for
from ..models.identity import token_embedding
from ..models.target import Target
from .arguments import colours, harmless

OURS = "mlx-redrafter"
PATIENCE = 5.0  # seconds for the hub to answer
LITTLE = 5e9  # bytes of disk space
COLOURS = {"ok": 32, "warn": 33, "fail": 31}


@dataclass(frozen=True)
class Finding:
    """What a check found: ``state`` is ok, warn or fail; ``remedy`` says what to do unless it is ok."""

    check: str
    state: str
    text: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("model", nargs="?", help="a model to check too: folder, GGUF file, or name in `mlx-redrafter models`")
    add("--drafter", help="that is to fit the model: folder, shipped name, or name in the same list")
    add("--model-dir", action="append", type=Path, default=[], help="folder of models; may be given again")
    add("--json", action="store_true", help="print JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    """Check everything, and return 1 if something fails."""
    if args.drafter and not args.model:
        raise ValueError("--drafter needs the model that it is for: name that first.")
    checks: list[Check] = [versions, device, blas, hub, disks, extras]
    if args.model:
        model = Model(args.model, args.model_dir)
        fits = partial(drafter, model, args.drafter)
        checks += [partial(each, model) for each in (files, tokenizer, drafts)] + [fits]
        checks += [partial(memory, model)]
    found = []
    for check in checks:
        for finding in findings(check):
            found.append(finding)
            if not args.json:
                print(line(finding), flush=True)
    failed = any(finding.state == "fail" for finding in found)
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=1))
    return int(failed)


def findings(check: Check) -> Iterator[Finding]:
    """What a check finds; that it fails itself is a finding too."""
    name = getattr(check, "func", check).__name__  # type: ignore[attr-defined]
    try:
        yield from check()
    except Unknown:
        return
    except (ValueError, OSError) as error:
        yield of_error(name, error)
    except Exception as error:
        yield Finding(
            name, "fail", f"{type(error).__name__}: {error}", "report this: the check itself fails."
        )


def of_error(check: str, error: Exception) -> Finding:
    """A finding of an error, which usually says after its last colon what to do."""
    text, _, remedy = " ".join(str(error).split()).rpartition(": ")
    return Finding(check, "fail", text or remedy, remedy if text else "check the names that were given.")


def line(finding: Finding) -> str:
    """For people."""
    state = f"{finding.state:4}"
    state = f"\033[{COLOURS[finding.state]}m{state}\033[0m" if colours() else state
    remedy = f"\n      -> {finding.remedy}" if finding.remedy else ""
    return f"{state}  {finding.check}: {harmless(finding.text)}{harmless(remedy)}"


# --- The installation --------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Of Python and of the packages that count, against what this package asks for."""
    yield Finding("python", "ok", f"{platform.python_version()} ({platform.platform()})")
    if sys.platform == "darwin" and platform.machine() != "arm64":
        remedy = "install one for arm64, such as uv's or Homebrew's."
        yield Finding("python", "fail", "this Python is for Intel, and MLX needs Apple Silicon", remedy)
    for name in (OURS, "mlx", "mlx-lm", "numpy", "transformers"):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "fail", "not installed", f"pip install {name}")
            continue
        asked = [each for each in _requirements(OURS) if each.name == name]
        wanted = [str(each.specifier) for each in asked if not _is_met(each)]
        if wanted:
            yield Finding(name, "fail", f"{found}, not {wanted[0]}", f"pip install '{name}{wanted[0]}'")
        else:
            yield Finding(name, "ok", found)


def device() -> Iterator[Finding]:
    """What MLX computes on, and its memory."""
    known: dict[str, Any] = mx.device_info()
    here = backend.current()
    text = f"{backend.chip()} ({here.name}), {backend.free_memory() / 1e9:.1f} GB for models"
    if here.name == "cpu" and sys.platform == "darwin":
        remedy = "leave MLX_DEFAULT_DEVICE alone, and run on Apple Silicon outside of a virtual machine."
        yield Finding("device", "warn", f"{text}: MLX does not use the GPU", remedy)
        return
    mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
    yield Finding("device", "ok", text)
    if wired := known.get("max_recommended_working_set_size"):
        physical = int(known.get("memory_size") or 0)
        yield Finding("wired memory", "ok", f"{int(wired) / 1e9:.1f} of {physical / 1e9:.1f} GB at most")


def blas() -> Iterator[Finding]:
    """What multiplies matrices on a CPU."""
    if backend.current().name != "cpu" or sys.platform == "darwin":
        yield Finding("BLAS", "ok", "MLX's own")
    elif path := load_blas():
        yield Finding("BLAS", "ok", path)
    else:
        remedy = "pip install cmeel-openblas, and let MLX_REDRAFTER_BLAS name no other."
        yield Finding("BLAS", "warn", "MLX's reference BLAS, which is about ten times slower", remedy)


def hub() -> Iterator[Finding]:
    """Whether models can be downloaded."""
    endpoint = huggingface_hub.constants.ENDPOINT
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        yield Finding("hub", "ok", "not asked, because HF_HUB_OFFLINE is set")
        return
    if not endpoint.startswith(("https://", "http://")):
        remedy = "let HF_ENDPOINT begin with https://"
        yield Finding("hub", "fail", f"{endpoint} is no address", remedy)
        return
    try:
        request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": OURS})
        urllib.request.urlopen(request, timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # it has answered
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        remedy = "check network, proxy and HF_ENDPOINT; models that are here work with HF_HUB_OFFLINE=1."
        yield Finding("hub", "warn", f"{endpoint} does not answer ({reason})", remedy)
        return
    yield Finding("hub", "ok", f"{endpoint} answers")


def disks() -> Iterator[Finding]:
    """Where models and what is made of them are kept."""
    hub_folder = Path(huggingface_hub.constants.HF_HUB_CACHE)
    for variable, path in {"MLX_REDRAFTER_CACHE": cache_folder(), "HF_HUB_CACHE": hub_folder}.items():
        remedy = f"make room, or let {variable} name another folder."
        try:
            check_writable(path / "models")
        except ValueError as error:
            yield Finding(f"disk of {path}", "fail", str(error).rpartition(": ")[0], remedy)
            continue
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        free = shutil.disk_usage(there).free
        state = "ok" if free > LITTLE else "warn"
        yield Finding(f"disk of {path}", state, f"{free / 1e9:.1f} GB free", "" if state == "ok" else remedy)


def extras() -> Iterator[Finding]:
    """What is not needed, and good to have."""
    needed = {str(requirement) for requirement in _requirements(OURS)}
    for name in metadata.metadata(OURS).get_all("Provides-Extra") or []:
        more = [each for each in _requirements(OURS, name) if str(each) not in needed]
        missing = [str(Requirement(str(each).partition(";")[0])) for each in more if not _is_met(each)]
        if more:
            text = f"lacks {', '.join(missing)} (pip install '{OURS}[{name}]')" if missing else "installed"
            yield Finding(f"extra {name}", "ok", text)


def _requirements(package: str, extra: str = "") -> list[Requirement]:
    """What a package asks for on this machine; with an extra, what that asks for too."""
    asked = [Requirement(text) for text in metadata.requires(package) or []]
    return [each for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})]


def _is_met(wanted: Requirement) -> bool:
    try:
        fits = wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
        parts = [each for extra in wanted.extras for each in _requirements(wanted.name, extra)]
        return fits and all(map(_is_met, parts))
    except metadata.PackageNotFoundError:
        return False


# --- A model -----------------------------------------------------------------------------------------


class Unknown(Exception):
    """What a check needs has failed, which another one tells."""


class Model:
    """A model on this machine; its parts are made when they are first asked for, or ``Unknown``."""

    def __init__(self, name: str, folders: list[Path]) -> None:
        self.name, self.folders = name, folders

    @cached_property
    def path(self) -> Path:
        """Its folder, or its GGUF file; ``ValueError`` if it is not on this machine."""
        path = Path(os.path.expanduser(self.name))
        if path.exists() or path.suffix.lower() == ".gguf":
            return find_model(self.name)
        if (entry := find(self.name, self.folders)) is not None:
            return entry.path
        if self.name in PACKAGED and (packed := packaged(*PACKAGED[self.name])):
            return Path(packed[0])
        raise ValueError(
            f"{self.name} is neither a path nor the name of one model here: take a name that `{OURS} models` "
            f"lists, or let `{OURS} generate --model` download it."
        )

    @cached_property
    def loaded(self) -> tuple[nn.Module, dict[str, Any]]:
        """The lazy mlx-lm model and its config; of a GGUF file, ``Unknown``."""
        if self.path.is_file():
            raise Unknown
        return load_base(self.path, check_values=False)

    @cached_property
    def gguf(self) -> Any:
        """The content of a GGUF file."""
        from ..loading.gguf import read_gguf

        return read_gguf(self.path)

    def known(self, part: str) -> Any:
        """A part; ``Unknown`` if it cannot be made."""
        try:
            return getattr(self, part)
        except Unknown:
            raise
        except Exception as error:
            raise Unknown from error


def files(model: Model) -> Iterator[Finding]:
    """Whether the model is here, and whole."""
    path = model.path
    yield Finding("model", "ok", str(path))
    if path.is_dir():
        _, config = model.loaded
        yield Finding("files", "ok", f"whole, as far as headers tell; mlx-lm has {config.get('model_type')}")
        return
    from ..loading.gguf.architectures import architecture_of

    text = f"whole, as far as headers tell; {architecture_of(model.gguf).model_type} once it is converted"
    yield Finding("files", "ok", text)


def tokenizer(model: Model) -> Iterator[Finding]:
    """Whether the tokenizer loads, fits, and can write a conversation down."""
    path: Path = model.known("path")
    if path.is_dir():
        base, config = model.known("loaded")
        found = load_tokenizer(path, name=model.name, eos_token_ids=config.get("eos_token_id"))
        embedding: Any = token_embedding(base)
        size = embedding and embedding.weight.shape[0]
        yield from _fitting(found, size)
        return
    from ..loading.build_tokenizers import gguf_ends, write_gguf_tokenizer

    file = model.known("gguf")
    with tempfile.TemporaryDirectory() as folder:
        write_gguf_tokenizer(file.metadata, Path(folder), 1024, path.name)
        found = load_tokenizer(Path(folder), eos_token_ids=gguf_ends(file.metadata))
    tensor = file.tensors.get("token_embd.weight")
    yield from _fitting(found, tensor and tensor.shape[0])


def _fitting(tokenizer: TokenizerWrapper, size: int | None) -> Iterator[Finding]:
    largest = max(tokenizer.get_vocab().values())
    if size is not None and largest >= size:
        text = f"it has token {largest}, but the model knows {size} tokens"
        yield Finding("tokenizer", "fail", text, "get the tokenizer of this very model.")
    elif not tokenizer.eos_token_ids:
        remedy = "give texts an end with --extra-eos-token, --stop or --max-tokens."
        yield Finding("tokenizer", "warn", "it names no token that ends a text", remedy)
    else:
        yield Finding("tokenizer", "ok", f"{len(tokenizer)} tokens of the model's {size or '?'}")
    if not tokenizer.has_chat_template:
        yield Finding("chat template", "ok", "none: prompts are given to the model as they are")
        return
    try:
        ask = [{"role": "user", "content": "Hello"}]
        text = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs
        remedy = "get its chat_template.jinja anew, or use --ignore-chat-template."
        yield Finding("chat template", "fail", f"it cannot be used ({error})", remedy)
        return
    yield Finding("chat template", "ok", f"renders {len(str(text))} characters")


def drafts(model: Model) -> Iterator[Finding]:
    """Whether drafts can be verified, as far as is known without reading weights."""
    base, _ = model.known("loaded")
    try:
        kind = "trees" if Target(base).trees else "chains"
    except ValueError as error:
        remedy = "nothing: it works, at plain speed. Another model may be drafted for."
        yield Finding("drafts", "warn", f"it is decoded plainly ({error})", remedy)
        return
    yield Finding("drafts", "ok", f"{kind} of drafted tokens")


def drafter(model: Model, name: str | None) -> Iterator[Finding]:
    """Whether the named drafter is for the model; which is, if none is named."""
    path: Path = model.known("path")
    base = model.known("loaded")[0] if path.is_dir() else None
    drafters = known_drafters(library(model.folders))
    if name is not None:
        drafters = [each for each in drafters if each.name == name] or [_named(name)]
        if base is not None:
            drafter_for(base, model.name, drafters[0].folder)  # reads all of it
    if found := drafter_of(path if base is None else base, drafters):
        yield Finding("drafter", "ok", f"{found.name} is for this model")
    elif name is not None:
        remedy = f"leave --drafter out, or train one with `{OURS} train`."
        yield Finding("drafter", "fail", f"{name} is not for this model", remedy)
    else:
        yield Finding("drafter", "ok", "none is here; tokens are drafted by copying from the text")


def _named(name: str) -> KnownDrafter:
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        raise ValueError(
            f"{name} is neither a folder nor a drafter here: take one that `{OURS} models --json` lists."
        )
    return known_drafter(name, folder)


def memory(model: Model) -> Iterator[Finding]:
    """Whether the weights leave room for texts."""
    weights, room = _weights(model), backend.free_memory()
    text = f"{weights / 1e9:.1f} GB of weights, and {room / 1e9:.1f} GB for models"
    if weights > room:
        remedy = f"take one of fewer bits (`{OURS} convert --quantize`) or of fewer parameters."
        size = int(mx.device_info().get("memory_size") or 0)
        if backend.current().name == "metal" and weights < 0.8 * size:
            remedy += f" `sudo sysctl iogpu.wired_limit_mb={int(0.9 * size) >> 20}` lets the GPU have more."
        yield Finding("memory", "fail", text, remedy)
    elif weights > 0.9 * room:
        remedy = "close other programs, and keep texts short (--max-kv-size, --kv-bits)."
        yield Finding("memory", "warn", text, remedy)
    else:
        yield Finding("memory", "ok", text)


def _weights(model: Model) -> int:
    """Bytes of a model's weights, as they are used here."""
    dtype = backend.current().dtype
    if model.known("path").is_file():
        tensors = model.known("gguf").tensors.values()
        return sum(4 * math.prod(each.shape) if dtype else each.rows.nbytes for each in tensors)
    base, _ = model.known("loaded")
    as_floats(base, dtype)
    weights: Any = tree_flatten(base.parameters())
    return sum(weight.nbytes for _, weight in weights)
