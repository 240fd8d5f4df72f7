"""The host loop of an exported model: what ``examples/cpp`` does, in Python."""

import json
from pathlib import Path

import mlx.core as mx


class Host:
    """Decodes one text with the functions in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = json.loads((folder / "manifest.json").read_text())
        weights = mx.load(str(folder / self.told["weights"]["file"]))
        self.weights = [weights[each["name"]] for each in self.told["weights"]["arrays"]]
        self.functions = {each["name"]: each for each in self.told["functions"]}
        self.loaded = {}

    def call(self, name: str, *own: mx.array) -> list[mx.array]:
        function = self.functions[name]
        while self.rows + function["room"] > self.told["capacities"][self.size]:
            self.size += 1
        shapes = [each["shapes"][self.size] for each in self.told["state"]]
        self.state = [grown(array, shape) for array, shape in zip(self.state, shapes, strict=True)]
        file = function["files"][self.size]
        if file not in self.loaded:
            self.loaded[file] = mx.import_function(str(self.folder / file))
        found = self.loaded[file](*own, *self.state, *self.weights)
        mx.eval(found)
        count = len(function["outputs"])
        self.state = found[count:]
        return found[:count]

    def generate(self, prompt: list[int], most: int, step: str, *own: mx.array) -> tuple[list[int], int]:
        """Tokens, and the steps that they took."""
        self.rows = self.size = 0
        dtypes = [getattr(mx, each["dtype"]) for each in self.told["state"]]
        self.state = [mx.zeros(e["shapes"][0], d) for e, d in zip(self.told["state"], dtypes, strict=True)]
        self.state[0] = mx.array(prompt[:1], mx.int32)
        chunks = sorted(each["tokens"] for each in self.functions.values() if each["kind"] == "prefill")
        rest = prompt[1:]
        while rest:
            size = max([chunk for chunk in chunks if chunk <= len(rest)], default=chunks[0])
            now, rest = rest[:size], rest[size:]
            tokens = mx.array([now + [0] * (size - len(now))], mx.int32)
            self.call(f"prefill-{size}", tokens, mx.array([len(now)], mx.int32))
            self.rows += len(now)
        said, steps = [], 0
        while (
            len(said) < most and self.rows + 1 < self.told["context"] and not ended(said, self.told["stop"])
        ):
            tokens, count = self.call(step, *own)
            new = tokens.tolist()[0][: count.item()]
            self.rows += len(new)
            steps += 1
            ends = [i for i, token in enumerate(new) if token in self.told["stop"]]
            said += new[: ends[0] + 1] if ends else new
        return said[:most], steps


def ended(said: list[int], stop: list[int]) -> bool:
    return bool(said) and said[-1] in stop


def grown(array: mx.array, shape: list[int]) -> mx.array:
    missing = [(0, new - old) for new, old in zip(shape, array.shape, strict=True)]
    return mx.pad(array, missing) if any(more for _, more in missing) else array
