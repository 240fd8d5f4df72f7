"""Conversion of drafters: from Apple's layout and back, trimmed, cast, quantized; and the commands."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.commands.main import build_parser
from mlx_redrafter.convert import drafter as convert
from mlx_redrafter.convert.drafter import convert_drafter, count_tokens, export_drafter
from mlx_redrafter.loading import find
from mlx_redrafter.models import bundle
from mlx_redrafter.models.bundle import load_drafter
from mlx_redrafter.models.drafter import Drafter, DrafterConfig
from mlx_redrafter.models.identity import BaseIdentity

H, V = 32, 50
BASE = BaseIdentity("tiny", H, V, "0" * 64, "someone/tiny")
OTHER = BaseIdentity("tiny", H, V, "f" * 64, "someone/other")
CONFIGS = [
    DrafterConfig(H, V, 64, 2, rnn=True),
    DrafterConfig(H, V, 64, 0, rnn=False),
    DrafterConfig(H, V, 32, 1, rnn=True),
]


class Letters:
    """A tokenizer: one token per letter, 49 ends a turn."""

    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) - ord("a") for letter in text if letter.isalpha()]


class Chat(Letters):
    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize, return_dict):
        from jinja2 import TemplateError

        if messages[0]["role"] not in ("user", "system"):
            raise TemplateError("a user must begin")
        return [token for message in messages for token in [*self.encode(message["content"]), 49]]


def apple_folder(folder, config=CONFIGS[0], dtype=mx.float16, **raw):
    folder.mkdir()
    config_json = {"torch_dtype": "float16", "model_type": bundle.MODEL_TYPE, **config.to_dict(), **raw}
    (folder / "config.json").write_text(json.dumps(config_json))
    mx.random.seed(0)
    weights = {name: value.astype(dtype) for name, value in Drafter(config).weights().items()}
    weights["emb_norm.weight"] = mx.ones((H,), mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def raw_tensors(folder):
    """Name -> (dtype, shape, bytes) of a safetensors file, without any library."""
    data = (folder / "model.safetensors").read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:size])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*(size + at for at in entry["data_offsets"]))])
        for name, entry in header.items()
    }


def config_json(folder):
    return json.loads((folder / "config.json").read_text())


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_export_is_bit_for_bit(tmp_path, config, dtype):
    source = apple_folder(tmp_path / "apple", config, dtype, architectures=["Drafter"], emb_norm=True)
    converted = convert_drafter(source, tmp_path / "bundle", base=BASE)
    assert (converted.unused, converted.base, converted.config) == (["emb_norm.weight"], BASE, config)
    assert load_drafter(tmp_path / "bundle", BASE).config == config
    export_drafter(tmp_path / "bundle", tmp_path / "back")
    assert raw_tensors(tmp_path / "back") == raw_tensors(source)
    assert list(config_json(tmp_path / "back").items()) == list(config_json(source).items())
    convert_drafter(tmp_path / "back", tmp_path / "again", base=BASE)
    assert raw_tensors(tmp_path / "again") == raw_tensors(tmp_path / "bundle")
    assert config_json(tmp_path / "again") == config_json(tmp_path / "bundle")


def test_every_alias_becomes_apples_name(tmp_path):
    source = apple_folder(tmp_path / "apple", CONFIGS[2])
    weights = mx.load(str(source / "model.safetensors"))
    for number, (head, projection) in enumerate([("lm_heads.", "input_projs."), ("0.", "input_proj.")]):
        renamed = {
            n.replace("lm_head.", head).replace("input_proj.", projection): weights[n] for n in weights
        }
        folder = apple_folder(tmp_path / f"alias{number}", CONFIGS[2])
        (folder / "model.safetensors").unlink()
        mx.save_safetensors(str(folder / "model.safetensors"), renamed)
        convert_drafter(folder, tmp_path / f"bundle{number}")
        assert raw_tensors(tmp_path / f"bundle{number}") == raw_tensors(source)


def test_shards_become_one_file(tmp_path):
    source = apple_folder(tmp_path / "apple")
    expected = raw_tensors(source)
    weights = mx.load(str(source / "model.safetensors"))
    mx.eval(weights)
    (source / "model.safetensors").unlink()
    index = {name: f"model-{place % 3}.safetensors" for place, name in enumerate(weights)}
    for file in set(index.values()):
        mx.save_safetensors(
            str(source / file), {name: weights[name] for name in weights if index[name] == file}
        )
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    convert_drafter(source, tmp_path / "bundle")
    assert raw_tensors(tmp_path / "bundle") == expected


def test_cast(tmp_path):
    source = apple_folder(tmp_path / "apple")
    convert_drafter(source, tmp_path / "bundle", dtype="bfloat16")
    assert {dtype for dtype, *_ in raw_tensors(tmp_path / "bundle").values()} == {"BF16"}
    export_drafter(tmp_path / "bundle", tmp_path / "back")
    assert config_json(tmp_path / "back")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
def test_quantized(tmp_path, bits, group_size):
    source = apple_folder(tmp_path / "apple")
    converted = convert_drafter(
        source, tmp_path / "bundle", q_bits=bits, q_group_size=group_size, dtype="float32"
    )
    drafter, plain = load_drafter(tmp_path / "bundle"), load_drafter(source, dtype=mx.float32)
    assert drafter.config == converted.config
    assert "lm_head.2.scales" in drafter.weights()
    assert ("rnn_w.scales" in drafter.weights()) == (group_size == 32)
    packed = [drafter.weights()[f"lm_head.2.{part}"] for part in ("weight", "scales", "biases")]
    expected = mx.quantize(plain.weights()["lm_head.2.weight"], group_size, bits)
    assert all(mx.array_equal(*pair).item() for pair in zip(packed, expected, strict=True))
    if bits == 8:
        x = mx.random.normal((3, H))
        assert mx.abs(drafter.logits(x, x) - plain.logits(x, x)).max().item() < 0.05


def test_trimmed_rows_are_the_most_frequent(tmp_path):
    source = apple_folder(tmp_path / "apple")
    counts = np.zeros(V, np.int64)
    counts[[7, 3, 40, 9, 8]] = 5, 9, 2, 2, 2
    convert.save_counts(tmp_path / "counts.npz", counts)
    convert_drafter(source, tmp_path / "bundle", draft_vocab=4, frequencies=tmp_path / "counts.npz")
    drafter, whole = load_drafter(tmp_path / "bundle"), load_drafter(source)
    assert drafter.weights()["draft_to_target"].tolist() == [3, 7, 8, 9]  # of the ties 8, 9, 40 the lower
    x = mx.random.normal((3, H)).astype(mx.float16)
    expected = whole.logits(x, x)[:, mx.array([3, 7, 8, 9])]
    np.testing.assert_allclose(np.array(drafter.logits(x, x)), np.array(expected), atol=1e-2)


def test_tokens_never_seen_fill_up_by_lowest_id(tmp_path):
    source = apple_folder(tmp_path / "apple")
    (tmp_path / "text.txt").write_text("zzz")
    options = {"frequencies": tmp_path / "text.txt", "tokenizer": Letters()}
    convert_drafter(source, tmp_path / "bundle", draft_vocab=3, **options)
    assert load_drafter(tmp_path / "bundle").weights()["draft_to_target"].tolist() == [0, 1, 25]


def test_trimmed_and_quantized_bundles_trim_again(tmp_path):
    source = apple_folder(tmp_path / "apple")
    counts = np.arange(V)
    convert.save_counts(tmp_path / "counts.json", counts)
    convert_drafter(
        source, tmp_path / "b10", base=BASE, draft_vocab=10, q_bits=4, frequencies=tmp_path / "counts.json"
    )
    converted = convert_drafter(
        tmp_path / "b10", tmp_path / "b4", draft_vocab=4, frequencies=tmp_path / "counts.json"
    )
    assert converted.base == BASE
    assert load_drafter(tmp_path / "b4", BASE).weights()["draft_to_target"].tolist() == [46, 47, 48, 49]
    assert load_drafter(tmp_path / "b4").weights()["lm_head.2.weight"].shape[0] == 4


MESSAGES = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "bcc"}]
SHAREGPT = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "bcc"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}, MESSAGES[1]]
EXPECTED = [1, 2, 2]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": MESSAGES}, 2),
        ({"messages": PARTS}, 2),
        ({"conversations": SHAREGPT}, 2),
        ({"turns": ["ab", "bcc"]}, 2),
        ({"prompt": "abbcc"}, 1),
        ({"prompt": MESSAGES}, 2),
        ({"text": "abbcc"}, 0),
        ({"messages": MESSAGES[::-1]}, 0),  # which the template refuses
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_conversations_are_counted(tmp_path, record, turns, name):
    path = lines(tmp_path / name, record) if name.endswith("l") else tmp_path / name
    if not name.endswith("l"):
        path.write_text(json.dumps([record]))
    counts = count_tokens(path, V, Chat())
    assert counts[:3].tolist() == EXPECTED
    assert (counts[49], counts.sum()) == (turns, 5 + turns)
    assert count_tokens(path, V, Letters()).sum() == 5


def test_text_is_counted_in_pieces(tmp_path):
    (tmp_path / "text.txt").write_text("abbcc\n" * 1000)
    assert count_tokens(tmp_path / "text.txt", V, Letters())[:3].tolist() == [1000, 2000, 2000]


@pytest.mark.parametrize("name", ["counts.json", "counts.npz"])
def test_saved_counts_are_read_back(tmp_path, name):
    (tmp_path / "text.txt").write_text("abbcc")
    source = apple_folder(tmp_path / "apple")
    options = {
        "frequencies": tmp_path / "text.txt",
        "save_frequencies": tmp_path / name,
        "tokenizer": Letters(),
    }
    convert_drafter(source, tmp_path / "bundle", **options)
    assert load_drafter(tmp_path / "bundle").config.draft_vocab_size is None
    assert count_tokens(tmp_path / name, V)[:3].tolist() == EXPECTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple", "bundle", name, "text.txt"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("data.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: a message's content is None"),
        ("data.jsonl", b'{"messages": 4}', "line 1: messages is 4"),
        ("data.jsonl", b"[1]", "item 1: 1 is no object"),
        ("data.jsonl", b"", "holds nothing that can be used .it is empty"),
        ("data.txt", b"  \n", "holds no text"),
        ("data.txt", b"~{|zz" + "é".encode(), "token 136, but the drafter's vocabulary has 50"),
        ("data.json", b"{", "line 1: not JSON"),
        ("data.json", b"{}", "it has only the keys"),
        ("data.json", b'{"vocab_size": 49, "counts": {"1": 1}}', "another vocabulary than 50"),
        ("data.json", b'{"vocab_size": 50, "counts": {"50": 1}}', "another vocabulary than 50"),
        ("data.json", b'{"vocab_size": 50, "counts": {"4": "many"}}', "not a usable file of counts"),
        ("data.json", b'{"vocab_size": 50, "counts": {"4": -1}}', "does not hold the counts"),
        ("data.npz", b"PK", "not a file of counts"),
    ],
)
def test_bad_frequency_files_are_refused(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        count_tokens(tmp_path / name, V, Letters())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": ', "not JSON"),
        (b'{"answer": "ab"}', "an answer without a question"),
        (b'{"text": "\xe9"}', "not UTF-8"),
        (b'{"messages": [{"role": "cat", "content": "ab"}]}', "role 'cat' is not known"),
    ],
)
def test_a_bad_row_does_not_spoil_the_others(tmp_path, line, says):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "ab"}\n' + line + b'\n{"text": "bcc"}\n')
    with pytest.warns(UserWarning, match=f"left out 1 unusable row; the first, line 2: .*{says}"):
        assert count_tokens(tmp_path / "data.jsonl", V, Letters())[:3].tolist() == EXPECTED


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "data.json", "counts.json"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    contents = {
        "data.txt": "abbcc",
        "data.jsonl": '{"text": "abbcc"}',
        "data.json": '[{"text": "abbcc"}]',
        "counts.json": json.dumps({"vocab_size": V, "counts": {"0": 1, "1": 2, "2": 2}}),
    }
    (tmp_path / name).write_text(contents[name], "utf-8-sig")
    counts = count_tokens(tmp_path / name, V, Letters())
    assert (counts[:3].tolist(), counts.sum()) == (EXPECTED, 5)


def test_counts_of_another_vocabulary_are_refused(tmp_path):
    convert.save_counts(tmp_path / "counts.npz", np.ones(V + 1, np.int64))
    with pytest.raises(ValueError, match="counts of 50 tokens"):
        count_tokens(tmp_path / "counts.npz", V)


def test_text_needs_a_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("abbcc")
    with pytest.raises(ValueError, match="--model"):
        count_tokens(tmp_path / "text.txt", V)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"q_bits": 7}, "7 bits"),
        ({"q_bits": 4, "q_group_size": 16}, "group size 16"),
        ({"q_bits": 4, "q_group_size": 128}, "no layer's width is a multiple of the group size 128"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"draft_vocab": 0, "frequencies": "counts.npz"}, "keep at least 1"),
        ({"draft_vocab": 51, "frequencies": "counts.npz"}, "the drafter has 50"),
        ({"draft_vocab": 5}, "needs --frequencies"),
        ({"frequencies": "counts.npz"}, "not used"),
        ({"save_frequencies": "x.json"}, "need --frequencies"),
        ({"frequencies": "counts.npz", "save_frequencies": "x.txt"}, "x.txt"),
        ({"draft_vocab": 5, "frequencies": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"base": BaseIdentity("tiny", H, V + 1, "0" * 64)}, "vocabulary 51"),
        ({"base": "nowhere"}, "nowhere is neither a folder nor a repository"),
        ({"base": "counts.npz"}, "counts.npz is no model"),
    ],
)
def test_bad_arguments_leave_nothing_behind(tmp_path, monkeypatch, options, complaint):
    monkeypatch.chdir(tmp_path)
    source = apple_folder(tmp_path / "apple")
    convert.save_counts("counts.npz", np.ones(V, np.int64))
    with pytest.raises(ValueError, match=complaint) as refusal:
        convert_drafter(source, tmp_path / "bundle", **options)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple", "counts.npz"]


def test_existing_outputs_are_kept(tmp_path):
    source = apple_folder(tmp_path / "apple")
    for function in (convert_drafter, export_drafter):
        with pytest.raises(ValueError, match="exists already"):
            function(source, source)


def test_nan_is_refused(tmp_path):
    source = apple_folder(tmp_path / "apple")
    weights = {**mx.load(str(source / "model.safetensors")), "rnn_u.bias": mx.full((H,), float("nan"))}
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(ValueError, match="rnn_u.bias holds NaN"):
        convert_drafter(source, tmp_path / "bundle")


def test_a_bundle_keeps_its_base(tmp_path):
    source = apple_folder(tmp_path / "apple")
    convert_drafter(source, tmp_path / "bundle", base=BASE)
    assert convert_drafter(tmp_path / "bundle", tmp_path / "copy").base == BASE
    with pytest.raises(ValueError, match="someone/tiny .*someone/other"):
        convert_drafter(tmp_path / "bundle", tmp_path / "other", base=OTHER)


def test_stored_in_fewer_bits(tmp_path):
    source = apple_folder(tmp_path / "apple", DrafterConfig(H, V, 128, 2, rnn=True))
    convert_drafter(source, tmp_path / "stored", store_bits=8, dtype="float16")
    assert raw_tensors(tmp_path / "stored")["lm_head.2.weight"][0] == "U32"
    found, wanted = load_drafter(tmp_path / "stored"), load_drafter(source)
    x = mx.random.normal((3, H))
    error = mx.abs(found.logits(x, x) - wanted.logits(x, x)).max().item()
    assert found.config == wanted.config and 0 < error < 0.02
    convert_drafter(tmp_path / "stored", tmp_path / "floats")
    assert mx.array_equal(load_drafter(tmp_path / "floats").logits(x, x), found.logits(x, x)).item()
    with pytest.raises(ValueError, match="stored form of fewer bits, which Apple's layout lacks"):
        export_drafter(tmp_path / "stored", tmp_path / "back")


def test_a_memory_is_converted_and_not_exported(tmp_path):
    config = DrafterConfig(H, V, 96, 1, rnn=True, memory_heads=2, memory_head_size=16)
    source = apple_folder(tmp_path / "bundle", config)
    convert.save_counts(tmp_path / "counts.json", np.ones(V, np.int64))
    convert_drafter(
        source, tmp_path / "small", q_bits=8, draft_vocab=20, frequencies=tmp_path / "counts.json"
    )
    drafter = load_drafter(tmp_path / "small")
    assert (drafter.config.memory_heads, drafter.config.head_outputs) == (2, 20)
    assert "memory_kv.scales" in drafter.weights()
    with pytest.raises(ValueError, match="memory of the text, which Apple's layout lacks"):
        export_drafter(source, tmp_path / "back")


def test_quantizing_twice_is_refused(tmp_path):
    convert_drafter(apple_folder(tmp_path / "apple"), tmp_path / "bundle", q_bits=4)
    with pytest.raises(ValueError, match="quantized already"):
        convert_drafter(tmp_path / "bundle", tmp_path / "again", q_bits=4)


def test_export_refuses_what_apples_layout_lacks(tmp_path):
    source = apple_folder(tmp_path / "apple")
    convert.save_counts(tmp_path / "counts.json", np.ones(V, np.int64))
    convert_drafter(source, tmp_path / "quantized", q_bits=4)
    convert_drafter(source, tmp_path / "trimmed", draft_vocab=5, frequencies=tmp_path / "counts.json")
    for name, complaint in (("quantized", "quantization"), ("trimmed", "trimmed vocabulary")):
        with pytest.raises(ValueError, match=complaint):
            export_drafter(tmp_path / name, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("function", [convert_drafter, export_drafter])
def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, function):
    source = apple_folder(tmp_path / "apple")
    write = mx.save_safetensors

    def interrupted(path, *args, **options):
        write(path, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        function(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["apple"]


def run(*flags):
    args = build_parser("convert").parse_args(["convert", *map(str, flags)])
    return args.run(args)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny Llama of mlx-lm's with a tokenizer of one-letter words."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    folder.mkdir()
    sizes = {"model_type": "llama", "hidden_size": H, "vocab_size": V, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 32, "num_attention_heads": 2, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(sizes))
    model = Model(ModelArgs.from_dict(sizes))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    words = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(26)} | {"?": 26}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?").save_pretrained(folder)
    return folder


def test_command_with_everything(tmp_path, base_folder, capsys):
    source = apple_folder(tmp_path / "apple")
    (tmp_path / "text.txt").write_text("c c c b b a")
    flags = [
        "--drafter",
        source,
        "--model",
        base_folder,
        "--mlx-path",
        tmp_path / "out",
        "--dtype",
        "float32",
    ]
    flags += ["--draft-vocab", 2, "--frequencies", tmp_path / "text.txt", "--drafter-q-bits", 8]
    flags += ["--drafter-q-group-size", 32, "--save-frequencies", tmp_path / "counts.json"]
    assert run(*flags) == 0
    drafter = load_drafter(tmp_path / "out", convert.load_identity(base_folder))
    assert drafter.weights()["draft_to_target"].tolist() == [1, 2]
    out = capsys.readouterr().out
    assert "2 of 50 tokens, for tiny-llama" in out
    assert "never used: emb_norm.weight" in out
    assert "library_name: mlx-redrafter" in (tmp_path / "out/README.md").read_text()


def test_command_finds_the_drafter_of_a_base(tmp_path, base_folder, monkeypatch):
    monkeypatch.setattr(find, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("MLX_REDRAFTER_SEARCH", "off")
    auto = "--drafter", "auto", "--model", base_folder, "--mlx-path"
    with pytest.raises(ValueError, match="no drafter was found for tiny-llama"):
        run(*auto, tmp_path / "none")
    (tmp_path / "shipped").mkdir()
    convert_drafter(apple_folder(tmp_path / "apple"), tmp_path / "shipped/one", base=base_folder)
    assert run(*auto, tmp_path / "out", "--drafter-q-bits", 8) == 0
    quantized = load_drafter(tmp_path / "out", convert.load_identity(base_folder)).config
    assert quantized.quantization.bits == 8


def test_command_knows_a_drafter_given_as_model(tmp_path):
    source = apple_folder(tmp_path / "apple")
    assert run("--hf-path", source, "--mlx-path", tmp_path / "out") == 0
    assert load_drafter(tmp_path / "out").config == CONFIGS[0]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "nothing to convert"),
        (["--drafter", "apple", "-q"], "--drafter-q-bits"),
        (["--drafter", "apple", "--q-bits", "4"], "--drafter-q-bits"),
        (["--drafter", "apple", "--drafter-q-group-size", "32"], "needs --drafter-q-bits"),
        (["--drafter", "apple", "--upload-repo", "a/b/c"], "owner/name"),
        (["--drafter", "apple", "--mlx-path", "apple"], "exists already"),
        (["--drafter", "auto"], "name that with --model"),
        (["--hf-path", "base", "--draft-vocab", "4"], "--draft-vocab is for drafters"),
        (["--hf-path", "base", "--store-bits", "8"], "--store-bits is for drafters"),
        (["--drafter", "apple", "--store-bits", "7"], "quantization to 7 bits"),
        (["--hf-path", "base", "-q", "-d"], "exclude each other"),
        (["--hf-path", "base", "-q", "--q-bits", "7"], "--q-bits is 7"),
        (["--hf-path", "base", "-q", "--q-group-size", "16"], "--q-group-size is 16"),
        (["--hf-path", "base", "--q-bits", "4"], "need -q"),
        (["--hf-path", "base", "--mlx-path", "apple"], "exists already"),
    ],
)
def test_command_refuses_before_long_work(tmp_path, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    apple_folder(tmp_path / "apple")
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match=complaint):
        run(*flags)
    assert not (tmp_path / "mlx_model").exists()


def test_command_passes_base_models_on(tmp_path, monkeypatch, capsys):
    calls = []

    def convert_base(source, output, **options):
        calls.append((source, options))
        tmp_path.joinpath(output).mkdir()

    monkeypatch.setattr("mlx_redrafter.commands.convert.convert_base", convert_base)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert run("--hf-path", "base", "-q", "--q-bits", 8, "--trust-remote-code") == 0
    ((source, options),) = calls
    assert (source, options["quantize"], options["q_bits"], options["q_group_size"]) == (
        "base",
        True,
        8,
        None,
    )
    assert options["trust_remote_code"]


class Hub:
    def __init__(self, fails=False):
        self.fails, self.calls = fails, []

    def __call__(self):
        return self

    def create_repo(self, repo, exist_ok):
        if self.fails:
            raise OSError("401 Unauthorized\nmore")
        self.calls.append(repo)

    def upload_folder(self, repo_id, folder_path):
        self.calls.append((repo_id, folder_path))


def test_upload(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    source = apple_folder(tmp_path / "apple")
    run("--drafter", source, "--mlx-path", tmp_path / "out", "--upload-repo", "me/drafter")
    assert hub.calls == ["me/drafter", ("me/drafter", str(tmp_path / "out"))]


def test_a_failed_upload_keeps_the_folder_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(fails=True))
    source = apple_folder(tmp_path / "apple")
    with pytest.raises(ValueError, match="out is converted, but .*401 Unauthorized") as refusal:
        run("--drafter", source, "--mlx-path", tmp_path / "out", "--upload-repo", "me/drafter")
    assert "\n" not in str(refusal.value)
    load_drafter(tmp_path / "out")


def test_export_command(tmp_path, capsys):
    source = apple_folder(tmp_path / "apple")
    args = build_parser("export").parse_args(
        ["export", "--drafter", str(source), "--output", str(tmp_path / "out")]
    )
    assert args.run(args) == 0
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)
