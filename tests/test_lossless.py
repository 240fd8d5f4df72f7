"""What is emitted is what the model would have said: greedy decoding against mlx-lm's, token for token."""

import mlx.core as mx
import numpy as np
import pytest
from decoding import decode, everything
from decoding import start as start_after
from mlx_lm.generate import generate_step
from models import ARCHITECTURES, RandomDrafter, ScriptedDrafter, make_model

from mlx_redrafter.decoding import beam
from mlx_redrafter.decoding.layers import Layers, commit, in_order
from mlx_redrafter.decoding.sampling import Sampling
from mlx_redrafter.decoding.state import DraftShape, State, begin, join
from mlx_redrafter.decoding.step import pick, step
from mlx_redrafter.engine import backend
from mlx_redrafter.engine.loop import Fixed, bucket
from mlx_redrafter.engine.runner import TRIALS, Runner
from mlx_redrafter.models.target import Target, from_prompt_cache

PROMPT = [5, 9, 33, 2, 17, 60, 3]
SHAPES = [(1, 1), (1, 4), (2, 3), (4, 5), (4, 5, 8), (3, 2, 2)]
AUTOMATIC = list(
    dict.fromkeys(s for b in (backend.METAL, backend.CUDA, backend.CPU) for s in (*b.shapes, *b.in_floats))
)


def plain(model, count, prompt=PROMPT):
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def start(target, prompt=PROMPT, **options):
    """The state after the prompt and the first token."""
    return start_after(target, prompt, **options)


def speculative(target, drafter, shape, count, prompt=PROMPT, grain=1):
    """Tokens, and how many each step emitted."""
    state = start(target, prompt)
    tokens = state.token.tolist()
    run = Runner(target, drafter)
    steps = list(decode(run, Fixed(shape), state, len(prompt), count - 1, frozenset(), grain=grain))
    return tokens + [token for s in steps for token in s.tokens], [len(s.tokens) for s in steps]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_says_what_it_would_have_said(name):
    model = make_model(name)
    target = Target(model)
    target.check()
    expected = plain(model, 30)
    for shape in (DraftShape(0, 0), DraftShape(1, 3), DraftShape(4, 3, 9), DraftShape(2, 2, 5, 3)):
        drafters = [ScriptedDrafter(target, PROMPT + expected)]
        if shape.width:  # else no drafter is asked
            drafters += [RandomDrafter(target), ScriptedDrafter(target, PROMPT + expected, shift=1)]
        for drafter in drafters:
            assert speculative(target, drafter, shape, 30)[0] == expected


@pytest.mark.parametrize("values", SHAPES)
def test_good_and_bad_drafters_at_every_shape(monkeypatch, values):
    shape = DraftShape(*values)
    model = make_model("llama3-rope")  # whose text does not repeat itself soon
    target = Target(model)
    expected = plain(model, 61)
    text = PROMPT + expected + plain(model, 10, PROMPT + expected)
    tokens, steps = speculative(target, ScriptedDrafter(target, text), shape, 61)
    assert tokens == expected
    assert all(n == shape.depth + 1 for n in steps[:-1])  # the last step may be cut short
    assert speculative(target, WrongDrafter(target, text), shape, 61)[0] == expected
    monkeypatch.setattr(beam, "TRUST", (0.0,) * 5)  # or some copies are right
    wrong_tokens, wrong_steps = speculative(target, WrongDrafter(target, text), shape, 61)
    assert wrong_tokens == expected
    assert set(wrong_steps) == {1}
    assert speculative(target, RandomDrafter(target), shape, 61)[0] == expected


class Turns:
    """A policy that uses each of some shapes in turn."""

    def __init__(self, shapes):
        self.shapes, self.chosen, self.seen = shapes, 0, []

    def choose(self, rows=0, texts=()):
        self.chosen += 1
        return self.shapes[(self.chosen - 1) % len(self.shapes)]

    def observe(self, shape, ranks, seconds, away):
        self.seen += [(shape, each) for each in ranks.values()]


@pytest.mark.parametrize("compiled, grain", [(False, 1), (False, 256), (True, 256)])
def test_every_automatic_shape_and_all_changes_between_them(compiled, grain):
    model = make_model("llama3-rope")
    target = Target(model)
    expected = plain(model, 200)
    state = start(target)
    drafter = ScriptedDrafter(target, PROMPT + expected)
    for shapes in ([shape] for shape in AUTOMATIC):
        run, policy = Runner(target, drafter, compiled=compiled), Turns(shapes)
        assert run_through(run, policy, start(target), 40, grain) == expected[:40]
    policy = Turns([*AUTOMATIC, *AUTOMATIC[::-1], *AUTOMATIC[::2]])
    run = Runner(target, drafter, compiled=compiled)
    assert run_through(run, policy, state, 200, grain) == expected
    for shape, ranks in policy.seen:
        assert len(ranks) <= shape.depth
        assert all(-1 <= rank < max(shape.width, 1) for rank in ranks)


def run_through(run, policy, state, count, grain=256):
    tokens = state.token.tolist()
    steps = list(decode(run, policy, state, len(PROMPT), count - 1, frozenset(), grain=grain))
    assert all(step.waited >= 0 for step in steps)
    return tokens + [token for step in steps for token in step.tokens]


def test_copies_alone_make_a_repetitive_text_shorter():
    model = make_model("llama")  # which soon repeats itself
    target = Target(model)
    expected = plain(model, 200)
    run, policy = Runner(target, None), Turns([DraftShape(0, 0, None, 4)])
    assert run_through(run, policy, start(target), 200) == expected
    assert len(policy.seen) < 160
    assert {rank for _, ranks in policy.seen for rank in ranks} == {-1}


def test_graphs_are_traced_a_few_times_for_a_long_text():
    model = make_model("qwen3")
    target = Target(model)
    expected = plain(model, 800)
    run = Runner(target, RandomDrafter(target), compiled=True)
    assert run_through(run, Fixed(DraftShape(2, 2, 4, 2)), start(target), 800, grain=64) == expected
    sizes = {bucket(rows, 64) for rows in range(1, 820)}
    assert len(sizes) <= 8 * (1 + np.log2(820 / 64))
    assert run.traces <= (2 + TRIALS) * len(sizes)  # with and without a path to commit, or a larger buffer


def test_buckets_hold_their_rows_and_waste_little():
    for grain in (1, 64, 256):
        for rows in range(1, 9000, 7):
            size = bucket(rows, grain)
            assert rows <= size < max(rows + grain, rows * 1.13 + 1)
            assert bucket(size, grain) == size
            assert size <= bucket(rows + 1, grain)


def test_a_plain_step_that_is_not_compiled_sees_its_own_rows_only_and_needs_no_mask():
    target = Target(make_model("llama", num_hidden_layers=1))
    run, views = Runner(target, None), []

    def watched(shape, state, view):
        views.append((view.columns, view.exact))
        return run(shape, state, view)

    for _ in decode(watched, Fixed(DraftShape(0, 0)), start(target), len(PROMPT), 200):
        pass
    assert views[:200] == [(rows + 1, True) for rows in range(len(PROMPT), len(PROMPT) + 200)]
    del views[:]
    for _ in decode(watched, Fixed(DraftShape(0, 0, None, 3)), start(target), len(PROMPT), 20):
        pass
    assert not any(exact for _, exact in views[1:])  # how far a draft gets is not known in advance


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("values", [(0, 0), (1, 4), (0, 0, None, 3), (3, 3, 8, 4)])
def test_no_step_copies_the_cache(values, compiled):
    """Peak memory over the model and one cache of 4,000 tokens; the buffers grow on the way."""
    target = Target(make_model("llama", num_hidden_layers=8, head_dim=64, max_position_embeddings=8192))
    run = Runner(target, RandomDrafter(target), compiled=compiled)

    def decode_on(count):
        steps = decode(run, Fixed(DraftShape(*values)), long_state(), LONG, count, frozenset())
        for _ in steps:
            pass

    decode_on(40)  # compiles
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    decode_on(40)
    size = 2 * 8 * 2 * 64 * 4 * bucket(LONG + 40)  # bytes of the buffers when they have grown
    assert size < mx.get_peak_memory() - before < 1.1 * size


LONG = 4060  # the buffers of 4,096 rows are soon full


def long_state():
    """A state after a long text, for a model of 8 layers with 2 key heads of size 64."""
    rows = [[mx.random.normal((1, 2, 4096, 64)) for _ in range(2)] for _ in range(8)]
    state = begin([1, 2, 5, 1, 2, 5], LONG, Layers(rows), mx.zeros((1, 32)), mx.random.key(0))
    mx.eval(rows, state.history)
    return state


class WrongDrafter(ScriptedDrafter):
    """Drafts anything but the right token."""

    def logits(self, context, state):
        return -super().logits(context, state)


def test_the_buffers_grow_during_decoding():
    model = make_model("qwen3")
    target = Target(model)
    expected = plain(model, 600)
    assert speculative(target, RandomDrafter(target), DraftShape(2, 2), 600)[0] == expected


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("values", [(1, 4), (4, 5), (4, 5, 8)])
def test_after_every_step_the_cache_equals_a_fresh_prefill(name, values):
    shape = DraftShape(*values)
    model = make_model(name)
    target = Target(model)
    text = PROMPT + plain(model, 40)
    good, bad = ScriptedDrafter(target, text), RandomDrafter(target)
    state = start(target)
    tokens = PROMPT + state.token.tolist()
    for number in range(8):
        state, output = step(target, bad if number % 3 else good, pick, shape, state, everything(state))
        tokens += output.tokens[0, : output.count.item()].tolist()
        assert state.rows.item() == len(tokens) - 1  # every token except the last
        assert tokens[-1] == state.token.item()
        rows = len(tokens) - 1
        caches = target.make_cache()
        _, hidden = target.forward(mx.array([tokens[:-1]]), caches)
        layers, fresh = (in_order(x, rows) for x in (commit(state.layers), from_prompt_cache(caches)))
        for mine, wanted, window in zip(layers.rows, fresh.rows, layers.windows, strict=True):
            for left, right in zip(mine, wanted, strict=True):
                cut = slice(rows) if window is None else slice(-window, None)
                left, right = (np.array(x)[:, :, cut] for x in (left, right))
                assert left.shape[2] == min(window or rows, rows)
                np.testing.assert_allclose(left, right, atol=1e-4)
        np.testing.assert_allclose(np.array(state.context), np.array(hidden[:, -1]), atol=1e-3)


def test_rows_of_a_batch_are_independent():
    model = make_model("llama")
    target = Target(model)
    shape = DraftShape(3, 3, 7)
    prompts = [PROMPT, [4, 4, 8, 50], list(range(20, 33))]
    expected = [plain(model, 25, prompt) for prompt in prompts]
    text = prompts[0] + expected[0]  # good for the first row only
    drafter = ScriptedDrafter(target, text)
    states = [start(target, prompt) for prompt in prompts]
    emitted = [row.token.tolist() for row in states]
    state = join(states, 256)
    for _ in range(25):
        state, output = step(target, drafter, pick, shape, state, everything(state))
        for row, (tokens, count) in enumerate(
            zip(output.tokens.tolist(), output.count.tolist(), strict=True)
        ):
            emitted[row] += tokens[:count]
    for row in range(3):
        assert emitted[row][:25] == expected[row]


@pytest.mark.parametrize("values", [(1, 4), (4, 5, 8)])
def test_the_whole_step_traces_under_compile(values):
    shape = DraftShape(*values)
    target = Target(make_model("llama"))
    drafter = RandomDrafter(target)
    how = Sampling(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1)
    traces = []

    def flat(state):
        return {**vars(state), "layers": vars(state.layers)}

    def full(arrays):
        return State(**{**arrays, "layers": Layers(**arrays["layers"])})

    @mx.compile
    def compiled(arrays):
        traces.append(1)
        state = full(arrays)
        after, output = step(target, drafter, pick, shape, state, everything(state))
        return flat(after), vars(output)

    state = start(target, sampling=how)
    # one step more, so that there is a path to commit
    state, _ = step(target, drafter, pick, shape, state, everything(state))
    eager = state
    for _ in range(5):
        arrays, output = compiled(flat(state))
        eager, expected = step(target, drafter, pick, shape, eager, everything(eager))
        state = full(arrays)
        assert output["tokens"].tolist() == expected.tokens.tolist()
    assert len(traces) == 1


def test_a_model_whose_positions_are_not_reached_drafts_chains_only(monkeypatch):
    monkeypatch.setattr("mlx_redrafter.models.hooks.ROPE_NAMES", ())
    model = make_model("llama")
    target = Target(model)
    target.check()
    assert not target.trees and target.batches
    expected = plain(model, 30)
    shape = DraftShape(3, 4, 9, 2)
    tokens, steps = speculative(target, ScriptedDrafter(target, PROMPT + expected), shape, 30)
    assert tokens == expected
    assert max(steps) == 5  # a chain of the beam's length


def test_a_model_whose_nodes_see_each_other_is_refused(monkeypatch):
    everything = lambda tree, length, capacity, window: mx.ones((1, tree.tokens.shape[1], capacity), mx.bool_)  # noqa: E731
    monkeypatch.setattr("mlx_redrafter.models.target.visible", everything)
    with pytest.raises(ValueError, match="its logits differ"):
        Target(make_model("llama")).check()


def test_the_view_leaves_the_model_as_it_was():
    model = make_model("llama")
    before = plain(model, 10)
    names = [name for name, _ in model.named_modules()]
    Target(model).check()
    assert [name for name, _ in model.named_modules()] == names
    assert plain(model, 10) == before
