"""``mlx-redrafter generate``."""

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from tqdm import tqdm

from ..conversations import render
from ..decoding.sampling import Sampling
from ..decoding.state import DraftShape
from ..engine import backend
from ..engine.engine import CHUNK
from ..engine.loop import Sampler
from ..loading.prompt_cache import PromptCache, check_quantization, fit, read_prompt_cache, same_model
from ..model import DEFAULT_MODEL, DTYPES, SpeculativeModel, load
from ..models.bundle import parse_config, read_config, resolve_drafter
from ..text import Response, check_shape, statistics, stream_generate

USUAL = DraftShape(2, 4)  # where some of its numbers are asked for, and not the others
DEFAULT_PROMPT = "hello"
GREEN, PLAIN = "\033[32m", "\033[0m"
RANGES: dict[str, tuple[float, float | None]] = {  # of the flags' numbers: the least, the most
    "lookup": (0, None),
    "max_kv_size": (1, None),
    "context_length": (1, None),
    "prefill_step_size": (1, None),
    "quantized_kv_start": (0, None),
    "min_tokens_to_keep": (1, None),
    "num_draft_tokens": (1, None),
    "seed": (0, (1 << 64) - 1),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # what a terminal may obey


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``mlx_lm.generate``, and the drafter's."""
    add = parser.add_argument
    add(
        "--prompt",
        "-p",
        default=DEFAULT_PROMPT,
        help="what to say to the model; - reads standard input. This and all other texts are taken as typed: "
        "a line break is the shell's, such as $'one\\ntwo'",
    )
    add("--prefill-response", help="beginning of the answer, from which the output goes on")
    add("--prompt-cache-file", type=Path, help="a prompt's cache, saved by mlx_lm.cache_prompt")
    add_decoding_arguments(parser)
    add("--verbose", type=_boolean, default=True, help="False prints the text alone")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--show-draft", action="store_true", help="colour drafted tokens, in a terminal")
    output.add_argument("--json", action="store_true", help="print one JSON record and nothing else")


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model decodes and how, whatever the prompts are."""
    add = parser.add_argument
    add("--model", help=f"folder, GGUF file or Hugging Face repository (default: {DEFAULT_MODEL})")
    add("--adapter-path", help="folder of LoRA adapters to apply")
    add("--trust-remote-code", action="store_true", help="let the model's repository run its code")
    add("--system-prompt", help="system message for the chat template")
    add("--ignore-chat-template", action="store_true", help="give the model the prompt as it is")
    add("--use-default-chat-template", action="store_true", help="accepted, as by mlx-lm: it is the default")
    add("--chat-template-config", help="options of the chat template, a JSON object")
    add("--max-tokens", "-m", type=int, default=100, help="tokens to generate at most; -1: no limit")
    add("--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability")
    add("--min-p", type=float, default=0.0, help="drop tokens less likely than this share of the likeliest")
    add("--top-k", type=int, default=0, help="sample from this many of the likeliest tokens; 0: all")
    add("--min-tokens-to-keep", type=int, default=1, help="that --min-p must leave")
    add("--xtc-probability", type=float, default=0.0, help="of XTC sampling")
    add("--xtc-threshold", type=float, default=0.0, help="probability above which XTC drops tokens")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--stop", action="append", default=[], help="text that ends the output; may be given several times")
    add("--extra-eos-token", nargs="+", default=[], help="further tokens, or their ids, that end the output")
    add("--context-length", type=int, help="tokens a prompt may have (default: what the model's config says)")
    add("--max-kv-size", type=int, help="tokens the cache may hold")
    add("--prefill-step-size", type=int, default=CHUNK, help="prompt tokens processed at once")
    add("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="of a quantized cache (without drafter)")
    add("--kv-group-size", type=int, choices=(32, 64, 128), default=64, help="of the quantized cache")
    add("--quantized-kv-start", type=int, default=5000, help="first step with a quantized cache")
    add("--drafter", default="auto", help="folder, shipped name, repository; auto: the one that ships; none")
    add(
        "--beam-width",
        type=_beam_width,
        default="auto",
        help="beams of the draft; auto: the shape that is fastest here for this text",
    )
    add("--beam-length", type=int, help="tokens drafted per step, the guaranteed one not counted")
    add("--max-nodes", type=int, help="tree nodes to verify, the root included")
    add("--lookup", type=int, help="tokens to copy from the text per step (default: part of auto, else 0)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; a float type dequantizes")
    add("--no-draft", action="store_true", help="plain decoding by mlx-lm, whatever is to be drafted")
    add("--draft-model", help="mlx-lm's speculative decoding with this small model, instead of a drafter")
    add("--num-draft-tokens", type=int, default=3, help="tokens that --draft-model drafts at once")
    add("--quantize-activations", "-qa", action="store_true", help="as the weights of each layer are")


def run(args: argparse.Namespace) -> int:
    """Generate, printing text as it is accepted and then statistics, or one JSON record."""
    _check_text("prompt", args.prompt, empty=True)
    _check_text("prefill_response", args.prefill_response, empty=True)
    shape = check_decoding(args)
    prompt = _standard_input() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text with --prompt, or pipe it to --prompt -.")
    args.no_draft = args.no_draft or args.draft_model is not None
    drafter = choose_drafter(args, shape)
    cache = _read_prompt_cache(args)
    with warnings.catch_warnings(record=True) as notes:
        model, tokenizer = load_model(args, drafter, cache.tokenizer_config if cache else None)
        if cache:
            fit(cache, model.model, args.prompt_cache_file)
        if args.prefill_response or is_raw(args, tokenizer):
            tokenizer = Continuing(tokenizer)
        ids = encode_prompt(tokenizer, prompt, args, cache is not None)
        responses = stream_generate(
            model,
            tokenizer,
            ids,
            shape=shape,
            lookup=args.lookup,
            prompt_progress_callback=_progress(len(ids), args.prefill_step_size),
            prompt_cache=cache.layers if cache else None,
            **decoding_options(args, tokenizer),
            **draft_model_options(args, tokenizer),
        )
    responses = _with_notes(responses, [str(note.message) for note in notes])
    if args.json:
        _print_record(responses, model, args, shape)
    else:
        _print(responses, args.show_draft, args.verbose)
    return 0


def check_decoding(args: argparse.Namespace) -> DraftShape | None:
    """Refuse decoding flags that no model can follow; the shape they ask for, None for the usual one."""
    for name in ("model", "drafter", "adapter_path", "draft_model"):
        _check_text(name, getattr(args, name))
    _check_text("system_prompt", args.system_prompt, empty=True)
    for text in args.stop:
        _check_text("stop", text)
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= (math.inf if most is None else most):
            usable = f"{least} or more" if most is None else f"{least} to {most}"
            raise ValueError(f"{_flag(name)} {value} is not usable: give {usable}.")
    if args.max_tokens < 1 and args.max_tokens != -1:
        raise ValueError(f"--max-tokens {args.max_tokens} is not usable: give 1 or more, or -1 for no limit.")
    try:
        options = json.loads(args.chat_template_config or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--chat-template-config is not JSON ({error}): give an object.") from error
    if not isinstance(options, dict):
        raise ValueError(f"--chat-template-config {args.chat_template_config} is no JSON object: give one.")
    sampling_of(args)
    if args.beam_width == "auto" and args.beam_length is None and args.max_nodes is None:
        return None
    width = USUAL.width if args.beam_width == "auto" else args.beam_width
    length = USUAL.length if args.beam_length is None else args.beam_length
    return DraftShape(width, length, args.max_nodes, args.lookup or 0)


def choose_drafter(args: argparse.Namespace, shape: DraftShape | None) -> str | Path | None:
    """What ``load`` is to be told of the drafter."""
    drafter = None if args.no_draft or args.drafter == "none" else args.drafter
    known = None
    if drafter not in (None, "auto"):  # what can be checked before the model is there
        drafter = resolve_drafter(drafter)
        known = parse_config(drafter, read_config(drafter)).head_outputs
    if shape is not None:
        check_shape(shape, known)
    return drafter


def load_model(
    args: argparse.Namespace, drafter: str | Path | None, tokenizer_config: dict[str, Any] | None = None
) -> tuple[SpeculativeModel, TokenizerWrapper]:
    """The model with its drafter and tokenizer; warns of a drafter that was not found, and of idle flags."""
    model, tokenizer = load(
        args.model,
        tokenizer_config,
        drafter=drafter,
        dtype=args.dtype,
        model_config={"quantize_activations": True} if args.quantize_activations else None,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    model.context_length = args.context_length or model.context_length
    tokenizer.model_max_length = sys.maxsize  # the context is checked, transformers need not warn
    for token in args.extra_eos_token:
        tokenizer.eos_token_ids.add(_token_id(token, tokenizer))
    if model.drafter is None and drafter is not None:
        warnings.warn(f"no drafter ships for {args.model}: name one with --drafter.", stacklevel=1)
    _warn_of_idle_flags(args, is_raw(args, tokenizer))
    return model, tokenizer


def _warn_of_idle_flags(args: argparse.Namespace, raw: bool) -> None:
    """Say which flags were given and do nothing; ``raw``: the prompt gets no template."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    cached = getattr(args, "prompt_cache_file", None) is not None
    beams = ("beam_width", "beam_length")
    for idle, why, flags in (
        (args.temp == 0, "with --temp 0, which is greedy", ("top_p", "top_k", "min_p", "xtc_probability")),
        (args.min_p == 0, "without --min-p", ("min_tokens_to_keep",)),
        (args.xtc_probability == 0, "without --xtc-probability", ("xtc_threshold",)),
        (args.kv_bits is None and not cached, "without --kv-bits", ("kv_group_size",)),
        (args.kv_bits is None, "without --kv-bits", ("quantized_kv_start",)),
        (args.draft_model is None, "without --draft-model", ("num_draft_tokens",)),
        (args.no_draft and args.draft_model is None, "where nothing is drafted", ("show_draft",)),
        (args.no_draft and args.draft_model, "with --draft-model", ("drafter", *beams, "lookup")),
        (args.drafter == "none", "with --drafter none", beams),
        (raw, "without a chat template", ("system_prompt", "prefill_response", "chat_template_config")),
        (cached, "with --prompt-cache-file: the cache decides", ("system_prompt", "max_kv_size")),
    ):
        for flag in flags if idle else ():
            if getattr(args, flag, None) not in (None, 0, "none", parser.get_default(flag)):
                warnings.warn(f"{_flag(flag)} does nothing {why}.", stacklevel=1)


def _token_id(token: str, tokenizer: TokenizerWrapper) -> int:
    """The id of a token that is given as an id or as text."""
    known = tokenizer.get_vocab()
    ids = [int(token)] if token.isdecimal() else [known[token]] if token in known else []
    ids = ids or [i for i in tokenizer.encode(token, add_special_tokens=False) if i != tokenizer.unk_token_id]
    if len(ids) == 1 and ids[0] in known.values():
        return ids[0]
    raise ValueError(f"--extra-eos-token {token!r} is not one token of this model: name one, or use --stop.")


def decoding_options(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """The options of ``stream_generate`` that the flags ask for, but for the shape."""
    never_dropped = (*tokenizer.encode("\n"), *tokenizer.eos_token_ids)  # by XTC, as in mlx-lm
    return {
        "max_tokens": args.max_tokens,
        "sampling": replace(sampling_of(args), xtc_special_tokens=never_dropped),
        "seed": args.seed,
        "stop": args.stop,
        "prefill_step_size": args.prefill_step_size,
        "max_kv_size": args.max_kv_size,
        "draft": not args.no_draft,
        **kv_options(args),
    }


class Continuing(TokenizerWrapper):  # type: ignore[misc]
    """A tokenizer for output that goes on from a text: mlx-lm's drop a space that the output begins with."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        vars(self).update(vars(tokenizer))

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """One that has had a token already."""
        detokenizer: StreamingDetokenizer = super().detokenizer
        detokenizer.add_token(self.encode("a", add_special_tokens=False)[-1])
        _ = detokenizer.last_segment
        return detokenizer


def is_raw(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> bool:
    """Whether the model is given the prompt as it is."""
    return bool(args.ignore_chat_template or not tokenizer.has_chat_template)


def encode_prompt(
    tokenizer: TokenizerWrapper, prompt: str, args: argparse.Namespace, continues: bool = False
) -> list[int]:
    """Token ids of the prompt in its chat template, if there is one; only the end if it ``continues``."""
    if is_raw(args, tokenizer):
        return list(tokenizer.encode(prompt))
    begun = args.prefill_response is not None
    answer = [{"role": "assistant", "content": args.prefill_response}] if begun else []
    options = {"continue_final_message": begun, "add_generation_prompt": not begun}

    def render(content: str) -> str:
        return render_messages(tokenizer, [{"role": "user", "content": content}, *answer], args, **options)

    try:
        text = render(prompt)
        if continues:
            text = text[render("<query>").index("<query>") :]
    except Exception as error:  # a template is a program, and may refuse a system prompt
        raise ValueError(
            f"the chat template refuses this ({error}): try --ignore-chat-template, or no --system-prompt."
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False))


def render_messages(
    tokenizer: TokenizerWrapper, messages: list[dict[str, str]], args: argparse.Namespace, **options: Any
) -> str:
    """The conversation in the model's chat template, after the system prompt, with the template's options."""
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt is not None else []
    options |= json.loads(args.chat_template_config or "{}")
    return render(tokenizer, [*system, *messages], **options)


def record(
    received: list[Response], model: SpeculativeModel, args: argparse.Namespace, shape: DraftShape | None
) -> dict[str, Any]:
    """The JSON record of a finished generation."""
    last = received[-1]
    drafted = last.steps > 0
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "command", "json")}
    settings |= {
        "model": args.model or DEFAULT_MODEL,
        "prompt_cache_file": args.prompt_cache_file and str(args.prompt_cache_file),
        "drafting": model.drafter is not None and not args.no_draft,
    }
    if shape is not None:
        settings |= describe_shape(shape)
    return {
        "text": "".join(response.text for response in received),
        "tokens": [response.token for response in received],
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": last.prompt_tps,
        "generation_tokens": last.generation_tokens,
        "generation_tps": last.generation_tps,
        "steps": last.steps if drafted else last.generation_tokens,
        "tokens_per_step": last.tokens_per_step if drafted else 1.0,
        "acceptance": list(last.acceptance),
        "copied_tokens": last.copied,
        "shapes": [{**describe_shape(shape), "steps": steps} for shape, steps in last.shapes.items()],
        "peak_memory_gb": last.peak_memory,
        "finish_reason": last.finish_reason,
        "settings": settings,
        "device": {"backend": backend.current().name, "chip": backend.chip()},
        "versions": {name: metadata.version(name) for name in ("mlx-redrafter", "mlx", "mlx-lm")},
    }


def describe_shape(shape: DraftShape) -> dict[str, int]:
    """A draft shape in the words of the flags."""
    names = ("beam_width", "beam_length", "max_nodes", "lookup")
    return dict(zip(names, (shape.width, shape.length, shape.size, shape.lookup), strict=True))


def _beam_width(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give a number, or auto.") from error


def _standard_input() -> str:
    try:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not text in UTF-8 ({error}): convert it, as with iconv."
        ) from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_text(name: str, value: str | None, empty: bool = False) -> None:
    if value == "" and not empty:
        raise ValueError(f"{_flag(name)} '' names nothing: leave it out, or give a value.")
    if value and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise ValueError(f"{_flag(name)} {value!r} is not text in UTF-8: check the terminal's encoding.")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling that the flags ask for."""
    names = ("top_p", "top_k", "min_p", "min_tokens_to_keep", "xtc_probability", "xtc_threshold")
    return Sampling(args.temp, **{name: getattr(args, name) for name in names})


def mlx_lm_sampler(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> Sampler | None:
    """mlx-lm's own sampler for the flags; None is greedy."""
    if args.temp == 0:
        return None
    sampler: Sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        args.top_k,
        args.xtc_probability,
        args.xtc_threshold,
        [*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    )
    return sampler


def draft_model_options(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """The options of ``mlx_lm.stream_generate`` for ``--draft-model``."""
    if args.draft_model is None:
        return {}
    model, its_tokenizer = load(args.draft_model, drafter=None, dtype=args.dtype)
    if its_tokenizer.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"--draft-model {args.draft_model} has another tokenizer than the model: name another."
        )
    return {"draft_model": model.model, "num_draft_tokens": args.num_draft_tokens}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "t", "false", "f"):
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give True or False.")
    return text.lower() in ("true", "t")


def kv_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a quantized cache."""
    names = ("kv_bits", "kv_group_size", "quantized_kv_start")
    return {} if args.kv_bits is None else {name: getattr(args, name) for name in names}


def _read_prompt_cache(args: argparse.Namespace) -> PromptCache | None:
    """The cache of ``--prompt-cache-file``, which also says which model to load unless ``--model`` does."""
    if args.prompt_cache_file is None:
        return None
    cache = read_prompt_cache(args.prompt_cache_file)
    check_quantization(cache, args.kv_bits, args.kv_group_size)
    if args.model and cache.model and not same_model(args.model, cache.model):
        raise ValueError(
            f"--model {args.model} is not the model of {args.prompt_cache_file}, {cache.model}: "
            "leave --model out, or make a cache for it with mlx_lm.cache_prompt."
        )
    args.model = args.model or cache.model
    return cache


def _progress(total: int, chunk: int) -> Any:
    """A callback that shows a bar on standard error while a prompt of several chunks is processed."""
    if total <= chunk or not sys.stderr.isatty():
        return None
    bar = tqdm(total=total, desc="Prompt", unit="token", leave=False)

    def update(done: int, total: int) -> None:
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update


def _with_notes(responses: Iterator[Response], notes: list[str]) -> Iterator[Response]:
    """Say on standard error what is to be said once it is clear that there is no error to report."""
    with contextlib.closing(responses):  # type: ignore[type-var]
        for response in responses:
            while notes:
                print(f"warning: {notes.pop(0)}", file=sys.stderr)
            yield response


def _print_record(
    responses: Iterator[Response], model: SpeculativeModel, args: argparse.Namespace, shape: DraftShape | None
) -> None:
    """Print the record, also of a generation that was interrupted."""
    received: list[Response] = []
    interrupt = None
    try:
        for response in responses:
            received.append(response)
    except KeyboardInterrupt as error:
        interrupt = error
    if received:
        print(json.dumps(record(received, model, args, shape), allow_nan=False))
    if interrupt is not None:
        raise interrupt


def colours() -> bool:
    """Whether standard output is to have colours: in a terminal, unless the usual variables differ."""
    force, dumb = os.environ.get("FORCE_COLOR", "0") not in ("", "0"), os.environ.get("TERM") == "dumb"
    return not os.environ.get("NO_COLOR") and (force or (sys.stdout.isatty() and not dumb))


def _print(responses: Iterator[Response], show_draft: bool, verbose: bool) -> None:
    last = None
    shown = GREEN + "{}" + PLAIN if show_draft and colours() else "{}"
    try:
        for response in responses:
            if last is None and verbose:
                print("=" * 10)
            last, text = response, response.text
            if sys.stdout.isatty():
                text = CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
            print(shown.format(text) if response.from_draft and text else text, end="", flush=True)
    finally:
        if last is not None:
            print(*(["", "=" * 10, statistics(last)] if verbose else [""]), sep="\n")
