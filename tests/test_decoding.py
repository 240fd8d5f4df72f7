"""The parts of a step, against plain NumPy."""

import mlx.core as mx
import numpy as np
import pytest
from models import Unprepared

from mlx_redrafter.decoding.accept import accept
from mlx_redrafter.decoding.beam import LOWEST, TRUST, Beam, draft, log_softmax
from mlx_redrafter.decoding.layers import Layers, commit, fit_rows, leave_path, visible, write_rows
from mlx_redrafter.decoding.lookup import PRIOR, Found, alone, find, first_record, learn, merge, scores
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.decoding.topk import top_k
from mlx_redrafter.decoding.tree import build_chain, build_tree, from_beam, make_tree

SIZES = [(1, 1), (7, 7), (128, 3), (1000, 1), (1001, 4), (1024, 8), (1024, 100), (5000, 2), (5000, 40)]


@pytest.mark.parametrize("size, k", SIZES)
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

    def from_target(self, tokens):
        return mx.where((tokens >= 100) & (tokens < 100 + self.table.shape[0]), tokens - 100, -1)


def embed_one_hot(vocabulary):
    return lambda tokens: (tokens[..., None] % 100 == mx.arange(vocabulary)).astype(mx.float32)


def reference_beams(table, token, width, length, copy=(), trust=()):
    """Exhaustive beam search: the survivors of each depth as {tokens: score}.

    A beam that has copied all of ``copy`` so far may go on; 6 and more have no row in ``table``, and say 0's.
    """
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    beams, depths = {(token,): 0.0}, []
    for depth in range(length):
        grown = {}
        for beam, score in beams.items():
            likely = dict(enumerate(np.exp(logp[beam[-1] if beam[-1] < len(table) else 0])))
            if depth < len(copy) and beam[1:] == tuple(copy[:depth]):
                share = trust[depth] * np.sqrt(1 - max(likely.values()))
                likely = {t: (1 - share) * p for t, p in likely.items()}
                likely[copy[depth]] = likely.get(copy[depth], 0.0) + share
            grown |= {(*beam, t): score + np.log(p) for t, p in likely.items() if p}
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


@pytest.mark.parametrize("width, length", [(1, 1), (1, 4), (2, 3), (4, 5)])
@pytest.mark.parametrize("copies", [([3, 3, 1, 0, 0], 2), ([70, 2, 71, 0, 0], 3), ([1] * 5, 4), ([5] * 5, 0)])
def test_beams_copy_as_far_as_a_copy_is_trusted(width, length, copies):
    """Tokens that the drafter has, and others; after 2 to 4 tokens that agree (0: nothing was found)."""
    table = 2 * np.random.RandomState(3).randn(6, 6).astype(np.float32)
    copy, match = copies
    trust = [TRUST[min(match + depth, 4)] if match else 0.0 for depth in range(len(copy))]
    given = mx.array([[token + 100 for token in copy[:length]]] * 2), mx.array([match, match])
    sizes = mx.array([4, 1]), mx.zeros((2, 3)), width, length
    beam = draft(BigramDrafter(table), embed_one_hot(6), *sizes, copy=given)
    for row, first in enumerate((4, 1)):
        paths = [(first,)] * width
        for depth, expected in enumerate(reference_beams(table, first, width, length, copy, trust)):
            parents, tokens = beam.parents[row, depth].tolist(), beam.tokens[row, depth].tolist()
            paths = [paths[p] + (t - 100,) for p, t in zip(parents, tokens, strict=True)]
            assert set(paths) == set(expected)
            wanted = [expected[path] for path in paths]
            np.testing.assert_allclose(np.array(beam.scores[row, depth]), wanted, atol=1e-5)


def test_who_is_sure_does_not_copy():
    sure = np.full((6, 6), -40.0) + 80 * np.eye(6)  # says the same token again
    copy = mx.array([[103, 103]]), mx.array([4])
    beam = draft(BigramDrafter(sure), embed_one_hot(6), mx.array([2]), mx.zeros((1, 3)), 1, 2, copy=copy)
    assert beam.tokens.tolist() == [[[102], [102]]]


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
        tree = build_tree(mx.array([7, 8, 9]), from_beam(beam), nodes, min(length, nodes - 1))
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
    tree = build_tree(mx.array([10]), from_beam(beam), 5, 2)
    assert tree.tokens.tolist() == [[10, 11, 12, 13, 14]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 1]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    assert tree.ancestors[0, 3].tolist() == [True, True, False, True, False]
    assert tree.ranks.tolist() == [[0, 0, 1, 0, 1]]
    pruned = build_tree(mx.array([10]), from_beam(beam), 4, 2)
    assert pruned.tokens.tolist() == [[10, 11, 13, 14]]  # 12 is the least likely
    assert pruned.parents.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("nodes", [1, 3, 4])
def test_a_chain_is_the_tree_that_a_search_would_find(nodes):
    beam = Beam(mx.array([[[11], [12], [13]]] * 2), mx.zeros((2, 3, 1), mx.int32), -mx.ones((2, 3, 1)))
    root = mx.array([10, 20])
    chain, tree = build_chain(root, from_beam(beam), nodes), build_tree(root, from_beam(beam), nodes, 3)
    assert chain.is_chain and tree.is_chain == (nodes <= 2)
    for name in ("tokens", "parents", "depths", "ancestors", "ranks"):
        assert getattr(chain, name).tolist() == getattr(tree, name).tolist(), name


def test_accept_follows_the_targets_picks():
    tokens = mx.array([[10, 11, 12, 13, 14]] * 6)
    tree = make_tree(tokens, mx.array([[0, 0, 0, 1, 1]] * 6, mx.int32), 2)
    picks = mx.array(
        [
            [11, 14, 0, 0, 77],  # root -> 11 -> 14, then 77
            [12, 14, 55, 0, 0],  # root -> 12, then 55
            [99, 14, 0, 0, 0],  # nothing; 14 is right after 11, which is not said
            [11, 98, 0, 0, 0],  # root -> 11, then 98
            [11, -1, 0, 0, 77],  # what comes after 11 is not known: only 11 is said
            [11, 14, 0, 0, -1],  # root -> 11, then 14
        ]
    )
    accepted = accept(tree, picks, 2)
    assert accepted.count.tolist() == [3, 2, 1, 2, 1, 2]
    emitted = [row[:n] for row, n in zip(accepted.tokens.tolist(), accepted.count.tolist(), strict=True)]
    assert emitted == [[11, 14, 77], [12, 55], [99], [11, 98], [11], [11, 14]]
    assert accepted.path[0].tolist() == [0, 1, 4]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_takes_the_accepted_rows(batch):
    rng = np.random.RandomState(0)
    keys = mx.array(rng.randn(batch, 2, 12, 4).astype(np.float32))
    nodes = mx.array(rng.randn(batch, 2, 5, 4).astype(np.float32))
    start = mx.array([3, 5, 0][:batch], mx.int32)
    path = mx.array([[0, 2, 4], [0, 1, 0], [0, 3, 4]][:batch], mx.int32)
    written = write_rows(keys, nodes, start)
    layers = commit(leave_path(Layers([[written, written]]), [[nodes, nodes]], path, start))
    expected = np.array(keys)
    for row in range(batch):
        at = start[row].item()
        expected[row, :, at : at + 5] = np.array(nodes)[row]
        expected[row, :, at : at + 3] = np.array(nodes)[row][:, path[row].tolist()]
    np.testing.assert_array_equal(np.array(layers.rows[0][0]), expected)
    np.testing.assert_array_equal(np.array(layers.rows[0][1]), expected)
    assert layers.path_start is None
    larger = fit_rows(layers, 20)
    assert larger.capacity == 20
    np.testing.assert_array_equal(np.array(larger.rows[0][0])[:, :, :12], expected)


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
    "values, word",
    [
        ((0, 1), "width"),
        ((1, 0), "length"),
        ((-1, 1), "width"),
        ((1, 1, None, -1), "lookup"),
        ((2, 2, 1), "nodes"),
        ((2, 2, 6), "nodes"),
        ((2, 2, 9, 3), "nodes"),
        ((0, 0, 2), "nodes"),
    ],
)
def test_impossible_shapes_are_refused(values, word):
    with pytest.raises(ValueError, match=word):
        DraftShape(*values)


def reference_lookup(text, count):
    """The longest match of the text's end (4 to 2 tokens), of these the latest: (tokens, match)."""
    for size in range(4, 1, -1):
        end = text[-size:]
        places = [p for p in range(size, len(text)) if text[p - size : p] == end and -1 not in end]
        if len(end) == size and places:
            period = text[places[-1] :]
            return [period[i % len(period)] for i in range(count)], size
    return None, 0


@pytest.mark.parametrize("seed", range(40))
def test_lookup_finds_the_longest_and_latest_repetition(seed):
    random = np.random.RandomState(seed)
    texts = [random.randint(0, 2 + seed % 4, random.randint(1, 30)).tolist() for _ in range(5)]
    texts[0][: len(texts[0]) // 2] = [-1] * (len(texts[0]) // 2)  # not known
    history = np.full((5, 40), -1, np.int32)
    history[:, 35:] = random.randint(0, 3, (5, 5))  # what a rejected draft left there
    for row, text in zip(history, texts, strict=True):
        row[: len(text)] = text
    length = mx.array([len(text) - 1 for text in texts])
    found = find(mx.array(history), length, 6)
    for row, text in enumerate(texts):
        tokens, match = reference_lookup(text, 6)
        assert found.match[row].item() == match
        if tokens:
            assert found.tokens[row].tolist() == tokens


@pytest.mark.parametrize("width, length, count", [(1, 3, 4), (2, 3, 2), (4, 5, 5), (3, 2, 6)])
def test_the_copy_shares_its_nodes_with_the_beams(width, length, count):
    """Every kept node has its parent, no two siblings say the same, and the likeliest paths are kept."""
    for seed in range(30):
        random = np.random.RandomState(seed)
        beam = random_beam(random, 1, width, length)
        beam.tokens = mx.array(random.permutation(50)[: width * length].reshape(1, length, width), mx.int32)
        copy = random.randint(50, 99, count)
        shared, at = random.randint(0, min(length, count) + 1), 0
        for depth in range(shared):  # the copy follows a path of the beams for a while
            children = [w for w in range(width) if depth == 0 or beam.parents[0, depth, w].item() == at]
            if not children:
                break
            at = children[-1]
            copy[depth] = beam.tokens[0, depth, at].item()
        copied = -np.cumsum(random.choice([0.0, 0.3, 1.0], count)).astype(np.float32)
        found = Found(mx.array(copy[None], mx.int32), mx.array([3]))
        candidates = merge(from_beam(beam), found, mx.array(copied[None]))
        known = paths_of(from_beam(beam))
        for depth in range(count):
            path = tuple(copy[: depth + 1].tolist())
            known[path] = max(known.get(path, -np.inf), copied[depth])
        for nodes in range(2, 2 + len(known)):
            tree = build_tree(mx.array([7]), candidates, nodes, max(length, count))
            kept = [tuple(path) for path in tree_paths(tree)][1:]
            assert len(set(kept)) == len(kept) == nodes - 1
            best = sorted(known.values(), reverse=True)[: nodes - 1]
            np.testing.assert_allclose(sorted((known[path] for path in kept), reverse=True), best)
            copies = [rank == -1 for rank in tree.ranks[0].tolist()][1:]
            assert copies == [path not in paths_of(from_beam(beam)) for path in kept]


def paths_of(candidates):
    """The tokens from the root of every candidate, and its score."""
    tokens, parents = candidates.tokens[0].tolist(), candidates.parents[0].tolist()
    paths = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append(((*paths[parent], token)) if parent >= 0 else (token,))
    return dict(zip(paths, candidates.scores[0].tolist(), strict=True))


def tree_paths(tree):
    tokens, parents, paths = tree.tokens[0].tolist(), tree.parents[0].tolist(), [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


def test_a_copy_alone_is_a_chain():
    found = Found(mx.array([[5, 6, 7]]), mx.array([2]))
    candidates = alone(found, scores(found, first_record(1)))
    assert list(paths_of(candidates)) == [(5,), (5, 6), (5, 6, 7)]
    expected = np.log(PRIOR[0][0] / PRIOR[0][1]) + np.arange(3) * np.log(PRIOR[3][0] / PRIOR[3][1])
    np.testing.assert_allclose(candidates.scores[0].tolist(), expected, rtol=1e-5)
    nothing = Found(found.tokens, mx.array([0]))
    assert scores(nothing, first_record(1)).tolist() == [[LOWEST] * 3]


def test_the_record_counts_hits_and_trials():
    found = Found(mx.array([[5, 6, 7, 8]] * 5), mx.array([2, 4, 3, 0, 2]))
    tokens = mx.array([[5, 6, 9, 0], [1, 0, 0, 0], [5, 6, 7, 0], [5, 6, 7, 8], [5, 9, 7, 8]])
    count = mx.array([3, 1, 3, 4, 4])
    change = np.array(learn(first_record(5), found, tokens, count)) - np.array(PRIOR)
    expected = np.zeros((5, 4, 2))
    expected[0, 0], expected[0, 3] = (1, 1), (1, 2)  # 5 right; of the later ones 6 right, 7 wrong
    expected[1, 2] = (0, 1)  # wrong at once
    expected[2, 1], expected[2, 3] = (1, 1), (2, 2)  # 8 was not reached
    expected[4, 0], expected[4, 3] = (1, 1), (0, 1)
    np.testing.assert_allclose(change, expected, atol=1e-6)


def test_the_record_forgets():
    found, record = Found(mx.array([[5]]), mx.array([2])), first_record(1)
    for token in [5] * 60 + [6] * 60:
        record = learn(record, found, mx.array([[token, 0]]), mx.array([1]))
        if token == 5:
            best = record
    rate = lambda r: (r[0, 0, 0] / r[0, 0, 1]).item()  # noqa: E731
    assert rate(best) > 0.85
    assert rate(record) < 0.1
    np.testing.assert_array_equal(np.array(record[:, 1:]), np.array(first_record(1)[:, 1:]))
