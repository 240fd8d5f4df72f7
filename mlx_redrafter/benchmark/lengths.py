"""Speed-up by how much was read before: the same prompts, after more and more other text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..chat import Message
from .measure import Contender, Meter, Run, time_answer
from .statistics import interval, speed, tokens_per_step
from .tables import Table, number, speedup

Encode = Callable[[list[Message]], list[int]]
Pair = tuple[Run, Run]  # plain decoding's answer and ours


class Padding:
    """Text to put before prompts; each gets another part of it.

    Raises:
        ValueError: there is hardly any.
    """

    def __init__(self, text: str, tokenizer: TokenizerWrapper, encode: Encode) -> None:
        self.tokens = list(tokenizer.encode(text, add_special_tokens=False))
        self.decode, self.encode = tokenizer.decode, encode
        if len(self.tokens) < 2:
            raise ValueError("--lengths has no text to put before the prompts: name a file with --padding.")

    def before(self, messages: list[Message], length: int, number: int) -> list[int] | None:
        """The messages' token ids, the last one after so much text that they are ``length`` or a few less.

        None if they are longer than that.
        """
        ids, missing = self.encode(messages), length - len(self.encode(messages))
        if missing < 0:
            return None
        *earlier, last = messages
        start = number * 7919 % len(self.tokens)
        around = (self.tokens[start:] + self.tokens * (1 + missing // len(self.tokens)))[:missing]
        while around:  # text and template may meet in other tokens
            content = f"{self.decode(around)}\n\n{last['content']}"
            ids = self.encode([*earlier, {**last, "content": content}])
            if len(ids) <= length:
                break
            around = around[: length - len(ids)]
        return ids if around else self.encode(messages)


def compare(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    meter: Meter,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Pair]:
    """Time plain decoding and ours, the two ``contenders``, on each of the prompts."""
    for place, ids in enumerate(prompts):
        order = contenders if place % 2 else contenders[::-1]  # so that a drift of the machine cancels
        runs = {each.name: time_answer(each, list(ids), max_tokens, meter) for each in order}
        tick()
        yield runs[contenders[0].name], runs[contenders[1].name]


def summarise(length: int, pairs: Sequence[Pair]) -> dict[str, Any]:
    """An entry of the report's ``lengths``."""
    plain, ours = [list(runs) for runs in zip(*pairs, strict=True)]
    speeds = [(speed([a]), speed([b])) for a, b in pairs]
    return {
        "length": length,
        "prompts": len(pairs),
        "prompt_tokens": median(run.prompt_tokens for run in ours),
        "speedup": asdict(interval([b / a for a, b in speeds if a and b])),
        "tps": speed(ours),
        "baseline_tps": speed(plain),
        "tokens_per_step": tokens_per_step(ours),
        "first_token": median(b.first / a.first for a, b in pairs),
        "peak_memory": median(b.peak_memory / a.peak_memory for a, b in pairs),
        "identical": all(a.tokens == b.tokens for a, b in pairs),
    }


def lengths_table(report: dict[str, Any]) -> Table:
    """All lengths."""
    rows = [
        [
            f"{found['prompt_tokens']:,.0f}",
            str(found["prompts"]),
            speedup(found["speedup"]),
            number(found["tps"]),
            number(found["baseline_tps"]),
            f"{found['tokens_per_step']:.2f}",
            f"{found['first_token']:.2f}",
            f"{found['peak_memory']:.2f}",
            "yes" if found["identical"] else "no",
        ]
        for found in report["lengths"]
    ]
    header = ["tokens before", "prompts", "speed-up (95 %)", "tokens/s", "plain", "tokens per step"]
    header += ["time to first token / plain", "peak memory / plain", "same output"]
    return Table("Speed-up by length of the text", header, rows)
