"""Conversations that a model writes with itself, a thousand rows in lockstep, each step one CUDA graph.

The product's ``mlx_redrafter.train.selfgen`` in another dress: the template is dictated, a user's turn is
a question that was given, or sampled after an opening, and an answer is sampled or greedy.
"""

from dataclasses import dataclass

import numpy as np
import torch
from base import Base, Cache

BUCKET = 128  # columns by which attention grows
LONGEST_USER_TURN = 160
LEAST_PROBABILITY = 0.05  # of a sampled token, compared with the likeliest


@dataclass
class Follow:
    """What may be dictated after an answer: the template, and a question or an opening."""

    tokens: torch.Tensor  # [Q, L] places, -1 after the end
    answers: torch.Tensor  # [Q] bool: the assistant speaks next (a whole question), else the user goes on
    asked: torch.Tensor  # [n] what comes after a user's own turn: the template up to the answer
    end: int  # the token that ends a turn


@torch.no_grad()
def write(
    base: Base,
    begun: torch.Tensor,
    answering: torch.Tensor,
    following: torch.Tensor,
    follow: Follow,
    temperature: torch.Tensor,
    length: int,
    prefill: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Write B rows of ``length`` tokens.

    Args:
        begun: [B, n] places of the first tokens, -1 after the end of each.
        answering: [B] who speaks then.
        following: [B, K] rows of ``follow`` to use after each answer; then 0.
        temperature: [B] of answers; 0 is greedy. Users' turns are at 1.
        prefill: tokens that all rows have begun with, and which are read at once.

    Returns:
        places int32 [B, length] and whether the model itself said them as the assistant, bool.
    """
    device, batch = base.device, begun.shape[0]
    room = length + follow.tokens.shape[1] + 2
    forced = torch.full((batch, room), -1, device=device, dtype=torch.int64)
    forced[:, : begun.shape[1]] = begun[:, :room]
    written = torch.zeros((batch, room), device=device, dtype=torch.int64)
    trained = torch.zeros((batch, room), device=device, dtype=torch.bool)
    columns = -(-length // BUCKET) * BUCKET
    cache = Cache(base, batch, columns)
    state = {
        "at": torch.zeros(1, device=device, dtype=torch.int64),
        "answering": answering.clone(),
        "said": torch.zeros(batch, device=device, dtype=torch.int64),
        "turn": torch.zeros(batch, device=device, dtype=torch.int64),
    }
    pad = torch.zeros((batch, 1), device=device, dtype=torch.int64)
    following = torch.cat([following, pad], dim=1)
    offsets = torch.arange(follow.tokens.shape[1], device=device)
    asked = torch.full((follow.tokens.shape[1],), -1, device=device, dtype=torch.int64)
    asked[: len(follow.asked)] = follow.asked

    def step(shown: int) -> None:
        at, answering = state["at"], state["answering"]
        token = written.index_select(1, at)[:, 0]
        logits = base.step(token, at, cache, shown).float()
        logits[:, follow.end] = torch.where(state["said"] == 0, -1e9, logits[:, follow.end])
        warmth = torch.where(answering, temperature, 1.0)[:, None]
        least = logits.amax(-1, keepdim=True) + np.log(LEAST_PROBABILITY)
        likely = logits >= least
        if device == "cpu":  # random numbers are dear, and their number need not be known in advance
            noise = torch.empty(int(likely.sum())).exponential_().log_()
            noise = torch.zeros_like(logits).masked_scatter_(likely, noise)
        else:
            noise = torch.empty_like(logits).exponential_().log_()
        sampled = torch.where(likely, logits - warmth * noise, -1e9).argmax(-1)
        sampled = torch.where(~answering & (state["said"] >= LONGEST_USER_TURN), follow.end, sampled)
        after = at + 1
        given = forced.index_select(1, after)[:, 0]
        free = given < 0
        token = torch.where(free, sampled, given)
        written.index_copy_(1, after, token[:, None])
        trained.index_copy_(1, after, (free & answering)[:, None])
        ended = free & (token == follow.end)
        row = following.gather(1, state["turn"].clamp(max=following.shape[1] - 1)[:, None])[:, 0]
        dictated = torch.where(answering[:, None], follow.tokens[row], asked)
        places = (after + 1 + offsets).clamp(max=room - 1)
        old = forced.index_select(1, places)
        forced.index_copy_(1, places, torch.where(ended[:, None] & (dictated >= 0), dictated, old))
        state["turn"] += ended & answering
        next_answers = torch.where(answering, follow.answers[row], True)
        state["answering"].copy_(torch.where(ended, next_answers, answering))
        state["said"].copy_(torch.where(ended, 0, state["said"] + free))
        at += 1

    written[:, 0] = forced[:, 0]
    if prefill:
        written[:, :prefill] = forced[:, :prefill]
        for start in range(0, batch, 8):
            part = slice(start, start + 8)
            base.features(written[part, : prefill - 1], cache.rows(start, start + 8))
        state["at"] += prefill - 1
    begin = max(prefill - 1, 0)
    if device == "cpu":
        for place in range(begin, length - 1):
            step(min(columns, (place // BUCKET + 1) * BUCKET))
    else:
        place = begin
        while place < length - 1:
            shown = min(columns, (place // BUCKET + 1) * BUCKET)
            place = _replay(lambda shown=shown: step(shown), place, min(shown, length - 1))
    return written[:, :length].cpu().numpy().astype(np.int32), trained[:, :length].cpu().numpy()


def _replay(step, place: int, end: int) -> int:
    """Steps up to ``end``: the first ones warm up, then one is captured and played."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(min(2, end - place)):
            step()
            place += 1
    torch.cuda.current_stream().wait_stream(stream)
    if place >= end:
        return place
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(end - place):
        graph.replay()
    torch.cuda.synchronize()
    return end
