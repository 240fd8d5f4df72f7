"""Thirty-two clients at once, of all kinds: each gets the answer that it gets alone."""

import importlib
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import make_drafter, make_folder
from serving import serving

from mlx_redrafter.decoding.state import PLAIN, DraftShape
from mlx_redrafter.model import SpeculativeModel

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
SHAPES = [PLAIN, DraftShape(0, 0, None, 3), DraftShape(1, 3), DraftShape(2, 3, 5, 4)]


class Random:
    """A policy that chooses at random."""

    def __init__(self, *_):
        self.rng = random.Random(0)

    def choose(self, rows, texts):
        return self.rng.choice(SHAPES)

    def observe(self, *outcome):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = make_folder(root / "base", kind="random", max_position_embeddings=4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculativeModel, "make_policy", Random)
        with serving(base, str(make_drafter(root / "drafter", base)), texts=8) as found:
            yield found


def test_32_requests_at_once_get_what_each_gets_alone(served):
    soak = importlib.import_module("soak_server")
    todo = soak.asks(32, seed=1, long=60)
    with soak.client_of(served.url) as client:
        for ask in todo:
            ask.alone = soak.whole(client, ask)
            assert soak.streamed(client, ask)[:2] == (ask.alone, True)
    assert len({ask.alone for ask in todo}) > 24 and {ask.path for ask in todo} == set(soak.PATHS)

    def visit(number):
        ask, way = todo[number], number % 3
        with soak.client_of(served.url) as client:
            if way == 0:
                return soak.whole(client, ask) == ask.alone
            said, is_all, _ = soak.streamed(client, ask, 1e9 if way == 1 else number % 7)
            return said == ask.alone if is_all else ask.alone.startswith(said)

    with ThreadPoolExecutor(32) as pool:
        for _ in range(2):  # the second time, all of the prompts are known
            assert all(pool.map(visit, range(32)))
    deadline, generations = time.monotonic() + 10, served.server.service.generations
    while (generations or soak.told(served.url, "texts")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not generations and served.loaded.served.texts == 0
    assert soak.told(served.url, 'tokens_total{kind="accepted"}') > 10
