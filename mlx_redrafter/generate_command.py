"""``mlx-redrafter generate``."""

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from . import backend
from .decoding.sampling import Sampling
from .decoding.step import DraftShape
from .model import DEFAULT_MODEL, DTYPES, SpeculativeModel, load
from .stream import PREFILL_STEP_SIZE, Response, statistics, stream_generate

DEFAULT_PROMPT = "hello"
GREEN, PLAIN = "\033[32m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``mlx_lm.generate``, and the drafter's."""
    add = parser.add_argument
    add("--model", help=f"folder, GGUF file or Hugging Face repository (default: {DEFAULT_MODEL})")
    add("--adapter-path", help="folder of LoRA adapters to apply")
    add("--trust-remote-code", action="store_true", help="let the model's repository run its code")
    add("--prompt", "-p", default=DEFAULT_PROMPT, help="what to say to the model; - reads standard input")
    add("--system-prompt", help="system message for the chat template")
    add("--ignore-chat-template", action="store_true", help="give the model the prompt as it is")
    add("--max-tokens", "-m", type=int, default=100, help="tokens to generate at most; -1: no limit")
    add("--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability")
    add("--min-p", type=float, default=0.0, help="drop tokens less likely than this share of the likeliest")
    add("--top-k", type=int, default=0, help="sample from this many of the likeliest tokens; 0: all")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--stop", action="append", default=[], help="text that ends the output; may be given several times")
    add("--extra-eos-token", nargs="+", default=[], help="further tokens that end the output")
    add("--max-kv-size", type=int, help="tokens the cache may hold")
    add("--prefill-step-size", type=int, default=PREFILL_STEP_SIZE, help="prompt tokens processed at once")
    add("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize the cache (decodes without drafter)")
    add("--kv-group-size", type=int, choices=(32, 64, 128), default=64, help="of the quantized cache")
    add("--quantized-kv-start", type=int, default=5000, help="first step with a quantized cache")
    add("--prompt-cache-file", type=Path, help="a prompt's cache, saved by mlx_lm.cache_prompt")
    add("--drafter", default="auto", help="folder, shipped name or repository; auto: the one that ships; none")
    add("--beam-width", type=int, help="beams of the draft (default: depends on the device)")
    add("--beam-length", type=int, help="tokens drafted per step, the guaranteed one not counted")
    add("--max-nodes", type=int, help="tree nodes to verify, the root included")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; a float type dequantizes a quantized model")
    add("--no-draft", action="store_true", help="plain decoding by mlx-lm, the baseline")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--show-draft", action="store_true", help="show drafted tokens in colour")
    output.add_argument("--json", action="store_true", help="print one JSON record and nothing else")


def run(args: argparse.Namespace) -> int:
    """Generate, printing text as it is accepted and then statistics, or one JSON record."""
    shape = _shape(args)
    sampling = Sampling(args.temp, args.top_p, args.top_k, args.min_p)
    _check(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text with --prompt, or pipe it to --prompt -.")
    cache = _read_prompt_cache(args.prompt_cache_file)
    drafter = None if args.no_draft or args.drafter == "none" else args.drafter
    model, tokenizer = load(
        args.model,
        drafter=drafter,
        dtype=args.dtype,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    if model.drafter is None and not args.no_draft and args.drafter == "auto":
        name = args.model or DEFAULT_MODEL
        print(f"No drafter ships for {name}: plain decoding. Name one with --drafter.", file=sys.stderr)
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    ids = encode_prompt(tokenizer, prompt, args, cache is not None)
    responses = stream_generate(
        model,
        tokenizer,
        ids,
        args.max_tokens,
        shape=shape,
        sampling=sampling,
        seed=args.seed,
        stop=args.stop,
        prefill_step_size=args.prefill_step_size,
        prompt_progress_callback=_progress(len(ids), args.prefill_step_size),
        prompt_cache=cache,
        max_kv_size=args.max_kv_size,
        draft=not args.no_draft,
        **_kv_options(args),
    )
    received = _collect(responses) if args.json else _print(responses, args.show_draft)
    if args.json:
        print(json.dumps(record(received, model, args, shape or backend.current().shape)))
    return 0


def encode_prompt(
    tokenizer: TokenizerWrapper, prompt: str, args: argparse.Namespace, continues: bool = False
) -> list[int]:
    """Token ids of the prompt in its chat template, if there is one; only the end if it ``continues``."""
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt is not None else []

    def render(content: str) -> str:
        messages = [*system, {"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    text = render(prompt)
    if continues:
        text = text[render("<query>").index("<query>") :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def record(
    received: list[Response], model: SpeculativeModel, args: argparse.Namespace, shape: DraftShape
) -> dict[str, Any]:
    """The JSON record of a finished generation."""
    last = received[-1]
    drafted = last.steps > 0
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "command", "json")}
    settings |= {
        "model": args.model or DEFAULT_MODEL,
        "prompt_cache_file": args.prompt_cache_file and str(args.prompt_cache_file),
        "drafting": model.drafter is not None and not args.no_draft,
        "beam_width": shape.width,
        "beam_length": shape.length,
        "max_nodes": shape.size,
    }
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
        "peak_memory_gb": last.peak_memory,
        "finish_reason": last.finish_reason,
        "settings": settings,
        "device": {"backend": backend.current().name, "chip": backend.chip()},
        "versions": {name: metadata.version(name) for name in ("mlx-redrafter", "mlx", "mlx-lm")},
    }


def _shape(args: argparse.Namespace) -> DraftShape | None:
    """The draft shape the flags ask for; None leaves it to the device."""
    if args.beam_width is None and args.beam_length is None and args.max_nodes is None:
        return None
    usual = backend.current().shape
    width = usual.width if args.beam_width is None else args.beam_width
    length = usual.length if args.beam_length is None else args.beam_length
    return DraftShape(width, length, args.max_nodes)


def _check(args: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--max-kv-size", args.max_kv_size, 1),
        ("--prefill-step-size", args.prefill_step_size, 1),
        ("--quantized-kv-start", args.quantized_kv_start, 0),
        ("--seed", args.seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value} is not usable: give {least} or more.")
    if args.max_tokens < 1 and args.max_tokens != -1:
        raise ValueError(f"--max-tokens {args.max_tokens} is not usable: give 1 or more, or -1 for no limit.")
    if "" in args.stop:
        raise ValueError("--stop '' would end the output at once: leave it out.")


def _kv_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.kv_bits is None:
        return {}
    start = args.quantized_kv_start
    return {"kv_bits": args.kv_bits, "kv_group_size": args.kv_group_size, "quantized_kv_start": start}


def _read_prompt_cache(path: Path | None) -> list[Any] | None:
    from mlx_lm.models.cache import load_prompt_cache

    if path is None:
        return None
    try:
        return list(load_prompt_cache(str(path)))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no prompt cache ({reason}): make one with mlx_lm.cache_prompt.") from error


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


def _collect(responses: Any) -> list[Response]:
    return list(responses)


def _print(responses: Any, show_draft: bool) -> list[Response]:
    received = []
    print("=" * 10)
    try:
        for response in responses:
            received.append(response)
            drafted = show_draft and response.from_draft and response.text
            print(f"{GREEN}{response.text}{PLAIN}" if drafted else response.text, end="", flush=True)
    finally:
        print("", "=" * 10, sep="\n")
        if received:
            print(statistics(received[-1]))
    return received
