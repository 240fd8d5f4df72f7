"""Plain decoding by mlx-lm, decoding by this package, and mlx-lm with a draft model, ready to be timed."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..commands.generate import decoding_options, draft_model_options, kv_options, mlx_lm_sampler
from ..decoding.state import DraftShape
from ..model import SpeculativeModel
from ..text import check_stop, stream_generate, until
from .measure import Contender
from .report import BASELINE, DRAFT_MODEL, OURS


def mlx_lm_contender(
    model: SpeculativeModel, tokenizer: TokenizerWrapper, args: argparse.Namespace, draft_model: bool = False
) -> Contender:
    """``mlx_lm.stream_generate`` with mlx-lm's own sampler; with ``--draft-model`` if asked."""
    stop = check_stop(args.stop)
    options: dict[str, Any] = {
        "sampler": mlx_lm_sampler(args, tokenizer),
        "prefill_step_size": args.prefill_step_size,
        "max_kv_size": args.max_kv_size,
        **kv_options(args),
        **(draft_model_options(args, tokenizer) if draft_model else {}),
    }

    def answer(ids: list[int], max_tokens: int) -> Iterator[Any]:
        if args.seed is not None:
            mx.random.seed(args.seed)
        responses = mlx_lm.stream_generate(model.model, tokenizer, ids, max_tokens, **options)
        return until(cast(Any, responses), stop) if stop else responses

    return Contender(DRAFT_MODEL if draft_model else BASELINE, answer)


def our_contender(
    model: SpeculativeModel, tokenizer: TokenizerWrapper, args: argparse.Namespace, shape: DraftShape | None
) -> Contender:
    """This package with a draft shape; None leaves it to the package."""
    options = {**decoding_options(args, tokenizer), "shape": shape, "lookup": args.lookup}
    del options["max_tokens"]  # which follows the prompt
    return Contender(OURS, partial(stream_generate, model, tokenizer, **options))
