"""``mlx-redrafter generate``."""

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..chat import Continuing
from ..options import check_text, choose_drafter, load_model, warn_of_idle
from ..text import Response, statistics, stream_generate
from .arguments import add_decoding_arguments, colours, harmless, options_of

GREEN, PLAIN = "\033[32m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``mlx_lm.generate``, and the drafter's."""
    add = parser.add_argument
    text = "what to say to the model; - reads standard input. This and all other texts are taken as typed: "
    text += "a line break is the shell's, such as $'one\\ntwo'"
    add("--prompt", "-p", default="hello", help=text)
    add("--prefill-response", help="beginning of the answer, from which the output goes on")
    add("--prompt-cache-file", type=Path, help="a prompt's cache, saved by mlx_lm.cache_prompt")
    add_decoding_arguments(parser)
    add("--verbose", type=_boolean, default=True, help="False prints the text alone")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--show-draft", action="store_true", help="colour drafted tokens, in a terminal")
    output.add_argument("--json", action="store_true", help="print one JSON record and nothing else")


def run(args: argparse.Namespace) -> int:
    """Generate, printing text as it is accepted and then statistics, or one JSON record."""
    check_text("prompt", args.prompt, empty=True)
    asked, prompting, decoding = options_of(args)
    prompt = _standard_input() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text with --prompt, or pipe it to --prompt -.")
    decoding = replace(decoding, no_draft=args.no_draft or args.draft_model is not None)
    drafter, cache = choose_drafter(asked, decoding), None
    if args.prompt_cache_file is not None:
        from ..loading.prompt_cache import read_prompt_cache

        kept_as = (decoding.kv_bits, decoding.kv_group_size)
        cache = read_prompt_cache(args.prompt_cache_file, asked.model, *kept_as)
        asked = replace(asked, model=asked.model or cache.model)
    with warnings.catch_warnings(record=True) as notes:
        model, tokenizer = load_model(asked, drafter, cache.tokenizer_config if cache else None, args.ranks)
        warn_of_idle(asked, prompting, decoding, tokenizer)
        if args.show_draft and args.no_draft and args.draft_model is None:
            warnings.warn("--show-draft does nothing where nothing is drafted.", stacklevel=1)
        if cache:
            cache.fit(model.model)
        if args.prefill_response or prompting.is_raw(tokenizer):
            tokenizer = Continuing(tokenizer)
        ids = prompting.encode([{"role": "user", "content": prompt}], tokenizer)
        options = decoding.for_stream_generate(tokenizer)
        if asked.draft_model is not None:
            from ..plain import load_draft_model

            options["draft_model"] = load_draft_model(asked.draft_model, asked.dtype, tokenizer)
        responses = stream_generate(
            model,
            tokenizer,
            ids,
            prompt_progress_callback=_progress(len(ids), decoding.prefill_step_size),
            prompt_cache=cache.layers if cache else None,
            **options,
        )
    responses = _with_notes(responses, [str(note.message) for note in notes])
    if args.json:
        settings = vars(args) | vars(asked) | vars(prompting) | vars(decoding)
        settings["drafting"] = model.drafter is not None and not decoding.no_draft
        from ..record import describe_shape, print_record

        settings |= describe_shape(decoding.shape) if decoding.shape else {}
        print_record(responses, settings)
    else:
        _print(responses, args.show_draft, args.verbose)
    return 0


def _standard_input() -> str:
    try:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        remedy = "convert it, as with iconv."
        raise ValueError(f"standard input is not text in UTF-8 ({error}): {remedy}") from error


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "t", "false", "f"):
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give True or False.")
    return text.lower() in ("true", "t")


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


def _print(responses: Iterator[Response], show_draft: bool, verbose: bool) -> None:
    last = None
    shown = GREEN + "{}" + PLAIN if show_draft and colours() else "{}"
    try:
        for response in responses:
            if last is None and verbose:
                print("=" * 10)
            last, text = response, response.text
            if sys.stdout.isatty():
                text = harmless(text)
            print(shown.format(text) if response.from_draft and text else text, end="", flush=True)
    finally:
        if last is not None:
            print(*(["", "=" * 10, statistics(last)] if verbose else [""]), sep="\n")
