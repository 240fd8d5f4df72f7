"""The on-disk format: what is written is read back, and nothing damaged or foreign gets in."""

import json
import pickle
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_redrafter.loading import find
from mlx_redrafter.loading.find import drafter_folder, find_drafter
from mlx_redrafter.models import bundle
from mlx_redrafter.models.bundle import load_drafter
from mlx_redrafter.models.drafter import Drafter, DrafterConfig, Quantization
from mlx_redrafter.models.identity import digest_rows, embedding_digest, identity_of
from mlx_redrafter.models.save import write_drafter

CONFIG = DrafterConfig(hidden_size=32, vocab_size=50, exit_dim=32, num_draft_layers=1, rnn=True)
TRIMMED = DrafterConfig(hidden_size=32, vocab_size=50, exit_dim=32, num_draft_layers=1, draft_vocab_size=4)


class Base(nn.Module):
    """What of an mlx-lm model an identity is made from."""

    model_type = "tiny"

    def __init__(self, seed=0, vocab=50, hidden=32, dtype=mx.float32):
        super().__init__()
        self.wpe = nn.Embedding(vocab + 9, hidden)  # more rows, but not the tokens'
        self.embed_tokens = nn.Embedding(vocab, hidden)
        rows = np.random.RandomState(seed).randn(vocab, hidden)
        self.embed_tokens.weight = mx.array(rows, dtype)


def identity(seed=0, **sizes):
    return identity_of(Base(seed, **sizes), f"tiny-{seed}")


def weights_of(config=CONFIG):
    mx.random.seed(0)
    return Drafter(config, config.draft_vocab_size and mx.array([2, 3, 5, 7], mx.int32)).weights()


def apple_folder(folder, config=CONFIG, weights=None, **raw):
    """A checkpoint in Apple's layout, no bundle."""
    folder.mkdir(exist_ok=True)
    config_json = {"model_type": bundle.MODEL_TYPE, **config.to_dict(), **raw}
    (folder / "config.json").write_text(json.dumps(config_json))
    mx.save_safetensors(str(folder / "model.safetensors"), weights or weights_of(config))
    return folder


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and mx.array_equal(left[name], right[name]).item()
        for name in left
    )


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        TRIMMED,
        DrafterConfig(32, 50, 64, 0, context_layers=(1, 2)),
        DrafterConfig(32, 50, 64, 2, True, 4, quantization=Quantization(4, 32)),
        DrafterConfig(32, 50, 96, 1, True, memory_heads=2, memory_head_size=16, memory_window=9),
        DrafterConfig(32, 50, 96, 1, True, quantization=Quantization(8, 32), memory_heads=3),
    ],
)
def test_round_trip(tmp_path, config):
    write_drafter(tmp_path / "new" / "bundle", config, weights_of(config), identity(), {"note": 1}, "# card")
    drafter = load_drafter(tmp_path / "new" / "bundle", identity())
    assert drafter.config == config
    assert same(drafter.weights(), weights_of(config))
    assert json.loads((tmp_path / "new/bundle/config.json").read_text())["mlx_redrafter"]["note"] == 1
    assert (tmp_path / "new/bundle/README.md").read_text() == "# card"


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, None])
def test_stored_bits_are_floats_once_loaded(tmp_path, dtype):
    config = DrafterConfig(64, 50, 192, 1, True, 4, memory_heads=2)
    weights = {
        name: x if x.dtype == mx.int32 else x.astype(mx.bfloat16) for name, x in weights_of(config).items()
    }
    for bits, name in ((None, "whole"), (8, "bundle")):
        stored = bits and Quantization(bits)
        write_drafter(tmp_path / name, config, weights, identity(hidden=64), stored=stored)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "bundle")]
    assert 0.5 < sizes[1] / sizes[0] < 0.6
    drafter = load_drafter(tmp_path / "bundle", identity(hidden=64), dtype)
    assert drafter.config == config
    found = drafter.weights()
    assert found.keys() == weights.keys()
    for name, wanted in weights.items():
        assert found[name].dtype == (mx.int32 if name == "draft_to_target" else dtype or mx.bfloat16)
        if name.endswith("weight") and wanted.ndim == 2:
            parts = [part.astype(mx.float32) for part in mx.quantize(wanted, 64, 8)[1:]]
            exact = mx.dequantize(mx.quantize(wanted, 64, 8)[0], *parts, 64, 8)
            assert mx.array_equal(found[name], exact.astype(found[name].dtype)).item()
        else:
            assert mx.array_equal(found[name], wanted).item()


@pytest.mark.parametrize(
    "stored", [8, [8], {"bits": 7}, {"bits": 8.0}, {"bits": True}, {"group_size": 64}, {"bits": 8, "more": 1}]
)
def test_a_bad_stored_form_is_refused(tmp_path, stored):
    write_drafter(tmp_path / "bundle", CONFIG, weights_of(), extra={"stored": stored})
    with pytest.raises(ValueError, match=r"config.json: 'stored' is .*: convert the drafter again"):
        load_drafter(tmp_path / "bundle")


def test_a_stored_form_that_is_not_there_is_refused(tmp_path):
    config = DrafterConfig(64, 50, 192, 1)
    write_drafter(tmp_path / "floats", config, weights_of(config), extra={"stored": {"bits": 8}})
    with pytest.raises(ValueError, match="asks for"):
        load_drafter(tmp_path / "floats")
    quantized = DrafterConfig(64, 50, 192, 1, quantization=Quantization(8))
    with pytest.raises(ValueError, match="quantized already"):
        write_drafter(tmp_path / "twice", quantized, weights_of(quantized), stored=Quantization(8))
    write_drafter(tmp_path / "both", quantized, weights_of(quantized), extra={"stored": {"bits": 8}})
    with pytest.raises(ValueError, match="in memory too"):
        load_drafter(tmp_path / "both")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_floats_are_cast(tmp_path, dtype):
    config = DrafterConfig(32, 50, 64, 1, True, 4, quantization=Quantization(4, 32))
    write_drafter(tmp_path / "bundle", config, weights_of(config))
    weights = load_drafter(tmp_path / "bundle", dtype=dtype).weights()
    assert weights["lm_head.0.linear.bias"].dtype == weights["lm_head.1.scales"].dtype == dtype
    assert (weights["lm_head.1.weight"].dtype, weights["draft_to_target"].dtype) == (mx.uint32, mx.int32)


def test_values_that_overflow_the_dtype_are_refused(tmp_path):
    weights = {**weights_of(), "rnn_u.bias": mx.full((32,), 1e6)}
    write_drafter(tmp_path / "bundle", CONFIG, weights)
    with pytest.raises(ValueError, match="rnn_u.bias holds NaN or infinity in float16"):
        load_drafter(tmp_path / "bundle", dtype=mx.float16)


@pytest.mark.parametrize("prefix", ["lm_head.", "lm_heads.", "0."])
@pytest.mark.parametrize("projection", ["input_proj.", "input_projs."])
@pytest.mark.parametrize("sharded", [False, True])
def test_apples_layout_under_every_name(tmp_path, prefix, projection, sharded):
    weights = {
        name.replace("lm_head.", prefix, 1).replace("input_proj.", projection): value
        for name, value in weights_of().items()
    }
    folder = apple_folder(tmp_path / "apple", weights={**weights, "emb_norm.weight": mx.ones(32)})
    if sharded:
        shard(folder)
    assert same(load_drafter(folder, identity()).weights(), weights_of())


def shard(folder):
    weights = sorted(mx.load(str(folder / "model.safetensors")).items())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    mx.save_safetensors(str(folder / names[0]), dict(weights[:3]))
    mx.save_safetensors(str(folder / names[1]), dict(weights[3:]))
    (folder / "model.safetensors").unlink()
    index = {name: names[place >= 3] for place, (name, _) in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def edit(**changes):
    def damage(folder):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, **changes}))

    return damage


def replaced(**tensors):
    def damage(folder):
        weights = {**mx.load(str(folder / "model.safetensors"))}
        for name, value in tensors.items():
            name = name.replace("__", ".")
            weights.pop(name, None) if value is None else weights.update({name: value})
        (folder / "model.safetensors").unlink()
        mx.save_safetensors(str(folder / "model.safetensors"), weights)

    return damage


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def removed(name):
    return lambda folder: (folder / name).unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def outside_shard(folder):
    shard(folder)
    weight_map = {"weight_map": {"rnn_u.bias": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))


DAMAGE = [
    (removed("config.json"), "no config.json"),
    (removed("model.safetensors"), "no model.safetensors"),
    (written("config.json", b"{"), "not valid JSON"),
    (written("config.json", b"\xff\xfe"), "not valid JSON"),
    (written("config.json", b"[]"), "holds a list, not an object"),
    (edit(model_type="llama"), "model_type 'llama'"),
    (edit(mlx_redrafter={"format": 2}), "update mlx-redrafter"),
    (edit(mlx_redrafter={"base": {"model_type": "llama"}}), "damaged base"),
    (edit(mlx_redrafter={"base": {**asdict(identity()), "embedding_digest": "xyz"}}), "'xyz'"),
    (edit(hidden_size=0), "config.json: hidden_size is 0"),
    (edit(exit_dim=10**12), r"lacks|has shape \[32, 64\].*\[1000000000000, 64\]"),
    (edit(num_draft_layers=2), r"lm_head.1.linear.weight \[32, 32\]"),
    (edit(num_draft_layers=0), r"lm_head.0.weight \[50, 32\]"),
    (edit(rnn=False), "no drafter of its config.json has: rnn_u.bias"),
    (replaced(rnn_u__bias=None), r"lacks the tensor rnn_u.bias \[32\]"),
    (replaced(rnn_u__bias=mx.zeros((31,))), r"rnn_u.bias has shape \[31\].* \[32\]"),
    (replaced(rnn_u__bias=mx.zeros((32,), mx.int32)), "rnn_u.bias is int32"),
    (replaced(rnn_u__bias=mx.full((32,), float("nan"))), "rnn_u.bias holds NaN"),
    (replaced(rnn_w__weight=mx.full((32, 32), float("inf"))), "rnn_w.weight holds NaN or inf"),
    (replaced(stranger=mx.zeros((1,))), "stranger"),
    (replaced(lm_heads__1__weight=mx.zeros((50, 32))), "second time"),
    (replaced(draft_to_target=mx.arange(50)), "draft_to_target"),
    (written("model.safetensors", b"not safetensors"), "damaged"),
    (written("model.safetensors", b""), "damaged"),
    (truncated, "damaged"),
    (pickled, "pickle.*safetensors.torch.save_file"),
    (missing_shard, "model-00002-of-00002.safetensors is missing"),
    (outside_shard, "elsewhere"),
    (written("model.safetensors.index.json", b"[]"), "index.json holds a list, not an object"),
]


@pytest.mark.parametrize(("damage", "complaint"), DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path, damage, complaint):
    folder = apple_folder(tmp_path / "apple")
    damage(folder)
    with pytest.raises(ValueError, match=complaint) as refusal:
        load_drafter(folder, identity())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (mx.array([2, 3, 5, 50], mx.int32), "outside"),
        (mx.array([-1, 3, 5, 7], mx.int32), "outside"),
        (mx.array([2, 3, 3, 7], mx.int32), "twice"),
        (mx.array([2, 3, 5], mx.int32), r"shape \[3\].*\[4\]"),
        (mx.array([2, 3, 5, 7], mx.int64), "int64"),
        (None, "lacks the tensor draft_to_target"),
    ],
)
def test_bad_draft_vocabularies_are_refused(tmp_path, ids, complaint):
    folder = apple_folder(tmp_path / "apple", TRIMMED)
    replaced(draft_to_target=ids)(folder)
    with pytest.raises(ValueError, match=complaint):
        load_drafter(folder)


def test_a_draft_vocabulary_beyond_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="draft_vocab_size is 51"):
        load_drafter(apple_folder(tmp_path / "apple", TRIMMED, draft_vocab_size=51))


def test_another_base_is_refused_by_name(tmp_path):
    write_drafter(tmp_path / "bundle", CONFIG, weights_of(), identity(0))
    with pytest.raises(ValueError, match="for tiny-0 .*, not for tiny-1 "):
        load_drafter(tmp_path / "bundle", identity(1))


@pytest.mark.parametrize("sizes", [{"hidden": 64}, {"vocab": 60}])
def test_without_a_recorded_base_sizes_count(tmp_path, sizes):
    folder = apple_folder(tmp_path / "apple")
    load_drafter(folder, identity(1))
    with pytest.raises(ValueError, match="for hidden size 32 and vocabulary 50, not for tiny-1 "):
        load_drafter(folder, identity(1, **sizes))


@pytest.mark.parametrize("hidden", [32, 576])
def test_a_model_is_recognised_in_every_precision(hidden):
    reference = identity(3, vocab=500, hidden=hidden)
    for dtype in (mx.float16, mx.bfloat16):
        assert identity(3, vocab=500, hidden=hidden, dtype=dtype).matches(reference)
    for bits in (8, 6, 4, 3):
        model = Base(3, 500, hidden)
        nn.quantize(model, 32, bits)
        assert identity_of(model).matches(reference), bits


def test_other_models_differ_in_half_the_bits():
    digests = [int(embedding_digest(np.random.RandomState(seed).randn(64, 96)), 16) for seed in range(20)]
    shares = [(a ^ b).bit_count() / 256 for a in digests for b in digests if a != b]
    assert min(shares) > 0.35 and max(shares) < 0.65


def test_a_common_direction_does_not_make_models_alike():
    def rows(seed):
        random = np.random.RandomState(seed)
        return random.randn(64, 96) + 10 * np.random.RandomState(99).randn(96)

    left, right = (int(embedding_digest(rows(seed)), 16) for seed in (1, 2))
    assert (left ^ right).bit_count() / 256 > 0.35


def test_the_digest_is_frozen():
    """Drafters on disk record it: with another digest none of them would know its base."""
    expected = "74bb66527ff54b618b8c6455b828075aab05077b9686b68abb01f674b897f9ad"
    assert embedding_digest(np.random.RandomState(5).randn(64, 8)) == expected


def test_digest_rows():
    assert digest_rows(128) == list(range(0, 128, 2))
    assert len(digest_rows(10)) == 64
    assert max(digest_rows(10)) == 9


def test_a_model_without_embedding_is_refused():
    with pytest.raises(ValueError, match="no token embedding"):
        identity_of(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("./nowhere", "is neither a folder nor a repository"),
        ("/no/where", "is neither a folder nor a repository"),
        ("nowhere", "is neither a folder nor a repository"),
        (None, "no drafter ships for tiny-0"),
    ],
)
def test_names_that_lead_nowhere(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        drafter_folder(name, identity())


def test_a_file_is_no_drafter(tmp_path):
    (tmp_path / "drafter.pt").write_bytes(pickle.dumps({}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="pickle"):
        drafter_folder(tmp_path / "drafter.pt")
    with pytest.raises(ValueError, match="is a file: name the folder"):
        drafter_folder(tmp_path / "model.safetensors")


def test_repositories_are_downloaded(tmp_path, monkeypatch):
    folder, asked = apple_folder(tmp_path / "apple"), []

    def snapshot_download(repo, **options):
        asked.append((repo, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_drafter(drafter_folder("someone/drafter")).config == CONFIG
    assert asked == [("someone/drafter", ["*.json", "*.safetensors"])]


def test_a_failed_download_is_one_line(monkeypatch):
    def snapshot_download(repo, **options):
        raise FileNotFoundError("no network\nmany\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="someone/drafter .*no network") as refusal:
        load_drafter(drafter_folder("someone/drafter"))
    assert "\n" not in str(refusal.value)


def test_shipped_drafters_load_for_their_base(monkeypatch):
    for folder in find.shipped_drafters():
        base = bundle.base_of(bundle.read_config(folder))
        assert find_drafter(base) == folder
        assert load_drafter(drafter_folder(None, base), base, mx.float16).config.vocab_size == base.vocab_size
        named = load_drafter(drafter_folder(folder.name), base, mx.float16)
        assert named.weights()["rnn_u.bias"].dtype == mx.float16
        assert "apache-2.0" in (folder / "README.md").read_text()
    assert find.shipped_drafters()


def test_shipped_drafters_are_found_by_listing(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "SHIPPED", tmp_path)
    for seed in (0, 1):
        write_drafter(tmp_path / f"drafter-{seed}", CONFIG, weights_of(), identity(seed))
    assert find_drafter(identity(1)) == tmp_path / "drafter-1"
    assert find_drafter(identity(2)) is None


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_drafter(tmp_path / "bundle", CONFIG, weights_of())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("[write] Unable to write 4 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match="cannot be written .*Unable to write"):
        write_drafter(tmp_path / "bundle", CONFIG, weights_of())
    assert list(tmp_path.iterdir()) == []


def test_writing_checks_the_weights(tmp_path):
    weights = weights_of()
    del weights["rnn_u.bias"]
    with pytest.raises(ValueError, match="rnn_u.bias"):
        write_drafter(tmp_path / "bundle", CONFIG, weights)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        write_drafter(tmp_path, CONFIG, weights_of())
