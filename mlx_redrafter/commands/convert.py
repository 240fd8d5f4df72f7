"""``mlx-redrafter convert``."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.convert import QUANT_RECIPES

from ..convert.base import MODES, convert_base
from ..convert.drafter import DRAFTER_GROUP_SIZE, check_output, convert_drafter, is_drafter
from ..loading.base import DTYPES
from ..loading.gguf import QUANTS
from ..loading.hub import check_repository, upload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``mlx-redrafter convert``: mlx_lm.convert's, and those of drafters."""
    add = parser.add_argument
    add("--hf-path", "--model", help="base model: a folder, a GGUF file or a Hugging Face repository")
    add("--mlx-path", default="mlx_model", help="output folder (default: %(default)s)")
    add("-q", "--quantize", action="store_true", help="quantize the base model, anew if it is")
    add("--q-bits", type=int, help="bits per weight (default: 4)")
    add("--q-group-size", type=int, help="weights per scale (default: 64)")
    add("--q-mode", choices=MODES, default="affine", help="(default: %(default)s)")
    add("--quant-predicate", choices=QUANT_RECIPES, help="mixed bits by mlx-lm's recipe (without --q-bits)")
    add("--dtype", choices=DTYPES, help="of the weights that are not quantized")
    add("-d", "--dequantize", action="store_true", help="dequantize the base model")
    add("--upload-repo", help="upload the result to this Hugging Face repository")
    add("--revision", help="branch, tag or commit of the source repository")
    add("--trust-remote-code", action="store_true", help="allow Python code in the source")
    add("--gguf-quant", choices=QUANTS, help="a GGUF's weights in MLX's nearest form (default), or exact")
    add = parser.add_argument_group("drafters").add_argument
    add("--drafter", help="convert this drafter, or the one found (auto); --model names its base")
    add("--drafter-q-bits", type=int, help="quantize the drafter to this many bits")
    add("--drafter-q-group-size", type=int, help=f"weights per scale (default: {DRAFTER_GROUP_SIZE})")
    add("--store-bits", type=int, help="of the drafter's weights on disk only: loaded, they are floats")
    add("--draft-vocab", type=int, help="keep only this many of the drafter's output tokens")
    add("--frequencies", help="where to count them: text, JSONL conversations, or saved counts")
    add("--save-frequencies", help="write the counts to this .json or .npz file")


def run(args: argparse.Namespace) -> int:
    """Convert what the command line names."""
    if args.drafter is None and args.hf_path is None:
        raise ValueError("nothing to convert: name a base model with --model, or a drafter with --drafter.")
    check_output(args.mlx_path)
    repo = args.upload_repo
    if repo is not None:
        check_repository(repo)
    if args.drafter is None and is_drafter(args.hf_path, args.revision):
        args.drafter, args.hf_path = args.hf_path, None
    report = (_run_base if args.drafter is None else _run_drafter)(args)
    if repo is not None:
        upload(args.mlx_path, repo, "converted")
        report += f"\nuploaded to https://huggingface.co/{repo}"
    print(report)
    return 0


def _run_base(args: argparse.Namespace) -> str:
    flags = ("drafter_q_bits", "drafter_q_group_size", "store_bits", "draft_vocab", "frequencies")
    for flag in (*flags, "save_frequencies"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} is for drafters: name one with --drafter.")
    names = ["quantize", "dequantize", "q_bits", "q_group_size", "q_mode", "quant_predicate"]
    names += ["dtype", "revision", "trust_remote_code", "gguf_quant"]
    options: Any = {name: getattr(args, name) for name in names}
    say = partial(print, file=sys.stderr) if sys.stderr.isatty() else None
    convert_base(args.hf_path, Path(args.mlx_path), **options, progress=say)
    return f"{args.mlx_path}: the model {args.hf_path}"


def _run_drafter(args: argparse.Namespace) -> str:
    if args.quantize or args.dequantize or args.q_bits is not None or args.q_group_size is not None:
        raise ValueError("-q, -d and --q-* are for base models: quantize a drafter with --drafter-q-bits.")
    size = args.drafter_q_group_size
    if size is not None and args.drafter_q_bits is None:
        raise ValueError("--drafter-q-group-size needs --drafter-q-bits.")
    names: tuple[str, ...] = (
        "dtype",
        "store_bits",
        "draft_vocab",
        "frequencies",
        "save_frequencies",
        "revision",
    )
    names += ("trust_remote_code",)
    options: Any = {name: getattr(args, name) for name in names}
    options |= {"q_bits": args.drafter_q_bits, "q_group_size": DRAFTER_GROUP_SIZE if size is None else size}
    show = sys.stderr.isatty()
    made = convert_drafter(args.drafter, args.mlx_path, base=args.hf_path, progress=show, **options)
    config, length = made.config, (made.folder / "model.safetensors").stat().st_size
    bits = f", {config.quantization.bits} bits" if config.quantization else ""
    report = (
        f"{made.folder}: a drafter of {length / 1e6:.1f} MB{bits}, {config.head_outputs} of "
        f"{config.vocab_size} tokens, for {made.base or 'any base of its size (--model names one)'}"
    )
    return report + (f"\nkept but never used: {', '.join(made.unused)}" if made.unused else "")
