"""What ``mlx.launch`` has started: a command that decodes with several machines."""

import argparse
from typing import Any

from ..engine.ranks import Ranks, refuse, run_together
from ..options import ModelOptions, choose_drafter, load_model
from .arguments import options_of

COMMANDS = ("generate", "benchmark", "serve")


def run(args: argparse.Namespace) -> int:
    """Run the command on rank 0; the others follow it."""

    def on_first(ranks: Ranks | None) -> int:
        if ranks is not None:
            if args.command not in COMMANDS:
                raise ValueError(f"{args.command} works on one machine only: start it without mlx.launch.")
            refuse(args)
            if args.command != "serve":  # which loads models as they are asked for
                asked, _, decoding = options_of(args)
                ranks.tell_load(asked, choose_drafter(asked, decoding))
        args.ranks = ranks
        return int(args.run(args))

    return run_together(on_first, _load)


def _load(ranks: Ranks, options: dict[str, Any], drafter: str | None) -> None:
    load_model(ModelOptions(**options), drafter, ranks=ranks)
