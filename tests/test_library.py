"""What models are on a machine, in the folders that people have; whatever is in these folders."""

import json
import math
import os
import shutil
from pathlib import Path

import gguf
import mlx.core as mx
import mlx_lm
import pytest
from bundles import make_drafter, make_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf import write_model

from mlx_redrafter.blas import packaged
from mlx_redrafter.decoding.state import PLAIN
from mlx_redrafter.engine import stopwatch
from mlx_redrafter.engine.policy import StepTimes
from mlx_redrafter.engine.step_times import keep
from mlx_redrafter.loading.find import DEFAULT_MODEL, PACKAGED
from mlx_redrafter.loading.library import find, library
from mlx_redrafter.model import load

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of models, not to be changed."""
    root = tmp_path_factory.mktemp("made")
    make_folder(root / "base", kind="random")
    make_drafter(root / "drafter", root / "base")
    write_model(root / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    return root


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """The folder of Hugging Face's cache, which is missing; and no models of LM Studio's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def write(folder: Path, config=CONFIG, name="model.safetensors", **tensors) -> Path:
    """A folder of a model of a few numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / name), tensors or {"w.weight": mx.zeros((4, 6), mx.bfloat16)})
    return folder


def add_to_hub(hub: Path, repo: str, revision: str = "a" * 40, main: bool = True) -> Path:
    """The folder of a repository's revision, as huggingface_hub would have downloaded it."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    if main:
        (folder / "refs" / "main").write_text(revision)
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    return snapshot


def blobs_of(snapshot: Path) -> None:
    """Let the files of a snapshot be links to blobs."""
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = snapshot.parents[1] / "blobs" / f"{number:064x}"
        file.rename(blob)
        file.symlink_to(blob)


def names(*folders):
    return [entry.name for entry in library(folders)]


def test_nothing_is_there(tmp_path):
    assert library() == library([tmp_path / "missing"]) == []
    assert find("a", [tmp_path]) is None


# --- Folders -----------------------------------------------------------------------------------------


def test_a_folder_of_models(tmp_path, made):
    shutil.copytree(made / "base", tmp_path / "models" / "someone" / "base")
    shutil.copytree(made / "base", tmp_path / "models" / "mine")
    shutil.copytree(made / "base", tmp_path / "models" / "much" / "too" / "deep")
    shutil.copytree(made / "base", tmp_path / "models" / ".hidden")
    assert names(tmp_path / "models") == ["mine", "someone/base"]
    entry = find("someone/base", [tmp_path / "models"])
    assert entry.path == tmp_path / "models" / "someone" / "base"
    assert (entry.format, entry.architecture, entry.precision) == ("safetensors", "llama", "float32")
    assert entry.bytes == (entry.path / "model.safetensors").stat().st_size
    weights = mx.load(str(entry.path / "model.safetensors"))
    assert entry.parameters == sum(weight.size for weight in weights.values())
    assert entry.supported
    assert not entry.is_drafter
    assert entry.problem == ""


def test_a_folder_that_is_a_model_itself_or_is_given_twice(made, tmp_path):
    assert names(made / "base") == ["base"]
    (tmp_path / "link").symlink_to(made / "base")
    assert names(made / "base", tmp_path, made / "base") == ["base"]


def test_quantized_models_have_the_parameters_of_those_they_were_made_of(made, tmp_path):
    mlx_lm.convert(str(made / "base"), str(tmp_path / "quantized"), quantize=True, q_bits=4, q_group_size=32)
    [entry] = library([tmp_path])
    [original] = library([made / "base"])
    assert (entry.precision, entry.parameters) == ("4-bit", original.parameters)
    assert entry.bytes < original.bytes


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mxfp4"),
        ({"quantization": {"bits": 3, "group_size": 64, "mode": "affine"}}, "3-bit"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization": ["?"]}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_precision(tmp_path, quantization, precision):
    write(tmp_path / "m", {**CONFIG, **quantization})
    assert [entry.precision for entry in library([tmp_path])] == [precision]


def test_drafters_are_told_from_models(made):
    drafter = next(entry for entry in library([made]) if entry.name == "drafter")
    assert drafter.is_drafter
    assert find("drafter", [made]) is None


@pytest.mark.parametrize("model_type", ["nemotron-nas", "phi-msft", "llama", "mistral"])
def test_architectures_of_mlx_lm(tmp_path, model_type):
    write(tmp_path / "m", {"model_type": model_type})
    assert [entry.supported for entry in library([tmp_path])] == [True]


def test_what_is_no_language_model_is_left_out(tmp_path):
    write(tmp_path / "images", {"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    write(tmp_path / "part", {"_class_name": "UNet"})
    (tmp_path / "empty").mkdir()
    write(tmp_path / "adapter").joinpath("config.json").unlink()
    write(tmp_path / "unknown", {"model_type": "of_tomorrow", "architectures": ["NewForCausalLM"]})
    assert [(entry.name, entry.supported) for entry in library([tmp_path])] == [("unknown", False)]


# --- GGUF --------------------------------------------------------------------------------------------


def test_a_gguf_file(made):
    entry = find("m.gguf", [made])
    assert entry == find("m", [made])
    assert (entry.path, entry.format, entry.architecture) == (made / "m.gguf", "gguf", "llama")
    assert (entry.precision, entry.supported, entry.bytes) == ("Q8_0", True, (made / "m.gguf").stat().st_size)
    weights = write_model(made.parent / "same.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    assert entry.parameters == sum(value.size for value in weights.values())


def test_the_type_of_a_gguf_file_is_what_it_says(tmp_path):
    kind = gguf.LlamaFileType.MOSTLY_Q4_K_M
    write_model(tmp_path / "m.gguf", change=lambda writer: writer.add_file_type(kind))
    assert [entry.precision for entry in library([tmp_path])] == ["Q4_K_M"]


def test_names_of_gguf_files(tmp_path, made):
    one, two = tmp_path / "someone" / "one", tmp_path / "someone" / "two"
    for path in (one / "m-Q8.gguf", one / "mmproj-m.gguf", two / "m-Q8.gguf", two / "m-Q4.GGUF"):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "m.gguf", path)
    assert names(tmp_path) == ["someone/one", "someone/two/m-Q4.GGUF", "someone/two/m-Q8.gguf"]
    assert find("m-Q4.gguf", [tmp_path]).path == two / "m-Q4.GGUF"


def write_split(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=1)
    for name in "ab":
        writer.add_tensor(name, mx.zeros((4, 32)).__array__())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def test_a_split_gguf_file_counts_once(tmp_path):
    parts = write_split(tmp_path / "split")
    assert len(parts) == 2
    [entry] = library([tmp_path])
    assert (entry.name, entry.path, entry.problem) == ("split", parts[0], "")
    assert entry.parameters == 2 * 4 * 32
    assert entry.bytes == sum(part.stat().st_size for part in parts)
    parts[0].unlink()
    [entry] = library([tmp_path])
    assert (entry.name, entry.path) == ("split", parts[1])
    assert parts[0].name in entry.problem


# --- Hugging Face's cache and LM Studio's ------------------------------------------------------------


def test_the_hub_s_cache(hub, made):
    shutil.copytree(made / "base", add_to_hub(hub, "someone/model"), dirs_exist_ok=True)
    blobs_of(hub / "models--someone--model" / "snapshots" / ("a" * 40))
    shutil.copytree(made / "drafter", add_to_hub(hub, "someone/drafter"), dirs_exist_ok=True)
    add_to_hub(hub, "someone/half-downloaded")
    (add_to_hub(hub, "someone/config-only") / "config.json").write_text(json.dumps(CONFIG))
    (hub / "models--damaged").mkdir()
    assert [(entry.name, entry.is_drafter) for entry in library()] == [
        ("someone/drafter", True),
        ("someone/model", False),
    ]
    assert find("model").path.name == "a" * 40
    assert find("model").bytes == (made / "base" / "model.safetensors").stat().st_size


def test_of_a_repository_s_revisions_main_counts(hub):
    write(add_to_hub(hub, "someone/m", "a" * 40), {"model_type": "llama"})
    write(add_to_hub(hub, "someone/m", "b" * 40, main=False), {"model_type": "qwen3"})
    assert [entry.architecture for entry in library()] == ["llama"]


def test_several_gguf_files_of_a_repository(hub, made):
    snapshot = add_to_hub(hub, "someone/m-GGUF")
    shutil.copy(made / "m.gguf", snapshot / "m-Q8.gguf")
    write_split(snapshot / "BF16")
    assert names() == ["someone/m-GGUF", "someone/m-GGUF/BF16"]


def test_lm_studio_s_folders(tmp_path):
    write(tmp_path / "home" / ".lmstudio" / "models" / "someone" / "new")
    write(tmp_path / "home" / ".cache" / "lm-studio" / "models" / "someone" / "old")
    assert names() == ["someone/new", "someone/old"]


# --- Names -------------------------------------------------------------------------------------------


def test_a_name_finds_what_it_names(tmp_path):
    for name in ("a/Model", "a/other", "b/other", "b/Case", "c/case", "d/CASE"):
        write(tmp_path / name)

    def found(name):
        entry = find(name, [tmp_path])
        return entry and entry.name

    assert found("a/Model") == found("Model") == found("model") == found("A/MODEL") == "a/Model"
    assert found("other") is None  # it could be either
    assert found("b/other") == "b/other"
    assert found("case") == "c/case"
    assert found("cAse") is None


def test_of_models_of_one_name_that_of_the_given_folder_is_taken(tmp_path, hub):
    write(add_to_hub(hub, "someone/m"))
    write(tmp_path / "mine" / "someone" / "m")
    assert find("someone/m", [tmp_path / "mine"]).path == tmp_path / "mine" / "someone" / "m"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "../m", "m/../m", "./m", "m/", "m\0", "\0", "a" * 100_000, "~", "*", "\ud800"],
)
def test_hostile_names_find_nothing(tmp_path, name):
    write(tmp_path / "models" / "m")
    write(tmp_path / "m")
    assert find(name, [tmp_path / "models"]) is None
    assert find(str(tmp_path / "m"), [tmp_path / "models"]) is None


# --- Damaged files -----------------------------------------------------------------------------------


def problem(root) -> str:
    [entry] = library([root])
    return entry.problem


def test_damaged_models_are_listed_with_the_reason(tmp_path):
    folder = write(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert problem(tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    assert problem(tmp_path)
    (folder / "model.safetensors").write_bytes(whole)
    assert problem(tmp_path) == ""
    (folder / "config.json").write_text("{")
    assert "config.json" in problem(tmp_path)
    (folder / "config.json").write_text("[]")
    assert "config.json" in problem(tmp_path)


def test_missing_shards_are_told_of(tmp_path):
    write(tmp_path / "m", name="model-00001-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors" in problem(tmp_path)
    index = {"weight_map": {"w.weight": "model-00001-of-00002.safetensors", "v": "model-other.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-other.safetensors" in problem(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for folder in ("a", "b", "c"):
        write(tmp_path / folder)
    (tmp_path / "a" / "config.json").unlink()
    os.mkfifo(tmp_path / "a" / "config.json")
    os.mkfifo(tmp_path / "b" / "model.safetensors.index.json")
    (tmp_path / "c" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "c" / "model.safetensors")
    os.mkfifo(tmp_path / "d.gguf")
    assert names(tmp_path) == ["b"]


def test_huge_files_are_not_read(tmp_path):
    with (write(tmp_path / "m") / "model.safetensors.index.json").open("wb") as file:
        file.truncate(1 << 40)
    with (tmp_path / "n.gguf").open("wb") as file:
        file.write(b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + b"\xff" * 8)
        file.truncate(1 << 40)
    assert all(entry.problem for entry in library([tmp_path]))
    assert names(tmp_path) == ["m", "n.gguf"]


class Originals:
    """The files of a tiny model of each format, and a folder for others."""

    def __init__(self, root: Path, *files: Path) -> None:
        self.root = root
        self.contents = [file.read_bytes() for file in files]

    def __repr__(self) -> str:
        return "originals"


@pytest.fixture(scope="module")
def originals(tmp_path_factory, made):
    folder, root = write(tmp_path_factory.mktemp("original")), tmp_path_factory.mktemp("damaged")
    (root / "m").mkdir()
    return Originals(root, folder / "config.json", folder / "model.safetensors", made / "m.gguf")


PIECES = st.one_of(st.binary(max_size=9), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"[" * 2000]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 2), changes=st.lists(st.tuples(st.integers(0, 999), PIECES), min_size=1))
def test_no_damage_stops_the_list(originals, which, changes):
    files = list(originals.contents)
    for place, piece in changes:
        start = place % len(files[which])
        files[which] = files[which][:start] + piece + files[which][start + 8 :]
    for name, content in zip(("m/config.json", "m/model.safetensors", "n.gguf"), files, strict=True):
        (originals.root / name).write_bytes(content)
    for entry in library([originals.root]):
        assert entry.problem or (entry.architecture and entry.parameters >= 0)
        assert len(entry.problem) <= 1100
    assert which == 2 or find("n", [originals.root]).problem == ""


# --- mlx-redrafter models ----------------------------------------------------------------------------


@pytest.fixture
def models(run):
    """The rows of ``mlx-redrafter models --json``, by name."""

    def call(*folders):
        flags = [flag for folder in folders for flag in ("--model-dir", folder)]
        code, out, err = run("models", "--json", *flags)
        assert (code, err) == (0, "")
        return {row["name"]: row for row in json.loads(out)["models"]}

    return call


def test_a_machine_without_models_gets_a_hint(run):
    code, out, err = run("models")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    assert "generate --model" in out


def test_a_folder_that_is_missing_is_refused(run, tmp_path):
    code, out, err = run("models", "--model-dir", tmp_path / "missing")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "missing" in err


def test_the_table(run, made, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))  # other tests may have tuned such a model
    write(add_to_hub(hub, "someone/strange\x1b[2J"), {"model_type": "x", "architectures": ["XForCausalLM"]})
    code, out, err = run("models", "--model-dir", made)
    assert (code, err) == (0, "")
    head, base, gguf, strange, _, note = out.splitlines()
    assert head.split()[:2] == ["model", "architecture"]
    assert base.split()[:2] == ["base", "llama"]
    assert base.split()[-3:] == ["trees", "drafter", "-"]
    assert gguf.split()[-5:] == ["Q8_0", "when", "loaded", "-", "-"]
    assert strange.startswith("someone/strange")
    assert "no code for x" in note
    assert "\x1b" not in out


def test_what_can_be_drafted_for(models, made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "whole")
    shutil.copytree(made / "base", tmp_path / "torn")
    weights = (tmp_path / "torn" / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(weights[:-9])
    write(tmp_path / "misfit", {"model_type": "llama", "hidden_size": "many"})
    write(tmp_path / "code", {"model_type": "llama", "model_file": "model.py"})
    rows = models(tmp_path)
    assert {name: row["drafts"] for name, row in rows.items()} == {
        "whole": "trees",
        "torn": "none",
        "misfit": "none",
        "code": "none",
    }
    assert rows["whole"]["reason"] == ""
    assert "trust-remote-code" in rows["code"]["reason"]
    assert rows["whole"]["drafter"] is None  # its drafter is in another folder


def test_models_that_cannot_be_rolled_back_are_decoded_plainly(models, tmp_path):
    from tiny import make_tiny

    model = make_tiny("deepseek_v41")
    folder = tmp_path / "m"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(mlx_flatten(model)))
    config = {**vars(model.args), "model_type": "deepseek_v41"}
    (folder / "config.json").write_text(json.dumps(config, default=vars))
    row = models(tmp_path)["m"]
    assert row["drafts"] == "plain"
    assert "rolled back" in row["reason"]


def mlx_flatten(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_the_drafter_of_a_model_is_found_in_any_precision(models, made, tmp_path):
    mlx_lm.convert(str(made / "base"), str(tmp_path / "q"), quantize=True, q_bits=8, q_group_size=32)
    shutil.copytree(made / "drafter", tmp_path / "its-drafter")
    make_drafter(tmp_path / "another", make_folder(tmp_path / "unlike"))
    rows = models(tmp_path)
    assert {name: row["drafter"] for name, row in rows.items()} == {"q": "its-drafter", "unlike": "another"}


def test_the_drafter_that_ships_is_found_for_a_gguf_file(models):
    path = Path(packaged(*PACKAGED[DEFAULT_MODEL])[0])
    assert models(path.parent)[path.name]["drafter"] == "smollm2-135m-instruct"


def test_a_tuned_model_says_so(models, made, run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made / "base", tmp_path / "models" / "base")
    make_folder(tmp_path / "models" / "other", kind="random", hidden_size=128)
    assert {row["tuned"] for row in models(tmp_path / "models").values()} == {False}
    model, _ = load(tmp_path / "models" / "base", drafter=None)
    assert keep(model.prepare(), [PLAIN], StepTimes([0.1], [0.0]))
    rows = models(tmp_path / "models")
    assert {name: row["tuned"] for name, row in rows.items()} == {"base": True, "other": False}


def test_the_speed_up_that_tune_has_measured_is_shown(models, made, run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stopwatch, "STEADY", math.inf)  # whatever else runs meanwhile
    monkeypatch.setattr(stopwatch, "BUSY", math.inf)
    shutil.copytree(made / "base", tmp_path / "models" / "base")
    flags = ("--model", tmp_path / "models" / "base", "--drafter", "none", "--seconds", 0.2, "--json")
    assert run("tune", *flags, "--tokens", 0)[0] == 0  # no token decoded: nothing is known of drafts
    row = models(tmp_path / "models")["base"]
    assert row["tuned"] and row["speedup"] is None
    assert " tuned" in run("models", "--model-dir", tmp_path / "models")[1]
    speedups = []
    for drafter in ("none", made / "drafter"):
        code, out, _ = run("tune", *flags, "--drafter", drafter, "--tokens", 20)
        assert code == 0
        speedups.append(json.loads(out)["chosen"]["speedup"])
    assert models(tmp_path / "models")["base"]["speedup"] == max(speedups) > 0
    assert f" {max(speedups):.2f} x" in run("models", "--model-dir", tmp_path / "models")[1]
