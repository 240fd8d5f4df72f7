"""Repositories on Hugging Face's hub, downloaded into its cache."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from .base import check_weight_format
from .files import shell_word
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


def check_repository(repo: str) -> None:
    """Raise ``ValueError`` if this cannot be a repository's name."""
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo):
        raise ValueError(f"{repo!r} is not the name of a Hugging Face repository: use owner/name.")


def check_upload(repo: str) -> None:
    """Raise ``ValueError`` if the user could not upload there: before hours of work, not after them."""
    check_repository(repo)
    remedy = "`hf auth login` with a token that may write, or leave --upload-repo out and `hf upload` later."
    try:
        user = huggingface_hub.HfApi().whoami()
        names = {user["name"], *(each["name"] for each in user.get("orgs", []))}
        role = user.get("auth", {}).get("accessToken", {}).get("role")
    except Exception as error:  # whatever the library's HTTP client raises, and whatever is answered
        raise ValueError(
            f"--upload-repo {repo}: Hugging Face does not say who you are ({first_line(error)}): {remedy}"
        ) from error
    owner = repo.rpartition("/")[0]
    if role == "read" or (owner and owner not in names):
        may = f"{user['name']} may only read" if role == "read" else f"{user['name']} is not {owner}"
        raise ValueError(f"--upload-repo {repo}: {may}: {remedy}")


def upload(folder: str | Path, repo: str, made: str) -> None:
    """Upload a folder to a Hugging Face repository, which is created if need be.

    Args:
        made: what was done to make the folder, for the message.
    Raises:
        ValueError: it failed; the folder stays.
    """
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder))
    except Exception as error:  # whatever the library's HTTP client raises
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"{folder} is {made}, but uploading it to {repo} failed ({reason}): "
            f"log in with `hf auth login`, then `hf upload {repo} {shell_word(folder)}`."
        ) from error
