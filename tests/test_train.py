"""Training: its loss and gradients against automatic ones, its order, resuming, and the whole command."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import test_data
from bundles import make_folder
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5
from models import VOCABULARY, make_model

from mlx_redrafter import DraftShape, stream_generate
from mlx_redrafter.commands import train as train_command
from mlx_redrafter.commands.main import main
from mlx_redrafter.decoding import beam
from mlx_redrafter.model import load
from mlx_redrafter.models.bundle import load_drafter
from mlx_redrafter.models.drafter import Drafter, DrafterConfig
from mlx_redrafter.models.identity import identity_of
from mlx_redrafter.models.memory import read_texts
from mlx_redrafter.models.save import write_drafter
from mlx_redrafter.models.target import Target
from mlx_redrafter.train import collect, loss, run
from mlx_redrafter.train.data import Conversation, write_shard
from mlx_redrafter.train.features import WholeRows, extract, read_features, select, write_features
from mlx_redrafter.train.loss import (
    LabelHead,
    Objective,
    add_rare,
    gradients,
    make_batch,
    make_row_batch,
    reachable,
    score,
)
from mlx_redrafter.train.selfgen import Recipe
from mlx_redrafter.train.streams import Workers
from mlx_redrafter.train.trainer import (
    Data,
    Settings,
    Shards,
    Trainer,
    initial_drafter,
    schedule,
    steps_of,
    with_memory,
    with_rare,
    with_vocabulary,
)
from mlx_redrafter.train.work import Request, Work, read_facts

H, DRAFT = 32, 90
ONE, TWO = Workers(1), Workers(2)


@pytest.fixture(autouse=True)
def one_blas_thread(monkeypatch):
    """Tests share the cores: threads that wait for each other would take twice the time."""
    monkeypatch.setattr("mlx_redrafter.train.run.set_blas_threads", lambda count: None)


def conversations(*lengths, seed=0):
    random = np.random.RandomState(seed)
    return [
        Conversation(random.randint(0, VOCABULARY, n).astype(np.int32), random.rand(n) < 0.9) for n in lengths
    ]


@pytest.fixture(scope="module")
def target():
    return Target(make_model("llama"), (1, 2))


@pytest.fixture(scope="module")
def features(target):
    return extract(target, conversations(80, 80, 60), ONE)


def make_drafter(cell="simple", exit_dim=24, layers=(1, 2)):
    mx.random.seed(0)
    config = DrafterConfig(
        H, VOCABULARY, exit_dim, 2, cell != "none", DRAFT, layers, "gru" if cell == "gru" else "simple"
    )
    return Drafter(config, mx.arange(DRAFT))


# --- Features ------------------------------------------------------------------------------------------


def test_context_layers_are_the_layers_outputs():
    model = make_model("llama")
    target = Target(model, (2, 1))
    tokens = mx.array([[3, 1, 4, 1, 5]])
    seen = []
    layers = model.model.layers
    try:
        model.model.layers = [Spy(layer, seen) for layer in layers]
        last = model.model(tokens)
    finally:
        model.model.layers = layers
    normed = [x * mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + 1e-6) for x in (seen[1], seen[0])]
    wanted = mx.concatenate([last, *normed], axis=-1)
    found = target.forward(tokens, target.make_cache())[1]
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-5)


class Spy:
    def __init__(self, layer, seen):
        self.layer, self.seen = layer, seen

    def __call__(self, *args, **kwargs):
        self.seen.append(self.layer(*args, **kwargs))
        return self.seen[-1]

    def __getattr__(self, name):
        return getattr(self.layer, name)


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match="layer 3 is not usable as context: the model has 2 layers"):
        Target(make_model("llama"), (3,))


@pytest.mark.parametrize("workers", [ONE, TWO])
def test_features_are_a_forward_pass_over_each_row(target, workers):
    rows = conversations(150, 90, 140)  # of more than one chunk, and padded
    found = extract(target, rows, workers)
    rows = rows if workers is ONE else [*rows[::2], rows[1]]  # the order in which workers take them
    place = 0
    for row in rows:
        _, hidden = target.forward(mx.array(row.tokens[None]), target.make_cache())
        for t in np.flatnonzero(row.trained[1:]):
            np.testing.assert_allclose(
                np.array(found.context[place].astype(mx.float32)),
                np.array(hidden[0, int(t)]),
                rtol=0.02,
                atol=0.03,
            )
            assert found.token[place].item() == row.tokens[t + 1]
            run_left = 0
            while t + 2 + run_left < len(row.tokens) and row.trained[t + 2 + run_left]:
                run_left += 1
            assert found.left[place].item() == run_left
            place += 1
    assert place == found.size


def test_features_on_disk(tmp_path, features):
    write_features(tmp_path / "0.safetensors", features)
    found = read_features(tmp_path / "0.safetensors")
    assert all(mx.array_equal(x, vars(found)[name]) for name, x in vars(features).items())
    assert os.listdir(tmp_path) == ["0.safetensors"]


# --- Loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["simple", "gru", "none"])
@pytest.mark.parametrize(("loss", "labels"), [("kl", "soft"), ("tv", "soft"), ("kl", "hard")])
@pytest.mark.parametrize("chunk", [1 << 23, DRAFT * 40])
def test_gradients_are_the_automatic_ones(target, features, cell, loss, labels, chunk):
    drafter = make_drafter(cell)
    objective = Objective(4, 0.8, loss, labels, 0.7, chunk)
    batch, head = a_batch(target, features, 4)

    def whole(parameters):
        drafter.update(parameters)
        soft = mx.softmax(head(batch.hidden) / 0.7, axis=-1)
        label = soft if labels == "soft" else (batch.labels[..., None] == mx.arange(DRAFT)).astype(mx.float32)
        state, total, mask = mx.zeros((4, 32, H)), 0, reachable(batch, 4)
        for d in range(4):
            state = drafter.advance(target.embed(batch.tokens[:, d : d + 32]), state)
            drafted = mx.softmax(drafter.logits(batch.context, state), axis=-1)
            wanted = label[:, d : d + 32]
            kl, tv = -(wanted * mx.log(drafted)).sum(-1), mx.maximum(wanted - drafted, 0).sum(-1)
            total = total + 0.8**d * ((kl if loss == "kl" else tv) * mask[d]).sum()
        return total

    parameters = drafter.trainable_parameters()
    value, wanted = mx.value_and_grad(whole)(parameters)
    stats, found = gradients(drafter, parameters, target, head, objective, batch)
    assert sum(0.8**d * stats[d, 0].item() for d in range(4)) == pytest.approx(value.item(), rel=1e-5)
    for (_, a), (_, b) in zip(tree_flatten(found), tree_flatten(wanted), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5 * max(1.0, mx.abs(b).max().item()))


def a_batch(target, features, length):
    to_draft = mx.array([i if i < DRAFT else -1 for i in range(VOCABULARY)])
    exact = type(features)(features.context.astype(mx.float32), features.token, features.left)
    batch = make_batch(exact, np.array([0, 32, 70, 190]), length, H, to_draft)
    return batch, LabelHead(target, mx.arange(DRAFT), exact.context[:16, :H])


def test_drawn_tokens_stand_for_all(target, features, monkeypatch):
    batch, head = a_batch(target, features, 4)
    drafter, objective = make_drafter(), Objective(4, negatives=0.5)
    parameters = drafter.trainable_parameters()
    find = lambda drawn: gradients(drafter, parameters, target, head, objective, batch, drawn)  # noqa: E731
    wanted_losses, wanted = find(None)
    most = np.array(mx.softmax(head(batch.hidden), axis=-1).max(axis=(0, 1)))  # [Vd]
    monkeypatch.setattr(loss, "LIKELY", np.median(most))
    drawn = [loss.draw(head, objective, batch, np.random.default_rng(i)) for i in range(60)]
    share = np.mean([d.ids.size for d in drawn]) / DRAFT
    assert share == pytest.approx(0.75, abs=0.02)  # the likely ones and half of the others
    likely = most > np.median(most)
    for d in drawn:
        assert set(np.flatnonzero(likely)) <= set(d.ids.tolist())
        assert d.shift.tolist() == [0 if likely[i] else 1 for i in d.ids.tolist()]
    found = [find(d) for d in drawn]
    mean = sum(losses for losses, _ in found) / len(found)
    np.testing.assert_allclose(np.array(mean), np.array(wanted_losses), rtol=0.02)
    for name, value in tree_flatten(wanted):
        mean = sum(dict(tree_flatten(g))[name] for _, g in found) / len(found)
        assert mx.linalg.norm(mean - value).item() < 0.2 * mx.linalg.norm(value).item(), name
    monkeypatch.setattr(loss, "LIKELY", -1)
    for (_, a), (_, b) in zip(
        tree_flatten(find(loss.draw(head, objective, batch, np.random.default_rng(0)))[1]),
        tree_flatten(wanted),
        strict=True,
    ):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


def test_dropout_keeps_the_mean_of_what_is_read_and_follows_its_key(target, features):
    batch, head = a_batch(target, features, 3)
    drafter = make_drafter()
    parameters = drafter.trainable_parameters()

    def find(share, key):
        objective = Objective(3, dropout=share)
        losses, found = gradients(drafter, parameters, target, head, objective, batch, None, key)
        return [np.array(x) for x in (losses, *(value for _, value in tree_flatten(found)))]

    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    whole, key = find(0.0, mx.random.key(0)), mx.random.key(1)
    assert same(whole, find(0.5, None))  # nothing is dropped where nothing is decided by chance
    assert same(find(0.5, key), find(0.5, key))
    assert not same(find(0.5, key), find(0.5, mx.random.key(2)))
    x = loss._drop(mx.ones((100, 100)), 0.25, key)
    assert x.mean().item() == pytest.approx(1, abs=0.03)
    assert (x == 0).mean().item() == pytest.approx(0.25, abs=0.02)
    many = [find(0.1, mx.random.key(i)) for i in range(30)]
    for i, value in enumerate(whole[1:], start=1):
        mean = sum(found[i] for found in many) / len(many)
        assert np.linalg.norm(mean - value) < 0.3 * np.linalg.norm(value)


def test_only_what_the_draft_vocabulary_can_reach_counts(target, features):
    batch, _ = a_batch(target, features, 3)
    mask = np.array(reachable(batch, 3))
    token, left = np.array(features.token), np.array(features.left)
    for n, start in enumerate((0, 32, 70, 190)):
        for t in range(32):
            for d in range(3):
                i = start + t
                known = i < features.size and left[i] > d and (token[i + 1 : i + 2 + d] < DRAFT).all()
                assert mask[d, n, t] == known


@pytest.mark.parametrize(
    ("name", "linear"), [("llama", True), ("llama-untied", True), ("gemma2", False), ("granite", False)]
)
def test_labels_are_the_models_own_logits(name, linear):
    target = Target(make_model(name, **({"final_logit_softcapping": 1.0} if name == "gemma2" else {})))
    logits, hidden = target.forward(mx.array([[5, 7, 11, 13]]), target.make_cache())
    ids = mx.array([2, 3, 50, 99])
    head = LabelHead(target, ids, hidden[0])
    assert head.linear == linear
    np.testing.assert_allclose(np.array(head(hidden)), np.array(logits[..., ids]), atol=1e-4)


def test_score_counts_agreement_with_the_text(target, features):
    drafter = make_drafter()
    batch, head = a_batch(target, features, 3)
    found = score(drafter, target, head, Objective(3), [batch])
    hits, lengths = np.zeros(3), []
    left, tokens, labels = (np.array(x) for x in (batch.left, batch.tokens, batch.labels))
    for n in range(4):
        for t in range(32):
            if left[n, t] >= 3:
                state, right = mx.zeros(H), []
                for d in range(3):
                    state = drafter.advance(target.embed(mx.array(tokens[n, t + d])), state)
                    first = drafter.logits(batch.context[n, t], state).argmax().item()
                    right.append(first == labels[n, t + d])
                hits += right
                lengths.append(np.cumprod(right).sum())
    np.testing.assert_allclose(found.top1, hits / len(lengths))
    assert found.tokens_per_step == pytest.approx(1 + np.mean(lengths))


@pytest.mark.parametrize("negatives", [1.0, 0.15])
def test_memory_does_not_grow_with_the_vocabulary(negatives):
    """The vocabulary's share is the weights' and their optimizer's; what is computed with stays the same."""
    peaks = [peak_memory(vocabulary, negatives) for vocabulary in (8192, 16384)]
    assert peaks[1] < 1.5 * peaks[0]


def peak_memory(vocabulary, negatives):
    model = make_model("llama", vocab_size=vocabulary, tie_word_embeddings=True)
    target = Target(model)
    data = a_data(target, vocabulary=vocabulary, draft=vocabulary)
    objective = Objective(5, chunk=1 << 20, negatives=negatives)
    config = DrafterConfig(H, vocabulary, H, 1, True)
    drafter = initial_drafter(target, config, None, 0)
    trainer = Trainer(target, drafter, data, Settings(objective, batch=1024), ONE)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    next(trainer.run())
    return mx.get_peak_memory() - before


# --- Drafters with a memory ----------------------------------------------------------------------------


def with_memory_of(drafter, heads=2, rare=0):
    mx.random.seed(5)
    config = replace(drafter.config, memory_heads=heads, memory_head_size=8, rare_tokens=rare)
    made = Drafter(config, mx.arange(DRAFT))
    made.update(drafter.parameters())
    made.memory_out.weight = mx.random.normal(made.memory_out.weight.shape)
    if rare:
        made.rare_bias = mx.array([0.7])
    return made


def row_batch(target, length, first=0, count=VOCABULARY):
    """Rows of unlike length, in some of which not everything is trained on, in another order."""
    rows = [Conversation(first + row.tokens % count, row.trained) for row in conversations(50, 23, 40)]
    features = extract(target, rows, ONE, whole=True)
    exact = WholeRows(features.context.astype(mx.float32), *list(vars(features).values())[1:])
    to_draft = mx.array([i if i < DRAFT else -1 for i in range(VOCABULARY)])
    batch = make_row_batch(exact, np.array([2, 0, 1]), length, H, to_draft)
    return rows, exact, batch, LabelHead(target, mx.arange(DRAFT), exact.context[:16, :H])


def test_whole_rows_have_what_was_read_and_train_on_the_same(target, tmp_path):
    rows, features, batch, _ = row_batch(target, 3)
    write_features(tmp_path / "0.safetensors", features)
    assert type(read_features(tmp_path / "0.safetensors")) is WholeRows
    trained = extract(target, rows, ONE)
    kept = mx.array(np.flatnonzero(np.array(features.left) >= 0))
    for name, wanted in vars(trained).items():
        np.testing.assert_array_equal(
            np.array(vars(features)[name][kept].astype(wanted.dtype).astype(mx.float32)),
            np.array(wanted.astype(mx.float32)),
        )
    place = 0
    for n, row in zip((1, 2, 0), rows, strict=True):
        count = int(row.trained[1:].sum())
        assert batch.left[n, :count].tolist() == trained.left[place : place + count].tolist()
        assert not batch.left[n, count:].any().item()
        assert batch.place[n, :count].tolist() == np.flatnonzero(row.trained[1:]).tolist()
        assert batch.read[n, : len(row.tokens) - 1].tolist() == row.tokens[:-1].tolist()
        np.testing.assert_allclose(
            np.array(batch.context[n, :count]),
            np.array(trained.context[place : place + count].astype(mx.float32)),
            rtol=0.01,
        )
        at = batch.place[n, :count]
        assert mx.array_equal(batch.read_context[n][at], batch.context[n, :count]).item()
        place += count


@pytest.mark.parametrize("chunk", [1 << 23, DRAFT * 40])
@pytest.mark.parametrize("rare", [0, 9])
def test_gradients_of_a_memory_are_the_automatic_ones(target, chunk, rare):
    drafter, objective = with_memory_of(make_drafter(), rare=rare), Objective(3, 0.8, chunk=chunk)
    _, _, batch, head = row_batch(target, 3, *((DRAFT - 9, 20) if rare else ()))
    if rare:
        without = np.array(reachable(batch, 3)).sum()
        batch = add_rare(batch, np.arange(VOCABULARY) >= DRAFT, DRAFT)
        assert np.array(reachable(batch, 3)).sum() > 1.05 * without

    def whole(parameters):
        drafter.update(parameters)
        mask, total = np.array(reachable(batch, 3)), 0
        for n in range(3):
            for s in np.flatnonzero(mask[0, n]).tolist()[::3]:
                end = batch.place[n, s].item() + 1  # what is after it is not even there
                seen = batch.read_context[n : n + 1, :end], target.embed(batch.read[n : n + 1, :end])
                memory, state = read_texts(drafter, *seen, mx.array([[end - 1]])), mx.zeros((1, 1, H))
                text = {*batch.read[n, :end].tolist(), batch.tokens[n, s].item()}
                ids = mx.array([*range(DRAFT), *sorted(x for x in text if rare and x >= DRAFT)])
                for d in range(3):
                    state = drafter.advance(target.embed(batch.tokens[n, s + d])[None, None], state)
                    x = drafter.body(batch.context[n : n + 1, s : s + 1], state, memory)[0, 0]
                    logits = drafter.lm_head[-1](x)
                    if rare:
                        more = target.embed(ids[DRAFT:]) @ drafter.rare_proj(x) + drafter.rare_bias
                        logits = mx.concatenate([logits, more])
                    label = mx.softmax(target.head(batch.hidden[n : n + 1, s + d][None])[0, 0, ids])
                    loss = -(label * mx.log(mx.softmax(logits))).sum()
                    total = total + 0.8**d * loss * mask[d, n, s].item()
        return total

    parameters = drafter.trainable_parameters()
    value, wanted = mx.value_and_grad(whole)(parameters)
    left, some = np.array(batch.left), np.array(reachable(batch, 3))[0]
    for n in range(3):
        left[n, np.setdiff1d(np.arange(left.shape[1]), np.flatnonzero(some[n])[::3])] = 0
    batch = replace(batch, left=mx.array(left))
    stats, found = gradients(drafter, parameters, target, head, objective, batch)
    assert sum(0.8**d * stats[d, 0].item() for d in range(3)) == pytest.approx(value.item(), rel=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(found), tree_flatten(wanted), strict=True):
        scale = max(1.0, mx.abs(b).max().item())
        np.testing.assert_allclose(np.array(a), np.array(b), atol=5e-5 * scale, err_msg=name)
        assert not name.startswith(("memory", "rare")) or mx.abs(b).max().item() > 1e-4


def questions(target, count, seed):
    """Rows that begin with one token of each of 4 kinds, and then ask for them, by kind, in turn."""
    random, rows = np.random.RandomState(seed), []
    for _ in range(count):
        known = [10 + 6 * kind + random.randint(6) for kind in range(4)]
        asked = [token for _ in range(3) for kind in range(4) for token in (kind, known[kind])]
        tokens = [*random.permutation(known), *random.randint(40, 101, 12), *asked]
        rows.append(Conversation(np.array(tokens, np.int32), np.arange(len(tokens)) >= 16))
    return rows


def test_a_memory_learns_to_copy_what_the_others_cannot(target):
    target = Target(target.model)
    settings = Settings(Objective(1, labels="hard"), batch=384, epochs=9, learning_rate=5e-3)
    shards = [questions(target, 64, seed) for seed in range(9)]
    found = []
    for heads in (0, 4):
        features = [extract(target, rows, ONE, whole=heads > 0) for rows in shards]
        pack = lambda some: Shards([64 * 23] * len(some), some.__getitem__, [64] * len(some) if heads else [])  # noqa: E731, B023
        data = Data(pack(features[1:]), pack(features[:1]), np.arange(VOCABULARY, dtype=np.int32))
        config = DrafterConfig(H, VOCABULARY, H, 1, True, memory_heads=heads, memory_head_size=16)
        trainer = Trainer(target, initial_drafter(target, config, None, 0), data, settings, ONE)
        for _ in trainer.run():
            pass
        found.append(trainer.score().top1[0])
    assert found[0] < 0.75 and found[1] > 0.9


def test_rare_tokens_are_learnt_as_if_the_vocabulary_had_them(target):
    """The answers' tokens are none of the draft vocabulary, which has the questions' and others."""
    target, known = Target(target.model), np.array([*range(10), *range(40, VOCABULARY)], np.int32)
    settings = Settings(Objective(1, labels="hard", negatives=0.5), batch=384, epochs=9, learning_rate=5e-3)
    shards = [extract(target, questions(target, 64, seed), ONE, whole=True) for seed in range(9)]
    pack = lambda some: Shards([64 * 23] * len(some), some.__getitem__, [64] * len(some))  # noqa: E731
    data, found = Data(pack(shards[1:]), pack(shards[:1]), known), []
    for rare in (0, 4):
        config = DrafterConfig(
            H, VOCABULARY, H, 1, True, len(known), memory_heads=4, memory_head_size=16, rare_tokens=rare
        )
        trainer = Trainer(target, initial_drafter(target, config, known, 0), data, settings, ONE)
        for _ in trainer.run():
            pass
        found.append(trainer.score().top1[0])
    assert found[0] < 0.55 and found[1] > 0.9


@pytest.mark.parametrize("workers", [ONE, TWO])
def test_resuming_with_a_memory_ends_with_the_same_weights(target, tmp_path, workers):
    data, rows = a_data(target, whole=True), [3, 3, 3, 3]
    assert data.train.rows == rows

    def trainer():
        config = DrafterConfig(
            H, VOCABULARY, H, 1, True, DRAFT, (1, 2), memory_heads=2, memory_head_size=8, rare_tokens=5
        )
        drafter = initial_drafter(target, config, data.draft_to_target, 0)
        return Trainer(target, drafter, data, replace(SETTINGS, batch=140), workers)

    whole, first, second = trainer(), trainer(), trainer()
    assert whole.steps == 9  # of two rows each
    for step, _ in whole.run():
        if step == 3:
            whole.score()
    for step, _ in first.run():
        if step == 3:
            first.score()
            first.save(tmp_path / "checkpoint.safetensors")
            break
    second.restore(tmp_path / "checkpoint.safetensors")
    assert [step for step, _ in second.run()] == list(range(4, 10))
    for name, value in whole.weights().items():
        assert mx.array_equal(value, second.weights()[name]), name
    assert mx.abs(whole.weights()["memory_out.weight"]).max().item() > 0


def test_a_memory_for_a_drafter_that_has_none(target):
    config = DrafterConfig(H, VOCABULARY, H, 1, True, DRAFT)
    drafter = initial_drafter(target, config, np.arange(5, 5 + DRAFT, dtype=np.int32), 0)
    found = with_memory(drafter, target, 2, 1)
    assert found.config.memory_heads == 2
    wanted = drafter.weights()
    assert all(mx.array_equal(found.weights()[name], value).item() for name, value in wanted.items())
    assert not found.memory_out.weight.any().item()


def test_rare_tokens_for_a_drafter_that_has_none(target):
    """Their logits begin as those of draft tokens are; what it learnt stays, also with more of them."""
    mx.random.seed(2)
    table = mx.random.normal((VOCABULARY, H))
    known = mx.arange(5, 5 + DRAFT)
    drafter = Drafter(DrafterConfig(H, VOCABULARY, H, 1, True, DRAFT, memory_heads=2), known)
    wide = mx.random.normal((H, H))
    drafter.lm_head[-1].weight = table[known] @ wide  # as if the head were a map of embeddings
    target = SimpleNamespace(embed=lambda ids: table[ids], model=target.model, vocabulary=VOCABULARY)
    found = with_rare(drafter, target, 7, 1)
    assert found.config.rare_tokens == 7
    assert all(
        mx.array_equal(found.weights()[name], value).item() for name, value in drafter.weights().items()
    )
    np.testing.assert_allclose(np.array(found.rare_proj.weight), np.array(wide), atol=0.1)
    found.rare_bias = mx.array([3.0])
    again = with_rare(found, target, 9, 1)
    assert (again.config.rare_tokens, again.rare_bias.item()) == (9, 3)
    assert mx.array_equal(again.rare_proj.weight, found.rare_proj.weight).item()
    assert with_rare(found, target, 0, 1).weights().keys() == drafter.weights().keys()


# --- The loop ------------------------------------------------------------------------------------------


def a_data(target, vocabulary=VOCABULARY, draft=DRAFT, whole=False):
    random = np.random.RandomState(1)
    shards = []
    for _ in range(5):
        tokens = random.randint(0, vocabulary, (3, 70)).astype(np.int32)
        rows = [Conversation(row, np.ones(70, bool)) for row in tokens]
        shards.append(extract(target, rows, ONE, whole))
    pack = lambda some: Shards([s.size for s in some], some.__getitem__, [3] * len(some) * whole)  # noqa: E731
    return Data(pack(shards[1:]), pack(shards[:1]), np.arange(draft, dtype=np.int32))


SETTINGS = Settings(Objective(3, negatives=0.5, dropout=0.2), batch=64, epochs=1.5, seed=3)


def a_trainer(target, workers=ONE, settings=SETTINGS):
    drafter = initial_drafter(
        target, DrafterConfig(H, VOCABULARY, H, 1, True, DRAFT, (1, 2)), np.arange(DRAFT, dtype=np.int32), 0
    )
    return Trainer(target, drafter, a_data(target), settings, workers)


@pytest.mark.parametrize("workers", [ONE, TWO])
def test_resuming_ends_with_the_same_weights(target, tmp_path, workers):
    whole = a_trainer(target, workers)
    for step, _ in whole.run():
        if step == 4:
            whole.score()
    first = a_trainer(target, workers)
    for step, _ in first.run():
        if step == 4:
            first.score()
            first.save(tmp_path / "checkpoint.safetensors")
            break
    second = a_trainer(target, workers)
    second.restore(tmp_path / "checkpoint.safetensors")
    assert second.progress == first.progress
    assert [step for step, _ in second.run()] == list(range(5, whole.steps + 1))
    for name, value in whole.weights().items():
        assert mx.array_equal(value, second.weights()[name]), name


def test_a_checkpoint_of_other_settings_is_refused(target, tmp_path):
    a_trainer(target).save(tmp_path / "c.safetensors")
    other = a_trainer(target, settings=Settings(Objective(3), batch=64, epochs=1.5, seed=4))
    with pytest.raises(ValueError, match="written with other settings"):
        other.restore(tmp_path / "c.safetensors")


def test_workers_do_not_change_the_result_much(target):
    all_tokens = replace(SETTINGS, objective=Objective(3))  # drawing and dropping go by part
    one, two = (a_trainer(target, workers, all_tokens) for workers in (ONE, TWO))
    for trainer in (one, two):
        for step, _ in trainer.run():
            if step == 3:
                break
    for name, value in one.weights().items():
        np.testing.assert_allclose(np.array(value), np.array(two.weights()[name]), atol=2e-3)


def test_an_epoch_covers_the_data_once():
    sizes, settings = [100, 64, 3, 200, 31] * 8, Settings(batch=64)
    for epoch in (0, 1):
        seen = 0
        for shards, batches in schedule(sizes, settings, epoch):
            total = sum(sizes[s] for s in shards)
            starts = np.concatenate(batches)
            assert len(set(starts)) == len(starts)
            assert (starts < total).all()
            seen += len(starts)
        assert seen * 32 >= 0.8 * sum(sizes)
    assert (
        str(schedule(sizes, settings, 0))
        == str(schedule(sizes, settings, 0))
        != str(schedule(sizes, settings, 1))
    )
    assert steps_of(sizes, Settings(batch=64, epochs=2)) > steps_of(sizes, Settings(batch=64, epochs=1.5))


@pytest.mark.parametrize("exit_dim", [H // 2, H, 2 * H])
def test_the_first_head_is_the_models(target, exit_dim):
    config = DrafterConfig(H, VOCABULARY, exit_dim, 1, True)
    drafter = initial_drafter(target, config, None, 0)
    rows = target.embed.weight
    head = drafter.lm_head[-1].weight
    if exit_dim >= H:
        assert mx.array_equal(head[:, :H], rows)
    else:  # the inner products that its width can hold
        found, wanted = np.array(head @ head.T), np.array(rows @ rows.T)
        assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.7
    x = mx.random.normal((3, exit_dim))
    assert mx.allclose(drafter.lm_head[0](x), x)  # blocks begin as the identity


def test_vocabulary():
    counts = np.array([[0, 5, 0, 9, 1, 5], [0, 2, 0, 3, 1, 3]])
    assert run.choose_vocabulary(counts, 1).tolist() == [3]
    assert run.choose_vocabulary(counts, 2).tolist() == [3, 5]  # in more conversations than token 1
    assert run.choose_vocabulary(counts, 0).tolist() == list(range(6))
    wide = np.ones((2, 5000), np.int64)
    assert len(run.choose_vocabulary(wide, None)) == 5000  # 96 % are 4800, in steps of 1024


def test_select_ignores_what_is_not_trained():
    hidden = mx.arange(12).reshape(2, 6, 1).astype(mx.float32)
    rows = [
        Conversation(np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 0, 1], bool)),
        Conversation(np.arange(10, 16, dtype=np.int32), np.array([1, 0, 0, 0, 0, 0], bool)),
    ]
    found = select(hidden, rows)
    assert found.context[:, 0].tolist() == [1, 2, 4]
    assert found.token.tolist() == [2, 3, 5]
    assert found.left.tolist() == [1, 0, 0]


def test_another_vocabulary_keeps_what_is_known(target):
    old, new = np.arange(0, DRAFT, dtype=np.int32), np.arange(40, 100, dtype=np.int32)
    config = DrafterConfig(H, VOCABULARY, H, 1, True, DRAFT)
    drafter = initial_drafter(target, config, old, 0)
    drafter.lm_head[-1].weight = drafter.lm_head[-1].weight / 2 + 1  # new rows must follow
    for ids in (new, None):
        found = with_vocabulary(drafter, target, ids, 0)
        tokens = np.arange(VOCABULARY) if ids is None else ids
        assert found.to_target(mx.arange(found.config.head_outputs)).tolist() == tokens.tolist()
        wanted = target.embed.weight[mx.array(tokens)] / 2 + 1
        assert mx.allclose(found.lm_head[-1].weight, wanted, atol=1e-5)
        assert mx.array_equal(found.rnn_u.weight, drafter.rnn_u.weight)
    unknown = mx.arange(DRAFT, 100)
    found = with_vocabulary(drafter, target, np.array(unknown), 0)
    assert mx.array_equal(found.lm_head[-1].weight, target.embed.weight[unknown])


# --- The command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return easy(make_folder(tmp_path_factory.mktemp("models") / "cycle"))


def easy(folder, head="lm_head.weight"):
    """A model whose next token is mostly one that follows from the last: easy to draft, but not constant."""
    weights = {name: mx.array(x) for name, x in mx.load(str(folder / "model.safetensors")).items()}
    weights[head] = 0.1 * weights[head]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<says>", "<assistant>"))
    return folder


FLAGS = [  # of a tiny run
    *("--tokens", "2000", "--row-length", "96", "--rows", "16", "--batch", "128", "--draft-vocab", "0"),
    *(
        "--context-layers",
        "1",
        "--length",
        "3",
        "--eval-tokens",
        "16",
        "--eval-shapes",
        "1,3",
        "--eval-temps",
        "0",
        "--workers",
        "1",
    ),
]


def test_generate_train_decode(model_folder, tmp_path, capsys):
    output = tmp_path / "drafter"
    assert (
        main(["train", "--model", str(model_folder), "--output", str(output), "--epochs", "4", *FLAGS]) == 0
    )
    card = (output / "README.md").read_text()
    assert "--epochs 4" in card
    assert "written by the model itself" in card
    assert sorted(os.listdir(output)) == [
        "README.md",
        "config.json",
        "learning_curve.png",
        "model.safetensors",
    ]
    assert measured(output, model_folder) > 2.0
    assert measured(untrained(model_folder, tmp_path), model_folder) < 1.3
    assert "Tokens per step, held-out conversations" in capsys.readouterr().out
    assert not (tmp_path / "drafter.train" / "features").exists()
    assert main(["export", "--drafter", str(output), "--output", str(tmp_path / "apple")]) == 2
    assert "context of several layers" in capsys.readouterr().err


def windowed(folder):
    kinds = ["sliding_attention", "full_attention"]
    return easy(make_folder(folder, layer_types=kinds, sliding_window=16))


def recurrent(folder):
    """Gated delta net and attention, in which what came before has a say in what comes next."""
    make_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen3_5", "full_attention_interval": 2, "head_dim": 16}
    config |= {"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_conv_kernel_dim": 3}
    config |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    mx.random.seed(3)
    weights = dict(tree_flatten(model.parameters()))
    known = mx.load(str(folder / "model.safetensors"))
    for name, value in weights.items():
        outer = "model.embed_tokens.weight" if "embed" in name else "lm_head.weight"
        inner = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
        noise = (0.02 if name.endswith(inner) else 0.2) * mx.random.normal(value.shape)
        is_outer = "embed_tokens" in name or "lm_head" in name
        weights[name] = known[outer] if is_outer else value + noise if value.ndim > 1 else value
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return easy(folder, "language_model.lm_head.weight")


@pytest.mark.parametrize("make", [windowed, recurrent])
def test_models_beyond_plain_keys_and_values(tmp_path, make, capsys, monkeypatch):
    folder, output = make(tmp_path / "model"), tmp_path / "out"
    flags = [*FLAGS, "--tokens", "1200", "--epochs", "8"]
    assert main(["train", "--model", str(folder), "--output", str(output), *flags]) == 0
    assert "Tokens per step, held-out conversations" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(beam, "TRUST", (0.0,) * 5)  # what beams copy is not the drafter's
        assert measured(output, folder) > 1.4 > measured(untrained(folder, tmp_path), folder)
    model, tokenizer = load(folder, drafter=output)
    said = [
        [x.token for x in stream_generate(model, tokenizer, "lazy dog", 40, **how)]
        for how in ({"shape": DraftShape(3, 3, 8, 2)}, {"draft": False})
    ]
    assert said[0] == said[1]


def measured(drafter, model_folder):
    model, tokenizer = load(model_folder, drafter=drafter)
    texts = [{"role": "user", "content": text} for text in ("the quick", "lazy dog", "naïve cafés")]
    prompts = [run.Prompt([text["content"]]) for text in texts]
    (found,) = run.evaluate(
        model, tokenizer, prompts, [run.DraftShape(1, 3)], [0], 24, progress=lambda x, **_: x
    )
    return found.tokens_per_step


def untrained(model_folder, tmp_path):
    model, _ = load(model_folder, drafter=None)
    target = Target(model.model, (1,))
    size = target.embed.weight.shape[0]
    drafter = initial_drafter(target, DrafterConfig(64, size, 64, 2, True, None, (1,)), None, 0)
    write_drafter(tmp_path / "untrained", drafter.config, drafter.weights(), identity_of(model.model))
    return tmp_path / "untrained"


def test_given_data_and_apples_layout(model_folder, tmp_path):
    """Conversations in a file, a drafter in Apple's layout, trained on from there."""
    rows = [
        Conversation(np.random.RandomState(i).randint(0, 250, 60).astype(np.int32), np.arange(60) > 9)
        for i in range(12)
    ]
    write_shard(tmp_path / "rows.npz", rows)
    common = ["--model", str(model_folder), "--data", str(tmp_path / "rows.npz"), *FLAGS[2:]]
    flags = [*common, "--context-layers", "--exit-dim", "128", "--eval-tokens", "0", "--eval-shapes", "1,3"]
    assert main(["train", "--output", str(tmp_path / "a"), *flags]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "context_layers" not in config
    assert main(["export", "--drafter", str(tmp_path / "a"), "--output", str(tmp_path / "apple")]) == 0
    exported = json.loads((tmp_path / "apple" / "config.json").read_text())
    assert {"hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn"} <= set(exported)
    assert main(["train", "--output", str(tmp_path / "b"), "--start-from", str(tmp_path / "a"), *flags]) == 0
    first, second = load_drafter(tmp_path / "a"), load_drafter(tmp_path / "b")
    assert first.config == second.config
    assert not mx.array_equal(first.weights()["rnn_w.weight"], second.weights()["rnn_w.weight"])
    flags += ["--start-from", str(tmp_path / "a"), "--draft-vocab", "50"]
    assert main(["train", "--output", str(tmp_path / "c"), *flags]) == 0
    assert load_drafter(tmp_path / "c").config.draft_vocab_size == 50


def test_a_memory_is_trained_resumed_and_trained_on(model_folder, tmp_path, capsys):
    flags = ["--model", str(model_folder), *FLAGS, "--tokens", "900", "--epochs", "4", "--eval-tokens", "0"]
    flags += ["--draft-vocab", "200"]
    memory = [*flags, "--memory-heads", "2"]
    assert main(["train", "--output", str(tmp_path / "whole"), *memory]) == 0
    parts = tmp_path / "parts"
    assert interrupted(["train", "--output", str(parts), *memory], parts, "b000001") == 130
    assert main(["train", "--output", str(parts), "--resume"]) == 0
    whole, other = (load_drafter(tmp_path / name).weights() for name in ("whole", "parts"))
    assert all(mx.array_equal(x, other[name]) for name, x in whole.items())
    assert measured(tmp_path / "whole", model_folder) > 1.5
    model, tokenizer = load(model_folder, drafter=tmp_path / "whole")
    said = [
        [x.token for x in stream_generate(model, tokenizer, "lazy dog", 40, **how)]
        for how in ({"shape": DraftShape(3, 3, 8, 2)}, {"draft": False})
    ]
    assert said[0] == said[1]
    start = ["--start-from", str(tmp_path / "whole"), *flags, "--epochs", "1", "--tokens", "200"]
    assert main(["train", "--output", str(tmp_path / "on"), *start]) == 0
    assert load_drafter(tmp_path / "on").config.memory_heads == 2
    assert load_drafter(tmp_path / "on").config.rare_tokens == 128
    assert main(["train", "--output", str(tmp_path / "fewer"), *start, "--rare-tokens", "3"]) == 0
    assert load_drafter(tmp_path / "fewer").config.rare_tokens == 3
    assert main(["train", "--output", str(tmp_path / "bare"), *flags, "--rare-tokens", "3"]) == 2
    assert "3 rare tokens need a memory: give --memory-heads too" in capsys.readouterr().err
    assert main(["train", "--output", str(tmp_path / "no"), *start, "--memory-heads", "3"]) == 2
    assert "has 2 memory heads, not 3: leave --memory-heads out" in capsys.readouterr().err
    untrained(model_folder, tmp_path)
    start[1] = str(tmp_path / "untrained")
    assert main(["train", "--output", str(tmp_path / "more"), *start, "--memory-heads", "1"]) == 0
    assert load_drafter(tmp_path / "more").config.memory_heads == 1
    bad = [*flags, "--memory-heads", "2", "--exit-dim", str(64 * 3)]
    assert main(["train", "--output", str(tmp_path / "bad"), *bad]) == 2
    assert "no half of input_proj" in capsys.readouterr().err


TALK = [
    {"role": "user", "content": "the quick brown"},
    {"role": "assistant", "content": "fox jumps over the lazy dog, and naïve cafés serve tea " * 3},
]
FILES = {
    "messages.jsonl": "\n".join(
        json.dumps({"messages": talk})
        for talk in (TALK, [TALK[0], {"role": "assistant", "content": "no " * 9}])
    ),
    "sharegpt.json": json.dumps(
        [
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": text},
                ]
            }
            for text in ("one two three four and so on to nine", "lazy dogs serve the quick brown foxes tea")
        ]
    ),
    "prompts.jsonl": "\n".join(json.dumps({"prompt": f"say {n}"}) for n in range(8)),
    "text.txt": "\n\n".join(
        " ".join(f"{n * m * m} bottles, {m + 7 * n}" for m in range(20)) for n in range(2, 6)
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_data(model_folder, tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    flags = [*FLAGS[2:], "--data", str(tmp_path / name), "--epochs", "1", "--eval-tokens", "0", "--rows", "4"]
    assert main(["train", "--model", str(model_folder), "--output", str(tmp_path / "out"), *flags]) == 0
    assert load(model_folder, drafter=tmp_path / "out")[0].drafter is not None
    assert name in (tmp_path / "out" / "README.md").read_text().replace("\\", "")


def test_a_base_model_without_chat_template(tmp_path):
    folder = make_folder(tmp_path / "base", tokenizer="sentencepiece", kind="random")
    flags = [
        *FLAGS,
        "--tokens",
        "500",
        "--epochs",
        "1",
        "--train-dtype",
        "bfloat16",
        "--cache-features",
        "off",
    ]
    assert main(["train", "--model", str(folder), "--output", str(tmp_path / "out"), *flags]) == 0
    assert not list((tmp_path / "out.train").rglob("*features*/*"))


def test_interrupted_and_resumed(model_folder, tmp_path, capsys):
    flags = ["--model", str(model_folder), "--epochs", "5", *FLAGS, "--tokens", "1000", "--eval-tokens", "0"]
    assert main(["train", "--output", str(tmp_path / "whole"), *flags]) == 0
    output = tmp_path / "parts"
    codes = [interrupted(["train", "--output", str(output), *flags], output, "b000001")]
    codes.append(interrupted(["train", "--output", str(output), "--resume"], output, "new-checkpoint", 0.3))
    assert codes[0] == 130
    assert not output.exists()
    assert main(["train", "--output", str(output), "--resume"]) == 0
    whole, parts = (load_drafter(tmp_path / name).weights() for name in ("whole", "parts"))
    assert all(mx.array_equal(x, parts[name]) for name, x in whole.items())
    assert main(["train", "--output", str(output), *flags]) == 2
    assert "exists already" in capsys.readouterr().err


def interrupted(arguments, output, name, delay=0.0):
    """Run a command and press Ctrl-C once a file whose name begins with ``name`` appears."""
    work = output.with_name(f"{output.name}.train")
    done = threading.Event()

    def press():
        while not done.is_set():
            parts = os.walk(work)  # which does not mind that temporary folders go away meanwhile
            if any(x.startswith(name) or delay for _, *kinds in parts for names in kinds for x in names):
                time.sleep(delay)
                if not done.is_set():
                    os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        return main(arguments)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_threads_are_busy(model_folder, tmp_path, number):
    """A process of its own, because MLX aborts one that ends while a stream works."""
    flags = ["--model", str(model_folder), "--output", "out", *FLAGS, "--tokens", "9000000", "--workers", "2"]
    flags += ["--temp", "3", "--row-length", "72"]  # so that nothing is dropped
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_redrafter", "train", *flags],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 60
    while not list((tmp_path / "out.train" / "data").glob("b000001*.npz")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Go on with: mlx-redrafter train --output out --resume" in err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--time", "soon"], "time 'soon' is not usable"),
        (["--length", "0"], "length 0 is not usable"),
        (["--batch", "3"], "batch 3 is not usable"),
        (["--epochs", "0"], "epochs 0.0 is not usable"),
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
        (
            ["--data", "loops.jsonl"],
            "too few conversations to train on (dropped: 0 near-duplicates, 1 loops)",
        ),
        (["--openings", "none.txt"], "none.txt cannot be read"),
        (["--eval-prompts", "none.jsonl"], "none.jsonl cannot be read"),
        (["--eval-shapes", "4x5"], "shape '4x5' is not usable"),
        (["--context-layers", "7"], "layer 7 is not usable as context: the model has 2 layers"),
        (["--draft-vocab", "-2"], "draft vocabulary of -2"),
        (["--memory-limit", "0"], "memory limit 0.0 is not usable"),
        (["--workers", "0"], "workers 0 is not usable"),
        (["--negatives", "0"], "share of negatives 0.0 is not usable"),
        (["--dropout", "1"], "dropout 1.0 is not usable"),
        (["--temp", "-1"], "temperature -1.0 is not usable"),
        (["--start-from", "/nowhere"], "/nowhere is neither a folder nor a repository"),
        (["--resume"], "there is no run to resume"),
    ],
)
def test_bad_input(model_folder, tmp_path, monkeypatch, capsys, flags, complaint):
    monkeypatch.chdir(tmp_path)
    loop = [TALK[0], {"role": "assistant", "content": "no " * 99}]
    (tmp_path / "loops.jsonl").write_text(json.dumps({"messages": loop}))
    assert main(["train", "--model", str(model_folder), "--output", "out", *flags]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert complaint in err[-1]
    assert not os.path.exists("out")
    assert not os.path.exists("out.train")  # it would refuse the corrected command


def test_a_run_with_other_options_is_not_gone_on_with(model_folder, tmp_path, capsys):
    (tmp_path / "out.train").mkdir()
    (tmp_path / "out.train" / "run.json").write_text(json.dumps({"asked": {"seed": 5}}))
    assert main(["train", "--model", str(model_folder), "--output", str(tmp_path / "out")]) == 2
    assert "holds a run with other options" in capsys.readouterr().err


def test_a_run_that_reads_something_else_is_not_gone_on_with(tmp_path):
    work = Work.open(tmp_path / "out.train", {"seed": 0})
    work.check({"model": "m", "a.jsonl": "digest"})
    with work.begin("train"):
        pass
    again = Work.open(tmp_path / "out.train", {"seed": 0})
    again.check({"model": "m", "a.jsonl": "digest"})
    for read in ({"model": "m", "a.jsonl": "other"}, {"model": "m", "a.jsonl": ""}, {"model": "n"}):
        with pytest.raises(ValueError, match="has changed since the run in .*out.train began"):
            again.check(read)
    again.facts["data_done"] = True
    again.check({"model": "m", "a.jsonl": ""})  # is not needed any more


def test_two_runs_at_once(tmp_path):
    first, second = (Work.open(tmp_path / "out.train", {}) for _ in range(2))
    with first.begin("train"):
        with pytest.raises(ValueError, match="another run works in .*out.train"), second.begin("train"):
            pass
        assert read_facts(first.folder)["commands"] == ["train"]
    with second.begin("train"):  # which the first one has left
        pass


@pytest.mark.parametrize("text", ["{", "[1]", "[]", '{"asked": 3}', "{}"])
def test_a_damaged_work_folder_is_named(model_folder, tmp_path, capsys, text):
    (tmp_path / "out.train").mkdir()
    (tmp_path / "out.train" / "run.json").write_text(text)
    for more in ([], ["--resume"]):
        assert main(["train", "--model", str(model_folder), "--output", str(tmp_path / "out"), *more]) == 2
        assert "run.json is damaged" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"no tensors", b"cut"])
def test_damaged_tensors_are_named(target, features, tmp_path, content):
    path = tmp_path / "a.safetensors"
    write_features(path, features)
    path.write_bytes(path.read_bytes()[:-99] if content == b"cut" else content)
    for read in (read_features, a_trainer(target).restore):
        with pytest.raises(ValueError, match="a.safetensors cannot be read: delete it and resume") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_given_flags_are_those_of_the_command_line():
    words = [
        "--output",
        "out",
        "--resume",
        "--seed",
        "0",
        "--system-prompt",
        "a",
        "--data=b",
        "--context-layers",
    ]
    assert train_command._given(words) == {
        **{"output": "out", "resume": True, "seed": 0, "system_prompt": ["a"], "data": ["b"]},
        "context_layers": [],
    }


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--time", "5m", "--epochs", "2"], "--epochs does nothing with --time."),
        (["--start-from", "x", "--blocks", "2"], "--blocks does nothing with --start-from."),
        (["--eval-tokens", "0", "--eval-temps", "1"], "--eval-temps does nothing with --eval-tokens 0."),
        (["--labels", "hard", "--label-temp", "1"], "--label-temp does nothing with --labels hard."),
        (["--epochs", "2", "--cell", "gru", "--label-temp", "1"], ""),
    ],
)
def test_flags_that_do_nothing_are_told(tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["train", "--output", "out", *flags, "--openings", "none.txt"]) == 2
    assert [str(warning.message) for warning in caught] == ([told] if told else [])


@pytest.mark.parametrize("chat", [True, False])
def test_flags_of_writing_that_do_nothing_are_told(tmp_path, chat):
    tokenizer = test_data.make_tokenizer("chatml" if chat else None)
    test_data.write(tmp_path / "a.jsonl", {"text": " ".join(map(str, range(99)))}, {"prompt": "x"})
    flags = ("--rows", "--user-temp")
    request = Request((str(tmp_path / "a.jsonl"),), tokens=9, writing=flags)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given, _ = collect.read_all(request, tokenizer)
        collect.read_all(replace(request, tokens=0, recipe=Recipe(length=20)), tokenizer)
    told = [str(warning.message) for warning in caught]
    assert given.prompts == [["x"]]
    assert told == [
        *([] if chat else ["--user-temp does nothing without a chat template."]),
        "--rows does nothing where the model writes nothing: see --tokens.",
        "--user-temp does nothing where the model writes nothing: see --tokens.",
        "prompts that are not answered, because of --tokens 0: 1.",
    ]


@pytest.mark.parametrize(
    ("text", "wanted"), [("90", 90), ("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_durations(text, wanted):
    assert train_command.seconds(text) == wanted
