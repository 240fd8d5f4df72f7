"""``mlx-redrafter export``."""

import argparse
import sys
from functools import partial

import mlx.core as mx

from ..convert.drafter import check_output, export_drafter
from ..convert.mlxfn import export_functions, read_shape, usable_context
from ..model import DTYPES
from ..options import DecodingOptions, ModelOptions, check_text, choose_drafter, load_model

OF_FUNCTIONS = ("shape", "context", "device", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``mlx-redrafter export``."""
    add = parser.add_argument
    add("--drafter", help="a bundle: a folder, a shipped name or a repository")
    add("--output", help="output folder (default: apple_drafter, or mlxfn_model)")
    add = parser.add_argument_group("functions of a model, for Swift and C++").add_argument
    add("--mlxfn", metavar="MODEL", help="export this model, with --drafter if named, else auto; or none")
    text = "beam width x length + tokens to copy @ most nodes, such as 4x5 or 2x3+4@5; may be given twice"
    add("--shape", action="append", help=text)
    add("--context", type=int, help="tokens that a text may have (default: 4096, or the model's if fewer)")
    add("--device", choices=("gpu", "cpu"), help="on which the functions run (default: this machine's usual)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: auto); a float type dequantizes, and so does auto on a CPU",
    )


def run(args: argparse.Namespace) -> int:
    """Write the drafter in Apple's layout, or a model's functions."""
    if args.mlxfn is not None:
        return _export_functions(args)
    if args.drafter is None:
        raise ValueError("nothing to export: name a drafter with --drafter, or a model with --mlxfn.")
    for name in OF_FUNCTIONS:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for models: name one with --mlxfn, or leave it out.")
    output = args.output or "apple_drafter"
    export_drafter(args.drafter, output)
    print(f"{output}: the drafter in Apple's layout")
    return 0


def _export_functions(args: argparse.Namespace) -> int:
    output = args.output or "mlxfn_model"
    check_output(output)
    check_text("mlxfn", args.mlxfn)
    usable_context(args.context, None)
    shapes = [read_shape(text) for text in args.shape or ()]
    if args.device is not None:
        device = mx.Device(mx.gpu if args.device == "gpu" else mx.cpu)
        if not mx.is_available(device):
            raise ValueError(f"--device {args.device}: MLX has none here; export where it has.")
        mx.set_default_device(device)
    options = ModelOptions(args.mlxfn, dtype=args.dtype or "auto", drafter=args.drafter or "auto")
    model, tokenizer = load_model(options, choose_drafter(options, DecodingOptions()))
    say = partial(_say, sys.stderr.isatty())
    told = export_functions(model, tokenizer, output, shapes, args.context, args.mlxfn, say)
    count, where, context = len(told["functions"]), told["device"], told["context"]
    print(f"{output}: {count} functions for the {where.upper()}, for texts of {context} tokens")
    return 0


def _say(wanted: bool, done: int, total: int) -> None:
    if wanted:
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} functions", end=end, file=sys.stderr, flush=True)
