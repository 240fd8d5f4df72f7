"""Repositories on Hugging Face's hub, downloaded into its cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from .base import check_weight_format
from .read import first_line, gguf_parts

MODEL_FILES = (
    "*.json", "model*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"
)  # fmt: skip
DRAFTER_FILES = ("*.json", "*.safetensors")


def download_model(repo: str, revision: str | None = None) -> Path:
    """The local snapshot of a model, or of the one GGUF that a repository has instead.

    Raises:
        ValueError: as ``download``, or there are no weights in either form, or several GGUF models.
    """
    folder = download(repo, revision, MODEL_FILES)
    if any(path.suffix in (".safetensors", ".gguf") for path in folder.iterdir()):
        return folder
    with _telling(repo):
        files = huggingface_hub.list_repo_files(repo, revision=revision)
    ggufs = [file for file in files if file.lower().endswith(".gguf")]
    if not ggufs or ggufs != [str(part) for part in gguf_parts(Path(ggufs[0]))]:
        check_weight_format(repo, files)
    return download(repo, revision, ggufs)


def download(repo: str, revision: str | None = None, patterns: Sequence[str] = DRAFTER_FILES) -> Path:
    """The local snapshot of a Hugging Face repository, only the files that match ``patterns``.

    Raises:
        ValueError: there is no such repository, or it cannot be reached.
    """
    with _telling(repo):
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _telling(repo: str) -> Iterator[None]:
    """Say in one line why a repository cannot be reached."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{repo} is neither a folder nor a repository that can be downloaded ({first_line(error)}): "
            "check the name, the network, the disk, and for private ones `hf auth login`."
        ) from error
