"""What may be expected of a run before it is done: a law fitted to the runs of docs/log.md.

A drafter gets better with the positions that it knows (different ones that it was trained on) and with those
that it is trained on (repeated ones counted again): tokens per step rise from 1 to ``1 + GAIN`` with the
geometric mean of both, half of the way at ``HALF``.
"""

import math

from .card import duration

# Millions of positions known and trained on, and tokens per step by real greedy decoding of MT-Bench with
# width 1, length 4; SmolLM2-135M-Instruct on text of its own. From docs/log.md, all of November 23:
RUNS = (
    (0.068, 0.62, 1.44),  # "The 30-minute run": 68,390 tokens, 601 steps of 1,024
    (0.109, 0.63, 1.46),  # "The 30-minute run on a quiet machine": 108,809 tokens, 612 steps
    (0.53, 1.68, 1.65),  # "The default drafter": 1,640 steps
    (0.93, 5.72, 1.76),  # "All of MT-Bench", after 1,800 steps with prompts
    (1.71, 9.2, 1.84),  # "Twice the data"
    (4.47, 31.7, 1.93),  # "The CPU's matrix units, and 2.7 times the data"
    (8.92, 58.4, 1.96),  # "Twice the data once more"
)
# Least squares of these; the largest error is 0.011. Not among them, and foreseen as 1.87: Qwen2.5-Coder 0.5B
# (2.92 M known, 11.8 M trained on; its card), 1.89 on code and 1.64 on other kinds of text.
GAIN, HALF, POWER = 1.080, 0.435e6, 0.54
# Of the foreseen gain, what other texts and models had: 0.59 (other kinds of text than MT-Bench, the first
# default drafter) to 1.17 (held-out conversations of the 30-minute run).
LOW, HIGH = 0.6, 1.2
MOST_EPOCHS = 10.0  # more of them were never measured


def tokens_per_step(known: float, trained: float) -> float:
    """What the law says of so many positions."""
    return 1 + GAIN / (1 + math.pow(HALF / max(1.0, _amount(known, trained)), POWER))


def forecast(known: float, trained: float, seconds: float) -> str:
    """One sentence, which says no more than the runs bear out.

    Args:
        known: positions in the data.
        trained: positions in all steps.
        seconds: until the drafter is there.
    """
    least, most = (1e6 * math.sqrt(run[0] * run[1]) for run in (RUNS[0], RUNS[-1]))
    amount = _amount(known, trained)
    after = "after " + duration(60 * max(1, round(seconds / 60))).removesuffix(" 0 s")
    if amount < 0.95 * least:
        return f"no forecast {after}: {trained:,.0f} positions to train on are fewer than were ever measured."
    if amount > 1.05 * most:
        return f"at least {RUNS[-1][2]:.2f} tokens per step {after}, on chat (width 1, length 4)."
    gain = tokens_per_step(known, trained) - 1
    spread = f"{1 + LOW * gain:.1f} to {1 + HIGH * gain:.1f}, by the kind of text"
    return f"about {1 + gain:.1f} tokens per step {after} ({spread}; width 1, length 4)."


def _amount(known: float, trained: float) -> float:
    """What counts of both: nothing is known that is not trained on, and epochs count as far as measured."""
    return math.sqrt(min(known, trained) * min(trained, MOST_EPOCHS * known))
