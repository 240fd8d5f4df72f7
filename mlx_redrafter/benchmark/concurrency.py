"""Several texts at once, against mlx-lm's batched decoding of the same texts."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..model import SpeculativeModel
from .statistics import interval
from .tables import Table, number, speedup


@dataclass
class Served:
    """What became of some texts that were decoded together; times in seconds since the first arrived."""

    tokens: list[list[int]]
    arrived: list[float]
    times: list[list[float]] = field(default_factory=list)  # of every token

    @property
    def speed(self) -> float:
        """Tokens per second of all texts together."""
        return sum(map(len, self.tokens)) / max(times[-1] for times in self.times)

    @property
    def waits(self) -> list[float]:
        """Seconds from each text's arrival to its first token."""
        return [times[0] - arrived for times, arrived in zip(self.times, self.arrived, strict=True)]

    @property
    def latencies(self) -> list[float]:
        """Seconds from each token to the next one of its text."""
        return [after - before for times in self.times for before, after in pairwise(times)]


WARM_UP = 4  # tokens of each text, before anything is timed


@dataclass(frozen=True)
class Crowd:
    """How texts come: so many, one every so many seconds (0: all at once)."""

    texts: int
    every: float = 0.0


def compare(
    model: SpeculativeModel,
    crowd: Crowd,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Iterable[int],
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Serve the prompts, ``crowd.texts`` at a time, by mlx-lm and by ours in turn.

    Prompts that do not fill a crowd are left out. Greedy, so that outputs can be compared.
    """
    both: Any = import_module("mlx_redrafter.batch_generator")  # here, since older mlx-lm has no such class
    ends = both.StopSequences([[token] for token in stop])
    makers = [lambda: both.PlainBatchGenerator(model.model), lambda: both.BatchGenerator(model)]
    for make in makers:  # step times are measured when so many texts are first there, which is done once
        serve(make(), prompts[: crowd.texts], 0, WARM_UP, ends)
    pairs = []
    for number_, start in enumerate(range(0, len(prompts) - crowd.texts + 1, crowd.texts)):
        some = prompts[start : start + crowd.texts]
        order = [0, 1] if number_ % 2 else [1, 0]  # so that a drift of the machine cancels
        found = {who: serve(makers[who](), some, crowd.every, max_tokens, ends) for who in order}
        pairs.append((found[0], found[1]))
        tick()
    return summarise(crowd, pairs)


def serve(
    generator: Any, prompts: Sequence[Sequence[int]], every: float, max_tokens: int, ends: Any
) -> Served:
    """Decode the prompts as they arrive, with mlx-lm's class or one with its methods."""
    served = Served([[] for _ in prompts], [every * i for i in range(len(prompts))], [[] for _ in prompts])
    places: dict[int, int] = {}
    running, start = 0, time.perf_counter()
    while running or len(places) < len(prompts):
        while len(places) < len(prompts) and served.arrived[len(places)] <= time.perf_counter() - start:
            options = {"max_tokens": [max_tokens], "stop_sequences": [ends]}
            places[generator.insert([list(prompts[len(places)])], **options)[0]] = len(places)
            running += 1
        if not running:
            time.sleep(0.001)
            continue
        for response in generator.next()[1]:
            place = places[response.uid]
            served.tokens[place].append(response.token)
            served.times[place].append(time.perf_counter() - start)
            running -= response.finish_reason is not None
    generator.close()
    mx.clear_cache()
    return served


def summarise(crowd: Crowd, pairs: Sequence[tuple[Served, Served]]) -> dict[str, Any]:
    """An entry of the report's ``concurrency``."""
    plain, ours = zip(*pairs, strict=True)
    return {
        "texts": crowd.texts,
        "arrive_every": crowd.every,
        "crowds": len(pairs),
        "speedup": asdict(interval([mine.speed / theirs.speed for theirs, mine in pairs])),
        **_figures("", ours),
        **_figures("baseline_", plain),
        "identical": all(theirs.tokens == mine.tokens for theirs, mine in pairs),
    }


def concurrency_table(report: dict[str, Any]) -> Table:
    """All crowds."""
    rows = []
    for found in report["concurrency"]:
        times = [
            f"{number(1000 * found[f'{who}{key}'][which])}"
            for key, which in (("ttft", "median"), ("latency", "median"), ("latency", "p95"))
            for who in ("baseline_", "")
        ]
        came = "at once" if not found["arrive_every"] else f"every {found['arrive_every']:g} s"
        speeds = [speedup(found["speedup"]), number(found["tps"]), number(found["baseline_tps"])]
        rows.append([str(found["texts"]), came, *speeds, *times, "yes" if found["identical"] else "no"])
    heads = ["texts", "arrive", "speed-up (95 %)", "tokens/s", "mlx-lm", "first token, ms: mlx-lm", "ours"]
    header = [*heads, "next token: mlx-lm", "ours", "95th: mlx-lm", "ours", "same output"]
    return Table("Several texts at once, against mlx-lm's BatchGenerator", header, rows, [])


def _figures(who: str, served: Sequence[Served]) -> dict[str, Any]:
    waits = [wait for each in served for wait in each.waits]
    latencies = [latency for each in served for latency in each.latencies]
    return {
        f"{who}tps": float(np.median([each.speed for each in served])),
        f"{who}ttft": _spread(waits),
        f"{who}latency": _spread(latencies),
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "p95": None}
    return {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
