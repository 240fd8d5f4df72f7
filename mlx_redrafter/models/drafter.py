"""The drafter: one recurrent step over the tokens drafted so far, and the head that reads it.

The network is Apple's ReDrafter (arXiv 2403.09919, section 3), with its parameter names, so that a
checkpoint in Apple's layout loads as it is. What may differ from it: the head may know only the tokens
the drafter ever proposes (``draft_to_target`` maps them back), its layers may be quantized, the context
may hold the states of more layers of the base model, the recurrent cell may be gated, and it may have a
*memory*: attention to what it noted of every token that the model has read, and with it *rare tokens*,
those of the text that the draft vocabulary lacks (``memory.py``).
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

Q_BITS = (2, 3, 4, 5, 6, 8)
Q_GROUP_SIZES = (32, 64, 128)
CELLS = ("simple", "gru")
MOST_HEADS, MOST_HEAD_SIZE = 64, 256  # of a memory, whose rows take room for every token of a text
MOST_RARE, MEMORY_EPS = 4096, 1e-5

Recall = Callable[[mx.array], mx.array]  # what blocks would read -> the same and what the memory adds


@dataclass(frozen=True)
class Quantization:
    """MLX's affine quantization: ``bits`` per weight, one scale and bias per ``group_size`` weights."""

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in Q_BITS:
            raise ValueError(f"quantization to {self.bits!r} bits: choose one of {Q_BITS}.")
        if type(self.group_size) is not int or self.group_size not in Q_GROUP_SIZES:
            raise ValueError(f"quantization group size {self.group_size!r}: choose one of {Q_GROUP_SIZES}.")


@dataclass(frozen=True)
class DrafterConfig:
    """The sizes of a drafter; the names are Apple's.

    Args:
        hidden_size: H, the width of the base model's embeddings and of the recurrent state.
        vocab_size: V, the rows of the base model's embedding.
        exit_dim: the width of the head's residual blocks.
        num_draft_layers: how many residual blocks the head has; may be 0.
        rnn: a recurrent cell; False sums embeddings instead.
        draft_vocab_size: Vd, the tokens the head knows; None for all of them.
        context_layers: layers of the base model, counted from 1, whose output the context holds besides
            the last hidden state.
        cell: simple, SiLU of a sum (Apple's), or gru, gated.
        quantization: of every linear layer whose input width is a multiple of the group size.
        memory_heads: M, heads with which it attends to the text; 0: it has no memory.
        memory_head_size: Dh, the width of each.
        memory_window: the last tokens that it attends to; None: all.
        rare_tokens: K, the last tokens of the text outside the draft vocabulary that it may draft too.

    Raises:
        ValueError: a size is not a positive integer, or the draft vocabulary exceeds the vocabulary.
    """

    hidden_size: int
    vocab_size: int
    exit_dim: int
    num_draft_layers: int
    rnn: bool = False
    draft_vocab_size: int | None = None
    context_layers: tuple[int, ...] = ()
    cell: str = "simple"
    quantization: Quantization | None = None
    memory_heads: int = 0
    memory_head_size: int = 64
    memory_window: int | None = None
    rare_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers"):
            _check_size(name, getattr(self, name), least=int(name != "num_draft_layers"))
        if not isinstance(self.rnn, bool):
            raise ValueError(f"rnn is {self.rnn!r}: it must be true or false.")
        if self.cell not in CELLS or (self.cell != "simple" and not self.rnn):
            raise ValueError(f"cell is {self.cell!r}: choose one of {CELLS}, and with rnn true.")
        layers = self.context_layers
        if not isinstance(layers, list | tuple) or any(type(x) is not int or x < 1 for x in layers):
            raise ValueError(f"context_layers is {layers!r}: it must be a list of layer numbers from 1.")
        object.__setattr__(self, "context_layers", tuple(layers))
        if self.draft_vocab_size is not None:
            _check_size("draft_vocab_size", self.draft_vocab_size)
            if self.draft_vocab_size > self.vocab_size:
                raise ValueError(
                    f"draft_vocab_size is {self.draft_vocab_size}, more than the vocabulary of "
                    f"{self.vocab_size}: choose at most that many draft tokens."
                )
        _check_size("memory_heads", self.memory_heads, least=0, most=MOST_HEADS)
        _check_size("memory_head_size", self.memory_head_size, most=MOST_HEAD_SIZE)
        _check_size("memory_window", 1 if self.memory_window is None else self.memory_window)
        _check_size("rare_tokens", self.rare_tokens, least=0, most=MOST_RARE)
        if self.rare_tokens and not (self.memory_heads and self.draft_vocab_size):
            raise ValueError(f"rare_tokens is {self.rare_tokens}: give memory_heads and draft_vocab_size.")
        if self.memory_heads and not self.can_split:
            raise ValueError(
                f"memory_heads is {self.memory_heads}, but no half of input_proj reads the context alone: "
                f"choose an exit_dim other than {self.head_inputs}, or another quantization."
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "DrafterConfig":
        """Read a parsed ``config.json``: unknown keys are left out, missing ones get Apple's default.

        Raises:
            ValueError: a size is missing or not valid.
        """
        for name in ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers"):
            if raw.get(name) is None:
                raise ValueError(
                    f"{name!r} is missing from the drafter's configuration: add it to config.json."
                )
        known = {name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None}
        if "quantization" in known:
            given = known["quantization"]
            if not isinstance(given, Mapping) or "bits" not in given:
                raise ValueError(
                    f"quantization is {given!r} in the drafter's configuration: "
                    "it needs 'bits' and 'group_size'."
                )
            known["quantization"] = Quantization(given["bits"], given.get("group_size", 64))
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads: the entries of ``config.json`` that are not their default."""
        optional = {name: value for name, value in asdict(self).items() if value not in (None, (), "simple")}
        if not self.memory_heads:
            optional = {name: x for name, x in optional.items() if not name.startswith("memory")}
        if not self.rare_tokens:
            optional.pop("rare_tokens")
        return {name: list(x) if isinstance(x, tuple) else x for name, x in optional.items()}

    @property
    def context_size(self) -> int:
        """F, the width of what the drafter reads of the base model."""
        return self.hidden_size * (1 + len(self.context_layers))

    @property
    def head_inputs(self) -> int:
        """F + H, the width of the context and the state together."""
        return self.context_size + self.hidden_size

    @property
    def head_outputs(self) -> int:
        """Vd, the number of draft tokens."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def cell_outputs(self) -> int:
        """The rows of the cell's two products: H, and for a gru H more for each gate."""
        return self.hidden_size * (3 if self.cell == "gru" else 1)

    @property
    def can_split(self) -> bool:
        """Whether ``input_proj`` is there, and is a layer of the context and one of the state."""
        splits = self.quantizes(self.context_size) or not self.quantizes(self.head_inputs)
        return self.head_inputs != self.exit_dim and splits

    def shapes(self, stored: Quantization | None = None) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor a drafter of these sizes has on disk, by name.

        Args:
            stored: how its linear layers are quantized on disk, if they are not in memory.
        """
        how = stored or self.quantization
        layers, width, blocks = {}, self.exit_dim, self.num_draft_layers  # name: inputs, outputs, has a bias
        if self.head_inputs != width:
            layers["input_proj"] = self.head_inputs, width, True
        layers |= {f"lm_head.{block}.linear": (width, width, True) for block in range(blocks)}
        layers[f"lm_head.{blocks}"] = width, self.head_outputs, False
        if self.rnn:
            layers["rnn_u"] = self.hidden_size, self.cell_outputs, True
            layers["rnn_w"] = self.hidden_size, self.cell_outputs, False
        shapes: dict[str, tuple[int, ...]] = {}
        if self.memory_heads:
            outputs = self.memory_heads * self.memory_head_size
            layers["memory_kv"] = width + self.hidden_size, 2 * outputs, False
            layers["memory_q"] = width, outputs, False
            layers["memory_out"] = outputs, width, False
            shapes["memory_q_norm.weight"] = (self.memory_head_size,)
            shapes["memory_decay"] = shapes["memory_sink"] = (self.memory_heads,)
        if self.rare_tokens:
            layers["rare_proj"] = width, self.hidden_size, False
            shapes["rare_bias"] = (1,)
        for name, (inputs, outputs, bias) in layers.items():
            shapes[f"{name}.weight"] = outputs, inputs
            if how is not None and inputs % how.group_size == 0:
                shapes[f"{name}.weight"] = outputs, inputs * how.bits // 32  # packed into uint32
                for part in ("scales", "biases"):
                    shapes[f"{name}.{part}"] = outputs, inputs // how.group_size
            if bias:
                shapes[f"{name}.bias"] = (outputs,)
        if self.draft_vocab_size is not None:
            shapes["draft_to_target"] = (self.draft_vocab_size,)
        return shapes

    def quantizes(self, inputs: int) -> bool:
        """Whether a linear layer with this input width is quantized."""
        return self.quantization is not None and inputs % self.quantization.group_size == 0


class ResidualBlock(nn.Module):
    """x + SiLU(W·x + b)."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = nn.Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = x + nn.silu(self.linear(x))
        return y


class Drafter(nn.Module):
    """Apple's recurrent drafter (arXiv 2403.09919, section 3).

    The state of a sequence starts as zeros [..., H]. For every token, ``advance`` the state with the
    base model's embedding of it, then read the ``logits`` of what follows. This is the network as it is
    trained and stored; it decodes as its ``FusedDrafter``.

    Args:
        config: the sizes.
        draft_to_target: int32 [Vd], the base model's token id of each draft token; None if the head
            knows the whole vocabulary.
    """

    def __init__(self, config: DrafterConfig, draft_to_target: mx.array | None = None):
        super().__init__()
        if (draft_to_target is None) != (config.draft_vocab_size is None):
            raise ValueError("draft_to_target and draft_vocab_size belong together: give both or neither.")
        self.config = config
        self._draft_to_target = draft_to_target  # the underscore keeps it out of the parameters
        if config.head_inputs != config.exit_dim:
            self.input_proj = nn.Linear(config.head_inputs, config.exit_dim)
        blocks = [ResidualBlock(config.exit_dim) for _ in range(config.num_draft_layers)]
        self.lm_head = [*blocks, nn.Linear(config.exit_dim, config.head_outputs, bias=False)]
        if config.rnn:
            self.rnn_u = nn.Linear(config.hidden_size, config.cell_outputs)
            self.rnn_w = nn.Linear(config.hidden_size, config.cell_outputs, bias=False)
        if config.memory_heads:
            outputs = config.memory_heads * config.memory_head_size
            self.memory_kv = nn.Linear(config.exit_dim + config.hidden_size, 2 * outputs, bias=False)
            self.memory_q = nn.Linear(config.exit_dim, outputs, bias=False)
            self.memory_q_norm = nn.RMSNorm(config.memory_head_size, MEMORY_EPS)
            self.memory_out = nn.Linear(outputs, config.exit_dim, bias=False)
            # Training begins with the network without it, and with distances that count a little.
            self.memory_out.weight = mx.zeros_like(self.memory_out.weight)
            self.memory_q_norm.weight = mx.full(config.memory_head_size, 2.0)
            self.memory_decay = mx.full(config.memory_heads, math.log(math.expm1(0.5)))
            self.memory_sink = mx.zeros(config.memory_heads)
        if config.rare_tokens:
            self.rare_proj = nn.Linear(config.exit_dim, config.hidden_size, bias=False)
            self.rare_bias = mx.zeros(1)
        if config.quantization is not None:
            nn.quantize(self, **asdict(config.quantization), class_predicate=self._is_quantized)

    def advance(self, embedding: mx.array, state: mx.array) -> mx.array:
        """One recurrent step: s_t = SiLU(W·E(tok) + U·s_{t-1} + b), or E(tok) + s_{t-1} without a cell.

        A gru has gates z and r (Cho et al., arXiv 1406.1078) around the same candidate n:
        s_t = (1 - z)·n + z·s_{t-1}, n = SiLU(W_n·E(tok) + r·(U_n·s_{t-1} + b_n)).

        Args:
            embedding: [..., H], the base model's embedding of the token.
            state: [..., H], the state before it.
        Returns:
            [..., H], the state after it.
        """
        return self.update_state(self.read_tokens(embedding), state)

    def read_tokens(self, embedding: mx.array) -> mx.array:
        """The cell's product with embeddings [..., H], which does not depend on the state."""
        new: mx.array = self.rnn_w(embedding) if self.config.rnn else embedding
        return new  # [..., H], three times as wide for a gru

    def update_state(self, new: mx.array, state: mx.array) -> mx.array:
        """The rest of ``advance``, with ``new`` from ``read_tokens``."""
        if not self.config.rnn:
            return new + state  # [..., H]
        old = self.rnn_u(state)
        if self.config.cell == "simple":
            after: mx.array = nn.silu(new + old)  # [..., H]
            return after
        size = self.config.hidden_size
        gates = mx.sigmoid(new[..., : 2 * size] + old[..., : 2 * size])  # [..., 2H]
        z, r = gates[..., :size], gates[..., size:]
        candidate: mx.array = nn.silu(new[..., 2 * size :] + r * old[..., 2 * size :])  # [..., H]
        return candidate + z * (state - candidate)

    def logits(self, context: mx.array, state: mx.array, memory: Recall | None = None) -> mx.array:
        """Unnormalised log-probabilities [..., Vd] of the next draft token.

        Args:
            context: [..., F], what the base model knew when it emitted the first token.
            state: [..., H], the state after the last token.
            memory: what is shown of it (``memory.py``); None: nothing.
        """
        logits: mx.array = self.lm_head[-1](self.body(context, state, memory))
        return logits

    def body(self, context: mx.array, state: mx.array, memory: Recall | None = None) -> mx.array:
        """What the last layer reads [..., exit_dim]; arguments as ``logits``, broadcast."""
        x: mx.array
        if (halves := self.halves()) is not None:
            x = halves[0](context) + halves[1](state)  # [..., exit_dim]
        else:
            shape = (*state.shape[:-1], context.shape[-1])
            x = mx.concatenate([mx.broadcast_to(context, shape), state], axis=-1)  # [..., F + H]
            if "input_proj" in self:
                x = self.input_proj(x)  # [..., exit_dim]
        if memory is not None:
            x = memory(x)
        for block in self.lm_head[:-1]:
            x = block(x)
        return x

    def halves(self) -> tuple[nn.Module, nn.Module] | None:
        """``input_proj`` as a layer of the context and one of the state; None if it cannot be split.

        So the context's product is computed once, however many states are read with it.
        """
        config = self.config
        return _split(self.input_proj, config.context_size, config.head_inputs) if config.can_split else None

    def to_target(self, index: mx.array) -> mx.array:
        """Token ids of the base model for indices into the draft vocabulary; any shape, kept."""
        return index if self._draft_to_target is None else self._draft_to_target[index]

    def weights(self) -> dict[str, mx.array]:
        """Every tensor of the drafter by its name on disk."""
        named = dict(tree_flatten(self.parameters()))
        return named if self._draft_to_target is None else {**named, "draft_to_target": self._draft_to_target}

    def _is_quantized(self, _path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and self.config.quantizes(module.weight.shape[-1])


def _split(layer: nn.Module, cut: int, inputs: int) -> tuple[nn.Module, nn.Module]:
    """A linear layer as one of its first ``cut`` inputs, which keeps the bias, and one of the others."""
    first, second = copy.copy(layer), copy.copy(layer)
    for name in ("weight", "scales", "biases"):
        if name in layer:  # of each, a column holds equally many inputs
            parts = mx.split(layer[name], [layer[name].shape[1] * cut // inputs], axis=1)
            first[name], second[name] = map(mx.contiguous, parts)
    second.pop("bias")
    return first, second


def _check_size(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(
            f"{name} is {value!r} in the drafter's configuration: it must be an integer {limit}."
        )
