"""What several commands have: flags, the options that are made of them, and colours."""

import argparse
import os
import re
import sys
from dataclasses import fields
from typing import Any, TypeVar

from ..loading.find import DEFAULT_MODEL
from ..model import DTYPES
from ..options import CHOICES, DecodingOptions, ModelOptions, PromptOptions

Options = TypeVar("Options")
TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # what a terminal may obey


def taken(kind: type[Options], args: argparse.Namespace, **others: Any) -> Options:
    """A dataclass of ``others``; its other fields take the flags of their names, if there are any."""
    names = {field.name for field in fields(kind)} & vars(args).keys() - others.keys()  # type: ignore[arg-type]
    return kind(**others, **{name: getattr(args, name) for name in names})


def options_of(args: argparse.Namespace) -> tuple[ModelOptions, PromptOptions, DecodingOptions]:
    """What ``add_decoding_arguments`` asked for."""
    return taken(ModelOptions, args), taken(PromptOptions, args), taken(DecodingOptions, args)


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
    add("--max-tokens", "-m", type=int, help="tokens to generate at most; -1: no limit")
    add("--temp", type=float, help="sampling temperature; 0 is greedy")
    add("--top-p", type=float, help="sample from the likeliest tokens of this total probability")
    add("--min-p", type=float, help="drop tokens less likely than this share of the likeliest")
    add("--top-k", type=int, help="sample from this many of the likeliest tokens; 0: all")
    add("--min-tokens-to-keep", type=int, help="that --min-p must leave")
    add("--xtc-probability", type=float, help="of XTC sampling")
    add("--xtc-threshold", type=float, help="probability above which XTC drops tokens")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--stop", action="append", help="text that ends the output; may be given several times")
    add("--extra-eos-token", nargs="+", help="further tokens, or their ids, that end the output")
    add("--context-length", type=int, help="tokens a prompt may have (default: what the model's config says)")
    add("--max-kv-size", type=int, help="tokens the cache may hold")
    add("--prefill-step-size", type=int, help="prompt tokens processed at once")
    add("--kv-bits", type=int, choices=CHOICES["kv_bits"], help="of a quantized cache")
    add("--kv-group-size", type=int, choices=CHOICES["kv_group_size"], help="of the quantized cache")
    add("--quantized-kv-start", type=int, help="first step with a quantized cache")
    add("--drafter", help="folder, shipped name, repository; auto: one that ships or is found; none")
    text = "beams of the draft; auto: the shape that is fastest here for this text"
    add("--beam-width", type=_beam_width, help=text)
    add("--beam-length", type=int, help="tokens drafted per step, the guaranteed one not counted")
    add("--max-nodes", type=int, help="tree nodes to verify, the root included")
    add("--lookup", type=int, help="tokens to copy from the text per step (default: part of auto, else 0)")
    add("--dtype", choices=DTYPES, help="of the weights; a float type dequantizes")
    add("--no-draft", action="store_true", help="plain decoding by mlx-lm, whatever is to be drafted")
    add("--draft-model", help="mlx-lm's speculative decoding with this small model, instead of a drafter")
    add("--num-draft-tokens", type=int, help="tokens that --draft-model drafts at once")
    add("--quantize-activations", "-qa", action="store_true", help="as the weights of each layer are")
    usual = vars(ModelOptions()) | vars(DecodingOptions()) | vars(PromptOptions())
    usual |= {name: [] for name, value in usual.items() if value == ()}  # which argparse appends to
    parser.set_defaults(**{a.dest: usual[a.dest] for a in parser._actions if a.dest in usual})


def seconds(text: str | None, name: str = "time") -> float | None:
    """A duration such as 90, 90s, 30m or 1h30m in seconds; ``ValueError``, with the name of what it is of."""
    if text is None:
        return None
    found = TIME.fullmatch(text.strip().lower())
    total = 0.0
    if found:
        total = sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))
    if total <= 0:
        raise ValueError(f"{name} {text!r} is not usable: give a duration such as 30m or 1h30m.")
    return total


def colours() -> bool:
    """Whether standard output is to have colours: in a terminal, unless the usual variables differ."""
    force, dumb = os.environ.get("FORCE_COLOR", "0") not in ("", "0"), os.environ.get("TERM") == "dumb"
    return not os.environ.get("NO_COLOR") and (force or (sys.stdout.isatty() and not dumb))


def harmless(text: str) -> str:
    """A model's text as a terminal may be given it."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _beam_width(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give a number, or auto.") from error
