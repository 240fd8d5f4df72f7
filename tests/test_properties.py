"""Whatever is done to a folder or written on a command line: valid output, or one line and exit code 2."""

import contextlib
import io
import json
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest
from bundles import make_drafter, make_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_redrafter.commands.main import main

SECONDS = 30  # for one command line
BYTES = 1 << 30  # by which it may raise the process's peak
VALUES = [
    None, True, False, -1, 0, 1, 3, 1.5, 1e-300, 1e300, float("nan"), float("inf"), 255, 65_536, 10**9,
    -(2**31), 2**31 - 1, 2**31, 2**63, 10**30, "", "text", "64", "\ud800", [], [0], [[]], {}, {"a": 1},
]  # fmt: skip
KEYS = [
    "text_config", "quantization", "quantization_config", "sliding_window", "head_dim", "layer_types",
    "attention_bias", "dtype", "eos_token_id", "bos_token_id", "_name_or_path", "context_size",
    "draft_vocab_size",
]  # fmt: skip


def bounded(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """A command line took too long."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    base = make_folder(root / "base", "Hé🙂", eos_token_id=1, rope_scaling={"type": "linear", "factor": 2.0})
    make_drafter(root / "drafter", base)
    make_folder(root / "sentencepiece", tokenizer="sentencepiece")
    (root / "text.txt").write_text("the quick brown fox")
    return root


@contextlib.contextmanager
def spoilt(made):
    """Copies of all folders."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(made, copy)
        yield copy


def outcome(*arguments, stdin=b""):
    """Run a command line; the exit code if the outcome is as it must be."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
        before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        finally:
            sys.stdin = before
    check(code, out.getvalue(), err.getvalue(), arguments)
    return code


def check(code, out, err, arguments):
    told = (code, out, err, arguments)
    lines = err.splitlines()
    if code == 2:
        assert out == "", told
        assert len(lines) == 1, told
        assert "error: " in lines[0], told
        assert len(lines[0]) > 20, told
    else:
        assert code == 0, told
        assert all(line.startswith("warning: ") for line in lines), told
        if "--json" in arguments:
            record = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in {told}"))
            assert record["generation_tokens"] == len(record["tokens"]) > 0, told
            assert all(isinstance(token, int) and token >= 0 for token in record["tokens"]), told
    assert "Traceback" not in err, told


@contextlib.contextmanager
def limited():
    def hang(*_):
        raise Hang

    handler, memory = signal.signal(signal.SIGALRM, hang), peak()
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert peak() - memory < BYTES


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def generate(folder, *more):
    return outcome(
        "generate",
        "--model",
        folder / "base",
        "--drafter",
        folder / "drafter",
        "--json",
        "-m",
        9,
        "-p",
        "a",
        *more,
    )


# --- Folders -----------------------------------------------------------------------------------------

FILES = [
    "base/config.json", "base/model.safetensors", "base/tokenizer.json", "base/tokenizer_config.json",
    "drafter/config.json", "drafter/model.safetensors",
]  # fmt: skip


@st.composite
def edits(draw):
    """What to do to the bytes of a file: (how, where, bytes); most headers are at the front."""
    how = draw(st.sampled_from(["flip", "insert", "delete", "cut"]))
    where = draw(st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 400)))
    return how, where, draw(st.binary(min_size=1, max_size=9))


def edit(content, how, where, new):
    place = min(int(where * len(content)) if isinstance(where, float) else where, len(content) - 1)
    before, after = content[:place], content[place:]
    return {
        "flip": before + bytes(a ^ b for a, b in zip(after, new, strict=False)) + after[len(new) :],
        "insert": before + new + after,
        "delete": before + after[len(new) :],
        "cut": before,
    }[how]


@bounded(100)
@given(st.sampled_from(FILES), st.lists(edits(), min_size=1, max_size=2))
def test_damaged_bytes(made, name, changes):
    with spoilt(made) as folder:
        content = (folder / name).read_bytes()
        for change in changes:
            content = edit(content, *change) or b" "
        (folder / name).write_bytes(content)
        generate(folder)


def places(value, path=()):
    """The paths of all values in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(document, path, value):
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


@bounded(150)
@given(st.data())
@pytest.mark.parametrize("command", ["generate", "convert"])
def test_other_json_values(made, command, data):
    with spoilt(made) as folder:
        for _ in range(data.draw(st.integers(1, 2))):
            names = [name for name in FILES if name.endswith(".json")]
            path = folder / data.draw(st.sampled_from(names))
            document = json.loads(path.read_text())
            more = [(key,) for key in KEYS] if path.name == "config.json" else []
            place = data.draw(st.sampled_from([*places(document), *more]))
            put(document, place, data.draw(st.sampled_from(VALUES)))
            path.write_text(json.dumps(document))
        if command == "generate":
            generate(folder)
        else:
            outcome(
                "convert",
                "--model",
                folder / "base",
                "--mlx-path",
                folder / "out",
                "-q",
                "--q-group-size",
                32,
            )
            outcome(
                "convert",
                "--drafter",
                folder / "drafter",
                "--model",
                folder / "base",
                "--mlx-path",
                folder / "o2",
            )


@bounded(60)
@given(
    st.sampled_from(["base", "drafter"]),
    st.integers(0, 99),
    st.sampled_from(
        ["rename", "remove", "double", "narrow", "deeper", "empty", "int8", "uint32", "nan", "inf"]
    ),
)
def test_other_tensors(made, name, place, change):
    with spoilt(made) as folder:
        path = folder / name / "model.safetensors"
        weights = dict(mx.load(str(path)))
        tensor = sorted(weights)[place % len(weights)]
        value = weights.pop(tensor)
        changed = {
            "rename": {tensor + "x": value},
            "remove": {},
            "double": {tensor: value, "again": value},
            "narrow": {tensor: value[..., :-1]},
            "deeper": {tensor: value[None]},
            "empty": {tensor: mx.zeros((0,))},
            "int8": {tensor: value.astype(mx.int8)},
            "uint32": {tensor: value.astype(mx.uint32)},
            "nan": {tensor: value * mx.nan},
            "inf": {tensor: value + mx.inf},
        }[change]
        mx.eval(weights, changed)
        mx.save_safetensors(str(path), weights | changed)
        code = generate(folder)
        assert code == 2 or change in ("double", "int8", "uint32")


# --- Command lines -----------------------------------------------------------------------------------

NUMBERS = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "4",
    "7",
    "64",
    "300",
    "1e9",
    "nan",
    "-inf",
    "1000000000",
    str(10**40),
    "x",
    "",
    "0.5",
]
TEXTS = [
    "",
    " ",
    "a",
    "🙂",
    "\\n",
    "-",
    "--",
    "a" * 3000,
    "\udcff",
    "\0",
    "<s>",
    "{{ x }}",
    "</s>" * 9,
    "/",
    "none",
    "auto",
]
PLACES = [
    "base",
    "drafter",
    "sentencepiece",
    "text.txt",
    "missing",
    "base/config.json",
    "",
    "a/b",
    "~",
    "x" * 300,
]
NUMERIC = [
    "--temp", "--top-p", "--min-p", "--top-k", "--seed", "--max-kv-size", "--prefill-step-size", "--kv-bits",
    "--kv-group-size", "--quantized-kv-start", "--beam-width", "--beam-length", "--max-nodes",
    "--xtc-probability", "--xtc-threshold", "--min-tokens-to-keep", "--num-draft-tokens",
]  # fmt: skip
TEXTUAL = [
    "--prompt",
    "--system-prompt",
    "--stop",
    "--extra-eos-token",
    "--dtype",
    "--nonsense",
    "-p",
    "--chat-template-config",
    "--verbose",
    "--prefill-response",
]
FOLDERS = ["--model", "--drafter", "--adapter-path", "--prompt-cache-file", "--draft-model"]
SWITCHES = ["--no-draft", "--ignore-chat-template", "--trust-remote-code", "--show-draft", "stray"]
CONVERSIONS = {
    **dict.fromkeys(["--q-bits", "--q-group-size", "--drafter-q-bits", "--drafter-q-group-size"], NUMBERS),
    **dict.fromkeys(["--model", "--drafter", "--frequencies"], PLACES),
    "--draft-vocab": NUMBERS,
    "--q-mode": ["affine", "mxfp4", "nvfp4", "mxfp8", "x"],
    "--dtype": ["float16", "bfloat16", "float32", "x"],
    "--save-frequencies": [*PLACES, "c.json", "c.npz"],
    "--mlx-path": [*PLACES, "out"],
    "--revision": ["", "x"],
    "--upload-repo": ["me/it", "a b", ""],
}


@st.composite
def flags(draw):
    kind = draw(st.sampled_from(["number", "number", "text", "folder", "switch"]))
    if kind == "switch":
        return [draw(st.sampled_from(SWITCHES))]
    names, values = {"number": (NUMERIC, NUMBERS), "text": (TEXTUAL, TEXTS), "folder": (FOLDERS, PLACES)}[
        kind
    ]
    return [draw(st.sampled_from(names)), draw(st.sampled_from(values))]


@bounded(150)
@given(st.lists(flags(), max_size=3), st.sampled_from([b"", b" \n", b"hello", b"\xff\xfe", b"a" * 5000]))
def test_any_generate_command(made, given_flags, stdin):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        command = ["generate", "--model", "base", "--drafter", "drafter", "-m", "5", "--json"]
        outcome(*command, *[part for flag in given_flags for part in flag], stdin=stdin)


@bounded(80)
@given(st.data())
def test_any_convert_command(made, data):
    with spoilt(made) as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = data.draw(
            st.sampled_from(
                [["convert", "--model", "base"], ["convert", "--drafter", "drafter"], ["export"], []]
            )
        )
        for name in data.draw(st.lists(st.sampled_from(sorted(CONVERSIONS)), max_size=3)):
            command = [*command, name, data.draw(st.sampled_from(CONVERSIONS[name]))]
        command = [
            *command,
            *data.draw(st.lists(st.sampled_from(["-q", "-d", "--trust-remote-code"]), max_size=1)),
        ]
        outcome(*command)
