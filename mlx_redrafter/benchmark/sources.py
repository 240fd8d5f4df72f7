"""Where prompts come from: files, standard input, and the two public sets."""

import contextlib
import http.client
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..conversations import Prompt, read_prompts
from ..loading.cache import cache_folder
from ..loading.files import atomic_file

# MT-Bench: the questions that its authors keep on the Hugging Face hub (arXiv 2306.05685).
MT_BENCH = ("lmsys/mt-bench", "data/mt_bench/question.jsonl")  # a Space and a file of it
# Spec-Bench is not on the hub; its authors' repository (arXiv 2401.07851) has it.
SPEC_BENCH_COMMIT = "fd2c1cd7d2201ef71db4c5f4e455008f017967bf"
SPEC_BENCH = f"https://github.com/hemingkx/Spec-Bench/raw/{SPEC_BENCH_COMMIT}/data/spec_bench/question.jsonl"
SPEC_BENCH_TASKS = {
    "translation": "translation",
    "summarization": "summarization",
    "qa": "question answering",
    "math_reasoning": "mathematical reasoning",
    "rag": "retrieval-augmented generation",
}
CONVERSATION = "multi-turn conversation"  # Spec-Bench's first task, made of MT-Bench's categories
TIMEOUT = 60  # seconds

Item = TypeVar("Item")


def load_prompts(source: str) -> list[Prompt]:
    """The prompts of a JSONL file, of standard input (``-``), of ``mt-bench`` or of ``spec-bench``.

    Raises:
        ValueError: there are none, or they cannot be had.
    """
    if source == "mt-bench":
        return read_prompts(_hub_file())
    if source == "spec-bench":
        prompts = read_prompts(_spec_bench_file())
        return [replace(p, category=SPEC_BENCH_TASKS.get(p.category, CONVERSATION)) for p in prompts]
    return read_prompts(source)


def sample(prompts: list[Item], limit: int | None) -> list[Item]:
    """``limit`` evenly spaced prompts, because files are often sorted by category."""
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def _hub_file() -> Path:
    """The questions in the hub's cache, downloaded if they are not there yet."""
    from huggingface_hub import hf_hub_download, logging

    with contextlib.suppress(OSError, ValueError):
        return Path(hf_hub_download(*MT_BENCH, repo_type="space", local_files_only=True))
    with _downloading("mt-bench", "the Hugging Face hub"):
        logging.set_verbosity_error()  # it would say each time that it tries again
        return Path(hf_hub_download(*MT_BENCH, repo_type="space"))


def _spec_bench_file() -> Path:
    """The questions in the cache folder, downloaded if they are not there yet."""
    path = cache_folder() / "prompts" / f"spec-bench-{SPEC_BENCH_COMMIT[:7]}.jsonl"
    if path.is_file():
        return path
    with _downloading("spec-bench", "GitHub"), urllib.request.urlopen(SPEC_BENCH, timeout=TIMEOUT) as found:
        data = found.read()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as new:
        new.write_bytes(data)
    return path


@contextlib.contextmanager
def _downloading(name: str, where: str) -> Iterator[None]:
    """Say so in a terminal, and what to do where it fails."""
    if sys.stderr.isatty():
        print(f"Downloading {name} ...", file=sys.stderr)
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        remedy = "check the network, or give prompts of your own with --prompts FILE."
        raise ValueError(f"{name} cannot be downloaded from {where} ({reason}): {remedy}") from error
