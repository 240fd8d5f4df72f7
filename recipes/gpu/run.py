"""Write conversations, train a drafter on them, measure it: one model, on one GPU, in a given time.

    python run.py FOLDER OUTPUT --seconds S --write S [--start drafter.safetensors]
        [--wait rows.npz --modes ...]

FOLDER is what ``prepare.py`` wrote. OUTPUT gets NAME.safetensors (in parts of at most 15 MB) and NAME.json.
"""

import argparse
import json
import random
import time
from pathlib import Path

import code_prompts
import numpy as np
import torch
from base import Base
from safetensors.torch import load_file, save_file
from train import Drafter, Sizes, Vocabulary, acceptance, train
from write import Follow, write

SHORT, LONG, READ = 640, 3072, 1536  # tokens of a row; of a long one; of it, read at once
LOOP_GRAM, LEAST_DISTINCT = 4, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--write", type=float, default=150, help="seconds of it")
    parser.add_argument("--batch", type=int, default=1024, help="rows written at once")
    parser.add_argument("--long-batch", type=int, default=160)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--exit", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--start", type=Path, help="a drafter's safetensors, whose draft tokens stay")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json: rows about the model's own code are added"
    )
    parser.add_argument("--modes", nargs="*", help="only compare these, on rows that another process writes")
    parser.add_argument("--rows", type=Path, required=True, help="where the rows are kept")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=32768, help="of a training batch")
    parser.add_argument("--short", type=int, default=SHORT)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    begun = time.time()
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")

    def say(*words: object) -> None:
        print(f"[{args.name} {time.time() - begun:.0f}]", *words, flush=True)

    base = Base(args.folder, tuple(args.layers), args.device, torch.bfloat16)
    prompts = dict(np.load(args.folder / "prompts.npz"))
    say("loaded", torch.cuda.memory_allocated() // 2**20 if args.device == "cuda" else "", "MiB")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.modes:
        while not args.rows.exists():
            time.sleep(2)
        kept = dict(np.load(args.rows))
    else:
        kept = write_all(args, base, prompts, begun + args.write, say)
        np.savez(args.rows.with_suffix(".part.npz"), **kept)
        args.rows.with_suffix(".part.npz").rename(args.rows)
    if args.modes:
        prompts["measured_names"] = prompts["measured_names"][::2]
    measured = [
        (row[:end], int(first))
        for row, first, end in zip(
            kept["measured"], prompts["measured_lengths"], kept["measured_ends"], strict=True
        )
    ][:: 2 if args.modes else 1]
    start = load_file(args.start) if args.start else None
    if start is not None:
        of_id = np.full(int(base.ids.max()) + 1, -1)
        of_id[base.ids.cpu().numpy()] = np.arange(len(base.ids))
        places = of_id[start["draft_to_target"].numpy()]
    else:
        counts = np.bincount(kept["short"][kept["short_trained"]], minlength=len(base.ids))
        places = np.sort(np.argsort(-counts, kind="stable")[: args.vocabulary])
        say(f"{counts[places].sum() / counts.sum():.4f} of the tokens are in the draft vocabulary")
    vocabulary = Vocabulary.of(places, base)
    results = {}
    modes = args.modes or ["depth"]
    for mode in modes:
        sizes = Sizes(
            base.hidden,
            base.hidden * (1 + len(args.layers)),
            args.exit,
            2,
            len(places),
            mode=mode.split("+")[0],
        )
        model = Drafter(sizes).to(args.device)
        if start is not None:
            named = {name: x.float() for name, x in start.items() if name != "draft_to_target"}
            missing, unknown = model.load_state_dict(named, strict=False)
            assert not unknown and all(name.startswith("memory") for name in missing), (missing, unknown)
        else:
            with torch.no_grad():  # the head begins as the model's own, the embeddings are small
                if args.exit >= base.hidden:
                    model.lm_head[-1].weight[:, : base.hidden] = base.head[vocabulary.places].float()
                model.rnn_w.weight *= 8
        left = begun + args.seconds - time.time() - 45
        seconds = min(left, 1e9) / (1 if not args.modes else len(modes) - len(results))
        batches = batches_of(kept, args.tokens, args.short)
        done = train(
            model,
            base,
            vocabulary,
            batches,
            seconds,
            args.steps,
            rate=args.rate,
            lk=3.0 if mode.endswith("+lk") else 0.0,
            say=lambda *x, m=mode: say(m, *x),
        )
        done["measured"] = report(model, base, vocabulary, measured, prompts)
        done["rate"], done["short_rows"], done["long_rows"] = (
            args.rate,
            len(kept["short"]),
            len(kept.get("long", [])),
        )
        done["trained"] = int(kept["short_trained"].sum())
        results[mode] = done
        say(mode, json.dumps(done))
        (args.output / f"{args.name}.json").write_text(
            json.dumps({"sizes": vars(sizes), "runs": results}, indent=1)
        )
        if not args.modes:
            save(model, base, places, args.output / args.name)


def save(model: Drafter, base: Base, places: np.ndarray, path: Path) -> None:
    tensors = {
        name: x.detach().to(torch.bfloat16).cpu().contiguous() for name, x in model.state_dict().items()
    }
    tensors["draft_to_target"] = base.ids[torch.from_numpy(places).to(base.device)].to(torch.int32).cpu()
    parts: list[dict] = [{}]
    for name, x in tensors.items():
        if sum(y.nbytes for y in parts[-1].values()) + x.nbytes > 15_900_000:
            parts.append({})
        parts[-1][name] = x
    for i, part in enumerate(parts):
        save_file(part, f"{path}-{i}.safetensors")


def report(model, base, vocabulary, measured, prompts) -> dict:
    model.eval()
    found = np.array(acceptance(model, base, vocabulary, measured))
    model.train()
    names = prompts["measured_names"]
    return {
        str(name): [
            round(float(found[names == name, i].sum() / found[names == name, i + 1].sum()), 3) for i in (0, 2)
        ]
        for name in np.unique(names)
    }


def batches_of(kept: dict, tokens: int, short: int):
    """Endless batches of rows, of one length each, as often as their tokens are many."""
    random_ = np.random.default_rng(3)
    kinds = [kind for kind in ("short", "long") if kind in kept and len(kept[kind])]
    sizes = np.array([kept[kind].size for kind in kinds], float)
    orders: dict[str, list[int]] = {kind: [] for kind in kinds}
    while True:
        kind = kinds[random_.choice(len(kinds), p=sizes / sizes.sum())]
        rows = kept[kind]
        count = max(1, tokens // rows.shape[1])
        if len(orders[kind]) < count:
            orders[kind] = random_.permutation(len(rows)).tolist()
        chosen, orders[kind] = orders[kind][:count], orders[kind][count:]
        yield rows[chosen], kept[f"{kind}_trained"][chosen]


def write_all(args, base: Base, prompts: dict, until: float, say) -> dict:
    follow = Follow(
        torch.from_numpy(prompts["follow"].astype(np.int64)).to(base.device),
        torch.from_numpy(prompts["follow_answers"]).to(base.device),
        torch.from_numpy(prompts["asked"].astype(np.int64)).to(base.device),
        int(prompts["end"]),
    )
    starts = np.split(prompts["begun"], np.cumsum(prompts["lengths"])[:-1])
    chance = np.random.default_rng(2)

    def texts(rows: list[np.ndarray]) -> torch.Tensor:
        wide = np.full((len(rows), max(map(len, rows))), -1, np.int64)
        for i, row in enumerate(rows):
            wide[i, : len(row)] = row
        return torch.from_numpy(wide).to(base.device)

    def batch(rows, answering, following, length, prefill=0, greedy=None):
        warm = np.where(
            chance.random(len(rows)) < 0.5, 0.0, np.where(chance.random(len(rows)) < 0.5, 0.5, 0.8)
        )
        warm = np.zeros(len(rows)) if greedy else warm
        return write(
            base,
            texts(rows),
            torch.from_numpy(answering).to(base.device),
            torch.from_numpy(following.astype(np.int64)).to(base.device),
            follow,
            torch.from_numpy(warm.astype(np.float32)).to(base.device),
            length,
            prefill,
        )

    kept: dict = {}
    measured = np.split(prompts["measured"], np.cumsum(prompts["measured_lengths"])[:-1])
    longest = max(map(len, measured)) + 256
    count = len(measured)
    rows, _ = batch(measured, np.ones(count, bool), np.zeros((count, 1), int), longest, greedy=True)
    ends = []
    for row, given in zip(rows, measured, strict=True):
        stop = np.flatnonzero(row[len(given) :] == follow.end)
        ends.append(min(len(given) + (int(stop[0]) + 1 if len(stop) else 256), len(given) + 256))
    kept["measured"], kept["measured_ends"] = rows, np.array(ends)
    say("measured texts written")

    parts: dict[str, list] = {"short": [], "short_trained": [], "long": [], "long_trained": []}

    def take(kind: str, tokens: np.ndarray, trained: np.ndarray) -> None:
        good = np.array([fine(x, y) for x, y in zip(tokens, trained, strict=True)])
        parts[kind].append(tokens[good])
        parts[f"{kind}_trained"].append(trained[good])

    short = chance.permutation(np.flatnonzero(~prompts["long"])).tolist()
    long = [i for i in np.flatnonzero(prompts["long"]) if len(starts[i]) >= READ]
    long = chance.permutation(long).tolist() if long else []
    tokenizer = None
    if args.tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.tokenizer))
    share_long, begun, turn, last = 0.3, time.time(), 0, 0.0
    spent = {"short": 0.0, "long": 0.0}
    more: list = []  # conversations about the model's own code: (begun, following)
    while time.time() + last < until:
        started, turn = time.time(), turn + 1
        wants_long = spent["long"] < share_long * (time.time() - begun)
        if tokenizer is not None and turn in (3, 9):
            blocks = own_code(tokenizer, base, parts)
            say(len(blocks), "code blocks")
            if blocks:
                more, long_more = conversations(tokenizer, base, prompts, follow, blocks, args)
                short = []
                long = long_more or long
        kind = "long" if wants_long and args.long_batch and len(long) > 0 and turn > 1 else "short"
        if kind == "long":
            chosen, long = long[: args.long_batch], long[args.long_batch :]
            if chosen and isinstance(chosen[0], tuple):
                first, then = [x for x, _ in chosen], np.array([y for _, y in chosen])
                answering = np.ones(len(chosen), bool)
            else:
                first, then, answering = (
                    [starts[i] for i in chosen],
                    prompts["following"][chosen],
                    prompts["answering"][chosen],
                )
            tokens, trained = batch(first, answering, then, LONG, READ)
        else:
            if more and turn % 2:
                chosen, more = more[: args.batch], more[args.batch :]
                first, then = [x for x, _ in chosen], np.array([y for _, y in chosen])
                answering = np.ones(len(chosen), bool)
            else:
                if len(short) < args.batch:
                    short = chance.permutation(np.flatnonzero(~prompts["long"])).tolist()
                chosen, short = short[: args.batch], short[args.batch :]
                first, then, answering = (
                    [starts[i] for i in chosen],
                    prompts["following"][chosen],
                    prompts["answering"][chosen],
                )
            tokens, trained = batch(first, answering, then, args.short)
        take(kind, tokens, trained)
        last = time.time() - started
        spent[kind] += last
        said = sum(int(x.sum()) for x in parts[f"{kind}_trained"])
        say(
            kind,
            f"{len(tokens)} rows in {last:.1f} s, {len(parts[kind][-1])} kept, "
            f"{said / 1e6:.2f} M trained tokens",
        )
    for kind in ("short", "long"):
        if parts[kind]:
            kept[kind] = np.concatenate(parts[kind])
            kept[f"{kind}_trained"] = np.concatenate(parts[f"{kind}_trained"])
    torch.cuda.empty_cache()
    return kept


def fine(tokens: np.ndarray, trained: np.ndarray) -> bool:
    """Whether the model said something in a row, and no loop."""
    said = tokens[trained].astype(np.int64)
    if len(said) < 48:
        return len(said) > 4
    grams = np.stack([said[i : len(said) - LOOP_GRAM + i] for i in range(LOOP_GRAM)])
    mixed = (grams * np.array([1, 1_000_003, 998_244_353, 15_485_863])[:, None]).sum(0)
    return len(np.unique(mixed)) >= LEAST_DISTINCT * len(mixed)


def own_code(tokenizer, base: Base, parts: dict) -> list[str]:
    ids = base.ids.cpu().numpy()
    texts = [
        tokenizer.decode(ids[row].tolist(), skip_special_tokens=True)
        for rows in parts["short"][-4:]
        for row in rows[:1200]
    ]
    return sorted({block for text in texts for block in code_prompts.code_blocks(text)})


def conversations(
    tokenizer, base: Base, prompts: dict, follow: Follow, blocks: list[str], args
) -> tuple[list, list]:
    """Rows (first places, following) about the model's own code, short and long."""
    of_id = np.full(300_000, -1)
    of_id[base.ids.cpu().numpy()] = np.arange(len(base.ids))
    chance = random.Random(len(blocks))
    # The template around a question is what all rows with one begin and end with.
    asked = prompts["asked"]
    first = np.split(prompts["begun"], np.cumsum(prompts["lengths"])[:-1])
    whole = [row for row, answering in zip(first, prompts["answering"], strict=True) if answering]
    shared = 0
    while all(row[shared] == whole[0][shared] for row in whole[:200]):
        shared += 1
    before = whole[0][:shared]
    after = np.concatenate([[follow.end], asked])
    texts = [code_prompts.edits(chance, blocks) for _ in range(6000)]
    longs = [code_prompts.files(chance, blocks, chance.randrange(5200, 7800)) for _ in range(900)]
    found: list[list] = []
    for conversation, least, most in [(texts, 0, 460), (longs, READ, 2600)]:
        codes = tokenizer.encode_batch([turns[0] for turns in conversation], add_special_tokens=False)
        rows = []
        for code in codes:
            places = of_id[np.array(code.ids)]
            row = np.concatenate([before, places, after])
            if (places < 0).any() or not least <= len(row) <= most:
                continue
            numbers = [
                chance.randrange(1, prompts["follow"].shape[0]) for _ in range(prompts["following"].shape[1])
            ]
            numbers = [n if prompts["follow_answers"][n] else 0 for n in numbers]
            rows.append((row, np.array(numbers)))
        found.append(rows)
    return found[0], found[1]


if __name__ == "__main__":
    main()
