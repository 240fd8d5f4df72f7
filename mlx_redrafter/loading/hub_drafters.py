"""Drafters on Hugging Face's hub: found by the model that they are for.

Nothing that a server says is trusted, and none may hold up a generation. A search has a second. A download
goes on for longer only as long as bytes come in, and starts only when a config.json says that the drafter is
for this model; its size is known from there too.
"""

import io
import itertools
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.utils import get_session, tqdm  # type: ignore[attr-defined]

from ..models.bundle import MODEL_TYPE, base_of, load_drafter, parse_config
from ..models.identity import DIGEST_TAG, DIGITS, TAG, BaseIdentity
from .cache import LARGEST
from .files import atomic_folder
from .read import first_line

MOMENT = 1.0  # seconds that a search may take, and that a download may stand still
LEAST_RATE = 256 << 10  # bytes per second of a download
LARGEST_DRAFTER = 1 << 29  # bytes of one that is downloaded unasked
MOST_LAYERS = 64
LISTED, READ = 20, 5  # drafters that are listed, and whose config.json is read
PUBLISHED = 500  # drafters that are listed where no config.json is read
REDIRECTS = 4
SIZES_TAG = r"redrafter-(\d{1,9})x(\d{1,9})"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Candidate:
    """A repository whose drafter is for the model: commit, config.json, bytes that its weights may have."""

    repo: str
    revision: str
    config: bytes
    size: int


class Patience:
    """Until when a server is waited for."""

    def __init__(self) -> None:
        self.until = time.monotonic() + MOMENT

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def earn(self, count: int) -> None:
        """Wait longer, since so many bytes came; never for more than a moment from now on."""
        self.until = min(self.until + count / LEAST_RATE, time.monotonic() + MOMENT)

    def check(self) -> None:
        if self.left <= 0:
            raise TimeoutError("it is too slow")


def hub_drafter(identity: BaseIdentity, kept: Path) -> tuple[Path | None, bool]:
    """The folder of a drafter on the hub for this base model, downloaded, if there is one and all went well.

    Whatever goes wrong, it takes a second at most.

    Args:
        kept: the folder in which it gets a folder, ``OWNER/NAME``.
    Returns:
        It, and whether the hub did answer whether there is one.
    """
    found = None
    try:
        patience = Patience()
        found = _waiting(patience, lambda: _search(identity, patience))
        return None if found is None else _download(found, identity, kept / found.repo), True
    except Exception as error:  # of a client, a server, the disk
        if found is not None:
            what = f"{found.repo} has a drafter for this model, but it cannot be used"
            warnings.warn(f"{what} ({first_line(error)}): try --drafter {found.repo}.", stacklevel=1)
        return None, False


def published() -> list[tuple[str, BaseIdentity]]:
    """Drafters on the hub, the most downloaded first, each with the model that its tags say it is for.

    It takes a second at most; there are none where the hub does not answer.
    """
    patience = Patience()
    with suppress(Exception):  # of a client, a server
        return _waiting(patience, lambda: [*_tagged(patience)])
    return []


def _tagged(patience: Patience) -> Iterator[tuple[str, BaseIdentity]]:
    for repo, tags in _repositories(patience, PUBLISHED):
        words = " ".join(map(str, tags or []))
        digest, sizes = (
            re.search(rf"(?:^| ){tag}(?: |$)", words) for tag in (f"{DIGEST_TAG}({DIGITS})", SIZES_TAG)
        )
        if digest and sizes:
            yield repo, BaseIdentity("", int(sizes[1]), int(sizes[2]), digest[1])


def _waiting(patience: Patience, task: Callable[[], Result]) -> Result:
    """What ``task`` returns or raises; ``TimeoutError`` once patience is at its end.

    It runs in a thread because no client bounds all of a request: its look-up of a name may hang.
    """
    done: SimpleQueue[tuple[Result | None, Exception | None]] = SimpleQueue()

    def work() -> None:
        try:
            done.put((task(), None))
        except Exception as error:
            done.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                result, error = done.get(timeout=max(0.0, patience.left))
            except Empty:
                patience.check()  # more may have been earned
                continue
            if error is not None:
                raise error
            return result  # type: ignore[return-value]  # of the task, which returned
    finally:
        patience.until = 0.0  # and the task ends too


def _search(identity: BaseIdentity, patience: Patience) -> Candidate | None:
    """The most downloaded drafter that is for this base model."""
    for repo in itertools.islice(_listed(identity, patience), READ):
        try:
            return _candidate(repo, identity, patience)
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
            patience.check()  # then it is damaged, gated or gone
    return None


def _listed(identity: BaseIdentity, patience: Patience) -> Iterator[str]:
    """Repositories with a drafter's tags that do not say that they are for another model, each once.

    The model's own name finds those whose card names it; the sizes find those for a model by another name.
    """
    known = set()
    tags = identity.tags()
    named = REPOSITORY.fullmatch(identity.name) and not Path(identity.name).exists()
    for tag in ([f"base_model:{identity.name}"] if named else []) + [tags[1]]:
        for repo, told in _repositories(patience, LISTED, tag):
            if repo not in known:
                known.add(repo)
                if told is None or identity.may_have(map(str, told)):
                    yield repo


def _repositories(patience: Patience, limit: int, *tags: str) -> Iterator[tuple[str, list[Any] | None]]:
    """Repositories with this package's tag and those given, the most downloaded first, and all their tags."""
    filters = [("filter", tag) for tag in (TAG, *tags)]
    query = urlencode([*filters, ("sort", "downloads"), ("limit", limit)])
    body, _ = _read(f"{constants.ENDPOINT}/api/models?{query}", patience, LARGEST)
    listed = json.loads(body)
    for model in listed[:limit] if isinstance(listed, list) else []:
        repo = model.get("id") if isinstance(model, dict) else None
        if isinstance(repo, str) and REPOSITORY.fullmatch(repo):
            told = model.get("tags")
            yield repo, told if isinstance(told, list) else None


def _candidate(repo: str, identity: BaseIdentity, patience: Patience) -> Candidate:
    """What a repository holds; some error if that is no drafter for this base model, or too large a one."""
    body, commit = _read(_file(repo, "main", "config.json"), patience, LARGEST)
    raw = json.loads(body)
    base = base_of(raw) if raw["model_type"] == MODEL_TYPE else None
    config = parse_config(Path(repo), raw)
    sizes = (config.hidden_size, config.vocab_size) == (identity.hidden_size, identity.vocab_size)
    if base is None or not base.matches(identity) or not sizes or config.num_draft_layers > MOST_LAYERS:
        raise ValueError(f"{repo} is for another model")
    size = LARGEST + 4 * sum(map(math.prod, config.shapes().values()))
    if size > LARGEST_DRAFTER + LARGEST:
        raise ValueError(f"{repo} has {size >> 20} MiB")
    return Candidate(repo, commit if re.fullmatch("[0-9a-f]{40}", commit) else "main", body, size)


def _download(found: Candidate, identity: BaseIdentity, folder: Path) -> Path:
    """Make the folder of a drafter that was found, and check all of it; a bar tells of the download."""
    patience = Patience()
    url = _file(found.repo, found.revision, "model.safetensors")
    with atomic_folder(folder, lambda: False) as new:
        (new / "config.json").write_bytes(found.config)
        with tqdm(desc=f"{found.repo}, a drafter for this model", unit="B", unit_scale=True) as bar:

            def told(count: int, whole: int | None) -> None:
                patience.earn(count)
                bar.total = whole
                bar.update(count)

            with (new / "model.safetensors").open("wb") as file:
                _waiting(patience, lambda: _receive(url, patience, found.size, file, told))
        load_drafter(new, identity)
    return folder


def _file(repo: str, revision: str, name: str) -> str:
    return f"{constants.ENDPOINT}/{repo}/resolve/{revision}/{name}"


def _read(url: str, patience: Patience, limit: int) -> tuple[bytes, str]:
    """A short answer, and the commit that it is from."""
    into = io.BytesIO()
    commit = _receive(url, patience, limit, into)
    return into.getvalue(), commit


def _receive(
    url: str,
    patience: Patience,
    limit: int,
    into: IO[bytes],
    told: Callable[[int, int | None], None] = lambda count, whole: None,
) -> str:
    """Write what is at ``url`` to ``into``; return the commit that it is from, or "".

    Redirects are followed here, since a client would read what comes with them, however long.

    Args:
        limit: bytes.
        told: of each piece's bytes, and those of all.
    Raises:
        OSError: it is not there, or too slow.
        ValueError: it is too large.
    """
    asked, commit = url, ""
    headers = {"user-agent": "mlx-redrafter", "accept-encoding": "identity"}  # a kilobyte may hold a gigabyte
    if (token := get_token()) and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        headers["authorization"] = f"Bearer {token}"
    for _ in range(REDIRECTS):
        with get_session().stream(
            "GET", url, headers=headers, timeout=MOMENT, follow_redirects=False
        ) as answer:
            patience.check()
            commit = answer.headers.get("x-repo-commit", commit)
            if answer.status_code in (301, 302, 303, 307, 308):
                url = urljoin(url, answer.headers.get("location", ""))
                if urlsplit(url).scheme not in ("https", urlsplit(asked).scheme):
                    raise OSError(f"{asked} leads to {url}")
                if urlsplit(url).netloc != urlsplit(asked).netloc:
                    headers.pop("authorization", None)
                continue
            if answer.status_code != 200:
                raise OSError(f"{asked} answers {answer.status_code}")
            length = answer.headers.get("content-length", "")
            whole = int(length) if length.isdecimal() else None
            size = 0
            for piece in answer.iter_raw():
                size += len(piece)
                if max(size, whole or 0) > limit:
                    raise ValueError(f"{asked} has more than {limit:,} bytes")
                patience.check()
                into.write(piece)
                told(len(piece), whole)
            return commit
    raise OSError(f"{asked} is redirected again and again")
