"""What is written appears whole or not at all, whatever happens; a conversion in the cache too."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from bundles import make_drafter, make_folder
from test_gguf import write_model

from mlx_redrafter.convert.drafter import save_counts
from mlx_redrafter.loading import files
from mlx_redrafter.loading.cache import cache_folder
from mlx_redrafter.loading.files import UNFINISHED, atomic_file, atomic_folder, unfinished
from mlx_redrafter.loading.find import model_folder
from mlx_redrafter.model import load


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def age(path):
    os.utime(path, (1, 1))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def gguf(tmp_path):
    write_model(tmp_path / "m.gguf", kind=2)
    return tmp_path / "m.gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_folder(folder / "base", kind="random")
    make_drafter(folder / "drafter", folder / "base")
    write_model(folder / "m.gguf", kind=2)
    return folder


# --- Files and folders -------------------------------------------------------------------------------


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    (tmp_path / "new-a.json").write_text("the user's")
    with atomic_file(tmp_path / "a.json") as first, atomic_file(tmp_path / "a.json") as second:
        first.write_text("first")
        second.write_text("second")
    assert first.suffix == ".json"
    assert tree(tmp_path) == {"a.json": b"first", "new-a.json": b"the user's"}


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match="out exists already"), atomic_folder(tmp_path / "out") as slow:
        (slow / "slow").touch()
        with atomic_folder(tmp_path / "out") as fast:
            (fast / "fast").touch()
    assert list(tree(tmp_path)) == ["out/fast"]


def test_links_and_devices_stay(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link") as new:
        new.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    with atomic_file(tmp_path / "pipe") as new:
        new.write_text("through")
    reader.join()
    assert (read, (tmp_path / "pipe").is_fifo()) == (["through"], True)


def test_permissions_are_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as new:
            new.write_text("x")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder")] == [0o640, 0o750]


def test_data_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with atomic_file(tmp_path / "file") as new:
        new.write_text("12345")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("1234567")
        assert synced == [5]
    assert synced == [5, 7]


def test_what_a_killed_process_left_is_removed_and_what_is_used_is_not(tmp_path):
    (tmp_path / f"{UNFINISHED}0123dead").mkdir()
    (tmp_path / f"{UNFINISHED}0123dead" / "part").write_text("x")
    (tmp_path / ".out-of-the-user").mkdir()
    (tmp_path / f"{UNFINISHED}of-the-user").mkdir()
    age(tmp_path / f"{UNFINISHED}of-the-user")
    age(tmp_path / f"{UNFINISHED}0123dead")
    with unfinished(tmp_path) as used:
        age(used)
        with atomic_folder(tmp_path / "out"):
            assert used.is_dir()
            assert not (tmp_path / f"{UNFINISHED}0123dead").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{UNFINISHED}of-the-user",
        ".out-of-the-user",
        "out",
    ]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOTSUP, "no locks here")

    (tmp_path / f"{UNFINISHED}0123cafe").mkdir()
    age(tmp_path / f"{UNFINISHED}0123cafe")
    monkeypatch.setattr(fcntl, "flock", none)
    with atomic_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{UNFINISHED}0123cafe", "out"]


def test_a_failure_leaves_no_folders_above(tmp_path):
    with pytest.raises(ValueError, match="bad"), atomic_folder(tmp_path / "a" / "b" / "out"):
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            RuntimeError("[write] Unable to write 9 bytes to file."),
            r"\[write\] Unable to write 9 bytes to file",
        ),
        (Exception("No space left on device (os error 28)"), r"No space left on device \(os error 28\)"),
    ],
    ids=["Python", "MLX", "tokenizers"],
)
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_every_librarys_full_disk_is_told_alike(tmp_path, atomic, error, reason):
    with (
        pytest.raises(OSError, match=rf"out cannot be written \({reason}\): make room"),
        atomic(tmp_path / "out"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass(tmp_path):
    for error in (RecursionError("deep"), BrokenPipeError(), KeyboardInterrupt(), ValueError("x")):
        with pytest.raises(type(error)), atomic_folder(tmp_path / "out"):
            raise error
    assert list(tmp_path.iterdir()) == []


# --- A full disk -------------------------------------------------------------------------------------

COMMANDS = {
    "convert": ("convert", "--model", "base", "--mlx-path", "{out}/new/out"),
    "quantize": ("convert", "-q", "--q-group-size", 32, "--model", "base", "--mlx-path", "{out}/out"),
    "gguf": ("convert", "--model", "m.gguf", "--mlx-path", "{out}/out"),
    "gguf quantized": ("convert", "-q", "--q-group-size", 32, "--model", "m.gguf", "--mlx-path", "{out}/out"),
    "drafter": ("convert", "--drafter", "drafter", "--mlx-path", "{out}/out"),
    "export": ("export", "--drafter", "drafter", "--output", "{out}/out"),
    "cache": ("generate", "--model", "m.gguf", "--no-draft", "-m", 1),
}


@pytest.mark.parametrize("limit", [100, 12_000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(run, made, tmp_path, monkeypatch, command, limit):
    """A limit on the size of files stands for the disk: the writers get true errors from the system."""
    import resource

    (tmp_path / "out").mkdir()
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(made)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code, _, error = run(*(str(word).format(out=tmp_path / "out") for word in COMMANDS[command]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert error.count("\n") == 1
    assert "cannot be written" in error and "make room on the disk" in error
    assert ("MLX_REDRAFTER_CACHE" in error) == (command == "cache")
    assert tree(tmp_path) == {} and list((tmp_path / "out").iterdir()) == []
    assert not list(tmp_path.rglob(f"{UNFINISHED}*"))


def test_saved_counts_are_whole(tmp_path, monkeypatch):
    def full(path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match=r"counts.npz cannot be written \(No space left on device\)"):
        save_counts(tmp_path / "counts.npz", np.ones(4, np.int64))
    assert list(tmp_path.iterdir()) == []


# --- The cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["m.gguf", "m.gguf/deeper"])
def test_a_cache_that_is_a_file(run, gguf, monkeypatch, place):
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(gguf.parent / place))
    code, _, error = run("generate", "--model", gguf, "-m", 1)
    assert code == 2
    assert error.count("\n") == 1
    assert "(Not a directory)" in error and "MLX_REDRAFTER_CACHE" in error


def test_a_conversion_is_used_from_a_cache_that_cannot_be_written(cache, gguf, monkeypatch):
    folder = model_folder(str(gguf))
    monkeypatch.setattr(files, "unfinished", None)  # nothing is written without it
    assert model_folder(str(gguf)) == folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "config.json").write_text(" " * (f / "config.json").stat().st_size),
        lambda f: (f / "tokenizer.json").write_bytes(b""),
        lambda f: (f / "conversion.json").write_text("{"),
        lambda f: [path.unlink() for path in f.iterdir()],
        lambda f: (shutil.rmtree(f), f.write_text("a file")),
    ],
    ids=["cut", "lost", "blanked", "emptied", "record", "everything", "file"],
)
def test_a_damaged_conversion_is_made_again(cache, gguf, damage):
    whole = tree(model_folder(str(gguf)))
    damage(next(cache.iterdir()))
    load(str(gguf), drafter=None)
    assert tree(model_folder(str(gguf))) == whole
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_conversion_without_its_source_is_not_lost_sight_of(cache, gguf):
    model_folder(str(gguf))
    gguf.unlink()
    with pytest.raises(ValueError, match="m.gguf does not exist"):
        model_folder(str(gguf))


def test_one_conversion_for_each_path(cache, gguf):
    first = model_folder(str(gguf))
    os.utime(gguf)
    assert model_folder(str(gguf)) == first
    shutil.copy(gguf, gguf.with_name("other.gguf"))
    assert model_folder(str(gguf.with_name("other.gguf"))) != first
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("at", [-40, 3000], ids=["weights", "metadata"])
def test_another_file_of_the_same_size_and_time_is_another_model(cache, gguf, at):
    """What is compared covers the metadata, and every part of a small file."""
    before = tree(model_folder(str(gguf)))
    status, content = gguf.stat(), bytearray(gguf.read_bytes())
    weight = content.rindex(content[at : at + 8]) if at < 0 else content.index(b"llama.context_length") + 24
    content[weight] ^= 1
    gguf.write_bytes(content)
    os.utime(gguf, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = tree(model_folder(str(gguf)))
    changed = {name for name in before if before[name] != after[name]} - {"conversion.json"}
    assert changed == ({"model.safetensors"} if at < 0 else {"config.json", "tokenizer_config.json"})


def test_two_conversions_at_once_are_one(cache, gguf, monkeypatch):
    from mlx_redrafter.loading import gguf as room

    convert, both = room.convert_gguf, threading.Barrier(2)

    def together(source, folder, **options):
        convert(source, folder, **options)
        both.wait(30)

    monkeypatch.setattr(room, "convert_gguf", together)
    found = []
    threads = [threading.Thread(target=lambda: found.append(model_folder(str(gguf)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [next(cache.iterdir())] * 2
    assert [path.name for path in cache.parent.rglob(f"{UNFINISHED}*")] == []
    load(str(gguf), drafter=None)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MLX_REDRAFTER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the standard
    assert cache_folder() == tmp_path / ".cache" / "mlx-redrafter"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/mlx-redrafter")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home
    with pytest.raises(OSError, match="set MLX_REDRAFTER_CACHE"):
        cache_folder()


@pytest.mark.parametrize("flags", [("--model",), ("--model", "base", "--drafter"), ("--adapter-path",)])
def test_an_unknown_users_home(run, made, monkeypatch, flags):
    monkeypatch.chdir(made)
    base = () if "--model" in flags else ("--model", "base")
    code, _, error = run("generate", *base, *flags, "~nobody-of-this-name/m")
    assert (code, error.count("\n")) == (2, 1)
    assert "~nobody-of-this-name/m" in error


def test_an_adapter_of_peft(run, made, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    code, _, error = run("generate", "--model", made / "base", "--adapter-path", tmp_path)
    assert (code, error.count("\n")) == (2, 1)
    assert "it is PEFT's: merge it into its model" in error


def test_generate_refuses_two_models_in_one_folder_too(run, made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "model")
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
        shutil.copy(made / "base" / "model.safetensors", tmp_path / "model" / name)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, error = run("generate", "--model", tmp_path / "model", "-m", 1)
    assert (code, error.count("\n")) == (2, 1)
    assert "move model.safetensors elsewhere" in error
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "old")  # as it says
    assert run("generate", "--model", tmp_path / "model", "-m", 1)[0] == 0


# --- Stopped -----------------------------------------------------------------------------------------

SLOW = (  # a process that is stopped in the midst of writing
    "import sys, time, mlx.core as mx\n"
    "from mlx_redrafter.commands.main import main\n"
    "write = mx.save_safetensors\n"
    "def slow(path, *args, **options):\n"
    "    write(path, *args, **options)\n"
    "    print('written', flush=True)\n"
    "    time.sleep(60)\n"
    "mx.save_safetensors = slow\n"
    "sys.exit(main())\n"
)


@pytest.mark.parametrize(
    ("number", "code", "left"), [(signal.SIGTERM, 130, False), (signal.SIGKILL, -9, True)]
)
def test_stopped_while_writing(run, made, tmp_path, number, code, left):
    command = ("convert", "--model", str(made / "base"), "--mlx-path", str(tmp_path / "out"))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "written\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in error) == (code, False)
    assert any(tmp_path.iterdir()) == left
    for path in tmp_path.iterdir():
        age(path)
    assert run(*command)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
