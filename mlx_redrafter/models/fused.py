"""The drafter as it decodes: the same arithmetic, in fewer products for each token drafted."""

import copy

import mlx.core as mx
from mlx import nn

from .drafter import Drafter, Recall


class FusedDrafter:
    """What a drafter computes with the weights that it has now, for ``beam.draft``.

    ``input_proj`` is applied to the context once per step, and to the state once per depth. For a simple
    cell that is one layer with ``rnn_u``: a state is kept as both products of it, U·s + b and P·s.

    Attributes:
        start: [S], the state before the first token. S is H + exit_dim where states are kept as products,
            otherwise H.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self._size = drafter, drafter.config.hidden_size
        self.config, self.weights = drafter.config, drafter.weights
        halves: tuple[nn.Module | None, nn.Module | None] = drafter.halves() or (None, None)
        self._of_context, self._of_state = halves
        self._joint: nn.Module | None = None
        head = drafter.lm_head[-1]
        self.start = mx.zeros(self._size, head.get("scales", head.weight).dtype)
        if self._of_state is not None and drafter.config.rnn and drafter.config.cell == "simple":
            self._joint, self._of_state = _stack(drafter.rnn_u, self._of_state), None
            self.start = self._joint.bias  # the products of zeros
        self._places: mx.array | None = None  # [V]
        if drafter.config.draft_vocab_size:
            index = mx.arange(drafter.config.head_outputs)
            none = mx.full(drafter.config.vocab_size, -1)
            self._places = none.at[drafter.to_target(index)].add(index + 1)
        mx.eval(self.start, self._of_context, self._of_state, self._joint, self._places)

    def advance(self, embedding: mx.array, state: mx.array) -> mx.array:
        """The embedding [..., H] of a token and the state [..., S] before it -> the state after it."""
        if self._joint is None:
            return self._drafter.advance(embedding, state)
        new = self._drafter.read_tokens(embedding)  # [..., H]
        after: mx.array = self._joint(nn.silu(new + state[..., : self._size]))  # [..., H + exit_dim]
        return after

    def prepare(self, context: mx.array) -> mx.array:
        """The context's share [..., exit_dim] of ``input_proj``; the context [..., F] if it is not split."""
        prepared: mx.array = context if self._of_context is None else self._of_context(context)
        return prepared

    def to_target(self, index: mx.array) -> mx.array:
        """Token ids for indices into the draft vocabulary."""
        return self._drafter.to_target(index)

    def from_target(self, tokens: mx.array) -> mx.array:
        """Indices into the draft vocabulary for token ids; -1: it lacks them."""
        last = self.config.vocab_size - 1  # a model may have been given more tokens since
        places = tokens if self._places is None else self._places[mx.minimum(tokens, last)]
        return mx.where(tokens <= last, places, -1)

    def logits(self, prepared: mx.array, state: mx.array) -> mx.array:
        """As ``Drafter.logits`` [..., Vd], of what ``prepare`` and ``advance`` returned."""
        logits: mx.array = self._drafter.lm_head[-1](self.body(prepared, state))
        return logits

    def body(self, prepared: mx.array, state: mx.array, memory: Recall | None = None) -> mx.array:
        """What the last layer reads [..., exit_dim]."""
        if self._of_context is None:
            return self._drafter.body(prepared, state)
        x = prepared + (state[..., self._size :] if self._of_state is None else self._of_state(state))
        if memory is not None:
            x = memory(x)
        for block in self._drafter.lm_head[:-1]:
            x = block(x)
        return x


def _stack(first: nn.Module, second: nn.Module) -> nn.Module:
    """One layer with the outputs of two that read the same input; only the first has a bias."""
    part = copy.copy(first)
    for name in ("weight", "scales", "biases"):
        if name in part:
            part[name] = mx.concatenate([first[name], second[name]])
    part["bias"] = mx.pad(part["bias"], (0, second["weight"].shape[0]))
    return part
