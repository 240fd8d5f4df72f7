"""Long conversations about several of the model's own texts: ``python long.py FOLDER [COUNT] > long.jsonl``.

FOLDER as for ``texts.py``, whose paragraphs and questions these are: 14 to 26 paragraphs in one turn, then
questions about them.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "smollm2-135m-instruct"))
import texts as t

SEED = 20261126
ORDINALS = ["first", "second", "third", "fourth", "fifth", "last"]


def main() -> None:
    chance = random.Random(SEED)
    paragraphs, _ = t.texts(Path(sys.argv[1]))
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 1200):
        body, words = [], chance.randrange(1150, 1650)
        while sum(len(p.split()) for p in body) < words:
            body.append(chance.choice(paragraphs))
        if chance.random() < 0.5:
            count, size = 6, len(body) // 6
            parts = ["\n".join(body[i * size : (i + 1) * size]) for i in range(count)]
            head = chance.choice(["Passage {}:", "Text {}", "## Document {}", "[{}]"])
            text = "\n\n".join(f"{head.format(i + 1)}\n{part}" for i, part in enumerate(parts))
        else:
            text = "\n\n".join(body)
        first = task(chance, body)
        opening = chance.choice([f"{first}\n\n{text}", f"{text}\n\n{first}", f"{text}\n\nQuestion: {first}"])
        print(json.dumps({"turns": [opening, *(task(chance, body) for _ in range(6))]}))


def task(chance: random.Random, body: list[str]) -> str:
    kind = chance.random()
    if kind < 0.3:
        return f"{chance.choice(t.questions)} Answer from the {chance.choice(ORDINALS)} passage."
    if kind < 0.5:
        start = " ".join(chance.choice(body).split()[:6])
        then = chance.choice(["", "Quote it.", "Summarize it."])
        return f'What does the passage that begins with "{start}" say? {then}'
    if kind < 0.7:
        which, how = (
            chance.choice(ORDINALS),
            chance.choice(["one sentence", "two sentences", "your own words"]),
        )
        return f"Summarize the {which} passage in {how}."
    if kind < 0.8:
        return f"Repeat the {chance.choice(ORDINALS)} passage word for word."
    return chance.choice([*t.extract, *t.summarize, *t.rewrite])


main()
