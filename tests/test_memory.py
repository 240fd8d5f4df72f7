"""The drafter's memory of the text: its arithmetic against NumPy, and what it is in every step."""

import math

import mlx.core as mx
import numpy as np
import pytest
from decoding import decode
from mlx_lm.models.cache import make_prompt_cache
from models import make_model
from test_drafter import silu
from test_engine import check_while_texts_come_and_go, finish, plain, prompts
from test_lossless import Turns
from tiny import make_tiny

from mlx_redrafter.decoding import beam
from mlx_redrafter.decoding.layers import Quantization as Kept
from mlx_redrafter.decoding.layers import fit_rows, in_order
from mlx_redrafter.decoding.state import PLAIN, DraftShape, begin
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.loop import Batch, Fixed, bucket
from mlx_redrafter.engine.prefix_folder import PrefixFolder, prefix_identity
from mlx_redrafter.engine.prefixes import Prefixes
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.models.drafter import Drafter, DrafterConfig, Quantization
from mlx_redrafter.models.memory import MemoryDrafter, attend, attend_at_once, read_texts
from mlx_redrafter.models.prompt_caches import to_prompt_cache
from mlx_redrafter.models.target import Target

SIZES = {"exit_dim": 20, "num_draft_layers": 1, "rnn": True, "memory_heads": 2, "memory_head_size": 8}


def make_drafter(hidden=8, vocabulary=20, **changes):
    """A drafter whose memory has a say in all that it drafts."""
    config = DrafterConfig(hidden, vocabulary, **{**SIZES, **changes})
    mx.random.seed(3)
    known = None if config.draft_vocab_size is None else 3 * mx.arange(config.draft_vocab_size)
    drafter = Drafter(config, known)
    # In this order whatever the network's is.
    strange = {
        name: value for name, value in drafter.weights().items() if name.startswith(("memory", "rare"))
    }
    drafter.load_weights(
        [(name, value + 0.7 * mx.random.normal(value.shape)) for name, value in sorted(strange.items())],
        strict=False,
    )
    mx.eval(drafter.parameters())
    return drafter


def with_memory(model, **changes):
    """A target and the drafter whose memory it writes."""
    target = Target(model)
    fused = MemoryDrafter(make_drafter(target.embed(mx.array([0])).shape[-1], target.vocabulary, **changes))
    return Target(model, fused.config.context_layers, fused), fused


# --- Arithmetic ---------------------------------------------------------------------------------------


def normed(x, weight=1.0):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def golden(drafter, context, texts, drafted, rare=()):
    """Logits [L, Vd] after ``drafted`` embeddings [L, H], given the T tokens read: context, embedding.

    With the embeddings [K, H] of ``rare`` tokens: [L, Vd + K].
    """
    config = drafter.config
    w = {name: np.array(value, np.float64) for name, value in drafter.weights().items()}
    heads, size, width = config.memory_heads, config.memory_head_size, config.context_size
    of_context, of_state = w["input_proj.weight"][:, :width], w["input_proj.weight"][:, width:]
    keys, values = [], []
    for c, e in zip(context, texts, strict=True):
        p = of_context @ c + w["input_proj.bias"]
        both = w["memory_kv.weight"] @ np.concatenate([p, e])
        keys.append(normed(both[: heads * size].reshape(heads, size)))
        values.append(both[heads * size :].reshape(heads, size))
    last, state, logits = len(context) - 1, np.zeros(config.hidden_size), []
    for embedding in drafted:
        state = silu(w["rnn_w.weight"] @ embedding + w["rnn_u.weight"] @ state + w["rnn_u.bias"])
        x = of_context @ context[-1] + w["input_proj.bias"] + of_state @ state
        q = normed((w["memory_q.weight"] @ x).reshape(heads, size), w["memory_q_norm.weight"])
        found = []
        for m in range(heads):
            first = 0 if config.memory_window is None else max(0, last + 1 - config.memory_window)
            scores = [
                q[m] @ keys[j][m] / math.sqrt(size)
                - math.log1p(math.exp(w["memory_decay"][m])) * math.log(1 + last - j)
                for j in range(first, last + 1)
            ]
            weights = np.exp([*scores, w["memory_sink"][m]])
            weights /= weights.sum()
            found.append(sum(weights[i] * values[first + i][m] for i in range(len(scores))))
        x = x + w["memory_out.weight"] @ np.concatenate(found)
        x = x + silu(w["lm_head.0.linear.weight"] @ x + w["lm_head.0.linear.bias"])
        more = [(w["rare_proj.weight"] @ x) @ e + w["rare_bias"][0] for e in rare]
        logits.append([*(w["lm_head.1.weight"] @ x), *more])
    return np.array(logits)


def fused_logits(drafter, context, texts, drafted, capacity, history=None, embed=None):
    """The same, as decoding computes it, from buffers with rows of others after the text's."""
    fused, size = MemoryDrafter(drafter), len(texts)
    context, texts, drafted = (mx.array(x, mx.float32)[None] for x in (context, texts, drafted))
    rows = [mx.pad(x, [(0, 0), (0, 0), (0, capacity - size), (0, 0)], constant_values=50.0)
            for x in fused.remember(context, texts)]  # fmt: skip
    memory = fused.look_back(rows, mx.array([size]), capacity, history, embed)
    prepared, state, logits = fused.prepare(context[:, -1])[:, None], fused.start[None, None], []
    for embedding in drafted[0]:
        state = fused.advance(embedding[None, None], state)
        logits.append(fused.logits(prepared, state, memory)[0, 0])
    return np.array(mx.stack(logits))


def some_text(config, size, seed=0):
    random = np.random.RandomState(seed)
    return (random.randn(size, width) for width in (config.context_size, config.hidden_size))


@pytest.mark.parametrize("changes", [{}, {"memory_window": 3}, {"context_layers": (1,)}, {"memory_heads": 1}])
def test_golden_values(changes):
    drafter = make_drafter(**changes)
    context, texts = some_text(drafter.config, 7)
    drafted = np.random.RandomState(1).randn(3, 8)
    expected = golden(drafter, context, texts, drafted)
    np.testing.assert_allclose(fused_logits(drafter, context, texts, drafted, 11), expected, atol=2e-5)
    drafter.memory_out.weight = mx.zeros_like(drafter.memory_out.weight)
    assert np.abs(fused_logits(drafter, context, texts, drafted, 11) - expected).max() > 0.1


@pytest.mark.parametrize(
    ("size", "tokens"), [(1, [7]), (4, [2, 5, 7, 8]), (6, [2, 5, 7, 8]), (99, [2, 5, 7, 8, 10])]
)
def test_golden_values_of_rare_tokens(size, tokens):
    """The last ones of the text that the draft vocabulary (0, 3, 6, 9, 12) lacks, each once."""
    drafter, table = make_drafter(draft_vocab_size=5, rare_tokens=size), mx.random.normal((20, 8))
    history = mx.array([[-1, 10, 5, 3, 7, 0, 7, 5, 9, 2, 8, 7, 4, 4]])  # those after the 11th are nobody's
    context, texts = some_text(drafter.config, 11)
    drafted = np.random.RandomState(1).randn(3, 8)
    count = mx.array([11])
    found = MemoryDrafter(drafter).look_back(
        [mx.zeros((1, 2, 14, 8))] * 2, count, 14, history, lambda x: table[x]
    )
    shown = np.array(found.rare.shift[0, 0] > -mx.inf)
    assert sorted(np.array(found.rare.tokens[0])[shown].tolist()) == tokens
    rare = np.array(table)[np.array(found.rare.tokens[0])]
    expected = golden(drafter, context, texts, drafted, rare)
    expected[:, 5:][:, ~shown] = -np.inf
    logits = fused_logits(drafter, context, texts, drafted, 14, history, lambda x: table[x])
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    places = mx.arange(logits.shape[1])[None]
    assert MemoryDrafter(drafter).to_target(places, found).tolist() == [
        [0, 3, 6, 9, 12, *found.rare.tokens[0].tolist()]
    ]


@pytest.mark.parametrize("cell", ["simple", "gru"])
@pytest.mark.parametrize("changes", [{}, {"memory_window": 3}])
def test_decoding_is_the_trained_form_at_every_place(cell, changes):
    drafter, length = make_drafter(cell=cell, **changes), 3
    context, texts = some_text(drafter.config, 10)
    whole_context, whole_texts = (mx.array(x, mx.float32)[None] for x in (context, texts))
    memory = read_texts(drafter, whole_context[:, :7], whole_texts[:, :7], mx.arange(7)[None])
    state, states = mx.zeros((1, 7, 8)), []
    for depth in range(length):
        state = drafter.advance(whole_texts[:, 1 + depth : 8 + depth], state)
        states.append(state)
    trained = np.array(drafter.logits(whole_context[:, :7], mx.stack(states), memory))  # [L, 1, T, Vd]
    for t in range(7):
        decoded = fused_logits(
            drafter, context[: t + 1], texts[: t + 1], texts[t + 1 : t + 1 + length], t + 1 + t % 3
        )
        np.testing.assert_allclose(decoded, trained[:, 0, t], atol=1e-5)


def test_both_forms_of_attention_are_one():
    keys, values, queries = (mx.random.normal((2, 3, size, 8)) for size in (9, 9, 4))
    bias = mx.where(mx.arange(9) < mx.array([[6], [0]]), mx.random.normal((2, 9)), -mx.inf)[:, None, None]
    given = queries, keys, values, mx.broadcast_to(bias, (2, 3, 1, 9)), mx.array([0.5, -1.0, 3.0])
    one, other = attend(*given), attend_at_once(*given)
    assert mx.allclose(one, other, atol=1e-6).item() and mx.abs(one[0]).max().item() > 0.1
    assert (one[1] == 0).all().item()


def test_an_empty_memory_gives_nothing():
    drafter = make_drafter()
    fused, state = MemoryDrafter(drafter), mx.random.normal((1, 2, 28))
    rows = [mx.full((1, 2, 4, 8), 7.0)] * 2
    prepared = mx.random.normal((1, 2, 20))
    seen = fused.look_back(rows, mx.array([0]), 4)
    assert mx.allclose(fused.logits(prepared, state, seen), fused.logits(prepared, state)).item()


def test_training_begins_at_the_network_without_it():
    config = DrafterConfig(8, 20, **SIZES)
    drafter = Drafter(config)
    context, texts = (mx.array(x, mx.float32)[None] for x in some_text(config, 5))
    state = mx.random.normal((1, 5, 8))
    with_it = drafter.logits(context, state, read_texts(drafter, context, texts, mx.arange(5)[None]))
    assert mx.array_equal(with_it, drafter.logits(context, state))
    np.testing.assert_allclose(np.log1p(np.exp(np.array(drafter.memory_decay))), 0.5, rtol=1e-5)


@pytest.mark.parametrize("quantization", [None, Quantization(8, 32)])
def test_shapes_and_config(quantization):
    config = DrafterConfig(
        32, 50, 96, 1, True, 5, quantization=quantization, memory_heads=2, memory_head_size=16, rare_tokens=9
    )
    drafter = Drafter(config, mx.arange(5))
    assert {name: value.shape for name, value in drafter.weights().items()} == config.shapes()
    assert ("memory_kv.scales" in config.shapes()) == (quantization is not None)
    assert DrafterConfig.from_dict(config.to_dict()) == config
    without = DrafterConfig(32, 50, 96, 1)
    names = *without.to_dict(), *without.shapes()
    assert not any(name.startswith(("memory", "rare")) for name in names)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"memory_heads": -1}, "from 0 to 64"),
        ({"memory_heads": 65}, "from 0 to 64"),
        ({"memory_heads": True}, "memory_heads is True"),
        ({"memory_head_size": 0}, "from 1 to 256"),
        ({"memory_head_size": 257}, "from 1 to 256"),
        ({"memory_window": 0}, "at least 1"),
        ({"rare_tokens": -1, "draft_vocab_size": 5}, "from 0 to 4096"),
        ({"rare_tokens": 4}, "rare_tokens is 4: give memory_heads and draft_vocab_size"),
        ({"rare_tokens": 4, "draft_vocab_size": 5, "memory_heads": 0}, "give memory_heads"),
        ({"exit_dim": 16}, "no half of input_proj"),
        ({"quantization": Quantization(8, 32), "hidden_size": 16, "exit_dim": 40}, "no half of input_proj"),
    ],
)
def test_bad_sizes_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        DrafterConfig(**{"hidden_size": 8, "vocab_size": 20, **SIZES, **changes})


# --- Decoding -----------------------------------------------------------------------------------------

SHAPES = [
    DraftShape(0, 0),
    DraftShape(1, 3),
    DraftShape(3, 3, 8),
    DraftShape(2, 3, 5, 4),
    DraftShape(0, 0, None, 3),
]
KINDS = {
    "full": {},
    "window": {"memory_window": 5},
    "layers": {"context_layers": (1,)},
    "rare": {"draft_vocab_size": 30, "rare_tokens": 6},
}
MODELS = {"llama3-rope": make_model, "gemma3": make_model, "qwen3_5": make_tiny, "mamba2": make_tiny}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param](request.param)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_is_plain_decoding_while_texts_come_and_go(model, changes, compiled):
    target, fused = with_memory(model, **changes)
    target.check()
    engine = Engine(Runner(target, fused, compiled=compiled), Turns(SHAPES), 16, texts=3, eager=compiled)
    check_while_texts_come_and_go(engine, model, 6, 9)


def memory_of(layers, rows):
    """The keys and values of the entries of a text's tokens, in order: those that are kept."""
    assert layers.memory
    return [np.array(part)[:, :, :rows] for part in in_order(layers, rows).rows[-1]]


def fresh(target, tokens):
    """The same after reading a text."""
    caches = target.make_cache()
    caches += target.make_memory(caches)
    target.forward(mx.array([tokens]), caches)
    return memory_of(target.layers_of(caches)[1], len(tokens))


def assert_alike(mine, wanted):
    for left, right in zip(mine, wanted, strict=True):
        rows = min(left.shape[2], right.shape[2])
        assert rows > 0
        np.testing.assert_allclose(left[:, :, -rows:], right[:, :, -rows:], atol=2e-4)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_what_reading_the_text_would_have_left(model, changes, compiled):
    target, fused = with_memory(model, **changes)
    target.check()
    engine = Engine(Runner(target, fused, compiled=compiled), Turns(SHAPES), 4)
    texts = {engine.submit(Request(prompt)): list(prompt) for prompt in prompts(4, 3)}
    checked = 0
    for number in range(40):
        for emitted in engine.step():
            texts[emitted.number] += emitted.tokens
        if number == 20:  # the others go on without it
            engine.cancel(1)
            del texts[1]
        for name, tokens in texts.items() if number % 6 == 5 else ():
            layers = engine.layers_of(name)
            if layers is None:  # it is being read
                continue
            checked += 1
            if changes.get("memory_window"):
                assert layers.rows[-1][0].shape[2] <= 5 + layers.room
            rows = len(tokens) - 1
            assert_alike(memory_of(layers, rows), fresh(target, tokens[:-1]))
    assert checked > 10


def drafts(engine, *requests):
    """All that was drafted for each of the requests: its trees' tokens, by its length then."""
    numbers = [engine.submit(request) for request in requests]
    found = {number: {} for number in numbers}
    original = Batch._read

    def read(self, shape, output):
        trees, rows = output.drafted.tolist(), [text.rows for text in self.texts]
        emitted = original(self, shape, output)
        for text, row, tree in zip(self.texts, rows, trees, strict=False):
            found[text.number][row] = tree
        return emitted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "_read", read)
        while engine.is_busy:
            engine.step()
    return [found[number] for number in numbers]


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_drafts_do_not_depend_on_company(changes):
    target, fused = with_memory(make_model("llama3-rope"), **changes)
    asks = [Request(prompt, 30 + 5 * i) for i, prompt in enumerate(prompts(5, 7))]
    shape, alone = DraftShape(3, 4, 9), []
    for ask in asks:
        alone += drafts(Engine(Runner(target, fused), Fixed(shape), 16), ask)
    together = drafts(Engine(Runner(target, fused), Fixed(shape), 16, texts=3), *asks)
    for ask, mine, wanted in zip(asks, together, alone, strict=True):
        both = mine.keys() & wanted.keys() - {len(ask.prompt) - 1}  # the first step depends on it
        assert len(both) > 10 and [mine[row] for row in both] == [wanted[row] for row in both]
    blind, _ = with_memory(make_model("llama3-rope"), **changes)
    blind.memory.look_back = lambda *given: None
    assert drafts(Engine(Runner(blind, blind.memory), Fixed(shape), 16), asks[4]) != alone[4:]


def test_rare_tokens_are_drafted(monkeypatch):
    """Of a drafter that likes them most, all that it drafts are tokens of the text that it lacks."""
    monkeypatch.setattr(beam, "TRUST", (0.0,) * 5)
    target, fused = with_memory(make_model("llama3-rope"), draft_vocab_size=30, rare_tokens=6)
    fused._drafter.rare_bias = mx.array([99.0])
    texts = [list(prompt) for prompt in prompts(3, 7)]
    engine = Engine(Runner(target, fused), Fixed(DraftShape(1, 3)), 16, texts=3)
    found = drafts(engine, *(Request(text, 60) for text in texts))
    common = set(range(0, 90, 3))
    for text, mine in zip(texts, found, strict=True):
        whole = text + plain(target.model, text, 60)
        for row, tree in list(mine.items())[1:20]:
            assert set(tree[1:]) <= set(whole[: row + 1]) - common, (row, tree)


def test_drafts_are_the_same_where_a_prefix_was_kept(model, tmp_path):
    target, fused = with_memory(model)
    target.check()
    shape = DraftShape(3, 4, 9)
    first, second = list(range(40)), [*range(40), 7, 8, 50, 51]
    wanted = drafts(Engine(Runner(target, fused), Fixed(shape), 16), Request(second, 12))
    folder = PrefixFolder(tmp_path, "0" * 32, 1 << 30)
    prefixes = Prefixes(1 << 30, folder)
    drafts(Engine(Runner(target, fused), Fixed(shape), 16, prefixes=prefixes), Request([*first, 7], 1))
    folder.flush()
    for kept in (prefixes, Prefixes(1 << 30, PrefixFolder(tmp_path, "0" * 32, 1 << 30))):
        request = Request(second, 12)
        found = drafts(Engine(Runner(target, fused), Fixed(shape), 16, prefixes=kept), request)
        assert request.cached_tokens >= 40
        assert found == wanted


def test_prefixes_of_another_drafter_are_not_used():
    model = make_model()
    ask = list(range(30))
    prefixes, said = Prefixes(1 << 30), plain(model, ask, 9)
    for made in (
        with_memory,
        lambda model: (Target(model), None),
        lambda model: with_memory(model, memory_heads=1),
    ):
        target, fused = made(model)
        engine = Engine(Runner(target, fused), Fixed(DraftShape(2, 2) if fused else PLAIN), prefixes=prefixes)
        request = Request(ask, 9)
        engine.submit(request)
        assert list(finish(engine).values()) == [said]
        assert request.cached_tokens == 0
        again = Request(ask, 9)
        engine.submit(again)
        assert list(finish(engine).values()) == [said]
        assert again.cached_tokens == 29
    one, other = (make_drafter(32, 101, memory_heads=heads) for heads in (1, 2))
    found = {
        prefix_identity(model, drafter)
        for drafter in (None, make_drafter(32, 101, memory_heads=0), one, other)
    }
    assert len(found) == 3


@pytest.mark.parametrize("changes", [{}, {"memory_window": 5}])
def test_quantized_keys_and_values(changes):
    model = make_model("llama", head_dim=32)
    target, fused = with_memory(model, **changes)
    kv = Kept(8, 32, 20)
    engine = Engine(Runner(target, fused), Turns(SHAPES), 16)
    wanted = {}
    for prompt in prompts(4, 5):
        wanted[engine.submit(Request(prompt, 40, kv=kv))] = plain(
            model, prompt, 40, kv_bits=8, kv_group_size=32, quantized_kv_start=20
        )
    assert finish(engine) == wanted


def test_the_callers_caches_stay_mlx_lms():
    model = make_model()
    target, fused = with_memory(model)
    prompt, more = list(range(20)), [5, 6, 7]
    expected = plain(model, prompt + more, 12)
    caches = make_prompt_cache(model)
    model(mx.array([prompt]), cache=caches)
    left = []
    engine = Engine(Runner(target, fused), Fixed(DraftShape(2, 3, 5)))
    release = lambda layers, rows: left.append((layers, rows))  # noqa: E731
    engine.submit(Request(more, 12, caches=caches, release=release))
    assert list(finish(engine).values()) == [expected]
    assert len(caches) == len(make_prompt_cache(model))
    (layers, rows), fresh_caches = left[0], make_prompt_cache(model)
    to_prompt_cache(layers, rows, fresh_caches)
    assert fresh_caches[0].offset == rows == 20 + 3 + 11


@pytest.mark.parametrize("values", [(1, 4), (3, 3, 8, 4)])
def test_no_step_copies_the_memory(values):
    """Peak memory over the model and one cache of 4,000 tokens; the buffers grow on the way."""
    model = make_model("llama", num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=8192)
    target, fused = with_memory(model, memory_heads=8, memory_head_size=64)
    run = Runner(target, fused)

    def state():
        layers = target.layers_of(target.make_cache())[1]
        layers = fit_rows(layers, 4096)
        layers.rows = [[mx.random.normal(part.shape) for part in parts] for parts in layers.rows]
        found = begin([1, 2, 5, 1, 2, 5], 4000, layers, mx.zeros((1, 32)), mx.random.key(0))
        mx.eval(found.layers.rows, found.history)
        return found

    def decode_on(count):
        for _ in decode(run, Fixed(DraftShape(*values)), state(), 4000, count):
            pass

    decode_on(20)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    decode_on(150)
    size = 2 * 8 * 64 * 4 * bucket(4150)  # bytes of the memory when it has grown
    assert size < mx.get_peak_memory() - before < 1.5 * size


def test_a_drafter_without_one_costs_no_layer():
    target = Target(make_model())
    _, layers = target.layers_of(target.make_cache())
    assert target.memory is None and not layers.memory and len(layers.rows) == 2
