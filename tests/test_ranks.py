"""Several machines decode together: here ranks on one, over MLX's ring."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from bundles import make_drafter, make_folder
from mlx import nn
from models import make_model
from tiny import CONFIGS, make_tiny

from mlx_redrafter.loading.split import can_split, split
from mlx_redrafter.models.drafter import Drafter, DrafterConfig
from mlx_redrafter.models.save import write_drafter

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not mx.distributed.is_available("ring"), reason="ranks are forked, with a ring"
)


# Gated delta nets and attention in turns, which mlx-lm splits by layers only.
BY_LAYERS = {key: value for key, value in CONFIGS["qwen3_next"].items() if key != "vocab_size"}
BY_LAYERS["full_attention_interval"] = 2
READER = {"context_layers": (1, 4), "memory_heads": 2, "memory_head_size": 8}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What the hosts' programs remember: not where tests that run beside these keep theirs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def host(cache):
    """Does jobs (``ranks_host.py``)."""
    file = Path(__file__).with_name("ranks_host.py")
    env = os.environ | {"MLX_REDRAFTER_CACHE": str(cache)}
    with subprocess.Popen([sys.executable, file], stdin=-1, stdout=-1, text=True, env=env) as process:

        def do(**job):
            print(json.dumps(job), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield do
        process.stdin.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds models: ``cycle`` with its drafter, and others."""
    folder = tmp_path_factory.mktemp("models")
    make_drafter(folder / "drafter", make_folder(folder / "cycle"))
    make_folder(folder / "only")
    make_folder(folder / "second", kind="random", num_attention_heads=8)
    make_folder(folder / "nine", num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    make_folder(folder / "layers", kind="random", **BY_LAYERS)
    reader = DrafterConfig(128, vocabulary(folder / "layers"), 20, 1, True, **READER)
    write_drafter(folder / "reader", reader, Drafter(reader).weights())
    make_folder(folder / "six-layers", kind="random", **{**BY_LAYERS, "num_hidden_layers": 6})
    return folder


def vocabulary(folder):
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def words(model, *more):
    return ["generate", "--model", str(model), "--prompt", "one two", "--verbose", "False", *more]


def test_texts_that_come_and_go_say_what_each_says_alone_on_one_machine(host):
    """Four, with drafts of every kind, greedy and sampled; others that ask the host, one of which fails."""
    names = ["llama", "compiled", "quantized", "llama-mha", "qwen2", "qwen3", "qwen3_moe", "asked"]
    done = host(names=names, size=2)
    assert done["codes"] == [0, 0], done["err"]
    said, alone = json.loads(done["out"][0]), json.loads(host(names=names)["out"][0])
    for name in names:
        assert said[name] == alone[name], name
    assert [text[-1] == "enough" for text in said["asked"]] == [False, False, True, False]
    assert not done["out"][1]


@pytest.mark.parametrize("name", ["by-layers", "by-layers-compiled", "by-layers-asked", "lightning"])
def test_so_do_texts_of_models_that_are_split_by_layers(host, name):
    done = host(names=[name], size=2)
    assert done["codes"] == [0, 0], done["err"]
    assert json.loads(done["out"][0]) == json.loads(host(names=[name])["out"][0])
    assert not done["out"][1]


def test_drafters_read_outputs_of_layers_that_other_ranks_have(host):
    """The oracle here knows its place in the text by these alone, and drafts all of it."""
    done = host(names=["context"], size=2)
    assert done["codes"] == [0, 0], done["err"]
    (steps,) = json.loads(done["out"][0]).values()
    assert [steps] == [*json.loads(host(names=["context"])["out"][0]).values()]
    assert [step[-1] for step in steps] == [0, 3, 3, 3, 3, 3]


def test_drafters_with_a_memory_read_them_too(host, folder):
    given = words(folder / "layers", "--drafter", str(folder / "reader"), "--max-tokens", "20")
    given += ["--beam-width", "2", "--beam-length", "3", "--lookup", "2"]
    done = host(words=given, size=2)
    assert done["codes"] == [0, 0], done["err"]
    assert done["out"] == [*host(words=given)["out"], ""]


def test_what_one_rank_cannot_verify_none_does(host):
    """Nor does one wait for the other, which has no such layers, say."""
    done = host(names=["branchless"], size=2)
    assert done["codes"] == [0, 0], done["err"]
    assert json.loads(done["out"][0]) == json.loads(host(names=["branchless"])["out"][0])
    assert "trees: False" in done["err"][0] and "trees: False" in done["err"][1]


def test_ties_fall_as_on_rank_0_whatever_others_draft_and_pick(host):
    done = host(names=["tied"], size=2)
    assert done["codes"] == [0, 0], done["err"]
    texts = json.loads(done["out"][0])["tied"]
    assert texts == json.loads(host(names=["tied"])["out"][0])["tied"]
    assert all(token % 2 == 0 for text in texts[:3] for token in text)  # rank 0 takes the first


@pytest.mark.parametrize("more", [(), ("--temp", "1", "--seed", "3"), ("--no-draft",)])
def test_generate_says_what_it_says_on_one_machine(host, folder, more):
    given = words(folder / "cycle", "--drafter", str(folder / "drafter"), "--max-tokens", "20", *more)
    done = host(words=given, size=2)
    assert done["codes"] == [0, 0], done["err"]
    assert done["out"] == [*host(words=given)["out"], ""]


@pytest.mark.parametrize("more", [("--lookup", "3"), ("--no-draft",)])
def test_three_machines_share_six_layers(host, folder, more):
    given = words(folder / "six-layers", "--drafter", "none", "--max-tokens", "12", *more)
    done = host(words=given, size=3)
    assert done["codes"] == [0, 0, 0], done["err"]
    assert done["out"] == [*host(words=given)["out"], "", ""]


def test_two_machines_share_four_layers_and_three_cannot(host, folder):
    done = host(words=words(folder / "layers", "--drafter", "none"), size=3)
    assert done["codes"] == [2, 2, 2]
    for line in done["err"]:
        assert line.count("\n") == 1
        assert "4 layers, of which 3 machines cannot have some of every kind each: start 2." in line


def test_self_checks_are_remembered_if_all_know_them(host, folder, cache):
    """Where one rank has lost its note, all try it out again, together."""
    given = words(folder / "layers", "--drafter", "none", "--lookup", "0", "--max-tokens", "3")
    checks = cache / "self-checks"
    shutil.rmtree(checks, ignore_errors=True)
    for _ in range(2):
        assert host(words=given, size=2)["codes"] == [0, 0]
        notes = [json.loads(note.read_text()) for note in checks.iterdir()]
        ranks = [note["conditions"]["device"][-6:] for note in notes]
        assert sorted(ranks) == ["0 of 2", "1 of 2"]
        next(checks.iterdir()).unlink()


def test_three_machines_share_nine_heads_and_two_cannot(host, folder):
    given = words(folder / "nine", "--drafter", "none", "--lookup", "0", "--max-tokens", "6")
    assert host(words=given, size=3)["out"] == [*host(words=given)["out"], "", ""]
    done = host(words=given, size=2)
    assert done["codes"] == [2, 2]
    for line in done["err"]:
        assert line.count("\n") == 1
        assert "9 attention heads and 3 key heads, which 2 machines cannot share evenly: start 3." in line


def test_commands_of_one_machine_are_refused_by_name(host, folder):
    done = host(words=["chat", "--model", str(folder / "cycle")], size=2)
    assert done["codes"] == [2, 2]
    assert all("chat works on one machine only" in line for line in done["err"])
    given = words(folder / "cycle", "--draft-model", str(folder / "cycle"))
    assert "--draft-model works on one machine only" in host(words=given, size=2)["err"][1]


def test_models_that_cannot_be_split_are_refused_by_name():
    model, group = make_model("olmo2"), mx.distributed.init()
    with pytest.raises(ValueError, match="mine cannot be split: .* for olmo2 models. Run it on one machine"):
        split(model, group, "mine")


def test_other_weights_and_versions_end_all_with_one_line(host, folder, tmp_path):
    for name, size in (("a", 64), ("b", 128)):
        make_folder(tmp_path / name / "m", hidden_size=size)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    done = host(words=words("m", "--drafter", "none"), size=2, folders=folders)
    assert done["codes"] == [2, 2]
    assert all("rank 1 has another copy of m" in line and line.count("\n") == 1 for line in done["err"])
    done = host(words=words(folder / "cycle"), size=2, old=1)
    assert done["codes"] == [2, 2]
    assert all("another version of mlx (0.1)" in line and line.count("\n") == 1 for line in done["err"])


@pytest.mark.parametrize("name", ["cycle", "layers"])
def test_a_rank_that_dies_ends_all_within_seconds(host, folder, name):
    given = words(folder / name, "--drafter", "none", "--lookup", "0", "--max-tokens", "900")
    done = host(words=given, size=2, signal="SIGKILL", to=[1])
    assert done["codes"] == [2, -9]
    assert done["err"][0].splitlines()[-1].startswith("error: rank 1 has ended without a word")
    assert done["seconds"] < 10
    done = host(words=given, size=2, signal="SIGKILL", to=[0])
    assert done["codes"] == [-9, 2]
    assert done["seconds"] < 10


def test_an_interrupt_ends_all(host, folder):
    given = words(folder / "cycle", "--drafter", "none", "--lookup", "0", "--max-tokens", "900")
    done = host(words=given, size=2, signal="SIGINT", to=[0, 1])
    assert done["codes"] == [130, 130]
    assert "Interrupted." in done["err"][0]
    assert done["seconds"] < 10


@pytest.mark.parametrize(("name", "drafter"), [("cycle", "drafter"), ("layers", None)])
def test_a_server_says_what_it_says_on_one_machine(host, folder, tmp_path, name, drafter):
    """To several at once, whatever they ask for; with models that come and go; and ends when it is told."""
    drafter = str(folder / drafter) if drafter else "none"
    given = ["serve", "--model", name, "--drafter", drafter, "--port", "0"]
    given += ["--model-dir", ".", "--max-models", "1", "--prefill-step-size", "8"]
    folders = [str(folder), str(tmp_path)]
    for each in (name, "second", "nine"):
        (tmp_path / each).symlink_to(folder / each)
    done = host(words=given, size=2, client="answers", folders=folders)
    alone = host(words=given, client="answers", folders=folders)
    assert done["codes"] == [0, 0] and not done["err"][1], done["err"]
    *said, refused, missing, loaded = done["heard"]["said"]
    assert [*said, loaded] == [*alone["heard"]["said"][:5], alone["heard"]["said"][-1]]
    assert said[-1][1] > 0 and loaded[1] == 0  # known tokens
    assert missing == 503 and "server's log says why. rank 1: only" in done["err"][0]
    assert refused == 503 and "2 machines cannot share evenly: start 3." in done["err"][0]
    assert done["heard"]["healthy"] and done["heard"]["last"] == "length"


def test_clients_hear_of_a_rank_that_dies(host, folder):
    given = ["serve", "--model", str(folder / "second"), "--drafter", "none", "--port", "0"]
    done = host(words=given, size=2, client="death")
    assert done["codes"] == [2, -9]
    assert done["heard"]["error"]["message"] == "the server has lost a machine, and ends."
    assert "error: rank 1 has ended without a word" in done["err"][0]


def test_a_server_of_several_machines_keeps_no_texts_on_the_disk(host, folder, tmp_path):
    done = host(words=["serve", "--prompt-cache-dir", str(tmp_path)], size=2)
    assert done["codes"] == [2, 2]
    assert all("--prompt-cache-dir works on one machine only" in line for line in done["err"])


def test_a_model_is_split_if_heads_and_weights_can_be_shared_evenly():
    model = make_model("llama")  # of 4 heads, 2 key heads, and 48 columns inside
    assert [n for n in range(2, 9) if can_split(model, n)] == [2]
    assert model.layers[0].self_attn.n_heads == 4  # nothing was changed
    model = make_model("llama", hidden_size=128, intermediate_size=96)
    nn.quantize(model, 32, 4)  # of which half a layer's inputs would be one and a half groups
    assert not any(can_split(model, n) for n in range(2, 9))


def test_a_model_is_split_by_layers_if_all_get_some_of_every_kind():
    model = make_tiny("qwen3_next", full_attention_interval=2, num_hidden_layers=8)
    assert [n for n in range(2, 9) if can_split(model, n)] == [2, 3, 4]
    assert len(model.layers) == 8 and None not in model.model.layers  # nothing was changed
    model = make_tiny("qwen3_next")  # of whose four layers one has attention
    assert not any(can_split(model, n) for n in range(2, 9))
    assert [n for n in range(2, 9) if can_split(make_tiny("bailing_hybrid"), n)] == [2]


@pytest.mark.skipif("CI" not in os.environ, reason="two processes import everything")
def test_mlx_launch_starts_it(folder, host):
    given = words(folder / "cycle", "--drafter", str(folder / "drafter"), "--max-tokens", "8")
    launch = [Path(sys.executable).with_name(name) for name in ("mlx.launch", "mlx-redrafter")]
    started = [launch[0], "-n", "2", "--backend", "ring", "--", launch[1], *given]
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)  # an end of its input would keep it busy
    with subprocess.Popen(started, **pipes) as launcher:
        assert launcher.stdout.read().decode() == host(words=given)["out"][0]
        launcher.stdin.close()
    assert launcher.returncode == 0
