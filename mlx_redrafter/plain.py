"""Decoding by mlx-lm itself, without drafts."""

import traceback
from collections.abc import Iterator
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .decoding.chance import seeds_at
from .decoding.sampling import draw, filter_settings
from .engine.engine import Request
from .model import load

UNKNOWN_TOKEN = "the model said a token that its tokenizer does not have: use the model's own tokenizer."


def decode(
    model: nn.Module, tokenizer: TokenizerWrapper, request: Request, vocabulary: int, **options: Any
) -> Iterator[GenerationResponse]:
    """What a request asks for, with the random numbers that drafting would use.

    Args:
        vocabulary: V, or more.
        **options: those of ``mlx_lm.stream_generate`` that a request has not; and ``ranks``, a model's.
    """
    sampling, places = request.sampling, count(len(request.prompt) - 1)
    filters = filter_settings([sampling], vocabulary)

    def sample(logprobs: mx.array) -> mx.array:
        rows = logprobs.reshape(1, -1, logprobs.shape[-1])
        here = mx.array([[next(places) for _ in range(rows.shape[1])]])
        return draw(rows, seeds_at(request.seeds[None], here), filters).reshape(logprobs.shape[:-1])

    given = {name: value for name, value in vars(sampling).items() if "penalty" in name or "context" in name}
    if sampling.repetition_penalty == 1:
        del given["repetition_penalty"]
    own = make_logits_processors(dict(sampling.logit_bias), **given)
    if request.grammar is not None:
        own.append(request.grammar.processor())
    responses = (options.pop("ranks", None) or mlx_lm).stream_generate(
        model,
        tokenizer,
        list(request.prompt),
        prompt_cache=request.caches,
        sampler=request.sampler or (sample if filters else None),
        logits_processors=[*own, *request.processors] or None,
        **options,
    )
    return _telling(responses)


def _telling(responses: Iterator[GenerationResponse]) -> Iterator[GenerationResponse]:
    try:
        yield from responses
    except (IndexError, TypeError) as error:
        if not any(frame.name == "add_token" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise ValueError(UNKNOWN_TOKEN) from error


def load_draft_model(name: str | None, dtype: str, tokenizer: TokenizerWrapper) -> nn.Module | None:
    """mlx-lm's draft model, if one is asked for; ``ValueError`` if its tokenizer is another."""
    if name is None:
        return None
    model, its_tokenizer = load(name, drafter=None, dtype=dtype)
    if its_tokenizer.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"--draft-model {name} has another tokenizer than the model: name another.")
    return model.model
