"""The parts of a step, against plain NumPy."""

import mlx.core as mx
import numpy as np
import pytest
from models import Unprepared

from mlx_redrafter.decoding.accept import accept
from mlx_redrafter.decoding.beam import Beam, draft, log_softmax
from mlx_redrafter.decoding.cache import commit, grow, leave_path, visible, write_rows
from mlx_redrafter.decoding.step import DraftShape
from mlx_redrafter.decoding.topk import top_k
from mlx_redrafter.decoding.tree import build_tree, make_tree


@pytest.mark.parametrize("size, k", [(1, 1), (7, 7), (128, 3), (1000, 1), (1000, 4), (1024, 8), (5000, 40)])
def test_top_k_is_the_sorted_head(size, k):
    scores = mx.random.normal((2, 3, size), key=mx.random.key(size))
    values, index = top_k(scores, k)
    expected = -np.sort(-np.array(scores), axis=-1)[..., :k]
    np.testing.assert_array_equal(np.array(values), expected)
    np.testing.assert_array_equal(np.take_along_axis(np.array(scores), np.array(index), -1), expected)


def test_top_k_with_ties_names_different_places():
    _, index = top_k(mx.zeros((1, 700)), 5)
    assert len(set(index[0].tolist())) == 5
    assert max(index[0].tolist()) < 700


def test_log_softmax_is_finite_and_never_positive():
    logits = mx.array([[1e4, 0.0, -1e4], [mx.nan, 0.0, 1.0], [mx.inf, 0.0, 0.0], [0.0, -mx.inf, 1.0]])
    values = np.array(log_softmax(logits))
    assert np.isfinite(values).all()
    assert (values <= 0).all()


class BigramDrafter(Unprepared):
    """The next token depends on the last one only: ``table`` [V, V] of logits."""

    def __init__(self, table):
        self.table = mx.array(table)

    def advance(self, embedding, state):
        return embedding

    def logits(self, context, state):
        return self.table[mx.argmax(state, axis=-1)] + 0.0 * context[..., :1]

    def to_target(self, index):
        return index + 100


def embed_one_hot(vocabulary):
    return lambda tokens: (tokens[..., None] % 100 == mx.arange(vocabulary)).astype(mx.float32)


def reference_beams(table, token, width, length):
    """Exhaustive beam search: the survivors of each depth as {tokens: score}."""
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    beams, depths = {(token,): 0.0}, []
    for _ in range(length):
        grown = {(*b, t): s + logp[b[-1], t] for b, s in beams.items() for t in range(len(table))}
        beams = dict(sorted(grown.items(), key=lambda item: -item[1])[:width])
        depths.append(beams)
    return depths


@pytest.mark.parametrize("width, length", [(1, 1), (1, 4), (2, 3), (4, 5), (6, 2)])
def test_beam_search_keeps_what_an_exhaustive_one_keeps(width, length):
    table = np.random.RandomState(width).randn(6, 6).astype(np.float32)
    token = mx.array([2, 5])
    beam = draft(BigramDrafter(table), embed_one_hot(6), token, mx.zeros((2, 3)), width, length)
    for row in range(2):
        paths = {0: [(int(token[row].item()),)] * width}
        for depth, expected in enumerate(reference_beams(table, int(token[row].item()), width, length), 1):
            parents, tokens = beam.parents[row, depth - 1].tolist(), beam.tokens[row, depth - 1].tolist()
            paths[depth] = [paths[depth - 1][p] + (t - 100,) for p, t in zip(parents, tokens, strict=True)]
            assert set(paths[depth]) == set(expected)
            wanted = [expected[path] for path in paths[depth]]
            np.testing.assert_allclose(np.array(beam.scores[row, depth - 1]), wanted, atol=1e-5)


def random_beam(rng, batch, width, length):
    scores = np.zeros((batch, length, width), np.float32)
    parents = np.zeros((batch, length, width), np.int32)
    for depth in range(length):
        for row in range(batch):
            if depth:
                parents[row, depth] = rng.randint(0, width, width)
                scores[row, depth] = scores[row, depth - 1][parents[row, depth]]
            scores[row, depth] -= rng.choice([0.0, 0.5, 1.0, 2.0], width)  # ties on purpose
    tokens = rng.randint(0, 50, (batch, length, width))
    return Beam(mx.array(tokens, mx.int32), mx.array(parents), mx.array(scores))


@pytest.mark.parametrize("width, length", [(1, 1), (1, 5), (2, 3), (4, 5), (8, 4)])
def test_every_pruned_tree_holds_its_ancestors(width, length):
    beam = random_beam(np.random.RandomState(length), 3, width, length)
    for nodes in range(2, 2 + width * length):
        tree = build_tree(mx.array([7, 8, 9]), beam, nodes)
        parents, depths = np.array(tree.parents), np.array(tree.depths)
        for row in range(3):
            assert (parents[row, 1:] < np.arange(1, nodes)).all()
            assert (depths[row, 1:] == depths[row][parents[row, 1:]] + 1).all()
            for node in range(nodes):
                ancestors, at = {node}, node
                while at:
                    at = parents[row, at]
                    ancestors.add(at)
                assert set(np.flatnonzero(np.array(tree.ancestors)[row, node])) == ancestors
            kept = sorted(np.array(beam.scores)[row].ravel(), reverse=True)[: nodes - 1]
            flat, where = np.array(beam.scores)[row].ravel(), {}
            for place in range(width * length):
                where.setdefault(int(np.array(beam.tokens)[row].ravel()[place]), []).append(flat[place])
            assert len(kept) == nodes - 1
            for token in np.array(tree.tokens)[row, 1:]:
                assert int(token) in where


def test_the_documented_tree():
    beam = Beam(
        mx.array([[[11, 12], [13, 14]]]),
        mx.array([[[0, 0], [0, 0]]]),
        mx.array([[[-0.1, -2.0], [-0.5, -1.5]]]),
    )
    tree = build_tree(mx.array([10]), beam, 5)
    assert tree.tokens.tolist() == [[10, 11, 12, 13, 14]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 1]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    assert tree.ancestors[0, 3].tolist() == [True, True, False, True, False]
    pruned = build_tree(mx.array([10]), beam, 4)
    assert pruned.tokens.tolist() == [[10, 11, 13, 14]]  # 12 is the least likely
    assert pruned.parents.tolist() == [[0, 0, 1, 1]]


def test_accept_follows_the_targets_picks():
    tokens = mx.array([[10, 11, 12, 13, 14]] * 4)
    tree = make_tree(tokens, mx.array([[0, 0, 0, 1, 1]] * 4, mx.int32), 2)
    picks = mx.array(
        [
            [11, 14, 0, 0, 77],  # root -> 11 -> 14, then 77
            [12, 14, 55, 0, 0],  # root -> 12, then 55
            [99, 14, 0, 0, 0],  # nothing; 14 is right behind 11, which is not said
            [11, 98, 0, 0, 0],  # root -> 11, then 98
        ]
    )
    accepted = accept(tree, picks, 2)
    assert accepted.count.tolist() == [3, 2, 1, 2]
    emitted = [row[:n] for row, n in zip(accepted.tokens.tolist(), accepted.count.tolist(), strict=True)]
    assert emitted == [[11, 14, 77], [12, 55], [99], [11, 98]]
    assert accepted.path[0].tolist() == [0, 1, 4]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_takes_the_accepted_rows(batch):
    rng = np.random.RandomState(0)
    keys = mx.array(rng.randn(batch, 2, 12, 4).astype(np.float32))
    nodes = mx.array(rng.randn(batch, 2, 5, 4).astype(np.float32))
    start = mx.array([3, 5, 0][:batch], mx.int32)
    path = mx.array([[0, 2, 4], [0, 1, 0], [0, 3, 4]][:batch], mx.int32)
    written = write_rows(keys, nodes, start)
    cache = commit(leave_path([written], [written], [nodes], [nodes], path, start))
    expected = np.array(keys)
    for row in range(batch):
        at = start[row].item()
        expected[row, :, at : at + 5] = np.array(nodes)[row]
        expected[row, :, at : at + 3] = np.array(nodes)[row][:, path[row].tolist()]
    np.testing.assert_array_equal(np.array(cache.keys[0]), expected)
    np.testing.assert_array_equal(np.array(cache.values[0]), expected)
    assert cache.path_start is None
    larger = grow(cache, 20)
    assert larger.capacity == 20
    np.testing.assert_array_equal(np.array(larger.keys[0])[:, :, :12], expected)


@pytest.mark.parametrize("window", [None, 3])
def test_nodes_see_the_text_and_their_ancestors(window):
    tree = make_tree(mx.array([[9, 1, 2, 3]] * 2), mx.array([[0, 0, 0, 2], [0, 0, 1, 2]], mx.int32), 3)
    length, capacity = mx.array([4, 6], mx.int32), 12
    mask = np.array(visible(tree, length, capacity, window))
    for row in range(2):
        parents, depths, text = tree.parents[row].tolist(), tree.depths[row].tolist(), length[row].item()
        for node in range(4):
            seen = {place: place for place in range(text)} | {text + node: text + depths[node]}
            at = node
            while at:
                at = parents[at]
                seen[text + at] = text + depths[at]
            own = text + depths[node]
            expected = {c for c, position in seen.items() if window is None or own - position < window}
            assert set(np.flatnonzero(mask[row, node])) == expected


@pytest.mark.parametrize(
    "values, word", [((0, 1), "width"), ((1, 0), "length"), ((2, 2, 1), "nodes"), ((2, 2, 6), "nodes")]
)
def test_impossible_shapes_are_refused(values, word):
    with pytest.raises(ValueError, match=word):
        DraftShape(*values)
