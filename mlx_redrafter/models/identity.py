"""Which base model a drafter belongs to: told by its token embedding, in any precision."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

DIGEST_ROWS = 64
DIGEST_BITS = 4 * DIGEST_ROWS
DIGITS = f"[0-9a-f]{{{DIGEST_BITS // 4}}}"
DIGEST_TAG = "redrafter-embedding-"
TAG = "mlx-redrafter"  # of drafters on Hugging Face's hub
SAME_MODEL = 0.2  # of the digest's bits may differ between two precisions of one model
EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings")


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model a drafter belongs to, whatever its precision.

    Args:
        model_type: the architecture, as in the base's config.json; told to people, not compared.
        hidden_size: H.
        vocab_size: V, the rows of the embedding.
        embedding_digest: 64 hexadecimal digits, see ``embedding_digest``.
        name: where the model came from; told to people, not compared.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    embedding_digest: str
    name: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(DIGITS, str(self.embedding_digest)):
            raise ValueError(f"embedding_digest is {self.embedding_digest!r}: convert the drafter again.")

    def matches(self, other: "BaseIdentity") -> bool:
        """Whether both are the same model, in any precision."""
        same_sizes = (self.hidden_size, self.vocab_size) == (other.hidden_size, other.vocab_size)
        differing = (int(self.embedding_digest, 16) ^ int(other.embedding_digest, 16)).bit_count()
        return same_sizes and differing <= SAME_MODEL * DIGEST_BITS

    def tags(self) -> list[str]:
        """Of its drafters on Hugging Face's hub: that of all drafters, its sizes, its digest."""
        sizes = f"redrafter-{self.hidden_size}x{self.vocab_size}"
        return [TAG, sizes, f"{DIGEST_TAG}{self.embedding_digest}"]

    def may_have(self, tags: Iterable[str]) -> bool:
        """Whether a drafter with these tags may be for this model: it records no other's digest."""
        digests = [tag.removeprefix(DIGEST_TAG) for tag in tags if re.fullmatch(DIGEST_TAG + DIGITS, tag)]
        return not digests or any(self.matches(replace(self, embedding_digest=each)) for each in digests)

    def __str__(self) -> str:
        sizes = f"hidden size {self.hidden_size}, vocabulary {self.vocab_size}"
        known = f"{self.model_type}, {sizes}, embedding {self.embedding_digest[:8]}"
        return f"{self.name or 'a model'} ({known})"


def digest_rows(vocab_size: int) -> list[int]:
    """The 64 evenly spaced token ids whose embeddings identify a model."""
    return [row * vocab_size // DIGEST_ROWS for row in range(DIGEST_ROWS)]


def embedding_digest(rows: np.ndarray[Any, Any]) -> str:
    """A 256-bit sketch of an embedding that survives quantization: signs of random projections.

    The sign of a projection changes only where rounding turns a vector by more than its angle to a
    random plane, so few bits differ between precisions of one model and half of them between models.
    The mean row is taken out first, because the rows of one model share a direction.

    Args:
        rows: float [64, H], the embeddings of ``digest_rows``.
    Returns:
        64 hexadecimal digits.
    """
    rows = np.asarray(rows, np.float32)  # [64, H]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    rows = rows - rows.mean(axis=0)
    planes = np.random.RandomState(0).standard_normal((rows.shape[1], DIGEST_BITS // DIGEST_ROWS))  # [H, 4]
    return np.packbits(rows @ planes.astype(np.float32) > 0).tobytes().hex()


def identity_of(model: nn.Module, name: str = "") -> BaseIdentity:
    """The identity of an mlx-lm model, quantized or not.

    Raises:
        ValueError: it has no token embedding.
    """
    embedding = token_embedding(model)
    if embedding is None:
        raise ValueError(f"{name or type(model).__name__} has no token embedding: it cannot have a drafter.")
    vocab_size = embedding.weight.shape[0]
    rows = np.array(embedding(mx.array(digest_rows(vocab_size))).astype(mx.float32))  # [64, H]
    args = getattr(model, "args", None)
    model_type = getattr(model, "model_type", None) or getattr(args, "model_type", "?")
    return BaseIdentity(str(model_type), rows.shape[1], vocab_size, embedding_digest(rows), name)


def token_embedding(model: nn.Module) -> Any | None:
    """The token embedding of an mlx-lm model: one with a usual name, else the one with the most rows."""
    embeddings = [
        (path.rsplit(".", 1)[-1] in EMBEDDING_NAMES, module.weight.shape[0], module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    ]
    return max(embeddings, key=lambda found: found[:2])[-1] if embeddings else None
