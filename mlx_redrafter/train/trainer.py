"""The training loop: batches in a reproducible order, AdamW, held-out score, checkpoints.

Everything follows from the seed and the step number, so a run that was interrupted and resumed ends
with exactly the weights of one that was not (in float32, on the same machine).
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..loading.files import atomic_file
from ..models.bundle import cast
from ..models.drafter import Drafter, DrafterConfig
from ..models.target import Target
from .features import Features, WholeRows, join, load_tensors
from .loss import (
    SEGMENT,
    Batch,
    LabelHead,
    Objective,
    Score,
    add_rare,
    draw,
    gradients,
    head_rows,
    make_batch,
    make_row_batch,
    score,
    segments_at_once,
)
from .streams import Workers

GROUP = 16
SCORED = 16384  # held-out positions at most


@dataclass(frozen=True)
class Settings:
    """How training goes."""

    objective: Objective = field(default_factory=Objective)  # what is minimised
    batch: int = 1024  # positions per step
    learning_rate: float = 1.5e-3  # the highest of a cosine schedule
    warm_up: float = 0.05  # the first share of the steps, in which it rises from 0
    weight_decay: float = 0.01  # AdamW's, of matrices
    clip: float = 1.0  # the norm that gradients are scaled down to
    epochs: float = 2.0  # passes over the data; part of one is possible
    seed: int = 0  # of the order of the data and of the initial weights
    dtype: str = "float32"  # of the products; weights are kept in float32
    group: int = GROUP  # shards that are in memory at once, and shuffled together

    def __post_init__(self) -> None:
        if self.batch < SEGMENT:
            raise ValueError(f"batch {self.batch} is not usable: give {SEGMENT} positions or more.")
        for name in ("learning_rate", "clip", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} is not usable: give more than 0.")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm-up {self.warm_up} is not usable: give a share from 0 to below 1.")


@dataclass
class Shards:
    """Features in parts: ``sizes`` trained positions each, of which ``load`` gets one."""

    sizes: list[int]
    load: Callable[[int], Features]
    rows: list[int] = field(default_factory=list)  # how many each has, if batches are of whole ones

    @property
    def unit(self) -> int:
        """Positions of what batches are made of: segments, or rows on average."""
        return unit_of(self.sizes, self.rows)


def unit_of(sizes: Sequence[int], rows: Sequence[int]) -> int:
    """As ``Shards.unit``."""
    return max(1, round(sum(sizes) / sum(rows))) if rows else SEGMENT


@dataclass
class Data:
    """What is trained on and what is held out, and how its tokens are numbered by the drafter."""

    train: Shards
    held_out: Shards
    draft_to_target: np.ndarray[Any, Any]  # int32 [Vd]


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    best: float = 0.0  # held-out tokens per step of the best checkpoint
    best_step: int = 0


def initial_drafter(
    target: Target, config: DrafterConfig, draft_to_target: np.ndarray[Any, Any] | None, seed: int
) -> Drafter:
    """A drafter whose last layer is the base model's own head, so that it speaks from the first step on.

    Residual blocks begin as the identity, and the products of the base model's (small) embeddings begin
    large enough to have a say.
    """
    mx.random.seed(seed)
    hidden, width = config.hidden_size, config.exit_dim
    ids = mx.arange(config.vocab_size) if draft_to_target is None else mx.array(draft_to_target)
    drafter = Drafter(config, None if draft_to_target is None else mx.array(draft_to_target))
    rows = head_rows(target, ids).astype(mx.float32)  # [Vd, H]
    wide = width >= hidden
    drafter.lm_head[-1].weight = (
        mx.pad(rows, [(0, 0), (0, width - hidden)]) if wide else rows @ _principal(rows, width)
    )
    for block in drafter.lm_head[:-1]:
        block.linear.weight, block.linear.bias = mx.zeros((width, width)), mx.zeros(width)
    size = mx.sqrt(mx.square(target.embed(ids[:4096]).astype(mx.float32)).mean())
    if config.rnn:
        drafter.rnn_w.weight = drafter.rnn_w.weight / mx.clip(size, 1e-3, 1.0)
    if config.memory_heads:
        of_context, of_token = mx.split(drafter.memory_kv.weight, [width], axis=1)
        drafter.memory_kv.weight = mx.concatenate([of_context, of_token / mx.clip(size, 1e-3, 1.0)], axis=1)
    if config.rare_tokens:
        drafter.rare_proj.weight = _as_head(target.embed(ids), drafter.lm_head[-1].weight)
    mx.eval(drafter.parameters())
    return drafter


def _as_head(embeddings: mx.array, rows: mx.array) -> mx.array:
    """[H, E], by which embeddings [Vd, H] are nearest to the head's rows [Vd, E] (ridge regression)."""
    x, y = (np.array(part.astype(mx.float32)) for part in (embeddings, rows))
    square = x.T @ x
    ridge = 1e-3 * np.trace(square) / len(square) + 1e-12
    return mx.array(np.linalg.solve(square + ridge * np.eye(len(square), dtype=np.float32), x.T @ y))


def with_vocabulary(drafter: Drafter, target: Target, ids: np.ndarray[Any, Any] | None, seed: int) -> Drafter:
    """The same network for the draft tokens ``ids`` (None: all).

    Rows of new tokens are the base model's, scaled and shifted as training did it with the others on
    average: as they are, their logits would drown the trained ones'.
    """
    size = drafter.config.vocab_size if ids is None else len(ids)
    rare = 0 if ids is None else drafter.config.rare_tokens
    config = replace(drafter.config, draft_vocab_size=None if ids is None else size, rare_tokens=rare)
    other = initial_drafter(target, config, ids, seed)
    known = drafter.config.head_outputs
    place = np.full(config.vocab_size, -1)
    place[np.array(drafter.to_target(mx.arange(known)))] = np.arange(known)
    old = place if ids is None else place[ids]  # [Vd]
    head, kept = np.array(other.lm_head[-1].weight), old >= 0
    other.update(drafter.parameters(), strict=False)
    if kept.any():
        rows = np.array(drafter.lm_head[-1].weight.astype(mx.float32))[old[kept]]
        before, after = head[kept].mean(axis=0), rows.mean(axis=0)
        base = head[kept] - before
        gain = (base * (rows - after)).sum() / max(np.square(base).sum(), 1e-12)
        head = after + gain * (head - before)
        head[kept] = rows
    other.lm_head[-1].weight = mx.array(head)
    mx.eval(other.parameters())
    return other


def with_memory(drafter: Drafter, target: Target, heads: int, seed: int) -> Drafter:
    """The same network with a memory, which gives nothing yet."""
    return _changed(drafter, target, replace(drafter.config, memory_heads=heads), seed)


def with_rare(drafter: Drafter, target: Target, count: int, seed: int) -> Drafter:
    """The same network with another number of rare tokens, whose logits begin as the others' would be."""
    other = _changed(drafter, target, replace(drafter.config, rare_tokens=count), seed)
    if not drafter.config.rare_tokens:
        ids = drafter.to_target(mx.arange(drafter.config.head_outputs))
        other.rare_proj.weight = _as_head(target.embed(ids), drafter.lm_head[-1].weight)
    return other


def _changed(drafter: Drafter, target: Target, config: DrafterConfig, seed: int) -> Drafter:
    """A new network of another kind with the parameters that it shares with this one."""
    ids = None if config.draft_vocab_size is None else drafter.to_target(mx.arange(config.head_outputs))
    other = initial_drafter(target, config, None if ids is None else np.array(ids), seed)
    other.update(drafter.parameters(), strict=False)
    return other


def _principal(rows: mx.array, width: int) -> mx.array:
    """[H, width], the directions in which ``rows`` [Vd, H] vary most."""
    _, vectors = np.linalg.eigh(np.array(rows.T @ rows))
    return mx.array(np.ascontiguousarray(vectors[:, ::-1][:, :width]))


def schedule(
    sizes: Sequence[int], settings: Settings, epoch: int, rows: Sequence[int] = ()
) -> list[tuple[list[int], list[Any]]]:
    """The order of one epoch: groups of shards, and for each of their batches where its segments begin.

    Args:
        rows: of each shard, if batches are of whole rows; then it is the rows' numbers in the group.
    """
    random = np.random.default_rng([settings.seed, epoch])
    order = random.permutation(len(sizes)).tolist()
    per_batch = max(1, settings.batch // unit_of(sizes, rows))
    groups = []
    for begin in range(0, len(order), settings.group):
        shards = order[begin : begin + settings.group]
        offsets = np.cumsum([0, *(sizes[shard] for shard in shards)])
        begun = []
        for offset, size in zip(offsets, (sizes[shard] for shard in shards), strict=False):
            first = min(int(random.integers(SEGMENT)), max(0, size - SEGMENT))
            begun.append(offset + np.arange(first, size, SEGMENT))
        starts = np.arange(sum(rows[shard] for shard in shards)) if rows else np.concatenate(begun)
        random.shuffle(starts)
        whole = max(1, len(starts) // per_batch)
        groups.append((shards, [starts[i * per_batch : (i + 1) * per_batch] for i in range(whole)]))
    return groups


def steps_of(sizes: Sequence[int], settings: Settings, rows: Sequence[int] = ()) -> int:
    """How many steps the settings' epochs have."""
    whole, part = int(settings.epochs), settings.epochs - int(settings.epochs)
    count = sum(sum(len(b) for _, b in schedule(sizes, settings, epoch, rows)) for epoch in range(whole))
    last = sum(len(b) for _, b in schedule(sizes, settings, whole, rows)) if part else 0
    return max(1, count + math.ceil(part * last))


def rate(settings: Settings, steps: int, step: int) -> float:
    """The learning rate of a step (from 0) of so many: linear warm-up, then a cosine down to 0."""
    warm = max(1, round(settings.warm_up * steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Trainer:
    """A run of training: its weights (first ``drafter``'s), its optimizer, and its place in the data.

    The ``target`` is not changed; each of the ``workers`` does a part of a batch.
    """

    def __init__(self, target: Target, drafter: Drafter, data: Data, settings: Settings, workers: Workers):
        self.target, self.drafter, self.data, self.settings = target, drafter, data, settings
        self.dtype: mx.Dtype = getattr(mx, settings.dtype)
        self.steps = steps_of(data.train.sizes, settings, data.train.rows)
        self.progress = Progress()
        self.optimizer = optim.AdamW(0.0, betas=[0.9, 0.98], weight_decay=0.0, bias_correction=True)
        self.parameters: Any = cast(drafter.trainable_parameters(), mx.float32)
        self.optimizer.init(self.parameters)
        self.workers = workers
        self._lock = Lock()
        to_draft = np.full(drafter.config.vocab_size, -1, np.int32)
        to_draft[data.draft_to_target] = np.arange(len(data.draft_to_target))
        self._to_draft = mx.array(to_draft)
        mx.eval(self._to_draft)
        self._is_rare = to_draft < 0
        probe = data.train.load(0).context[:64, : drafter.config.hidden_size]
        self.head = LabelHead(target, mx.array(data.draft_to_target), probe)
        self._held_out: list[Batch] | None = None

    def run(self) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """Train on from ``progress``; yields after every step its number (from 1) and losses [L]."""
        for features, starts in self._batches():
            stats = self._step(features, starts)
            self.progress.step += 1
            yield self.progress.step, stats[:, 0] / np.maximum(stats[:, 1], 1)
            if self.progress.step >= self.steps:
                return

    def score(self) -> Score:
        """The held-out score; remembers whether it is the best so far."""
        if self._held_out is None:
            self._held_out = self._held_out_batches()
        self.drafter.update(cast(self.parameters, self.dtype))
        found = score(self.drafter, self.target, self.head, self.settings.objective, self._held_out)
        if found.tokens_per_step > self.progress.best:
            self.progress.best, self.progress.best_step = found.tokens_per_step, self.progress.step
        return found

    def weights(self) -> dict[str, mx.array]:
        """The drafter's tensors now, float32."""
        self.drafter.update(self.parameters)
        return self.drafter.weights()

    def save(self, path: Path) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        flat: Any = tree_flatten({"parameters": self.parameters, "optimizer": self.optimizer.state})
        state = json.dumps({"progress": asdict(self.progress), "settings": asdict(self.settings)})
        with atomic_file(path) as temporary:
            mx.save_safetensors(str(temporary), dict(flat), {"state": state})

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it was written with other settings.
        """
        arrays, metadata = load_tensors(path)
        state = json.loads(metadata["state"])
        if state["settings"] != json.loads(json.dumps(asdict(self.settings))):
            raise ValueError(
                f"{path} was written with other settings ({state['settings']}): resume with the same, or "
                "name another output."
            )
        tree: Any = tree_unflatten(list(arrays.items()))
        self.parameters, self.optimizer.state = tree["parameters"], tree["optimizer"]
        self.progress = Progress(**state["progress"])

    def _batches(self) -> Iterator[tuple[Features, np.ndarray[Any, Any]]]:
        """All batches from the current step on, whatever the epoch."""
        skip, epoch, train = self.progress.step, 0, self.data.train
        while True:
            for shards, batches in schedule(train.sizes, self.settings, epoch, train.rows):
                if skip < len(batches):
                    features = join([train.load(shard) for shard in shards])
                    yield from ((features, starts) for starts in batches[skip:])
                skip = max(0, skip - len(batches))
            epoch += 1

    def _step(self, features: Features, starts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        parameters = cast(self.parameters, self.dtype)
        mx.eval(parameters)
        parts = [part for part in np.array_split(starts, self.workers.count) if len(part)]
        found = self.workers.map(
            lambda part: self._gradients(features, parts[part], parameters, part), len(parts)
        )
        stats = sum(np.array(stats, np.float64) for stats, _ in found)
        total = tree_map(lambda *xs: sum(x.astype(mx.float32) for x in xs), *(grads for _, grads in found))
        self._update(total, 1.0 / max(float(stats[0, 1]), 1.0))  # type: ignore[index]
        return stats  # type: ignore[return-value]

    def _gradients(
        self, features: Features, starts: np.ndarray[Any, Any], parameters: Any, part: int
    ) -> tuple[mx.array, Any]:
        """Losses and gradients of a part of a batch, summed."""
        objective, pieces = self.settings.objective, 1
        random = np.random.default_rng([self.settings.seed, self.progress.step, part])
        if objective.negatives < 1:  # drawing holds the logits of a piece at once
            pieces = math.ceil(len(starts) / segments_at_once(self.head, objective, self.data.train.unit))
        total = None
        for piece in np.array_split(starts, pieces):
            batch = self._batch(features, piece)
            drawn = draw(self.head, objective, batch, random) if objective.negatives < 1 else None
            key = mx.random.key(int(random.integers(1 << 62)))
            with self._lock:  # while the graph is built, the drafter's weights are placeholders
                found = gradients(
                    self.drafter, parameters, self.target, self.head, objective, batch, drawn, key
                )
            total = found if total is None else tree_map(mx.add, total, found)
            mx.eval(total)
        return total  # type: ignore[return-value]

    def _update(self, gradients: Any, scale: float) -> None:
        """Clip, and take one step of AdamW with weight decay on matrices only."""
        flat: Any = tree_flatten(gradients)
        squares = [mx.square(x).sum() for _, x in sorted(flat, key=itemgetter(0))]
        norm = mx.sqrt(mx.stack(squares).sum()) * scale
        factor = scale * mx.minimum(1.0, self.settings.clip / (norm + 1e-6))
        now = rate(self.settings, self.steps, self.progress.step)
        keep = 1 - now * self.settings.weight_decay
        decayed = tree_map(lambda x: x * keep if x.ndim > 1 else x, self.parameters)
        self.optimizer.learning_rate = now
        gradients = tree_map(lambda x: x * factor, gradients)
        updated = self.optimizer.apply_gradients(gradients, decayed)
        # In the layout that a checkpoint is read back in, as products of other layouts round differently.
        self.parameters = tree_map(mx.contiguous, updated)
        mx.eval(self.parameters, self.optimizer.state)

    def _batch(self, features: Features, starts: np.ndarray[Any, Any]) -> Batch:
        config, length = self.drafter.config, self.settings.objective.length
        if isinstance(features, WholeRows):
            rows = make_row_batch(features, starts, length, config.hidden_size, self._to_draft)
            if config.rare_tokens:
                rows = add_rare(rows, self._is_rare, config.head_outputs)
            read = rows.read_context.astype(self.dtype)
            return replace(rows, context=rows.context.astype(self.dtype), read_context=read)
        batch = make_batch(features, starts, length, config.hidden_size, self._to_draft)
        return replace(batch, context=batch.context.astype(self.dtype))

    def _held_out_batches(self) -> list[Batch]:
        """Up to ``SCORED`` positions, evenly from all held-out shards."""
        shards = self.data.held_out
        per_batch = max(1, self.settings.batch // shards.unit)
        most = max(1, SCORED // shards.unit // len(shards.sizes))
        batches = []
        for shard, size in enumerate(shards.sizes):
            starts = np.arange(0, max(1, size - SEGMENT), SEGMENT)
            if shards.rows:
                starts = np.arange(shards.rows[shard])
            chosen = starts[np.linspace(0, len(starts) - 1, min(most, len(starts))).astype(int)]
            features = shards.load(shard)
            batches += [
                self._batch(features, chosen[i : i + per_batch]) for i in range(0, len(chosen), per_batch)
            ]
        mx.eval([vars(batch) for batch in batches])
        return batches
