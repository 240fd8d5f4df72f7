"""``mlx-redrafter export``."""

import argparse

from ..convert.drafter import export_drafter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``mlx-redrafter export``."""
    parser.add_argument("--drafter", required=True, help="a bundle: a folder, a shipped name or a repository")
    parser.add_argument("--output", default="apple_drafter", help="output folder (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the drafter in Apple's layout."""
    export_drafter(args.drafter, args.output)
    print(f"{args.output}: the drafter in Apple's layout")
    return 0
