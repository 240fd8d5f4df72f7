"""Write conversations and train a drafter on them: one model, on one GPU, in a given time.

    python run.py FOLDER OUTPUT --name NAME --start DRAFTER.safetensors --layers 8 16 23 --seconds S --write S

FOLDER is what ``prepare.py`` wrote. OUTPUT gets NAME-I.safetensors (parts of at most 15.9 MB), the
conversations as NAME.npz and what is known of the run as NAME.json. A file FOLDER/deadline with seconds since
1970 replaces ``--seconds``, also during the run.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import code_prompts
import numpy as np
import torch
from base import Base
from safetensors.torch import load_file, save_file
from train import Drafter, How, Rows, Vocabulary, train, with_rare
from write import Follow, write

SHORT, LONG, READ = 640, 3072, 1536  # tokens of a row; of a long one; of it, read at once
LOOP_GRAM, LOOP = 4, 32  # tokens of a gram, of a stretch
POOL = 32  # batches whose features are kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--start", type=Path, required=True, help="a drafter's safetensors, in floats")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--write", type=float, required=True, help="seconds of it")
    parser.add_argument("--batch", type=int, default=2048, help="rows written at once")
    parser.add_argument("--long-batch", type=int, default=192)
    parser.add_argument("--long-share", type=float, default=0.15, help="of the time for writing")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json: rows about the model's own code are added"
    )
    parser.add_argument("--blocks", type=int, help="residual blocks, where it is to have more")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=16384, help="of a training batch")
    parser.add_argument("--uses", type=int, default=2, help="of a batch's features, until made anew")
    parser.add_argument("--short", type=int, default=SHORT)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    begun = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    def say(*words: object) -> None:
        print(f"[{args.name} {time.time() - begun:.0f}]", *words, flush=True)

    base = Base(args.folder, tuple(args.layers), args.device, torch.bfloat16)
    say("loaded", torch.cuda.memory_allocated() // 2**20 if args.device == "cuda" else "", "MiB")
    args.output.mkdir(parents=True, exist_ok=True)
    kept = write_all(args, base, dict(np.load(args.folder / "prompts.npz")), begun + args.write, say)
    start = load_file(args.start)
    of_id = np.full(int(base.ids.max()) + 1, -1)
    of_id[base.ids.cpu().numpy()] = np.arange(len(base.ids))
    places = of_id[start["draft_to_target"].numpy()]
    vocabulary = Vocabulary.of(places, base)
    model = with_rare(start, base, vocabulary, args.blocks)
    kinds = [kind for kind in ("short", "long") if kind in kept and len(kept[kind])]
    rows = {kind: Rows.of(kept[kind], kept[f"{kind}_trained"], vocabulary) for kind in kinds}
    said = {kind: int(kept[f"{kind}_trained"].sum()) for kind in kinds}
    say({kind: len(x) for kind, x in rows.items()}, "rows,", said, "trained tokens")
    count = min(args.tokens // args.short, len(rows["short"]) // 4)
    held = rows["short"][torch.arange(count, device=args.device)]
    rows["short"] = rows["short"][torch.arange(count, len(rows["short"]), device=args.device)]
    end = args.folder / "deadline"

    def share() -> float:
        at = float(end.read_text()) if end.exists() else begun + args.seconds
        return (time.time() - trained_from) / max(at - trained_from, 1)

    def keep() -> None:
        save(model, base, places, args.output / args.name)

    trained_from = time.time()
    done = train(
        model,
        base,
        vocabulary,
        featured(base, batches_of(rows, args.tokens), args.uses),
        (held, base.features(held.tokens)),
        share,
        How(rate=args.rate),
        save=keep,
        say=say,
    )
    keep()
    done |= {"rate": args.rate, "tokens": args.tokens, "trained_tokens": sum(said.values())}
    done |= {f"{kind}_rows": len(kept[kind]) for kind in kinds}
    say(json.dumps(done))
    (args.output / f"{args.name}.json").write_text(json.dumps(done, indent=1))
    ids = base.ids.cpu().numpy().astype(np.uint16 if int(base.ids.max()) < 2**16 else np.int32)
    trained = {f"{kind}_trained": np.packbits(kept[f"{kind}_trained"]) for kind in kinds}
    np.savez_compressed(args.output / args.name, **{kind: ids[kept[kind]] for kind in kinds}, **trained)
    say("done")


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
        new = Path(f"{path}-{i}.part")
        save_file(part, new)
        new.rename(f"{path}-{i}.safetensors")


def batches_of(rows: dict[str, Rows], tokens: int) -> Iterator[Rows]:
    """Endless batches of rows of one kind, each kind as often as its tokens are many."""
    random_ = np.random.default_rng(3)
    sizes = np.array([x.tokens.numel() for x in rows.values()], float)
    orders: dict[str, torch.Tensor] = {}
    while True:
        kind = list(rows)[random_.choice(len(rows), p=sizes / sizes.sum())]
        all_, order = rows[kind], orders.get(kind, ())
        count = min(max(1, tokens // all_.tokens.shape[1]), len(all_))
        if len(order) < count:
            order = torch.randperm(len(all_), device=all_.tokens.device)
        yield all_[order[:count]]
        orders[kind] = order[count:]


def featured(base: Base, batches: Iterator[Rows], uses: int) -> Iterator[tuple[Rows, torch.Tensor]]:
    """With what the model says of each batch, which comes ``uses`` times, among the ``POOL`` last ones."""
    chance, pool = random.Random(4), []
    while True:
        batch = next(batches)
        new = batch, base.features(batch.tokens)
        if len(pool) < POOL:
            pool.append(new)
        else:
            pool[chance.randrange(POOL)] = new
        for _ in range(uses):
            yield chance.choice(pool)


def write_all(args, base: Base, prompts: dict, until: float, say) -> dict:
    follow = Follow(
        torch.from_numpy(prompts["follow"].astype(np.int64)).to(base.device),
        torch.from_numpy(prompts["follow_answers"]).to(base.device),
        torch.from_numpy(prompts["asked"].astype(np.int64)).to(base.device),
        int(prompts["end"]),
    )
    starts = np.split(prompts["begun"], np.cumsum(prompts["lengths"])[:-1])
    chance = np.random.default_rng(args.seed)

    def texts(rows: list[np.ndarray]) -> torch.Tensor:
        wide = np.full((len(rows), max(map(len, rows))), -1, np.int64)
        for i, row in enumerate(rows):
            wide[i, : len(row)] = row
        return torch.from_numpy(wide).to(base.device)

    def batch(rows, answering, following, length, prefill=0):
        warm = np.where(
            chance.random(len(rows)) < 0.5, 0.0, np.where(chance.random(len(rows)) < 0.5, 0.5, 0.8)
        )
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
    parts: dict[str, list] = {"short": [], "short_trained": [], "long": [], "long_trained": []}

    def take(kind: str, tokens: np.ndarray, trained: np.ndarray) -> None:
        trained = trained & ~loops(tokens)
        good = trained.sum(1) > 4
        parts[kind].append(tokens[good])
        parts[f"{kind}_trained"].append(trained[good])

    short = chance.permutation(np.flatnonzero(~prompts["long"])).tolist()
    long = [i for i in np.flatnonzero(prompts["long"]) if len(starts[i]) >= READ]
    long = chance.permutation(long).tolist() if long else []
    tokenizer = None
    if args.tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.tokenizer))
    begun, turn, last = time.time(), 0, 0.0
    spent = {"short": 0.0, "long": 0.0}
    more: list = []  # conversations about the model's own code: (begun, following)
    while time.time() + last < until:
        started, turn = time.time(), turn + 1
        wants_long = spent["long"] < args.long_share * (time.time() - begun)
        if tokenizer is not None and turn in (3, 7):
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


def loops(tokens: np.ndarray) -> np.ndarray:
    """Which tokens of rows [B, T] end a stretch that was nearly all said three times before, bool."""
    n = LOOP_GRAM - 1
    primes = np.array([1, 1_000_003, 998_244_353, 15_485_863])[:LOOP_GRAM]
    width = tokens.shape[1] - n
    grams = sum(tokens[:, i : i + width].astype(np.int64) * prime for i, prime in enumerate(primes))
    order = np.argsort(grams, axis=1, kind="stable")
    ordered, place = np.take_along_axis(grams, order, 1), np.arange(width)
    begins = np.ones_like(ordered, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    before = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    old = np.zeros(tokens.shape)
    np.put_along_axis(old, order + n, before >= 3, 1)
    total = np.cumsum(old, axis=1)
    total[:, LOOP:] -= total[:, :-LOOP].copy()
    return total >= 0.9 * LOOP


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
