"""``mlx-redrafter train``."""

import argparse
import shlex
import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import model as models
from ..conversations import read_prompts
from ..loading.files import check_writable, shell_word
from ..loading.find import DEFAULT_MODEL
from ..loading.hub import check_upload, upload
from ..options import check_range
from ..train import run as training
from ..train.evaluate import Measured, parse_shape
from ..train.loss import Objective
from ..train.selfgen import Recipe, read_openings
from ..train.trainer import Settings
from ..train.work import Request, read_facts
from .arguments import seconds, taken

WRITING = ("rows", "temp", "user_temp", "top_p", "top_k", "system_prompt", "openings", "opened")
NOT_ASKED = ("run", "command", "output", "resume", "words", "upload_repo")
ROWS = 64  # on a CPU
SIZES = ("rows", "batch", "exit_dim")  # which memory and time decide, unless they are given
NETWORK = ("exit_dim", "blocks", "cell", "context_layers")  # what --start-from decides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    files: Any = {"nargs": "+", "default": [], "metavar": "FILE"}
    share: Any = {"type": float, "metavar": "SHARE"}
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="folder, GGUF file or Hugging Face repository")
    add("--output", required=True, help="folder for the drafter; OUTPUT.train beside it holds the work")
    add("--resume", action="store_true", help="go on with an interrupted run; other flags may be left out")
    add("--time", help="for everything together, such as 30m or 1h30m; decides tokens and epochs")
    add("--dtype", default="auto", choices=models.DTYPES, help="of the base model")
    add("--trust-remote-code", action="store_true", help="let the model's repository run its code")
    add("--memory-limit", type=float, help="GB that may be used")
    add("--workers", type=int, help="computations side by side (default: one per core, one on a GPU)")
    add("--license", default="", help="of the drafter, for its model card, such as apache-2.0")
    add("--seed", type=int, default=0, help="of data and training")
    add("--upload-repo", metavar="OWNER/NAME", help="publish it with its card on Hugging Face's hub")
    add = parser.add_argument_group("data").add_argument
    text = "conversations, prompts or text (.jsonl, .json, .txt, .npz); without, the model writes its own"
    add("--data", help=text, **files)
    text = "tokens of its own answers that the model writes (default: 2,000,000; with --time as many as "
    add("--tokens", type=int, help=text + "time allows; none where conversations are given)")
    add("--row-length", type=int, default=512, help="tokens per conversation")
    add(
        "--rows",
        type=int,
        help="conversations written at once (default: 64, on a GPU up to 256)",
    )
    add("--temp", type=float, default=0.7, help="of the model's answers")
    add("--user-temp", type=float, default=1.0, help="of the user's turns it writes")
    add("--top-p", type=float, default=0.95, help="of the data's sampling")
    add("--top-k", type=int, default=40, help="of the data's sampling")
    add("--system-prompt", action="append", default=[], help="may be given several times; one is drawn")
    add("--openings", help="file with beginnings of the user's turn, one per line (a list ships)")
    add("--opened", type=float, default=0.65, help="share of conversations that begin so")
    text = "keep hidden states on disk (auto: what is faster)"
    add("--cache-features", default="auto", choices=("auto", "disk", "off"), help=text)
    add = parser.add_argument_group("drafter").add_argument
    text = "tokens the drafter knows; 0: all (default: 96 %% of the data, or those of --start-from)"
    add("--draft-vocab", type=int, help=text)
    add(
        "--exit-dim",
        type=int,
        help="width of its head (default: the model's, or less if it must)",
    )
    add("--blocks", type=int, default=2, help="residual blocks of its head")
    add("--cell", default="simple", choices=("simple", "gru", "none"), help="recurrent cell")
    add("--memory-heads", type=int, help="with which it attends to the whole text (default: none)")
    text = "tokens of the text that its vocabulary lacks and it may draft too (default: 128 with a memory)"
    add("--rare-tokens", type=int, help=text)
    text = "layers it reads besides the last state (default: a low, a middle and a high one; "
    add("--context-layers", type=int, nargs="*", metavar="N", help=text + "none given: Apple's layout)")
    text = "train an existing drafter on, also one in Apple's layout; none: begin with a new one (default: "
    text += "for a fine-tuned model that of its base, if there is one and no flag above asks for another)"
    add("--start-from", default="auto", metavar="DRAFTER", help=text)
    add = parser.add_argument_group("training").add_argument
    add("--length", type=int, default=5, help="depths it is trained for")
    add("--labels", default="soft", choices=("soft", "hard"), help="distribution or token")
    add("--loss", default="kl", choices=("kl", "tv"), help="divergence or total variation")
    add("--label-temp", type=float, default=1.0, help="of soft labels")
    text = "of the draft tokens unlikely in a batch that its softmax has"
    add("--negatives", default=0.15, help=text, **share)
    add("--dropout", default=0.2, help="of the drafter's inputs that a step does not see", **share)
    add("--depth-weight", type=float, default=0.9, help="of each depth to the one before")
    add("--epochs", type=float, default=2.0, help="passes over the data")
    text = "positions per step (default: 1,024, fewer if memory is short; by the number of steps with --time)"
    add("--batch", type=int, help=text)
    add("--learning-rate", type=float, default=1.5e-3, help="highest")
    add("--warm-up", type=float, default=0.05, help="share of the steps")
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--clip", type=float, default=1.0, help="norm of gradients")
    types = ("auto", "float32", "bfloat16")
    add("--train-dtype", default="auto", choices=types, help="of products in training")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-prompts", help="JSONL of prompts to measure with besides", **files)
    shapes: Any = {"default": ["1,4", "2,4", "4,5"], "nargs": "+", "metavar": "W,L"}
    add("--eval-shapes", help="width,length or width,length,nodes (default: 1,4 2,4 4,5)", **shapes)
    temps: Any = {"default": [0.0, 0.7], "type": float, "nargs": "+", "metavar": "T"}
    add("--eval-temps", help="temperatures to measure at (default: 0 0.7)", **temps)
    add("--eval-tokens", type=int, default=128, help="per answer; 0: no evaluation")


def run(args: argparse.Namespace) -> int:
    """Train a drafter as the command line says."""
    output = Path(args.output).expanduser()
    work, given = output.with_name(f"{output.name}.train"), _given(args.words[1:])
    if args.resume:
        kept = {name: x for name, x in read_facts(work)["asked"].items() if name not in given}
        vars(args).update(kept)
    if args.start_from == "auto" and given.keys() & {*NETWORK, "memory_heads"}:
        args.start_from = "none"
    asked = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_ASKED}
    if output.exists():
        raise ValueError(f"{output} exists already: delete it or name another output folder.")
    check_writable(output)
    if args.upload_repo is not None:
        check_upload(args.upload_repo)
    _warn_of_idle(args, given)
    request = _request(args, given, _limit_memory(args.memory_limit))
    prompts = {Path(path).name: read_prompts(path) for path in args.eval_prompts}
    shapes = tuple(parse_shape(text) for text in args.eval_shapes)
    evaluation = training.Evaluation(prompts, shapes, tuple(args.eval_temps), args.eval_tokens)
    model, tokenizer = models.load(
        args.model, drafter=None, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    command = shlex.join(["mlx-redrafter", *args.words])
    try:
        measured = training.train(model, tokenizer, request, output, asked, args.model, evaluation, command)
    except KeyboardInterrupt:
        if (work / "run.json").is_file():
            again = f"mlx-redrafter train --output {shell_word(output)} --resume"
            print(f"\nSaved. Go on with: {again}", file=sys.stderr)
        raise
    base = "" if args.model == DEFAULT_MODEL else f" --model {shell_word(args.model)}"
    base += " --trust-remote-code" * args.trust_remote_code
    print(f"Wrote {output}. Use it with: mlx-redrafter generate{base} --drafter {shell_word(output)}")
    _report(measured)
    if args.upload_repo is not None:
        upload(output, args.upload_repo, "trained")
        print(f"Uploaded to https://huggingface.co/{args.upload_repo}")
    return 0


def _given(words: Sequence[str]) -> dict[str, Any]:
    """The options that a command line has, without defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    names = vars(parser.parse_args(["--output", ""]))
    found = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(names)))
    return {name: value for name, value in vars(found).items() if value is not None}


def _warn_of_idle(args: argparse.Namespace, given: Collection[str]) -> None:
    """Warn of flags that do nothing beside others."""
    for why, there, names in (
        ("--start-from", args.start_from not in (None, "auto", "none"), NETWORK),
        ("--time", args.time, ("epochs",)),
        ("--draft-vocab 0", args.draft_vocab == 0, ("rare_tokens",)),
        ("--labels hard", args.labels == "hard", ("label_temp",)),
        ("--opened 0", args.opened == 0, ("openings",)),
        ("--eval-tokens 0", args.eval_tokens == 0, ("eval_prompts", "eval_shapes", "eval_temps")),
    ):
        for flag in _flags(names, given) if there else ():
            warnings.warn(f"{flag} does nothing with {why}.", stacklevel=1)


def _flags(names: Sequence[str], given: Collection[str]) -> tuple[str, ...]:
    """Those options that are ``given``, as they are typed."""
    return tuple("--" + name.replace("_", "-") for name in names if name in given)


def _limit_memory(limit: float | None) -> int:
    """Tell MLX its limit; how many logits may be held at once under it."""
    if limit is None:
        return Objective.chunk
    if not limit > 0:
        raise ValueError(f"memory limit {limit} is not usable: give GB, more than 0.")
    mx.set_memory_limit(int(limit * 1e9))
    mx.set_cache_limit(int(limit * 1e9 / 8))
    # A chunk's arrays take a fraction.
    return max(1 << 16, min(Objective.chunk, int(limit * 1e9 / 4 / 64)))


def _request(args: argparse.Namespace, given: Collection[str], chunk: int) -> Request:
    for name in ("tokens", "memory_heads", "rare_tokens", "blocks", "exit_dim", "workers"):
        check_range(name, getattr(args, name), int(name in ("exit_dim", "workers")))
    recipe = taken(
        Recipe,
        args,
        length=args.row_length,
        batch=ROWS if args.rows is None else args.rows,
        temperature=args.temp,
        user_temperature=args.user_temp,
        systems=tuple(args.system_prompt),
        openings=read_openings(Path(args.openings) if args.openings else None),
        longest_user_turn=max(1, min(160, args.row_length // 3)),
    )
    objective = taken(Objective, args, decay=args.depth_weight, temperature=args.label_temp, chunk=chunk)
    usual = "bfloat16" if mx.default_device().type == mx.gpu else "float32"
    dtype = usual if args.train_dtype == "auto" else args.train_dtype
    sizes = {name: getattr(args, name) for name in SIZES}
    batch = Settings.batch if args.batch is None else args.batch
    return taken(
        Request,
        args,
        data=tuple(args.data),
        recipe=recipe,
        settings=taken(Settings, args, objective=objective, dtype=dtype, batch=batch),
        context_layers=None if args.context_layers is None else tuple(args.context_layers),
        memory_heads=args.memory_heads or 0,
        seconds=seconds(args.time),
        cache=args.cache_features,
        memory=None if args.memory_limit is None else args.memory_limit * 1e9,
        left_open=tuple(name for name, value in sizes.items() if value is None),
        writing=_flags(WRITING, given),
    )


def _report(measured: dict[str, list[Measured]]) -> None:
    for name, found in measured.items():
        print(f"Tokens per step, {name}:")
        for m in found:
            depths = " ".join(f"{share:.2f}" for share in m.acceptance)
            print(
                f"  width {m.shape.width}, length {m.shape.length}, temperature {m.temperature:g}: "
                f"{m.tokens_per_step:.2f} ({m.low:.2f}-{m.high:.2f}; {m.prompts} prompts), "
                f"acceptance by depth {depths}"
            )
