"""``mlx-redrafter serve``."""

import argparse
import math
import os
from pathlib import Path

from ..loading.find import DEFAULT_MODEL
from ..model import DTYPES
from ..options import DecodingOptions, ModelOptions, check_range, check_text
from .arguments import seconds, taken

KEY = "MLX_REDRAFTER_API_KEY"
BOUNDS = (
    ("port", 0, 65535),
    ("max_tokens", 1, math.inf),
    ("texts", 1, 256),
    ("max_queue", 1, math.inf),
    ("max_models", 1, math.inf),
    ("prefill_step_size", 1, math.inf),
    ("prompt_cache_bytes", 0, math.inf),
    ("prompt_cache_dir_bytes", 0, math.inf),
    ("max_body_bytes", 1, math.inf),
    ("shutdown_timeout", 0, math.inf),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``mlx_lm.server``, and ours."""
    add = parser.add_argument
    add("--model", help=f"that requests mean who name none (default: {DEFAULT_MODEL})")
    add("--model-dir", action="append", type=Path, default=[], help="folder with models; may be repeated")
    add("--adapter-path", help="folder of LoRA adapters to apply")
    add("--trust-remote-code", action="store_true", help="let the model's repository run its code")
    add(
        "--drafter",
        default="auto",
        help="folder, shipped name, repository; auto: one that ships or is found; none",
    )
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; a float type dequantizes")
    add("--context-length", type=int, help="tokens a text may have (default: what the model's config says)")
    add("--host", default="127.0.0.1", help="address to listen at")
    add("--port", type=int, default=8080, help="0: any that is free")
    add("--api-key", help=f"that requests must carry (default: the environment's {KEY})")
    add("--no-auth", action="store_true", help="let everyone ask who reaches this machine")
    add("--allow-host", action="append", default=[], help="a further name of this server; may be repeated")
    text = "pages of this origin may ask, such as http://localhost:3000; *: of any; may be repeated"
    add("--allow-origin", action="append", default=[], help=text)
    add("--max-tokens", type=int, help="of an answer, where a request does not say (default: what fits)")
    add("--temp", type=float, default=0.0, help="sampling temperature, where a request does not say")
    add("--top-p", type=float, default=1.0, help="likewise")
    add("--top-k", type=int, default=0, help="likewise")
    add("--min-p", type=float, default=0.0, help="likewise")
    add("--texts", type=int, default=16, help="that are decoded at once; others wait")
    add("--max-queue", type=int, default=256, help="texts at once, waiting ones included; others get 429")
    add("--max-models", type=int, default=2, help="that are loaded at once")
    add("--prefill-step-size", type=int, default=512, help="prompt tokens read between two steps")
    text = "of texts kept for reuse, of each model (default: a quarter of what is free)"
    add("--prompt-cache-bytes", type=int, help=text)
    text = "keep texts on the disk too, in this folder, so that they are known after a restart"
    add("--prompt-cache-dir", type=Path, help=text)
    add("--prompt-cache-dir-bytes", type=int, default=20 << 30, help="that may be kept there")
    add("--max-body-bytes", type=int, default=16 << 20, help="of a request")
    add("--idle-unload", help="let go of models that nobody asks for in so long, such as 30m")
    add("--shutdown-timeout", type=float, default=30.0, help="seconds for running answers to end in")
    add("--log-prompts", action="store_true", help="write requests to the log, with what users say")


def run(args: argparse.Namespace) -> int:
    """Serve until told to end."""
    try:
        from ..server.run import Settings, serve
    except ImportError as error:
        text = f"serve needs more packages ({error}): pip install 'mlx-redrafter[server]' (Python 3.11)."
        raise ValueError(text) from error
    from ..server.app import LOOPBACK, Access
    from ..server.catalog import ServingOptions

    for name, least, most in BOUNDS:
        check_range(name, getattr(args, name), least, most)
    check_text("api_key", args.api_key)
    key, loopback = args.api_key or os.environ.get(KEY) or None, args.host in LOOPBACK
    if args.no_auth:
        key = None
    elif key is None and not loopback:
        raise ValueError(
            f"--host {args.host} can be reached from other machines: give --api-key, set {KEY}, or --no-auth."
        )
    usual = {"temperature": args.temp, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    DecodingOptions(temp=args.temp, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p)  # checks them
    hosts = [*LOOPBACK, *(host.lower() for host in args.allow_host)] if loopback else []
    serving = ServingOptions(
        args.model_dir,
        args.texts,
        args.prefill_step_size,
        args.max_models,
        args.prompt_cache_bytes,
        args.prompt_cache_dir,
        args.prompt_cache_dir_bytes,
        seconds(args.idle_unload, "--idle-unload"),
    )
    serve(
        Settings(
            taken(ModelOptions, args),
            serving,
            Access(key, hosts, args.allow_origin, args.max_body_bytes),
            args.host,
            args.port,
            usual,
            args.max_tokens,
            args.max_queue,
            args.shutdown_timeout,
            args.log_prompts,
        ),
        args.ranks,
    )
    return 0
