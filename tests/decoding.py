"""Ways into the decoding core that tests share."""

import mlx.core as mx

from mlx_redrafter.decoding.layers import View
from mlx_redrafter.decoding.penalties import penalty_settings
from mlx_redrafter.decoding.sampling import Sampling, filter_settings
from mlx_redrafter.decoding.state import PLAIN, begin
from mlx_redrafter.decoding.step import pick, step
from mlx_redrafter.engine.loop import Batch, Text


def everything(state):
    """A view of all rows."""
    return View(state.capacity)


def before_the_last(target, prompt, sampling=None, seeds=None):
    """The state of a text that is a prompt: its layers hold all tokens but the last."""
    caches = target.make_cache()
    for start in range(0, len(prompt) - 1, 4):
        target.forward(mx.array([prompt[start : min(start + 4, len(prompt) - 1)]]), caches)
    rows, layers = target.layers_of(caches)
    seeds = mx.random.key(0) if seeds is None else seeds
    state = begin(prompt, rows, layers, target.no_context(), seeds)
    how = [sampling or Sampling()]
    state.sampling = filter_settings(how, target.vocabulary) | penalty_settings(how)
    return state


def start(target, prompt, **options):
    """The state after a prompt and the first token, which is what the model says then."""
    state = before_the_last(target, prompt, **options)
    return step(target, None, pick, PLAIN, state, everything(state))[0]


def decode(run, policy, state, rows, limit, stop=frozenset(), grain=1):
    """Decode on after a state whose layers hold ``rows`` tokens; yields what each step emits."""
    batch = Batch(lambda texts: run, policy, 0, grain)
    batch.join(Text(1, stop=stop, left=limit, rows=rows, is_new=False), state)
    del state
    while batch.everyone:
        yield from batch.step()
