"""How the default drafter was made: ``mlx-redrafter train`` for SmolLM2-135M, on a CPU with matrix units.

    uv pip install mkl mkl-include
    python texts.py FOLDER > texts.jsonl
    python make.py write FOLDER [--prompts FILE] [--first N] [--temperature T ...] [--seconds S]
    python make.py train FOLDER WEIGHTS --start WEIGHTS --steps N [...]
    python make.py check FOLDER

Such a CPU (x86 with AMX) multiplies bfloat16 matrices five times as fast as float32 ones, which MLX does
not use. So the two loops that take the time are C, with Intel's MKL: the forward pass that the model
writes conversations with (``forward.c``), and the drafter's gradients (``train.c``). The rest, from
sampling to the score, is the package's. ``check`` compares both with MLX. FOLDER holds the shards:
``data/NAME.npz`` and ``features/NAME.safetensors``, as ``mlx-redrafter train`` writes them.
"""

import argparse
import ctypes
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from mlx_redrafter import load
from mlx_redrafter.models.drafter import Drafter, DrafterConfig
from mlx_redrafter.models.target import Target
from mlx_redrafter.train.data import LEAST_DISTINCT, Cleaner, count_tokens, read_shard, write_shard
from mlx_redrafter.train.features import read_features, select, write_features
from mlx_redrafter.train.loss import LabelHead, Objective, gradients, head_rows, make_batch, score
from mlx_redrafter.train.run import choose_vocabulary
from mlx_redrafter.train.selfgen import Recipe, generate, read_openings
from mlx_redrafter.train.trainer import Settings, rate, with_vocabulary

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten  # isort: skip

HERE = Path(__file__).parent
LAYERS = (8, 16, 23)
HIDDEN, CONTEXT, VOCABULARY, BLOCKS, SEGMENT = 576, 4 * 576, 49152, 2, 32
AT_ONCE = 400_000  # positions in memory, whose segments are shuffled together
Arrays = list[np.ndarray[Any, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for function in (write, train, check):
        parsers[function] = command = commands.add_parser(function.__name__)
        command.add_argument("folder", type=Path)
        command.set_defaults(function=function)
    command = parsers[write]
    command.add_argument("--prompts", type=Path, help="turns to answer; without, the model writes them too")
    command.add_argument("--skip", type=int, default=0, help="prompts to leave out at the start")
    command.add_argument("--by-length", action="store_true", help="prompts of a batch are of similar length")
    command.add_argument("--first", type=int, default=0, help="batch")
    command.add_argument("--name", type=int, default=0, help="of batch 0's shard; each batch's is one more")
    command.add_argument("--batch", type=int, default=256)
    command.add_argument("--length", type=int, default=288)
    command.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.5], help="batch by batch")
    command.add_argument("--least-distinct", type=float, default=LEAST_DISTINCT, help="of what is no loop")
    command.add_argument("--seed", type=int, default=6)
    command.add_argument("--seconds", type=float, default=3600, help="no batch begins that would take longer")
    command = parsers[train]
    command.add_argument("output", type=Path)
    command.add_argument("--start", type=Path, required=True)
    command.add_argument("--held-out", nargs="+", default=[], help="shards")
    command.add_argument("--draft-vocab", type=int, help="choose the draft tokens again, so many")
    command.add_argument("--steps", type=int, required=True)
    command.add_argument("--batch", type=int, default=64, help="segments")
    command.add_argument("--length", type=int, default=3)
    command.add_argument("--last", type=float, default=0.2, help="share of the steps that are of length 5")
    command.add_argument("--rate", type=float, default=1e-3)
    command.add_argument("--warm-up", type=float, default=0.03)
    command.add_argument("--weight-decay", type=float, default=0.01)
    command.add_argument("--depth-weight", type=float, default=0.7)
    command.add_argument("--dropout", type=float, default=0.2)
    command.add_argument("--negatives", type=float, default=0.2)
    command.add_argument("--average", type=float, default=0.001, help="a step's share of the running average")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--scores", type=int, default=4, help="how often to score")
    args = parser.parse_args()
    args.function(args)


# --- The C programs ------------------------------------------------------------------------------------


def compiled(name: str) -> ctypes.CDLL:
    """A C program of this folder, compiled with the MKL of this environment."""
    base = Path(sys.prefix)
    if "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        raise SystemExit("This CPU has no bfloat16 matrix units (amx_bf16): use mlx-redrafter train.")
    if not (base / "lib/libmkl_rt.so.3").exists():
        raise SystemExit(f"{base} has no MKL: uv pip install mkl mkl-include")
    flags = ["-O3", "-ffast-math", "-march=sapphirerapids", "-shared", "-fPIC"]
    mkl = [f"-I{base}/include", f"-L{base}/lib", f"-Wl,-rpath,{base}/lib", "-l:libmkl_rt.so.3", "-lm"]
    ctypes.CDLL(f"{base}/lib/libmkl_rt.so.3").MKL_Set_Threading_Layer(1)  # sequential
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/{name}.so"
        subprocess.run(["gcc", *flags, str(HERE / f"{name}.c"), "-o", library, *mkl], check=True)
        return ctypes.CDLL(library)


def address(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def addresses(arrays: list[int]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*arrays)


def bf16(x: mx.array) -> np.ndarray[Any, Any]:
    return np.array(x.astype(mx.bfloat16).view(mx.uint16))


class Fast(Target):
    """A target whose forward pass is ``forward.c``: all rows of a batch after as many tokens."""

    def __init__(self, target: Target, batch: int, longest: int) -> None:
        super().__init__(target.model, LAYERS)
        self.batch, self.offset, self.longest = batch, 0, longest
        matrices, norms = [], []
        model: Any = target.model
        for layer in model.model.layers:
            a, b = layer.self_attn, layer.mlp
            joint = [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [b.gate_proj, b.up_proj], [b.down_proj]]
            matrices += [bf16(mx.concatenate([part.weight for part in parts])) for parts in joint]
            norms += [np.array(layer.input_layernorm.weight), np.array(layer.post_attention_layernorm.weight)]
        self.kept = [*matrices, bf16(self.embed.weight)], [*norms, np.array(model.model.norm.weight)]
        self.library = compiled("forward")
        pointers = [addresses([array.ctypes.data for array in arrays]) for arrays in self.kept]
        self.library.setup(*pointers, batch, longest, (ctypes.c_int * 3)(*LAYERS))
        self.logits = np.empty((batch, VOCABULARY), np.float32)

    def make_cache(self) -> list[Any]:
        self.offset = 0
        return []

    def forward(self, tokens: mx.array, caches: Any) -> tuple[mx.array, mx.array]:
        """Tokens [B, n] -> the last one's logits [B, 1, V], all hidden states [B, n, F]."""
        fed = np.ascontiguousarray(np.array(tokens), np.int32)
        assert len(fed) == self.batch and self.offset + fed.shape[1] <= self.longest
        features = np.empty((*fed.shape, CONTEXT), np.uint16)
        self.library.forward(address(fed), fed.shape[1], self.offset, address(features), address(self.logits))
        self.offset += fed.shape[1]
        return mx.array(self.logits)[:, None], mx.array(features).view(mx.bfloat16)


class Net:
    """The drafter's parameters as one array, and what AdamW knows of them; two threads work on them."""

    def __init__(self, weights: dict[str, mx.array], target: Target) -> None:
        self.ids = np.array(weights["draft_to_target"], np.int32)
        wide = (HIDDEN, HIDDEN)
        shapes = {"rnn_w.weight": wide, "rnn_u.weight": wide, "rnn_u.bias": (HIDDEN,)}
        shapes |= {"context": (HIDDEN, CONTEXT), "state": wide, "input_proj.bias": (HIDDEN,)}
        for i in range(BLOCKS):
            shapes |= {f"lm_head.{i}.linear.weight": wide, f"lm_head.{i}.linear.bias": (HIDDEN,)}
        self.shapes = {**shapes, f"lm_head.{BLOCKS}.weight": (len(self.ids), HIDDEN)}
        parts = {name: np.array(x.astype(mx.float32)) for name, x in weights.items()}
        parts["context"], parts["state"] = np.split(parts["input_proj.weight"], [CONTEXT], axis=1)
        flat = [parts[name].reshape(shape).ravel() for name, shape in self.shapes.items()]
        self.parameters = np.concatenate(flat).astype(np.float32)
        self.first, self.second, *self.gradients = np.zeros((4, self.parameters.size), np.float32)
        self.average, self.step = self.parameters.copy(), 0
        to_draft = np.full(VOCABULARY, -1, np.int32)
        to_draft[self.ids] = np.arange(len(self.ids))
        self.kept = bf16(target.embed.weight), bf16(head_rows(target, mx.array(self.ids))), to_draft
        self.library = compiled("train")
        self.library.layout.restype = ctypes.c_long
        self.library.squares.restype = ctypes.c_double
        assert self.library.layout(len(self.ids)) == self.parameters.size
        self.library.setup(*map(address, self.kept), address(self.parameters))
        self.pool = ThreadPoolExecutor(2)

    def weights(self, flat: np.ndarray[Any, Any]) -> dict[str, mx.array]:
        """The drafter's tensors, by their names on disk."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        parts = dict(zip(self.shapes, np.split(flat.copy(), ends[:-1]), strict=True))
        named = {name: mx.array(x.reshape(self.shapes[name])) for name, x in parts.items()}
        named["input_proj.weight"] = mx.concatenate([named.pop("context"), named.pop("state")], axis=1)
        return {**named, "draft_to_target": mx.array(self.ids)}

    def add_gradients(self, segments: list[tuple[Arrays, int]], objective: Objective, seed: int) -> Any:
        """Add those of segments (a shard's arrays, and where in it) -> losses [L, 2]."""
        losses = np.zeros((2, objective.length, 2))
        keep, drawn = round(256 * (1 - objective.dropout)), round(256 * objective.negatives)

        def half(k: int) -> None:
            mine = segments[k::2]
            places = [
                addresses([arrays[i].ctypes.data + begin * arrays[i].strides[0] for arrays, begin in mine])
                for i in range(3)
            ]
            decay, random = ctypes.c_float(objective.decay), ctypes.c_uint64(2 * seed + k)
            mutable = map(address, (self.parameters, self.gradients[k], losses[k]))
            self.library.part(len(mine), *places, objective.length, decay, keep, drawn, random, *mutable)

        list(self.pool.map(half, range(2)))
        return losses.sum(axis=0)

    def update(self, count: float, rate: float, weight_decay: float, share: float) -> None:
        """A step of AdamW with the gradients so far, divided by ``count`` and clipped to 1."""
        middle, size, a, b = self.parameters.size // 32 * 16, self.parameters.size, *self.gradients
        parts = [(ctypes.c_long(0), ctypes.c_long(middle)), (ctypes.c_long(middle), ctypes.c_long(size))]
        squares = self.pool.map(lambda part: self.library.squares(*part, address(a), address(b)), parts)
        factor = min(1.0, 1 / (math.sqrt(sum(squares)) / count + 1e-6)) / count
        self.step += 1
        corrections = 1 - 0.9**self.step, 1 - 0.98**self.step
        numbers = [ctypes.c_float(x) for x in (factor, rate, weight_decay, *corrections, share)]
        arrays = [address(x) for x in (self.parameters, self.first, self.second, a, b, self.average)]
        list(self.pool.map(lambda part: self.library.update(*part, *arrays, *numbers), parts))


# --- Commands ------------------------------------------------------------------------------------------


def write(args: argparse.Namespace) -> None:
    """Let the model write conversations, or answer prompts, until the time is up."""
    model, tokenizer = load(drafter=None)
    target = Fast(Target(model.model, LAYERS), args.batch, args.length)
    mx.set_cache_limit(1 << 30)
    prompts: list[list[str]] = []
    own = {"openings": read_openings(), "opened": 0.5}
    if args.prompts:
        prompts = [json.loads(line)["turns"] for line in args.prompts.read_text().splitlines()][args.skip :]
        own = {}
    if args.by_length:
        prompts.sort(key=lambda turns: len(tokenizer.encode(turns[0])))
        order = np.random.default_rng(1).permutation(len(prompts) // args.batch)
        prompts = [prompts[i * args.batch + j] for i in order for j in range(args.batch)]
    for part in ("data", "features"):
        (args.folder / part).mkdir(parents=True, exist_ok=True)
    cleaner, begin, last, number = Cleaner(args.least_distinct), time.time(), 0.0, args.first
    while time.time() - begin + last < args.seconds:
        started, name = time.time(), f"{args.name + number:05d}"
        data = args.folder / "data" / f"{name}.npz"
        temperature = args.temperature[number % len(args.temperature)]
        recipe = Recipe(batch=args.batch, length=args.length, temperature=temperature, seed=args.seed, **own)  # type: ignore[arg-type]
        if not data.exists():
            found = generate(target, tokenizer, recipe, number, prompts=prompts, features=True)
            assert found.features is not None
            kept = [i for i, x in enumerate(found.conversations) if x.trained[1:].any() and cleaner.keep(x)]
            rows = [found.conversations[i] for i in kept]
            features = select(found.features[mx.array(kept)], rows)
            write_features(args.folder / "features" / f"{name}.safetensors", features)
            write_shard(data, rows)
            last = time.time() - started
            print(name, temperature, len(rows), features.size, f"{last:.0f} s", cleaner.dropped, flush=True)
        number += 1


def train(args: argparse.Namespace) -> None:
    """Train on all shards of the folder but those held out; writes the weights and their running average."""
    model, _ = load(drafter=None)
    target = Target(model.model, LAYERS)
    names = sorted(path.stem for path in (args.folder / "features").glob("*.safetensors"))
    names = [name for name in names if name not in args.held_out]
    if not names:
        raise SystemExit(f"{args.folder} has no shards to train on: write some.")
    weights = dict(mx.load(str(args.start)))  # type: ignore[arg-type]
    if args.draft_vocab:
        rows = (row for name in names for row in read_shard(args.folder / "data" / f"{name}.npz"))
        ids = choose_vocabulary(count_tokens(rows, VOCABULARY), args.draft_vocab)
        named = with_vocabulary(drafter(weights), target, ids, 1).weights()
        print(len(np.setdiff1d(ids, np.array(weights["draft_to_target"]))), "new draft tokens", flush=True)
        weights = named
    net = Net(weights, target)
    held_out = {name: held_out_batches(args.folder, name, net) for name in args.held_out}
    head = LabelHead(
        target,
        mx.array(net.ids),
        read_features(args.folder / "features" / f"{names[0]}.safetensors").context[:64, :HIDDEN],
    )
    settings, steps, done = Settings(learning_rate=args.rate, warm_up=args.warm_up), args.steps, 0
    marks = {0, *(round(steps * (i + 1) / args.scores) for i in range(args.scores))}

    def report() -> None:
        for what, flat in (("now", net.parameters), ("average", net.average)):
            weights = net.weights(flat)
            print(done, what, scores(weights, target, head, held_out), flush=True)
            mx.save_safetensors(str(args.output / f"{what}.safetensors"), weights)

    args.output.mkdir(parents=True, exist_ok=True)
    report()
    recent, begun = [], time.time()
    for segments in batches(args.folder, names, args.batch, args.seed):
        length = 5 if done >= steps * (1 - args.last) else args.length
        objective = Objective(length, args.depth_weight, negatives=args.negatives, dropout=args.dropout)
        losses = net.add_gradients(segments, objective, args.seed * 1_000_003 + done)
        net.update(losses[0, 1], rate(settings, steps, done), args.weight_decay, args.average)
        recent.append(losses[:3, 0] / losses[:3, 1])
        done += 1
        if done % 100 == 0:
            speed = done * args.batch * SEGMENT / (time.time() - begun)
            print(f"{done} of {steps}: {np.mean(recent[-100:], 0).round(3)}, {speed:.0f} /s", flush=True)
        if done in marks:
            report()
        if done == steps:
            return


def check(args: argparse.Namespace) -> None:
    """Compare hidden states, logits, losses and gradients with MLX's in float32."""
    model, _ = load()
    target = Target(model.model, LAYERS)
    name = sorted(path.stem for path in (args.folder / "data").glob("*.npz"))[0]
    tokens = mx.array(
        np.stack([row.tokens[:64] for row in read_shard(args.folder / "data" / f"{name}.npz")[:8]])
    )
    fast, caches = Fast(target, 8, 64), target.make_cache()
    fast.make_cache()
    for part in (tokens[:, :50], *(tokens[:, i : i + 1] for i in range(50, 64))):
        (logits, hidden), (a, b) = target.forward(part, caches), fast.forward(part, [])
    print("logits", differ(logits[:, -1:], a), "hidden states", differ(hidden, b))
    features = read_features(args.folder / "features" / f"{name}.safetensors")
    assert model.drafter is not None
    weights = model.drafter.weights()
    made, net, objective = drafter(weights), Net(weights, target), Objective(3, 0.7)
    starts = np.arange(16) * 97
    batch = make_batch(features, starts, 3, HIDDEN, mx.array(net.kept[2]))
    batch.context = batch.context.astype(mx.float32)
    head = LabelHead(target, mx.array(net.ids), features.context[:64, :HIDDEN])
    losses, wanted = gradients(made, made.trainable_parameters(), target, head, objective, batch)
    shard = arrays(args.folder, name)
    found = net.add_gradients([(shard, int(i)) for i in starts], objective, 1)
    print("losses", differ(losses, mx.array(found)))
    gradient = net.weights(np.add(*net.gradients))
    for key, value in tree_flatten(wanted):
        print(key, differ(value, gradient[key]))


def differ(wanted: mx.array, found: mx.array) -> float:
    wanted, found = wanted.astype(mx.float32), found.astype(mx.float32)
    return round(float(mx.sqrt(mx.square(wanted - found).mean() / mx.square(wanted).mean())), 4)


# --- Shards --------------------------------------------------------------------------------------------


def drafter(weights: dict[str, mx.array]) -> Drafter:
    ids = weights["draft_to_target"]
    made = Drafter(DrafterConfig(HIDDEN, VOCABULARY, HIDDEN, BLOCKS, True, ids.size, LAYERS), ids)
    made.load_weights([(k, x.astype(mx.float32)) for k, x in weights.items() if k != "draft_to_target"])
    return made


def arrays(folder: Path, name: str) -> Arrays:
    """A shard's context [M, F] in bfloat16's bits, token [M] and left [M]."""
    features = read_features(folder / "features" / f"{name}.safetensors")
    return [np.array(features.context.view(mx.uint16)), np.array(features.token), np.array(features.left)]


def batches(folder: Path, names: list[str], size: int, seed: int) -> Iterator[list[tuple[Arrays, int]]]:
    """Endless batches of ``size`` segments; some shards are shuffled together, while the next are read."""
    random, groups = np.random.default_rng(seed), Queue[list[Arrays]](1)

    def read() -> None:
        while True:
            group: list[Arrays] = []
            for i in random.permutation(len(names)):
                group.append(arrays(folder, names[i]))
                if sum(len(x[1]) for x in group) > AT_ONCE:
                    groups.put(group)
                    group = []
            if group:
                groups.put(group)

    threading.Thread(target=read, daemon=True).start()
    mixed = np.random.default_rng(seed + 1)
    while True:
        group = groups.get()
        places = [
            (shard, int(begin))
            for shard in group
            for begin in range(int(mixed.integers(SEGMENT)), len(shard[1]) - SEGMENT - 5, SEGMENT)
        ]
        order = mixed.permutation(len(places))
        for i in range(0, len(order) - size + 1, size):
            yield [places[k] for k in order[i : i + size]]


def held_out_batches(folder: Path, name: str, net: Net) -> list[Any]:
    """Up to 5,120 positions of a shard."""
    features = read_features(folder / "features" / f"{name}.safetensors")
    starts = np.arange(0, max(1, features.size - 40), SEGMENT)
    starts = starts[np.linspace(0, len(starts) - 1, min(len(starts), 160)).astype(int)]
    made = []
    for i in range(0, len(starts), 32):
        batch = make_batch(features, starts[i : i + 32], 5, HIDDEN, mx.array(net.kept[2]))
        batch.context = batch.context.astype(mx.float32)
        mx.eval(vars(batch))
        made.append(batch)
    return made


def scores(
    weights: dict[str, mx.array], target: Target, head: LabelHead, held_out: dict[str, list[Any]]
) -> dict[str, float]:
    """Tokens per step on held-out shards, their own tokens given."""
    made, found = drafter(weights), {}
    for name, parts in held_out.items():
        found[name] = round(score(made, target, head, Objective(), parts).tokens_per_step, 4)
    return found


if __name__ == "__main__":
    main()
