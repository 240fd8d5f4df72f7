"""What the developer's benchmarks share: models, times, and result files that say which machine made them."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import mlx_redrafter as r
from mlx_redrafter.benchmark.machine import describe
from mlx_redrafter.decoding.state import State, begin
from mlx_redrafter.engine.loop import Chooser, Emitted
from mlx_redrafter.engine.stopwatch import made_up_text
from mlx_redrafter.loading.files import atomic_file
from mlx_redrafter.loading.find import DEFAULT_MODEL
from mlx_redrafter.model import SpeculativeModel
from mlx_redrafter.models.drafter import Drafter, DrafterConfig

import mlx.core as mx  # isort: skip
from mlx_lm.models import llama  # isort: skip

RESULTS = Path(__file__).parent / "results"
TINY = "tiny"
SEEDS = {"model": 0, "drafter": 1}


def parser(text: str | None, output: str, model: str = DEFAULT_MODEL) -> argparse.ArgumentParser:
    """A parser with the flags of all benchmarks; ``text`` describes the one at hand."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=model, help=f"{TINY}: a small random one (default: %(default)s)")
    made.add_argument("--drafter", default="auto", help="folder, shipped name or repository; auto; none")
    made.add_argument("--dtype", default="auto", help="of the weights, as mlx-redrafter generate has it")
    made.add_argument("--output", type=Path, default=RESULTS / output, help="default: %(default)s")
    return made


def load(args: argparse.Namespace) -> SpeculativeModel:
    """The model that the flags name, with its drafter; it has a target."""
    if args.model == TINY:
        return tiny(drafter=args.drafter != "none")
    model, _ = r.load(args.model, drafter=None if args.drafter == "none" else args.drafter, dtype=args.dtype)
    if model.prepare() is None:
        raise ValueError(f"{args.model} cannot verify drafts: choose a model with plain attention caches.")
    return model


def tiny(drafter: bool = True, hidden: int = 64, layers: int = 2, vocabulary: int = 512) -> SpeculativeModel:
    """A small random float32 model with a random drafter."""
    mx.random.seed(SEEDS["model"])
    sizes = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs.from_dict(sizes))
    model.eval()
    mx.random.seed(SEEDS["drafter"])
    made = Drafter(DrafterConfig(hidden, vocabulary, hidden, 1, rnn=True)) if drafter else None
    mx.eval(model.parameters(), [] if made is None else made.parameters())
    return SpeculativeModel(model, made)


def after_prompt(model: SpeculativeModel, rows: int) -> State:
    """The state after a prompt of ``rows`` made-up tokens, which the model has read, and one more."""
    target = model.prepare().target
    assert target is not None
    ids = made_up_text(model.prepare(), rows + 1)
    caches = target.make_cache()
    caches += target.make_memory(caches)
    for start in range(0, rows, 512):
        target.forward(mx.array([ids[start : min(start + 512, rows)]]), caches)
        mx.eval([cache.state for cache in caches])
    return begin(ids, rows, target.layers_of(caches)[1], target.no_context(), mx.random.key(0))


def decode(model: SpeculativeModel, policy: Chooser, state: State, rows: int) -> Iterator[Emitted]:
    """Steps without end, after a text of which the layers hold ``rows`` tokens; nobody may keep the state."""
    engine = model.engine(policy)
    engine.resume(state, rows)
    del state
    while True:
        yield from engine.step()


def timed(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds until what ``function`` returns is evaluated: median and least of some repeats."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        mx.eval(function())
        times.append(1000 * (time.perf_counter() - start))
    return {"ms": round(median(times[2:]), 4), "least_ms": round(min(times[2:]), 4), "repeats": repeats}


def write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write a result with its command, settings and machine, whole or not at all."""
    settings = {
        name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items() if name != "output"
    }
    head = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "settings": settings}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.output) as temporary:
        temporary.write_text(json.dumps({**head, "machine": describe(), **report}, indent=1) + "\n")
    print(f"Wrote {args.output}.")
