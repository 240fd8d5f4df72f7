"""Plain decoding by mlx-lm, decoding by this package, and mlx-lm with a draft model, ready to be timed."""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..decoding.state import DraftShape
from ..engine.loop import Sampler
from ..model import SpeculativeModel
from ..options import DecodingOptions, never_dropped
from ..stop_texts import check_stop, until
from ..text import stream_generate
from .measure import Contender
from .report import BASELINE, DRAFT_MODEL, OURS


def mlx_lm_contender(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    options: DecodingOptions,
    draft_model: nn.Module | None = None,
) -> Contender:
    """``mlx_lm.stream_generate`` with mlx-lm's own sampler, and perhaps with its own draft model."""
    stop, sampler = check_stop(options.stop), _mlx_lm_sampler(options, tokenizer)
    given: dict[str, Any] = {"sampler": sampler, "draft_model": draft_model, **options.for_mlx_lm}

    def answer(ids: list[int], max_tokens: int) -> Iterator[Any]:
        if options.seed is not None:
            mx.random.seed(options.seed)
        begin: Any = mlx_lm.stream_generate if model.ranks is None else model.ranks.stream_generate
        responses = begin(model.model, tokenizer, ids, max_tokens=max_tokens, **given)
        return until(cast(Any, responses), stop) if stop else responses

    return Contender(BASELINE if draft_model is None else DRAFT_MODEL, answer)


def our_contender(
    model: SpeculativeModel, tokenizer: TokenizerWrapper, options: DecodingOptions, shape: DraftShape | None
) -> Contender:
    """This package with a draft shape; None leaves it to the package."""
    given = {**options.for_stream_generate(tokenizer), "shape": shape}
    del given["max_tokens"]  # which follows the prompt
    return Contender(OURS, partial(stream_generate, model, tokenizer, **given))


def _mlx_lm_sampler(options: DecodingOptions, tokenizer: TokenizerWrapper) -> Sampler | None:
    """mlx-lm's own sampler; None is greedy."""
    if options.temp == 0:
        return None
    special = never_dropped(tokenizer)
    sampler: Sampler = make_sampler(options.temp, **options.filters, xtc_special_tokens=special)
    return sampler
