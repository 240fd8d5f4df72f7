"""Texts kept on the disk: found again by other processes, never taken for others, and within their bound."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from itertools import takewhile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import RandomDrafter, make_model
from test_prefixes import LIMIT, SYSTEM, say
from tiny import make_tiny

from mlx_redrafter.decoding.layers import Layers
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine import prefix_folder
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.prefix_folder import PrefixFolder, prefix_identity
from mlx_redrafter.engine.prefixes import Prefixes
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.models.target import Target

NAMES = ("llama", "gemma3", "mamba", "falcon_h1")  # rows; windows; states; both
ONE, OTHER = "1" * 32, "2" * 32
ROW = 3 * 64 * 2  # bytes of a token in ``layers_of``


def make_runner(name):
    if name in ("llama", "gemma3"):
        target = Target(make_model(name))
        return Runner(target, RandomDrafter(target)), DraftShape(3, 4, None, 3)
    return Runner(Target(make_tiny(name)), None), DraftShape(0, 0, None, 3)


def converse(name, folder):
    """What is said in a conversation, and how many tokens of each prompt were known already."""
    runner, shape = make_runner(name)
    kept = folder and PrefixFolder(folder, prefix_identity(runner.target.model), LIMIT)
    prefixes = folder and Prefixes(LIMIT, kept)
    engine = Engine(runner, Fixed(shape), 16, prefixes=prefixes)
    text, said, known = [token % runner.target.vocabulary for token in SYSTEM], [], []
    for turn in range(3):
        text += [(31 * turn + i) % 90 for i in range(5)]
        request = Request(text, 9, seed=turn, checkpoints=(30,))
        said += say(engine, request)
        known.append(request.cached_tokens)
        text += said[-1]
    if kept:
        kept.flush()
    return said, known


def another_process(code, *arguments):
    """A new process of this code, with the tests' modules."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import mlx_redrafter; {code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)


# --- Processes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What another process says of conversations and identities, and the folder that it leaves."""
    folder = tmp_path_factory.mktemp("left")
    code = """from test_prefix_folder import *
folder = Path(sys.argv[1])
known = {name: converse(name, folder)[1] for name in NAMES}
print(json.dumps([known, prefix_identity(make_model("llama"))]))
keep(PrefixFolder(folder, ONE, 10 ** 9), [1, 2])"""
    process = another_process(code, folder)
    out, _ = process.communicate()
    assert process.returncode == 0
    return folder, *json.loads(out)


@pytest.mark.parametrize("name", NAMES)
def test_what_another_process_read_is_not_read_again(name, left):
    folder, known, _ = left
    wanted, _ = converse(name, None)
    said, now = converse(name, folder)
    assert said == wanted
    assert known[name][0] == 0
    assert now[0] == 64  # all but the token that the first step reads
    assert all(n > before for n, before in zip(now, known[name], strict=True))


def test_what_is_to_be_written_is_written_at_the_end_of_the_program(left):
    assert restored(PrefixFolder(left[0], ONE, 10**9), [1, 2, 3]) == 2


def test_a_process_that_is_killed_leaves_nothing_half(tmp_path):
    code = """from test_prefix_folder import *
folder = PrefixFolder(Path(sys.argv[1]), ONE, 10 ** 9)
print("ready", flush=True)
for i in range(10 ** 6):
    keep(folder, [i % 7, *range(i % 50), i])"""
    for i in range(2):
        process = another_process(code, tmp_path)
        process.stdout.readline()
        count = len(list(tmp_path.glob("*.safetensors")))
        while len(list(tmp_path.glob("*.safetensors"))) <= count:
            time.sleep(0.01)
        time.sleep(0.1 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        folder = PrefixFolder(tmp_path, ONE, 10**9)
        for path in tmp_path.glob("*.safetensors"):
            assert path.stat().st_size > 8
        found = [restored(folder, [i % 7, *range(i % 50), i]) for i in range(60)]
        assert sum(found) > 0
    for left in tmp_path.glob(".*"):
        os.utime(left, (1, 1))
    keep(folder, [99])  # tidies up
    folder.flush()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("count", [9, 150])  # within a ring, and round it
def test_a_system_prompt_is_known_to_other_conversations_without_a_checkpoint(tmp_path, count):
    """Rings cannot go back, but what a prompt's tokens left in them is kept before they forget it."""
    runner, shape = make_runner("gemma3")
    for turn, known in enumerate((0, 60, 60)):  # each after a restart
        folder = PrefixFolder(tmp_path, ONE, LIMIT)
        engine = Engine(runner, Fixed(shape), 16, prefixes=Prefixes(LIMIT, folder))
        ask, anew = (Request([*SYSTEM, turn, *range(40)], count, seed=turn) for _ in range(2))
        assert say(engine, ask) == say(Engine(runner, Fixed(shape), 16), anew)
        assert ask.cached_tokens == known
        folder.flush()


# --- Layers whose numbers tell the text, and restoring them ------------------------------------------


def layers_of(tokens, states=False, dtype=mx.bfloat16):
    """Layers of two kinds of rows that tell of which text they are."""
    seen = np.cumsum(np.asarray(tokens) * np.arange(3, len(tokens) + 3)) % 251
    rows = mx.array(seen)[None, None, :, None].astype(dtype) + mx.arange(64).astype(dtype)
    last = mx.array([[float(seen[-1])]])
    return Layers([[rows, 2 * rows], [3 * rows]], states=[[last, last + 1]] if states else [])


def keep(folder, tokens, states=False, limit=LIMIT, **options):
    prefixes = Prefixes(limit, folder)
    prefixes.keep(tokens, layers_of(tokens, states, **options))


def restored(folder, tokens):
    """How many of the tokens are found; fails if what is found is not theirs."""
    found = folder.read(np.asarray(tokens, np.int32), 0)
    if found is None:
        return 0
    count, layers = found
    wanted = layers_of(tokens[:count], bool(layers.states))
    for some, others in ((layers.rows, wanted.rows), (layers.states, wanted.states)):
        for parts, right in zip(some, others, strict=True):
            for part, each in zip(parts, right, strict=True):
                assert part.dtype == each.dtype
                assert part.shape == each.shape
                assert mx.array_equal(part, each)
    return count


def files(folder):
    return {path.name for path in folder.folder.glob("*.safetensors")}


@pytest.fixture
def folder(tmp_path):
    return PrefixFolder(tmp_path / "kept", ONE, 10**6)


def reopened(folder, identity=ONE, limit=10**6):
    folder.flush()
    return PrefixFolder(folder.folder, identity, limit)


def same(pair):
    return pair[0] == pair[1]


TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(TEXTS, st.booleans()), max_size=12), states=st.booleans(), asked=TEXTS)
def test_what_is_found_is_what_was_kept(tmp_path_factory, texts, states, asked):
    folder = PrefixFolder(tmp_path_factory.mktemp("kept"), ONE, 10**6)
    prefixes = Prefixes(LIMIT, folder)
    for text, anew in texts:
        if anew:  # as another process would
            folder = reopened(folder)
            prefixes = Prefixes(LIMIT, folder)
        prefixes.keep(text, layers_of(text, states))
    folder.flush()
    common = [sum(1 for _ in takewhile(same, zip(text, asked, strict=False))) for text, _ in texts]
    if states:
        common = [n for n, (text, _) in zip(common, texts, strict=True) if n == len(text)]
    assert restored(folder, asked) == restored(reopened(folder), asked) == max(common, default=0)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_types_of_numbers_stay(folder, dtype):
    keep(folder, [1, 2, 3], dtype=dtype)
    _, layers = reopened(folder).read(np.array([1, 2, 3, 4], np.int32), 0)
    assert {part.dtype for rows in layers.rows for part in rows} == {dtype}


def test_only_what_is_new_is_written(folder):
    keep(folder, [*range(50)])
    folder.flush()
    [first] = folder.folder.iterdir()
    size = first.stat().st_size
    keep(folder, [*range(50)])
    keep(folder, [*range(40)])
    keep(folder, [*range(51)])
    folder.flush()
    sizes = sorted(path.stat().st_size for path in folder.folder.iterdir())
    assert len(sizes) == 2
    assert sizes[1] == size
    assert sizes[0] < size - 45 * ROW


def test_memory_takes_no_more_than_it_may(folder):
    keep(folder, [*range(50)])
    folder.flush()
    prefixes = Prefixes(10 * ROW, folder)
    assert prefixes.restore([*range(60)], []) == 0
    assert prefixes.nbytes == 0


def test_others_cannot_read_it(folder):
    keep(folder, [1, 2])
    folder.flush()
    assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700


def test_a_model_that_changes_leaves_the_folder_alone(folder):
    prefixes = Prefixes(LIMIT, folder)
    prefixes.keep([1, 2], layers_of([1, 2]))
    prefixes.clear()
    prefixes.keep([3, 4], layers_of([3, 4]))
    folder.flush()
    assert len(files(folder)) == 1
    assert prefixes.restore([1, 2, 3], []) == 0


# --- The bound ---------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(tmp_path):
    text = [*range(100)]
    size = 103 * ROW + 2000  # of a file
    folder = PrefixFolder(tmp_path, ONE, 4 * size)
    for i in range(2):
        keep(folder, [i, *text])
    keep(folder, [0, *text, 5])  # uses the first
    folder.flush()
    assert restored(folder, [1, *text]) == 101
    assert restored(folder, [0, *text, 5]) == 102
    for i in range(2, 6):
        keep(folder, [i, *text])
        folder.flush()
        assert restored(folder, [0, *text, 5]) == 102
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * size
    assert restored(folder, [1, *text]) == 0
    assert restored(folder, [5, *text]) == 101


def test_the_end_of_a_text_goes_before_its_beginning(tmp_path):
    folder = PrefixFolder(tmp_path, ONE, 10**6)
    for end in (100, 200, 300):
        keep(folder, [*range(end)])
    small = reopened(folder, limit=250 * ROW)
    keep(small, [7] * 100)
    small.flush()
    assert restored(small, [7] * 100) == 100
    assert restored(reopened(small), [*range(300)]) == 100


def test_a_text_that_is_too_long_costs_the_others_nothing(tmp_path):
    folder = PrefixFolder(tmp_path, ONE, 200 * ROW)
    keep(folder, [1] * 50)
    keep(folder, [2] * 250)
    folder.flush()
    assert restored(folder, [1] * 50) == 50
    assert restored(folder, [2] * 250) == 0


def test_models_share_the_bound_and_nothing_else(folder):
    keep(folder, [1, 2])
    other = reopened(folder, OTHER)
    assert restored(other, [1, 2]) == 0
    keep(other, [1, 2])
    other.flush()
    assert len(files(folder)) == 2
    assert restored(reopened(folder), [1, 2]) == restored(other, [1, 2]) == 2
    small = reopened(folder, OTHER, 104 * ROW)  # a text of 100 tokens, and its header
    keep(small, [3] * 100)
    small.flush()
    assert len(files(folder)) == 1


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="-1 is not usable: give 0"):
        PrefixFolder(tmp_path, ONE, -1)
    with pytest.raises(ValueError, match="no identity"):
        PrefixFolder(tmp_path, "../x", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        PrefixFolder(tmp_path / "file" / "folder", ONE, 10)


# --- Damage ------------------------------------------------------------------------------------------


def cut(content):
    return content[:-1]


def flip(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def rename_text(content):
    return content.replace(b"[0, 1, 2,", b"[0, 9, 2,")


def huge(content):
    return content.replace(b"[0, 1, 2,", b"[0,1e9,2,")


@pytest.mark.parametrize("change", [cut, flip, rename_text, huge, lambda content: b""])
def test_damaged_files_are_removed_and_what_comes_after_them(folder, change):
    keep(folder, [*range(10)])
    folder.flush()
    [first] = folder.folder.iterdir()
    keep(folder, [*range(20)])
    folder.flush()
    content = first.read_bytes()
    assert change(content) != content
    first.write_bytes(change(content))
    new = reopened(folder)
    assert restored(new, [*range(20)]) == 0
    assert files(new) == set()
    keep(new, [*range(20)])
    assert restored(reopened(new), [*range(20)]) == 20


def test_what_is_not_ours_is_left_alone(folder):
    keep(folder, [1])
    folder.flush()
    (folder.folder / "notes.txt").write_text("mine")
    (folder.folder / "model.safetensors").write_text("mine")
    (folder.folder / f"{ONE}-x.prefix.safetensors").mkdir()
    small = reopened(folder, limit=40 * ROW)
    keep(small, [2] * 30)
    small.flush()
    assert restored(small, [2] * 30) == 30
    assert {"notes.txt", "model.safetensors"} < {path.name for path in folder.folder.iterdir()}


def test_files_that_another_process_removes_are_done_without(folder):
    keep(folder, [1] * 10)
    folder.flush()
    for path in folder.folder.iterdir():
        path.unlink()
    assert restored(folder, [1] * 10) == 0
    keep(folder, [1] * 10)
    folder.flush()
    assert restored(folder, [1] * 10) == 10


def test_two_processes_that_cut_a_text_in_different_places(tmp_path):
    one, other = (PrefixFolder(tmp_path, ONE, 10**6) for _ in range(2))
    keep(one, [*range(30)])
    keep(one, [*range(40)])
    one.flush()
    keep(other, [*range(20)])
    keep(other, [*range(40)])  # takes the place of the other's file of this text
    other.flush()
    keep(one, [*range(35), 1, 2])  # which is after a part of that
    one.flush()
    for folder in (one, other, reopened(one)):
        assert restored(folder, [*range(40)]) in (0, 20, 30, 40)
        assert restored(folder, [*range(35), 1, 2]) in (0, 20, 30, 35, 37)


def test_a_full_disk_costs_nothing_but_the_text(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    keep(folder, [1] * 5)
    folder.flush()
    write = prefix_folder._write
    monkeypatch.setattr(prefix_folder, "_write", full)
    keep(folder, [1] * 9)
    keep(folder, [1] * 12)
    folder.flush()
    monkeypatch.setattr(prefix_folder, "_write", write)
    assert restored(folder, [1] * 12) == 5
    keep(folder, [1] * 12)
    folder.flush()
    assert restored(folder, [1] * 12) == restored(reopened(folder), [1] * 12) == 12


def test_what_comes_faster_than_the_disk_takes_it_is_left_out(folder, monkeypatch):
    monkeypatch.setattr(prefix_folder, "LONGEST_WAIT", 100 * ROW)
    keep(folder, [1] * 101)
    keep(folder, [2] * 20)
    folder.flush()
    assert restored(folder, [1] * 101) == 0
    assert restored(folder, [2] * 20) == 20


# --- Identities --------------------------------------------------------------------------------------


def test_identities(left):
    model = partial(make_model, "llama")
    known = prefix_identity(model())
    changed = [model(rope_theta=5.0)]
    for change in (
        lambda each: each.set_dtype(mx.float16),
        lambda each: spoil(each.model.layers[1].mlp.up_proj, 3, 5),
    ):
        changed.append(model())
        change(changed[-1])
    assert len({known, *map(prefix_identity, changed)}) == 1 + len(changed)
    assert known == left[2]  # of another process


def spoil(layer, row, column):
    """Change one number a little."""
    weight = np.array(layer.weight)
    weight[row, column] = np.nextafter(weight[row, column], np.float32(9))
    layer.weight = mx.array(weight)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_random_conversations_with_little_memory_and_disk(tmp_path, name):
    """Each text gets what it gets alone, whatever memory and disk have of it."""
    rng = random.Random(3)
    runner, shape = make_runner(name)
    identity = prefix_identity(runner.target.model)
    texts = [[rng.randrange(3) for _ in range(rng.randrange(5, 40))] for _ in range(3)]
    for i in range(12):
        folder = PrefixFolder(tmp_path, identity, 60_000)
        engine = Engine(runner, Fixed(shape), 16, prefixes=Prefixes(40_000, folder))
        text = texts[i % 3]
        request, anew = (Request(text, 7, seed=i) for _ in range(2))
        (said,) = say(engine, request)
        assert [said] == say(Engine(runner, Fixed(shape), 16), anew)
        folder.flush()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 60_000
        text += said
