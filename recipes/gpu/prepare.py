"""What a GPU machine without a network needs of a model: its weights, cut to the size that travels; prompts.

    uv run --with gguf recipes/gpu/prepare.py MODEL.gguf OUTPUT --prompts FILE.jsonl ...
        --measure FILE.jsonl ... [--tokens N] [--rows N] [--long FILE.jsonl]

OUTPUT gets tensors.bin and index.json (the GGUF's own blocks, nothing is requantized; of the embedding and
the head only the rows of the tokens in ids.npy), prompts.npz and parts of at most 44 MB to carry.
"""

import argparse
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import gguf
import numpy as np

from mlx_redrafter import load
from mlx_redrafter.train.selfgen import read_openings
from mlx_redrafter.train.template import Template, token_ids

PART = 46_000_000
FOLLOWING = 8  # turns that may follow a row's first one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="JSONL with turns")
    parser.add_argument(
        "--long", type=Path, nargs="*", default=[], help="JSONL with turns, the first one long"
    )
    parser.add_argument("--measure", type=Path, nargs="*", default=[], help="JSONL with turns")
    parser.add_argument("--openings", type=Path)
    parser.add_argument("--tokens", type=int, help="keep only the first N tokens and the special ones")
    parser.add_argument("--own", type=int, default=8192, help="rows that the model begins by itself")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(args.model)
    sizes = read_sizes(reader)
    _, tokenizer = load(args.model, drafter=None)
    vocabulary = vocabulary_of(reader)
    ids = np.arange(vocabulary)
    if args.tokens:
        special = {int(t) for t in tokenizer.all_special_ids} | set(tokenizer.eos_token_ids)
        special |= {i for i in tokenizer.get_added_vocab().values() if i < vocabulary}
        ids = np.array(sorted({*range(args.tokens), *special, *used(args, tokenizer)}), np.int64)
    pack(reader, sizes, ids, args.output)
    np.save(args.output / "ids.npy", ids.astype(np.int32))
    write_prompts(args, tokenizer, ids)


def used(args: argparse.Namespace, tokenizer: object) -> set[int]:
    """Tokens of the template and of what is measured, and the commoner ones of the prompts."""
    template = Template.of(tokenizer)
    found = {*template.begin(None, "a"), *template.user.then, *template.assistant.then}
    for path in args.measure:
        for turns in read_turns(path):
            found.update(token_ids(turns[0], tokenizer))
    counts: Counter[int] = Counter()
    for path in args.prompts:
        for turns in read_turns(path)[:3000]:
            counts.update(set(token_ids("\n".join(turns), tokenizer)))
    return found | {token for token, count in counts.items() if count > 2}


def read_turns(path: Path) -> list[list[str]]:
    return [json.loads(line)["turns"] for line in path.read_text().splitlines() if line.strip()]


def read_sizes(reader: gguf.GGUFReader) -> dict:
    def value(name: str) -> object:
        return reader.fields[name].contents()

    kind = value("general.architecture")
    return {
        "architecture": kind,
        "layers": value(f"{kind}.block_count"),
        "hidden": value(f"{kind}.embedding_length"),
        "heads": value(f"{kind}.attention.head_count"),
        "kv_heads": value(f"{kind}.attention.head_count_kv"),
        "eps": value(f"{kind}.attention.layer_norm_rms_epsilon"),
        "theta": value(f"{kind}.rope.freq_base"),
    }


def vocabulary_of(reader: gguf.GGUFReader) -> int:
    return next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight")


def pack(reader: gguf.GGUFReader, sizes: dict, ids: np.ndarray, output: Path) -> None:
    entries, at, whole = [], 0, len(ids) == vocabulary_of(reader)
    if whole:  # the file itself travels, so that it can be loaded there as well
        shutil.copyfile(reader.data.filename, output / "tensors.bin")
    with (output / "tensors.bin").open("r+b" if whole else "wb") as file:
        for tensor in reader.tensors:
            data = tensor.data
            if tensor.name in ("token_embd.weight", "output.weight"):
                data = data[ids]
            data = np.ascontiguousarray(data)
            raw = data.view(np.uint8)
            kind = int(tensor.tensor_type)
            entry = {"name": tensor.name, "type": kind, "bytes": raw.nbytes, "byte_shape": list(raw.shape)}
            entries.append({**entry, "at": int(tensor.data_offset) if whole else at})
            if not whole:
                file.write(raw.tobytes())
            at += raw.nbytes
    (output / "index.json").write_text(json.dumps({"sizes": sizes, "tensors": entries}))
    data = (output / "tensors.bin").read_bytes()
    for i in range(0, len(data), PART):
        (output / f"part{i // PART:02d}").write_bytes(data[i : i + PART])
    print(f"{at / 1e6:.0f} MB in {-(-len(data) // PART)} parts, {len(ids)} tokens")


def write_prompts(args: argparse.Namespace, tokenizer: object, ids: np.ndarray) -> None:
    template = Template.of(tokenizer)
    place = np.full(int(ids.max()) + 2_000, -1, np.int64)
    place[ids] = np.arange(len(ids))
    chance = random.Random(20261126)
    follow: list[tuple[list[int], bool]] = [(list(template.assistant.then[1:]), False)]
    openings = read_openings(args.openings)
    for opening in openings:
        tokens = [*follow[0][0], *token_ids(opening, tokenizer)]
        follow.append((tokens, False))
    end = int(template.assistant.then[0])
    rows: dict[str, list] = {"begun": [], "answering": [], "following": [], "long": []}

    def add(begun: list[int], answering: bool, following: list[int], long: bool = False) -> None:
        if any(t >= len(place) or place[t] < 0 for t in begun):
            return
        rows["begun"].append(begun)
        rows["answering"].append(answering)
        rows["following"].append((following + [0] * FOLLOWING)[:FOLLOWING])
        rows["long"].append(long)

    def asked(turn: str) -> int:
        tokens = template.ask(turn)[1:]
        if len(tokens) > 240 or any(t >= len(place) or place[t] < 0 for t in tokens):
            return 0
        follow.append((tokens, True))
        return len(follow) - 1

    for path in args.prompts + args.long:
        for turns in read_turns(path):
            begun = [*template.begin(None, turns[0]), *template.user.then]
            if len(begun) > (480 if path in args.prompts else 2600):
                continue
            add(begun, True, [asked(turn) for turn in turns[1:]], path in args.long)
    for _ in range(args.own):
        opening = chance.choice(openings) if chance.random() < 0.65 else ""
        others = [chance.randrange(1, 1 + len(openings)) if chance.random() < 0.5 else 0 for _ in range(3)]
        add(template.begin(None, opening), False, others)
    measured = []
    for path in args.measure:
        for turns in read_turns(path):
            begun = [*template.begin(None, turns[0]), *template.user.then]
            measured.append((path.stem, begun))
    widest = max(len(tokens) for tokens, _ in follow)
    table = np.full((len(follow), widest), -1, np.int32)
    for i, (tokens, _) in enumerate(follow):
        table[i, : len(tokens)] = place[tokens]
    arrays = {
        "follow": table,
        "follow_answers": np.array([x for _, x in follow]),
        "asked": place[list(template.user.then[1:])].astype(np.int32),
        "end": place[end],
        "begun": place[np.concatenate([np.array(x) for x in rows["begun"]])].astype(np.int32),
        "lengths": np.array([len(x) for x in rows["begun"]], np.int32),
        "answering": np.array(rows["answering"]),
        "following": np.array(rows["following"], np.int32),
        "long": np.array(rows["long"]),
        "measured": place[np.concatenate([np.array(x) for _, x in measured])].astype(np.int32),
        "measured_lengths": np.array([len(x) for _, x in measured], np.int32),
        "measured_names": np.array([name for name, _ in measured]),
    }
    np.savez_compressed(args.output / "prompts.npz", **arrays)
    kinds = np.array(rows["long"]), np.array(rows["answering"])
    print(
        f"{len(rows['begun'])} rows, {kinds[0].sum()} long, {kinds[1].sum()} with questions,",
        f"{len(follow)} follow-ups",
    )


if __name__ == "__main__":
    main()
