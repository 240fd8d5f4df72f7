"""How far a drafter is from its base model, at every depth, and in which direction it should move.

At position t the drafter reads the context and token t + 1, then the text's own tokens (teacher
forcing), and predicts token t + 1 + d at depth d = 1..L. Its label is the base model's distribution
there, which is computed once per position and serves all depths. Everything of the size of the
vocabulary is made and used up in chunks, so memory does not grow with the vocabulary.

Most of the work is the head's, over thousands of tokens of which a batch can do with hundreds: those
that the model finds likely somewhere in it, and a few of the others, which stand for all of these.

A drafter that may draft rare tokens (``models/memory.py``) has a row of the head for each of those U that a
batch has, too, which are seen from the first place on where they are known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from ..models.drafter import Drafter
from ..models.memory import read_texts
from ..models.target import Target
from .features import Features, WholeRows

SEGMENT = 32  # positions in a row that are trained on together
LOG2_E = 1.4426950408889634
LOSSES = ("kl", "tv")
LABELS = ("soft", "hard")
NEVER = -1e4  # a logit
LIKELY = 0.05  # a token that the model gives more somewhere in a batch is always among the drawn ones


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    length: int = 5  # L, depths
    decay: float = 0.9  # the weight of depth d is decay^(d - 1)
    # kl, the Kullback-Leibler divergence from the label, or tv, the total variation, which is one minus the
    # probability that a sample of the drafter is accepted (arXiv 2211.17192).
    loss: str = "kl"
    labels: str = "soft"  # the base model's distribution; or hard, the token that came
    temperature: float = 1.0  # of soft labels; below 1 they lean to the model's first choice
    chunk: int = 1 << 23  # logits (rows times draft tokens) held at once
    negatives: float = 1.0  # share of the draft tokens that are unlikely in a batch that its softmax has
    # Share of the context, and of what the last layer reads, that a training step does not see (Srivastava
    # et al., JMLR 15, 2014).
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length {self.length} is not usable: give 1 or more.")
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r} is not known: choose one of {', '.join(LOSSES)}.")
        if self.labels not in LABELS:
            raise ValueError(f"labels {self.labels!r} are not known: choose one of {', '.join(LABELS)}.")
        for name, value in (("depth weight", self.decay), ("share of negatives", self.negatives)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} {value} is not usable: give more than 0, at most 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not usable: give a share from 0 to below 1.")
        if not self.temperature > 0:
            raise ValueError(f"label temperature {self.temperature} is not usable: give more than 0.")


@dataclass
class Batch:
    """``n`` segments of S positions, with the L positions after each."""

    context: mx.array  # [n, S, F]
    hidden: mx.array  # [n, S + L - 1, H] the last hidden states one position on
    tokens: mx.array  # [n, S + L]
    labels: mx.array  # [n, S + L - 1] draft indices of the tokens one position on; -1: not in the vocabulary
    left: mx.array  # [n, S]


@dataclass
class Rare:
    """The U rare tokens of a batch."""

    ids: mx.array  # [U]
    shown: mx.array  # [n, S, U] bool: it is in the text that the drafter has seen, the first token included
    first: mx.array  # [n, S + L - 1] where the token of each label comes first; -1 of those that are not rare


@dataclass
class RowBatch(Batch):
    """``n`` whole rows, of which the S positions are those that are trained on; padded at their ends."""

    place: mx.array  # [n, S] in their rows
    read: mx.array  # [n, T] all tokens of the rows
    read_context: mx.array  # [n, T, F] after reading each
    rare: Rare | None = None


def make_batch(features: Features, starts: np.ndarray, length: int, hidden: int, to_draft: mx.array) -> Batch:
    """Cut segments out of features.

    Args:
        features: M positions.
        starts: [n], where segments begin.
        length: L, depths.
        hidden: H, the width of the last hidden state.
        to_draft: [V], the draft index of every token; -1 for none.
    """
    index = starts[:, None] + np.arange(SEGMENT + length)  # [n, S + L]
    inside = np.minimum(index, features.size - 1)
    return _batch(features, inside, index < features.size, length, hidden, to_draft)


def make_row_batch(
    features: WholeRows, rows: np.ndarray, length: int, hidden: int, to_draft: mx.array
) -> RowBatch:
    """The ``rows`` [n], by number; other arguments as of ``make_batch``."""
    left, first = np.array(features.left), np.flatnonzero(np.array(features.place) == 0)
    ends = np.append(first[1:], len(left))[rows] - 1
    first = first[rows]
    trained = [i + np.flatnonzero(left[i : end + 1] >= 0) for i, end in zip(first, ends, strict=True)]
    most = max(1, *map(len, trained))
    index = ends[:, None].repeat(most + length, axis=1)  # [n, S + L]
    for places, mine in zip(index, trained, strict=True):
        places[: len(mine)] = mine
    inside = np.arange(most + length) < np.array([[len(mine)] for mine in trained])
    batch = _batch(features, index, inside, length, hidden, to_draft)
    every = first[:, None] + np.arange((ends - first).max() + 1)
    read = mx.array(np.minimum(every, ends[:, None]).astype(np.int32))  # [n, T]
    place = features.place[mx.array(index[:, :most].astype(np.int32))]
    return RowBatch(**vars(batch), place=place, read=features.read[read], read_context=features.context[read])


def add_rare(batch: RowBatch, is_rare: np.ndarray[Any, Any], known: int) -> RowBatch:
    """The batch with its rare tokens, whose labels come after those of the ``known`` draft tokens.

    Args:
        is_rare: [V] bool.
    """
    read, place = np.array(batch.read), np.array(batch.place)
    ids = np.unique(read[is_rare[read]])
    if ids.size == 0:
        return batch
    first = np.full((len(read), ids.size), read.shape[1] + 1, np.int32)  # [n, U]; never
    rows, places = np.nonzero(is_rare[read])
    np.minimum.at(first, (rows, np.searchsorted(ids, read[rows, places])), places.astype(np.int32))
    tokens = np.array(batch.tokens)[:, 1:]
    number = np.minimum(np.searchsorted(ids, tokens), ids.size - 1)
    here = ids[number] == tokens  # [n, S + L - 1]
    rare = Rare(
        mx.array(ids.astype(np.int32)),
        mx.array(first[:, None] <= place[..., None] + 1),
        mx.array(np.where(here, np.take_along_axis(first, number, axis=1), -1)),
    )
    labels = mx.where(mx.array(here), mx.array((known + number).astype(np.int32)), batch.labels)
    return replace(batch, labels=labels, rare=rare)


def _batch(
    features: Features, index: np.ndarray, inside: np.ndarray, length: int, hidden: int, to_draft: mx.array
) -> Batch:
    """The positions ``index`` [n, S + L], of which only those ``inside`` are trained on."""
    size, places = index.shape[1] - length, mx.array(index.astype(np.int32))
    left = mx.where(mx.array(inside[:, :size]), features.left[places[:, :size]], 0)
    tokens = features.token[places]
    context = features.context[places]  # [n, S + L, F]
    return Batch(context[:, :size], context[:, 1:, :hidden], tokens, to_draft[tokens[:, 1:]], left)


class LabelHead:
    """The base model's logits over the draft vocabulary, from its last hidden states.

    Where the model's head is one linear layer, only the rows of draft tokens are multiplied; a head
    that does more (soft-capping, scaling) runs as it is, and the draft tokens are picked afterwards.

    Args:
        target: the base model.
        ids: [Vd], the draft tokens.
        probe: [n, H], some hidden states, to compare both ways.
    """

    def __init__(self, target: Target, ids: mx.array, probe: mx.array) -> None:
        self.target, self.ids = target, ids
        self.rows = head_rows(target, ids)  # [Vd, H]
        dtype = self.rows.dtype
        wanted = target.head(probe[None].astype(dtype))[0][:, ids]  # [n, Vd]
        error = mx.abs(self._linear(probe) - wanted.astype(mx.float32)).max()
        self.linear = bool((error <= 0.02 * mx.abs(wanted).max()).item())

    def __call__(self, hidden: mx.array, rare: Rare | None = None) -> mx.array:
        """[..., H] -> [..., Vd] float32, with rare tokens [..., Vd + U]."""
        ids = self.ids if rare is None else mx.concatenate([self.ids, rare.ids])
        if self.linear:
            return self._linear(hidden, None if rare is None else head_rows(self.target, rare.ids))
        flat = hidden.reshape(1, -1, hidden.shape[-1]).astype(self.rows.dtype)
        logits = self.target.head(flat)[..., ids].astype(mx.float32)
        return logits.reshape(*hidden.shape[:-1], -1)

    def _linear(self, hidden: mx.array, more: mx.array | None = None) -> mx.array:
        rows = self.rows if more is None else mx.concatenate([self.rows, more])
        return (hidden.astype(rows.dtype) @ rows.T).astype(mx.float32)

    @property
    def width(self) -> int:
        """Logits that are computed per position."""
        return int(self.ids.size if self.linear else self.target.embed.weight.shape[0])


def head_rows(target: Target, ids: mx.array) -> mx.array:
    """Rows [n, H] of the head's matrix for tokens ``ids`` [n]; of the embedding if both are tied."""
    heads = [
        (len(path), path, module)
        for path, module in target.model.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
        and module.weight.shape[0] == target.vocabulary
        and not any(name.isdigit() for name in path.split("."))  # of no layer
    ]
    layer: Any = min(heads)[-1] if heads else target.embed
    if isinstance(layer, nn.QuantizedLinear):
        biases = None if layer.biases is None else layer.biases[ids]
        return mx.dequantize(
            layer.weight[ids], layer.scales[ids], biases, layer.group_size, layer.bits, layer.mode
        )
    rows: mx.array = layer(ids) if layer is target.embed else layer.weight[ids]
    return rows


@dataclass
class Drawn:
    """Draft tokens that stand for all of them in one batch."""

    ids: mx.array  # [K] their places in the draft vocabulary
    shift: mx.array  # [K] base-2 logarithms of how many tokens each one stands for
    labels: mx.array  # [n, S + L - 1, K] the label, of these tokens only


def draw(head: LabelHead, objective: Objective, batch: Batch, random: np.random.Generator) -> Drawn:
    """The tokens that are likely somewhere in a batch, and ``objective.negatives`` of the others."""
    labels = _labels(batch, slice(None), head, objective, [])
    likely = np.array(labels.max(axis=(0, 1)) > LIKELY)
    likely[head.ids.size :] = True  # rare tokens
    taken = likely | (random.random(likely.size) < objective.negatives)
    ids = mx.array(np.flatnonzero(taken).astype(np.int32))
    shift = mx.array(np.where(likely, 0, -np.log2(objective.negatives))[taken].astype(np.float32))
    some = labels[..., ids] * mx.power(2.0, shift)
    drawn = Drawn(ids, shift, some / mx.maximum(some.sum(axis=-1, keepdims=True), 1e-9))
    mx.eval(vars(drawn))
    return drawn


def segments_at_once(head: LabelHead, objective: Objective, positions: int = SEGMENT) -> int:
    """How many segments may be computed together, of as many logits as may be held at once."""
    return max(1, objective.chunk // (max(head.width, head.ids.size) * (positions + objective.length)))


def trunk(drafter: Drafter, embed: Callable[[mx.array], mx.array], batch: Batch, length: int) -> mx.array:
    """What the last layer of the drafter's head reads, at every depth: [L, n, S, exit_dim]."""
    positions = batch.left.shape[1]
    embeddings = embed(batch.tokens[:, : positions + length - 1]).astype(batch.context.dtype)
    new = drafter.read_tokens(embeddings)  # [n, S + L - 1, ...]
    state = mx.zeros((*batch.left.shape, drafter.config.hidden_size), new.dtype)
    states = []
    for depth in range(length):
        state = drafter.update_state(new[:, depth : depth + positions], state)
        states.append(state)
    memory = None
    if isinstance(batch, RowBatch):
        read = embed(batch.read).astype(batch.context.dtype)
        memory = read_texts(drafter, batch.read_context, read, batch.place)
    return drafter.body(batch.context, mx.stack(states), memory)


def _rare(batch: Batch) -> Rare | None:
    return batch.rare if isinstance(batch, RowBatch) else None


def last_layer(
    drafter: Drafter, embed: Callable[[mx.array], mx.array], batch: Batch, x: mx.array
) -> tuple[mx.array, mx.array]:
    """What is multiplied to logits: ``x`` [L, n, S, E] and the rows [Vd, E] of the drafter's head.

    With rare tokens there are U rows more, and a bias for these as one column more of both.
    """
    rows = drafter.lm_head[-1].weight
    rare = _rare(batch)
    if rare is None:
        return x, rows
    weight = drafter.rare_proj.weight  # [H, E]
    more = embed(rare.ids).astype(weight.dtype) @ weight  # [U, E]
    bias = mx.concatenate([mx.zeros(len(rows)), mx.repeat(drafter.rare_bias, len(more))])
    rows = mx.concatenate([mx.concatenate([rows, more]), bias[:, None].astype(rows.dtype)], axis=1)
    return mx.concatenate([x, mx.ones((*x.shape[:-1], 1), x.dtype)], axis=-1), rows


def _unseen(batch: Batch, cut: slice, logits: mx.array) -> mx.array:
    """Logits [c, S, ...] without rare tokens that the text did not have so far; their places are the last."""
    rare = _rare(batch)
    if rare is None:
        return logits
    common, more = mx.split(logits, [logits.shape[-1] - rare.ids.size], axis=-1)
    return mx.concatenate([common, mx.where(rare.shown[cut], more, NEVER)], axis=-1)


def _label(batch: Batch, cut: slice, labels: mx.array) -> mx.array:
    """The label [c, S, ...] without rare tokens that the text did not have so far."""
    rare = _rare(batch)
    if rare is None:
        return labels
    common, more = mx.split(labels, [labels.shape[-1] - rare.ids.size], axis=-1)
    seen = mx.concatenate([common, more * rare.shown[cut]], axis=-1)
    return seen / mx.maximum(seen.sum(axis=-1, keepdims=True), 1e-9)


def reachable(batch: Batch, length: int) -> mx.array:
    """[L, n, S] bool: the text goes on to this depth, and the drafter knows its tokens that far."""
    positions = batch.left.shape[1]
    masks, mask = [], mx.array(True)
    for depth in range(length):
        mask = mask & (batch.labels[:, depth : depth + positions] >= 0) & (batch.left > depth)
        if isinstance(batch, RowBatch) and batch.rare is not None:
            mask = mask & (batch.rare.first[:, depth : depth + positions] <= batch.place + 1)
        masks.append(mask)
    return mx.stack(masks)


def gradients(
    drafter: Drafter,
    parameters: Any,
    target: Target,
    head: LabelHead,
    objective: Objective,
    batch: Batch,
    drawn: Drawn | None = None,
    key: mx.array | None = None,
) -> tuple[mx.array, Any]:
    """Sums over a batch: of the loss and of the positions, and gradients of the weighted loss.

    Args:
        drawn: tokens that stand for all of the draft vocabulary; None takes all.
        key: decides what is dropped; None drops nothing.

    Returns:
        [L, 2] losses and positions at each depth, and gradients like ``parameters``.
    """
    mask, share = reachable(batch, objective.length), objective.dropout
    keys = [None, None] if key is None else mx.random.split(key)
    seen = replace(batch, context=_drop(batch.context, share, keys[0]))
    if isinstance(seen, RowBatch):
        other = None if key is None else mx.random.split(key, 3)[2]
        seen = replace(seen, read_context=_drop(seen.read_context, share, other))

    def surrogate(parameters: Any) -> tuple[mx.array, mx.array]:
        drafter.update(parameters)
        x = _drop(trunk(drafter, target.embed, seen, objective.length), share, keys[1])
        x, last = last_layer(drafter, target.embed, seen, x)
        fixed, rows = mx.stop_gradient(x).astype(last.dtype), mx.stop_gradient(last)
        losses, x_gradient, rows_gradient = head_gradients(fixed, rows, mask, head, objective, batch, drawn)
        # Its gradients are those of the loss, which were computed along with the loss itself.
        total = (x * x_gradient).sum() + (last * rows_gradient).sum()
        return total, losses

    (_, losses), found = mx.value_and_grad(surrogate)(parameters)
    return mx.stack([losses, mask.sum(axis=(1, 2)).astype(mx.float32)], axis=-1), found


def _drop(x: mx.array, share: float, key: mx.array | None) -> mx.array:
    """``x`` without a random ``share`` of its elements, the others larger; without a key, all of ``x``."""
    if share == 0 or key is None:
        return x
    kept = mx.random.bernoulli(1 - share, x.shape, key)
    return mx.where(kept, x / (1 - share), 0).astype(x.dtype)


def head_gradients(
    x: mx.array,
    last_rows: mx.array,
    mask: mx.array,
    head: LabelHead,
    objective: Objective,
    batch: Batch,
    drawn: Drawn | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """The summed losses [L], and gradients of their weighted sum by x [L, n, S, E] and the rows [Vd, E]."""
    length, _, positions, _ = x.shape
    rows = last_rows if drawn is None else last_rows[drawn.ids]  # [K, E]
    shift = mx.array(0.0) if drawn is None else drawn.shift
    losses = mx.zeros(length)
    rows_gradient = mx.zeros(rows.shape, mx.float32)
    parts, done = [], [losses]
    for cut in _cuts(x, head, objective):
        labels = drawn.labels[cut] if drawn else _labels(batch, cut, head, objective, done)
        depths, sums = [], []  # of labels [c, S + L - 1, K]
        for depth in range(length):
            # One depth of one chunk at a time, or many would be in memory at once.
            inputs = mx.depends([x[depth, cut]], done)[0]  # [c, S, E]
            logits = _unseen(batch, cut, (inputs * LOG2_E) @ rows.T)
            label = _label(batch, cut, labels[:, depth : depth + positions])
            values, gradient = _divergence(logits.astype(mx.float32), label, objective.loss, shift)
            valid = mask[depth, cut]
            sums.append((values * valid).sum())
            gradient = (gradient * (objective.decay**depth * valid)[..., None]).astype(rows.dtype)
            depths.append(gradient @ rows)
            flat = gradient.reshape(-1, rows.shape[0])
            rows_gradient = rows_gradient + flat.T @ inputs.reshape(-1, rows.shape[1])
            done = [rows_gradient, sums[-1], depths[-1]]
        losses = losses + mx.stack(sums)
        parts.append(mx.stack(depths))
    if drawn is not None:
        rows_gradient = mx.zeros(last_rows.shape).at[drawn.ids].add(rows_gradient)
    return losses, mx.concatenate(parts, axis=1), rows_gradient


def _cuts(x: mx.array, head: LabelHead, objective: Objective) -> Iterator[slice]:
    """Parts of the n segments of ``x`` [L, n, S, E], of as many logits as may be held at once."""
    _, segments, positions, _ = x.shape
    step = segments_at_once(head, objective, positions)
    return (slice(start, start + step) for start in range(0, segments, step))


def _labels(
    batch: Batch, cut: slice, head: LabelHead, objective: Objective, after: list[mx.array]
) -> mx.array:
    """Labels [c, S + L - 1, Vd] of a part of the segments, computed after ``after``.

    With rare tokens [c, S + L - 1, Vd + U], whether the text had them so far or not.
    """
    rare = _rare(batch)
    if objective.labels == "hard":
        known = head.ids.size + (0 if rare is None else rare.ids.size)
        return (batch.labels[cut][..., None] == mx.arange(known)).astype(mx.float32)
    logits = head(mx.depends([batch.hidden[cut]], after)[0], rare)
    return _softmax2(logits * (LOG2_E / objective.temperature))[0]


def _softmax2(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Softmax to the base 2, and the base-2 logarithm of its denominator [..., 1].

    MLX's power of two takes a third of the time of its exponential on a CPU.
    """
    top = logits.max(axis=-1, keepdims=True)
    powers = mx.power(2.0, logits - top)
    total = powers @ mx.ones((logits.shape[-1], 1))  # faster than a sum on a CPU
    return powers / total, top + mx.log2(total)


def _divergence(
    logits: mx.array, label: mx.array, loss: str, shift: mx.array | float = 0.0
) -> tuple[mx.array, mx.array]:
    """Loss [...] of base-2 logits [..., K] against ``label``, and its gradient by the natural logits.

    Each token stands for 2^``shift`` ones. The divergence comes without the label's own entropy, which does
    not depend on the drafter.
    """
    probability, log_total = _softmax2(logits + shift)
    if loss == "kl":
        return (log_total[..., 0] - (label * logits).sum(axis=-1)) / LOG2_E, probability - label
    less = (probability < label).astype(probability.dtype)
    gained = probability * less
    gradient = probability * gained.sum(axis=-1, keepdims=True) - gained
    return ((label - probability) * less).sum(axis=-1), gradient


@dataclass
class Score:
    """How a drafter fares on held-out text."""

    loss: list[float]  # mean loss per depth
    top1: list[float]  # per depth, the share of positions where its first choice is the token that came
    tokens_per_step: float  # 1 plus the mean length of the first choices' agreement with the text, up to L


def score(
    drafter: Drafter, target: Target, head: LabelHead, objective: Objective, batches: list[Batch]
) -> Score:
    """Compare a drafter with held-out text, its own tokens given."""
    total = np.zeros((objective.length, 2))
    hits = np.zeros((objective.length, 3))
    for batch in batches:
        mask = reachable(batch, objective.length)
        x = trunk(drafter, target.embed, batch, objective.length)
        x, rows = last_layer(drafter, target.embed, batch, x)
        losses, right = _compare(x, rows, mask, head, objective, batch)
        whole = batch.left >= objective.length  # [n, S]: all depths are there
        right = right & whole
        chain = mx.cumprod(right.astype(mx.float32), axis=0)
        positions = mx.broadcast_to(whole.sum(), losses.shape)
        found = mx.stack([right.sum(axis=(1, 2)), chain.sum(axis=(1, 2)), positions], axis=-1)
        total += np.array(mx.stack([losses, mask.sum(axis=(1, 2)).astype(mx.float32)], axis=-1))
        hits += np.array(found.astype(mx.float32))
    scored = max(hits[0, 2], 1)
    mean = total[:, 0] / np.maximum(total[:, 1], 1)
    return Score(mean.tolist(), (hits[:, 0] / scored).tolist(), float(1 + hits[:, 1].sum() / scored))


def _compare(
    x: mx.array, rows: mx.array, mask: mx.array, head: LabelHead, objective: Objective, batch: Batch
) -> tuple[mx.array, mx.array]:
    """Summed losses [L], and where the drafter's first choice is the token that came [L, n, S]."""
    length, _, positions, _ = x.shape
    losses, right = mx.zeros(length), []
    for cut in _cuts(x, head, objective):
        labels = _labels(batch, cut, head, objective, [losses])
        sums, firsts = [], []
        for depth in range(length):
            logits = _unseen(batch, cut, ((x[depth, cut] * LOG2_E) @ rows.T).astype(mx.float32))
            label = _label(batch, cut, labels[:, depth : depth + positions])
            values, _ = _divergence(logits, label, objective.loss)
            sums.append((values * mask[depth, cut]).sum())
            firsts.append(logits.argmax(axis=-1) == batch.labels[cut, depth : depth + positions])
        losses = losses + mx.stack(sums)
        right.append(mx.stack(firsts))
        mx.eval(losses, right[-1])
    return losses, mx.concatenate(right, axis=1)
