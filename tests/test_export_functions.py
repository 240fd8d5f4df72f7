"""Models exported as functions: programs without Python say what this package says."""

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from bundles import make_drafter, make_folder
from mlxfn_host import Host
from models import make_model
from test_memory import make_drafter as make_memory_drafter
from tiny import make_tiny

from mlx_redrafter.convert import functions
from mlx_redrafter.convert.base import convert_base
from mlx_redrafter.convert.mlxfn import export_functions, read_shape, usable_context
from mlx_redrafter.decoding.sampling import Sampling
from mlx_redrafter.decoding.state import PLAIN, DraftShape
from mlx_redrafter.loading.tokenizer import load_tokenizer
from mlx_redrafter.model import SpeculativeModel, load
from mlx_redrafter.text import stream_generate

CONTEXT = 300  # which takes two capacities
SHAPE, NAME = DraftShape(2, 3, 5, 4), "2x3+4@5"
SEED = (1 << 40) + 7
SETTINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(1.0),
    "filters": Sampling(1.2, top_p=0.9, top_k=40, min_p=0.01),
}
WAYS = [*SETTINGS]
CPP = Path(__file__).parents[1] / "examples/cpp"


def prompt_of(tokens, most=200):
    return random.Random(tokens).choices(range(5, most), k=tokens)


def said(model, tokenizer, prompt, limit, shape=SHAPE, way="greedy"):
    """What this package says."""
    options = {"shape": shape, "sampling": SETTINGS[way], "seed": SEED}
    return [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=limit, **options)]


def inputs(way):
    """The same settings as a step's inputs."""
    if way == "greedy":
        return []
    how = SETTINGS[way]
    found = [mx.array([SEED >> 32, SEED & 0xFFFFFFFF], mx.uint32), mx.array([how.temperature])]
    filters = [mx.array([how.top_p]), mx.array([how.top_k]), mx.array([how.min_p])]
    return found + filters if way == "filters" else found


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Which ``--device`` chooses for the process."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and a drafter, and where they are exported by the command."""
    from mlx_redrafter.commands.main import main

    folder = tmp_path_factory.mktemp("functions")
    base = make_folder(folder / "base", kind="random")
    drafter = make_drafter(folder / "drafter", base)
    words = ["--mlxfn", base, "--drafter", drafter, "--context", CONTEXT, "--shape", NAME, "--device", "cpu"]
    assert main(["export", *map(str, words), "--output", str(folder / "out")]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(made):
    return load(made / "base", drafter=made / "drafter")


@pytest.fixture(scope="module")
def host(made):
    return Host(made / "out")


@pytest.mark.parametrize("way", WAYS)
def test_functions_say_what_the_package_says(loaded, host, way):
    for size in (1, 34, 262):  # nothing to read, two chunks, more than the first capacity
        for name, shape in (("plain", PLAIN), (NAME, SHAPE)):
            expected = said(*loaded, prompt_of(size), 15, shape, way)
            assert host.generate(prompt_of(size), 15, f"{name}-{way}", *inputs(way))[0] == expected, (
                size,
                name,
            )


def test_drafts_are_accepted(tmp_path):
    """A drafter that knows what the model says is right in every step, from the first one on."""
    base = make_folder(tmp_path / "base")
    model, tokenizer = load(base, drafter=make_drafter(tmp_path / "drafter", base))
    export_functions(model, tokenizer, tmp_path / "out", [DraftShape(2, 3)], 64)
    found, steps = Host(tmp_path / "out").generate([5, 6, 7], 24, "2x3-greedy")
    assert found == said(model, tokenizer, [5, 6, 7], 24)
    assert steps == 24 / 4


def test_texts_end_where_the_context_does(loaded, host):
    prompt = prompt_of(CONTEXT - 10)
    found, _ = host.generate(prompt, 1000, f"{NAME}-greedy")
    assert 10 <= len(found) <= 10 + SHAPE.depth
    assert found == said(*loaded, prompt, len(found))


def test_quantized_weights_stay_as_they_are(made, tmp_path):
    convert_base(made / "base", tmp_path / "q", quantize=True, q_bits=4, q_group_size=32)
    model, tokenizer = load(tmp_path / "q", drafter=made / "drafter", dtype="stored")
    export_functions(model, tokenizer, tmp_path / "out", context=100)
    weights = mx.load(str(tmp_path / "out/weights.safetensors"))
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == mx.uint32
    host = Host(tmp_path / "out")
    for way in WAYS[:2]:
        expected = said(model, tokenizer, prompt_of(50), 20, SHAPE, way)
        assert host.generate(prompt_of(50), 20, f"{NAME}-{way}", *inputs(way))[0] == expected


@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": 30, "rare_tokens": 6}])
def test_rings_and_a_memory(monkeypatch, made, tmp_path, changes):
    """Windows' buffers go round, and the drafter's memory is that of every token that was read."""
    monkeypatch.setattr(functions, "CHUNKS", (8, 32))
    model = SpeculativeModel(make_model("gemma3"), make_memory_drafter(32, 101, **changes), 512)
    tokenizer, prompt = load_tokenizer(made / "base"), prompt_of(100, 90)
    export_functions(model, tokenizer, tmp_path / "out", [SHAPE], 200)
    host = Host(tmp_path / "out")
    expected = said(model, tokenizer, prompt, 30)
    assert host.generate(prompt, 30, f"{NAME}-greedy")[0] == expected
    target = model.prepare().target
    caches = target.make_cache()
    caches += target.make_memory(caches)
    target.forward(mx.array([prompt + expected[:20]]), caches)
    names = [each["name"] for each in host.told["state"]]
    for i, entries in enumerate((caches[-1].keys, caches[-1].values)):
        kept = host.state[names.index(f"layer.{len(target.windows) - 1}.{i}")]
        assert mx.allclose(kept[:, :, :120], entries[:, :, :120], atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_k3"])
def test_recurrent_layers_and_arrays_that_a_model_keeps(made, tmp_path, name):
    model = SpeculativeModel(make_tiny(name), None, 512)
    model(mx.array([[0]]))  # as when it is loaded: some compute arrays then that they keep
    tokenizer, prompt = load_tokenizer(made / "base"), prompt_of(40, 90)
    export_functions(model, tokenizer, tmp_path / "out", [DraftShape(0, 0, None, 3)], 100)
    expected = said(model, tokenizer, prompt, 30, DraftShape(0, 0, None, 3))
    assert Host(tmp_path / "out").generate(prompt, 30, "0x0+3-greedy")[0] == expected


def test_the_manifest_tells_what_is_there(made, loaded):
    told = json.loads((made / "out/manifest.json").read_text())
    files = {path.name for path in (made / "out").iterdir()} - {"manifest.json"}
    assert told["sha256"].keys() == files
    for name, digest in told["sha256"].items():
        assert hashlib.sha256((made / "out" / name).read_bytes()).hexdigest() == digest
    named = [file for each in told["functions"] for file in each["files"] if file]
    assert {*named, *told["tokenizer"], "weights.safetensors"} == files and len(set(named)) == len(named)
    assert (told["context"], told["device"], told["step"]) == (CONTEXT, "cpu", NAME)
    assert told["capacities"] == [256, 384]
    assert [each["name"] for each in told["functions"][:2]] == ["prefill-32", "prefill-256"]
    for each in (*told["state"], *(x for f in told["functions"] for x in (*f["inputs"], *f["outputs"]))):
        assert each["name"] and each["dtype"] and each["meaning"], each
    tokenizer = load_tokenizer(made / "out")
    assert tokenizer.encode("quick fox") == loaded[1].encode("quick fox")


def test_weights_are_stored_once(made):
    weights = mx.load(str(made / "out/weights.safetensors"))
    large = {name: np.array(x) for name, x in weights.items() if x.ndim > 1}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= large.keys()
    assert len({x.tobytes() for x in large.values()}) == len(large)
    for file in (made / "out").glob("*.mlxfn"):
        content = file.read_bytes()
        assert not any(x[0].tobytes() in content for x in large.values()), file


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The loop in C++, built against the installed MLX."""
    if not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))):
        pytest.skip("needs cmake and a C++ compiler")
    folder = tmp_path_factory.mktemp("cpp")
    root = Path(mx.__file__).parent
    for command in (["-S", CPP, "-B", folder, f"-DMLX_ROOT={root}"], ["--build", folder]):
        done = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "generate"


def test_the_loop_in_cpp_says_what_the_package_says(made, loaded, program):
    def call(*words):
        done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    how = SETTINGS["filters"]
    flags = {"temperature": ["--temperature", 1.0, "--seed", SEED], "greedy": []}
    flags["filters"] = ["--temperature", how.temperature, "--seed", SEED, "--top-p", how.top_p]
    flags["filters"] += ["--top-k", how.top_k, "--min-p", how.min_p]
    for size, way in ((1, "greedy"), (262, "greedy"), (34, "temperature"), (34, "filters")):
        prompt = prompt_of(size)
        code, out, told = call(made / "out", *prompt, "--max-tokens", 15, *flags[way])
        assert (code, [*map(int, out.split())]) == (0, said(*loaded, prompt, 15, SHAPE, way)), told
        assert "15 tokens in" in told and "tokens per step" in told
    for words, reason in (
        ([], "usage:"),
        ([made, 5], "manifest.json cannot be read"),
        ([made / "out", 5000], "no such token"),
        ([made / "out", *prompt_of(CONTEXT)], "longer than the context"),
        ([made / "out", 5, "--step", "4x4"], "no function 4x4-greedy"),
    ):
        code, out, told = call(*words)
        assert (code, out) == (2, "") and told.startswith("error: ") and reason in told
    assert sum(len(file.read_text().splitlines()) for file in CPP.iterdir() if file.suffix != ".md") <= 250


@pytest.mark.skipif(not mx.is_available(mx.Device(mx.gpu)), reason="needs a GPU")
def test_functions_for_a_gpu(tmp_path):
    mx.set_default_device(mx.gpu)
    try:
        test_drafts_are_accepted(tmp_path)
    finally:
        mx.set_default_device(mx.cpu)


# --- What cannot be exported --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (["--shape", "4*5"], "--shape '4*5' is not usable: give beam width x length, such as 2x3"),
        (["--shape", "0x4"], "beam width 0 does not fit beam length 4"),
        (["--shape", "2x2@9"], "9 tree nodes do not fit"),
        (["--shape", "1x1", "--shape", "1x2", "--shape", "1x3"], "3 draft shapes"),
        (["--shape", "2x2", "--drafter", "none"], "--shape 2x2 needs a drafter"),
        (["--context", "1"], "--context 1 is not usable"),
        (["--context", "5000"], "--context 5000 exceeds the model's context of 1024"),
        (["--output", "/"], "exists already"),
        (["--drafter", "/missing"], "/missing"),
    ],
)
def test_bad_flags(run, made, tmp_path, words, naming):
    command = [
        "export",
        "--mlxfn",
        made / "base",
        "--drafter",
        made / "drafter",
        "--output",
        tmp_path / "out",
    ]
    code, out, told = run(*command, *words)
    assert (code, out) == (2, "") and told.startswith("error: ") and naming in told, told
    assert not list(tmp_path.iterdir())


def test_flags_of_models_and_of_drafters(run, made, tmp_path):
    command = ("export", "--drafter", made / "drafter", "--output", tmp_path / "out")
    assert "--context is for models" in run(*command, "--context", "100")[2]
    assert "--drafter, or a model with --mlxfn" in run("export")[2]
    if not mx.is_available(mx.Device(mx.gpu)):
        told = run("export", "--mlxfn", made / "base", "--output", tmp_path / "out", "--device", "gpu")[2]
        assert told == "error: --device gpu: MLX has none here; export where it has.\n"


class Unwritable(nn.Module):
    """A layer of which MLX can write no graph."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) + mx.from_fp8(mx.to_fp8(x), x.dtype)


def test_a_model_that_cannot_be_exported_is_named(made, tmp_path):
    model = make_model()
    model.model.layers[0].mlp = Unwritable(model.model.layers[0].mlp)
    told = r"me/it \(model type llama\) cannot be exported: Unable to serialize primitive \w+\.$"
    with pytest.raises(ValueError, match=told):
        export_functions(
            SpeculativeModel(model, None), load_tokenizer(made / "base"), tmp_path / "out", name="me/it"
        )
    assert not list(tmp_path.iterdir())
    monkey = SpeculativeModel(make_model(), None)
    monkey.prepare = lambda: None
    monkey.refusal = "it cannot be rolled back"
    with pytest.raises(ValueError, match="me/it cannot be exported: it cannot be rolled back"):
        export_functions(monkey, load_tokenizer(made / "base"), tmp_path / "out", name="me/it")


def test_shapes_and_contexts_are_read():
    assert read_shape("4x5") == DraftShape(4, 5)
    assert read_shape(NAME) == SHAPE and functions.shape_word(SHAPE) == NAME
    assert read_shape("0x0+4") == DraftShape(0, 0, None, 4)
    assert (usable_context(None, None), usable_context(None, 512), usable_context(100, 512)) == (
        4096,
        512,
        100,
    )
