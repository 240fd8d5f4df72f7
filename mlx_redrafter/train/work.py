"""What was asked of a run of training, and the work folder that says what has been done of it.

Everything on the way is kept in a work folder beside the output, so a run can be interrupted anywhere:

    run.json                what was asked for, and what has been done
    data/a000000.npz        conversations (a: given, b: written), ``SHARD_ROWS`` per file
    features/               hidden states, for one file of conversations each
    checkpoint.safetensors  weights and the optimizer's state
    best.safetensors        the weights with the best held-out score
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..loading.files import atomic_file
from .selfgen import Recipe
from .trainer import Settings

SHARD_ROWS = 16
RARE_TOKENS = 128


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    data: tuple[str, ...] = ()  # files to train on, or to take prompts from
    # Trained tokens that the model writes itself, besides ``data``; None: none if conversations are given,
    # else as many as the time allows, or ``DEFAULT_TOKENS``.
    tokens: int | None = None
    recipe: Recipe = field(default_factory=Recipe)  # how it writes them
    settings: Settings = field(default_factory=Settings)  # of training; epochs give way to ``seconds``
    draft_vocab: int | None = None  # None: those of start_from, or chosen by coverage; 0: all
    exit_dim: int | None = None  # None is H
    blocks: int = 2  # residual blocks of the head
    cell: str = "simple"  # or gru, or none
    memory_heads: int = 0  # 0: no memory, or that of start_from
    # Tokens of the text outside the draft vocabulary that it may draft too; None: those of start_from, or
    # ``RARE_TOKENS`` with a memory.
    rare_tokens: int | None = None
    context_layers: tuple[int, ...] | None = None  # None: a low, a middle and a high one; empty: Apple's
    start_from: str | None = None  # a drafter to train on, or auto: that of the model this one was made from
    upload_repo: str | None = None  # where it will be published, for the card
    seconds: float | None = None  # for everything together
    cache: str = "auto"  # disk keeps hidden states, off computes them in every epoch, auto chooses
    license: str = ""  # of the drafter, for the card
    workers: int | None = None  # None is one per core on a CPU, one on a GPU
    memory: float | None = None  # bytes that may be used; None: what the device has
    left_open: tuple[str, ...] = ()  # of rows, batch and exit_dim those that memory and time may change
    writing: tuple[str, ...] = ()  # the user's own options of the recipe, to warn where they change nothing

    def __post_init__(self) -> None:
        if self.draft_vocab is not None and self.draft_vocab < 0:
            size = f"a draft vocabulary of {self.draft_vocab} tokens"
            raise ValueError(f"{size} is not usable: give 1 or more, or 0 for all.")


@dataclass
class Work:
    """The work folder and its run.json."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, asked: dict[str, Any]) -> "Work":
        """The run that the folder holds, or a new one; nothing is written before ``begin``.

        Raises:
            ValueError: it holds a run that was asked for otherwise.
        """
        work = cls(folder)
        if (folder / "run.json").is_file():
            work.facts = read_facts(folder)
            before = work.facts["asked"]
            if before != asked:
                changed = [name for name in sorted({*asked, *before}) if asked.get(name) != before.get(name)]
                raise ValueError(
                    f"{folder} holds a run with other options ({', '.join(changed)}): give the same ones, or "
                    "only --output with --resume; or delete that folder to start again."
                )
        work.facts["asked"] = asked
        return work

    def check(self, read: dict[str, str]) -> None:
        """Raise ``ValueError`` if what is read (a digest for each name) is not what the run began with."""
        before = self.facts.setdefault("read", read)
        for name in read:
            gone = not read[name] and "data_done" in self.facts  # which does no harm then
            if read[name] != before.get(name) and not gone:
                raise ValueError(
                    f"{name} has changed since the run in {self.folder} began: put back what it was, or "
                    "delete the folder to start again."
                )

    @contextmanager
    def begin(self, command: str) -> Iterator[None]:
        """Make what is not there yet of the folder, and note the command line; within, nobody else may.

        Raises:
            ValueError: another run works in the folder.
        """
        for name in ("data", "features"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.note(commands=[*self.facts.get("commands", []), command])
            yield
        except BlockingIOError as error:
            raise ValueError(
                f"another run works in {self.folder}: wait for its end, or name another output folder."
            ) from error
        finally:
            os.close(folder)

    def note(self, **facts: Any) -> None:
        """Add to run.json."""
        self.facts.update(facts, seconds=self.elapsed)
        self.began = time.monotonic()
        with atomic_file(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(self.facts, indent=1) + "\n")

    @property
    def elapsed(self) -> float:
        """Seconds of work, those of interrupted runs included."""
        return float(self.facts.get("seconds", 0.0)) + time.monotonic() - self.began

    def shards(self) -> list[Path]:
        return sorted((self.folder / "data").glob("[ab]*.npz"))

    def features(self, shard: Path) -> Path:
        return self.folder / "features" / f"{shard.stem}.safetensors"


def read_facts(folder: Path) -> dict[str, Any]:
    """The run.json of a work folder.

    Raises:
        ValueError: it is not there, or damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: there is no run to resume; leave --resume out.")
    try:
        facts = dict(json.loads(path.read_text("utf-8")))
        return {**facts, "asked": dict(facts["asked"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete {folder} and start again.") from error
