"""From a prompt to text, token by token, with mlx-lm's responses and statistics."""

import operator
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, GenerationResponse, wired_limit
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .chat import encode_text
from .decoding.layers import Layers, Quantization
from .decoding.sampling import Sampling
from .decoding.state import DraftShape
from .engine.engine import CHUNK, UNLIMITED, Request
from .engine.loop import Chooser, Emitted, Fixed, Sampler
from .model import SpeculativeModel
from .models.target import kept_as

if TYPE_CHECKING:
    from .engine.grammar import Grammar
    from .engine.prefixes import Prefixes

# Options of mlx-lm's decoding that a drafter cannot follow (they need caches or logits of another kind).
PLAIN_ONLY = ("input_embeddings", "draft_model")
QUANTIZATION = {"bits": "kv_bits", "group_size": "kv_group_size", "start": "quantized_kv_start"}
# Options that do nothing without another one.
DETAILS = {"kv_group_size": "kv_bits", "quantized_kv_start": "kv_bits", "num_draft_tokens": "draft_model"}
MOST_DRAFTED = 1024  # tokens per step; the mask of so many nodes is as large as usual caches

# By device, streams of generations that have ended, to be used again: a stream keeps a thread for good.
_idle_streams: defaultdict[str, list[mx.Stream]] = defaultdict(list)


@dataclass
class Response(GenerationResponse):  # type: ignore[misc]
    """mlx-lm's response for one token, and how the drafter has fared so far.

    Attributes:
        steps: verification steps so far.
        tokens_per_step: tokens emitted per step (the first token comes from the prompt, without one).
        acceptance: for each depth, the share of the steps that emitted the token drafted there.
        copied: tokens that came from the text itself where the drafter had none.
        waited: seconds in which the device waited for the host to hand over the next step.
        shapes: how many steps each draft shape was used for (one object for all responses).
    """

    steps: int = 0
    tokens_per_step: float = 0.0
    acceptance: tuple[float, ...] = ()
    copied: int = 0
    waited: float = 0.0
    shapes: Mapping[DraftShape, int] = field(default_factory=dict)


class _Drafted(Response):
    """Keeps logits, and computes log-probabilities in the thread that asks for them, if any does."""

    logprobs = property(
        lambda self: _logprobs(self.logits), lambda self, value: setattr(self, "logits", value)
    )


def stream_generate(
    model: SpeculativeModel | nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | Sequence[int],
    max_tokens: int = 256,
    *,
    shape: DraftShape | None = None,
    lookup: int | None = None,
    sampling: Sampling | None = None,
    sampler: Sampler | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    grammar: "Grammar | None" = None,
    prefill_step_size: int = CHUNK,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    draft: bool = True,
    prefixes: "Prefixes | None" = None,
    **options: Any,
) -> Iterator[Response]:
    """Generate text; stands in for ``mlx_lm.stream_generate``.

    Tokens are drafted by the drafter, if there is one, and copied from the text itself where it repeats;
    every one that is emitted has exactly the model's own distribution. With ``draft=False``, with options
    that drafting cannot follow, and for models not from ``load``, mlx-lm itself decodes.

    Args:
        model: from ``load``, or any mlx-lm model.
        tokenizer: from ``load``.
        prompt: text or token ids.
        max_tokens: tokens to generate at most; -1 is no limit.
        shape: how much to draft at each step; by default the shape that is fastest on this machine for
            this text is used, plain decoding included (``step_times.py``).
        lookup: tokens that the automatic shape may copy from the text per step; 0: none.
        sampling: temperature and filters; greedy by default.
        sampler: instead of ``sampling``, a function from log-probabilities [N, V] to tokens [N], such as
            one of mlx-lm's; rows must be sampled independently (XTC's, which share a coin, are not).
        seed: makes sampling repeatable; without it, MLX's global random state is used.
        stop: texts that end the generation; they are not part of the output.
        grammar: what the output must be, such as JSON of a schema (``mlx_redrafter.engine.grammar``).
        prefill_step_size: prompt tokens processed at once.
        prompt_progress_callback: called with prompt tokens processed and their total.
        prompt_cache: mlx-lm caches of an earlier part of the text.
        max_kv_size: tokens the cache may hold, as in mlx-lm.
        draft: False decodes with mlx-lm.
        prefixes: texts kept for reuse; what mlx-lm decodes does without.
        **options: other options of ``mlx_lm.generate_step``. Those of a quantized cache (``kv_bits``,
            ``kv_group_size``, ``quantized_kv_start``) are followed, the others switch drafting off.

    Yields:
        One response per token; the last one has a ``finish_reason``, "stop" or "length".

    Raises:
        ValueError: an empty prompt, one longer than the model's context, or an option out of range.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if not isinstance(model, SpeculativeModel):
        model, draft = SpeculativeModel(model, None), False
    if stop or isinstance(stop, str):
        from .stop_texts import check_stop, until

        stop = check_stop(stop)
    if prefill_step_size < 1:
        raise ValueError(f"prefill step size {prefill_step_size} is not usable: give 1 or more.")
    ids = _encode(model, tokenizer, prompt, prompt_cache)
    options = _effective(options)
    if sampling is not None and sampler is not None:
        raise ValueError("sampling and sampler are both given: give one of them.")
    request = Request(
        ids,
        UNLIMITED if max_tokens == -1 else max_tokens,
        sampling or Sampling(),
        seed,
        frozenset(tokenizer.eos_token_ids),
        options.pop("logits_processors", ()),
        sampler,
        grammar,
        prompt_cache,
        _quantization(options),
        progress=prompt_progress_callback or (lambda done, total: None),
    )
    if seed is not None:
        mx.random.seed(seed)  # for functions of the caller's
    if draft and _can_draft(model, request, max_kv_size, options):
        policy = model.make_policy(lookup) if shape is None else Fixed(_usable(shape, model))
        responses = _speculative(model, tokenizer, request, policy, prefill_step_size, prefixes)
        responses = _in_any_thread(responses)
    else:
        from .plain import decode

        plain = decode(
            model.model,
            tokenizer,
            request,
            model.vocabulary or 1 << 30,
            ranks=model.ranks,
            max_tokens=max_tokens,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=prompt_progress_callback,
            max_kv_size=max_kv_size,
            **options,
        )
        responses = (Response(**vars(response)) for response in plain)
    return until(responses, stop) if stop else responses


def generate(
    model: SpeculativeModel | nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | Sequence[int],
    verbose: bool = False,
    **options: Any,
) -> str:
    """The whole text that ``stream_generate`` yields; stands in for ``mlx_lm.generate``.

    With ``verbose``, text and statistics are printed as they come.
    """
    text = ""
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **options):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print("", "=" * 10, statistics(response), sep="\n")
    return text


def statistics(last: Response) -> str:
    """mlx-lm's statistics of a finished generation, and the drafter's if there was one."""
    lines = [
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {last.peak_memory:.3f} GB",
    ]
    if last.steps:
        depths = " ".join(f"{share:.2f}" for share in last.acceptance)
        lines.insert(2, f"Drafting: {last.tokens_per_step:.2f} tokens per step, acceptance by depth {depths}")
    return "\n".join(lines)


def _encode(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | Sequence[int],
    prompt_cache: Sequence[Any] | None,
) -> list[int]:
    if isinstance(prompt, str):
        ids = encode_text(tokenizer, prompt)
    else:
        ids = _flat(prompt.tolist() if isinstance(prompt, mx.array) else prompt)
    held = getattr(prompt_cache[0], "offset", 0) if prompt_cache else 0
    model.check_prompts([ids], held, "the prompt")
    return ids


def _flat(prompt: Any) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise ValueError(
            f"the prompt is no text and no flat list of token ids ({error}): give one."
        ) from error


def _effective(options: dict[str, Any]) -> dict[str, Any]:
    """Without options that ask for nothing: None, an empty list, a detail of an absent option."""
    empty = [name for name, value in options.items() if value is None or value in ([], ())]
    given = {name: value for name, value in options.items() if name not in empty}
    return {name: value for name, value in given.items() if DETAILS.get(name, name) in given}


def _quantization(options: Mapping[str, Any]) -> Quantization | None:
    """What mlx-lm's options say of a quantized cache."""
    if "kv_bits" not in options:
        return None
    given = {field: options[name] for field, name in QUANTIZATION.items() if name in options}
    return Quantization(**{"start": DEFAULT_QUANTIZED_KV_START, **given})


def check_shape(shape: DraftShape, known: int | None = None) -> None:
    """Raise ``ValueError`` if a shape drafts too much, or more beams than the ``known`` draft tokens."""
    if known is not None and shape.width > known:
        raise ValueError(
            f"beam width {shape.width} exceeds the drafter's vocabulary of {known} tokens: give fewer."
        )
    drafted = shape.width * min(shape.length, shape.depth) + shape.lookup
    if drafted > MOST_DRAFTED:
        raise ValueError(
            f"beam width {shape.width}, length {shape.length} and lookup {shape.lookup} draft {drafted} "
            f"tokens per step: give values that draft at most {MOST_DRAFTED}."
        )


def _usable(shape: DraftShape, model: SpeculativeModel) -> DraftShape:
    """The shape, without beams if there is no drafter."""
    if model.drafter is None and shape.width:
        shape = DraftShape(0, 0, None, min(shape.lookup, shape.size - 1))
    check_shape(shape, model.drafter.config.head_outputs if model.drafter else None)
    return shape


def _can_draft(
    model: SpeculativeModel, request: Request, max_kv_size: int | None, options: Mapping[str, Any]
) -> bool:
    """Whether drafting can do what is asked; warns where the model, or a drafter that is there, cannot."""
    if (runner := model.prepare_or_tell()) is None:
        return False
    unknown = [name for name in options if name not in (*PLAIN_ONLY, *QUANTIZATION.values())]
    reasons = [name for name in PLAIN_ONLY if name in options] or unknown
    needed = len(request.prompt) + request.max_tokens
    if max_kv_size is not None and request.caches is None and needed > max_kv_size:
        reasons.append(f"max_kv_size={max_kv_size}, less than prompt and max tokens together")
    for kind in {type(x) for x in request.caches or ()} - {KVCache, QuantizedKVCache, RotatingKVCache}:
        reasons.append(f"a prompt cache of {kind.__name__}")
    if request.caches is not None and not runner.target.suits(request.caches):
        reasons.append("a prompt cache of other windows")
    kept = {kept_as(cache) for cache in request.caches or ()}
    if len(kept) > 1:
        reasons.append("a prompt cache of several kinds")
    try:
        for how in filter(None, {request.kv, *kept}):
            from .models.prompt_caches import check_quantized

            check_quantized(runner.target, how)
    except ValueError:
        reasons.append("kv_bits")
    if reasons and model.drafter is not None:
        warnings.warn(f"decoding without the drafter: it cannot follow {', '.join(reasons)}.", stacklevel=3)
    return not reasons


def _logprobs(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _in_any_thread(responses: Iterator[Response]) -> Iterator[Response]:
    """Resume ``responses`` on a stream of their own: MLX's others are bound to the thread that began."""
    idle = _idle_streams[str(mx.default_device())]
    stream = idle.pop() if idle else mx.new_thread_unsafe_stream(mx.default_device())
    try:
        while True:
            with mx.stream(stream):
                response = next(responses, None)
            if response is None:
                return
            yield response
    finally:
        with mx.stream(stream):
            responses.close()  # type: ignore[attr-defined]
        idle.append(stream)


def _speculative(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    request: Request,
    policy: Chooser,
    chunk: int,
    prefixes: "Prefixes | None",
) -> Iterator[Response]:
    engine = model.engine(policy, chunk, prefixes=prefixes)  # as the model is at the first token
    target, kept = engine.target, request.caches
    rows = len(request.prompt) - 1 + (kept[0].offset if kept else 0)
    left: list[Layers] = []
    request.release = None if kept is None else lambda layers, rows: left.append(layers)
    with wired_limit(target.model):
        writer = Writer(tokenizer, len(request.prompt), request.max_tokens)
        engine.submit(request)
        try:
            while not writer.finished:
                for emitted in engine.step():
                    if emitted.error is not None:
                        raise vars(emitted).pop("error")  # this frame must not hold what holds it
                    yield from writer.write(emitted)
        finally:
            engine.close()
            if kept is not None and left:  # the caller may have left in the middle of a step
                from .models.prompt_caches import quantize, to_prompt_cache

                to_prompt_cache(left.pop(), rows + writer.tokens, kept, request.kv)
                last = writer.last if writer.tokens else request.prompt[-1]
                target.forward(mx.array([[last]]), kept)  # mlx-lm leaves the last token in them too
                quantize(kept, request.kv)
                mx.eval([cache.state for cache in kept])


class Writer:
    """Turns emitted tokens into responses, and keeps the statistics."""

    def __init__(self, tokenizer: TokenizerWrapper, prompt_tokens: int, max_tokens: int) -> None:
        self.tokenizer, self.detokenizer = tokenizer, tokenizer.detokenizer
        self.prompt_tokens, self.max_tokens = prompt_tokens, max_tokens
        self.accepted: list[int] = []  # for each depth, the steps that emitted the token drafted there
        self.tokens = self.steps = self.last = self.copied = 0
        self.shapes: Counter[DraftShape] = Counter()
        self.waited = 0.0
        self.finished = False
        self.start = time.perf_counter()

    def _begin(self) -> None:
        """The prompt has been read and the first token is there."""
        handed_in, self.start = self.start, time.perf_counter()
        self.prompt_tps = self.prompt_tokens / (self.start - handed_in)

    def _count(self, emitted: Emitted) -> None:
        """Take a step into the statistics."""
        self.steps += 1
        self.shapes[emitted.shape] += 1
        self.waited += emitted.waited
        self.copied += sum(rank < 0 for rank in emitted.ranks)
        self.accepted += [0] * (emitted.shape.depth - len(self.accepted))
        for depth in range(emitted.drafted):
            self.accepted[depth] += 1

    def _add(self, token: int) -> None:
        try:
            self.detokenizer.add_token(token)
        except (IndexError, TypeError) as error:
            from .plain import UNKNOWN_TOKEN

            raise ValueError(UNKNOWN_TOKEN) from error

    def write(self, emitted: Emitted) -> Iterator[Response]:
        """The responses for the tokens of a step; the first step is the prompt's last."""
        assert emitted.logits is not None
        self._count(emitted) if self.tokens else self._begin()
        logits = [emitted.logits[place] for place in range(len(emitted.tokens))]
        mx.async_eval(logits)  # which another thread could not
        for place, token in enumerate(emitted.tokens):
            self.tokens += 1
            self.last = token
            ended = token in self.tokenizer.eos_token_ids
            if not ended:
                self._add(token)
            self.finished = ended or self.tokens == self.max_tokens
            if self.finished:
                self.detokenizer.finalize()
            yield _Drafted(
                text=self.detokenizer.last_segment,
                token=token,
                logprobs=logits[place],
                from_draft=place < emitted.drafted,
                prompt_tokens=self.prompt_tokens,
                prompt_tps=self.prompt_tps,
                generation_tokens=self.tokens,
                generation_tps=self.tokens / (time.perf_counter() - self.start),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=("stop" if ended else "length") if self.finished else None,
                steps=self.steps,
                tokens_per_step=(self.tokens - 1) / self.steps if self.steps else 0.0,
                acceptance=tuple(hits / self.steps for hits in self.accepted) if self.steps else (),
                copied=self.copied,
                waited=self.waited,
                shapes=self.shapes,
            )
