"""What machines that have some of a model's layers each exchange besides what mlx-lm's ``pipeline`` does."""

from collections.abc import Sequence

import mlx.core as mx


def from_all(
    logits: mx.array, last: mx.array, layers: Sequence[mx.array | None]
) -> tuple[mx.array, list[mx.array]]:
    """Outputs [B, n, H] of layers, each of which one machine has and the others give as None, on all of them.

    They are summed after all that gives ``last`` [B, n, H], and before what comes after the logits, which are
    returned too: what machines compute together, all must compute in the same order.
    """
    own = mx.stack([mx.zeros_like(last) if each is None else each for each in layers])
    found = mx.distributed.all_sum(mx.depends(own, last))
    return mx.depends(logits, found), list(found)
