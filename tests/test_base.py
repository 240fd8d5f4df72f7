"""Hugging Face folders, SentencePiece-only ones and bad ones, converted and loaded by mlx-lm."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
import sentencepiece
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from test_gguf import CORPUS, TEXTS, byte_level, write_model
from transformers import PreTrainedTokenizerFast

from mlx_redrafter.convert.base import convert_base
from mlx_redrafter.loading.tokenizer import load_tokenizer

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 400,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}
PROMPT = mx.array([[3, 50, 200, 299]])


def write_weights(folder, shards=1, **config):
    """Write config.json and random safetensors weights of a tiny Llama; return the model."""
    config = CONFIG | config
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = tree_flatten(model.parameters())
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        mx.save_safetensors(str(folder / name), dict(weights[i::shards]))
    weight_map = {key: names[i % shards] for i, (key, _) in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_weights(folder, shards=2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece_folder(folder, **options):
    """Write a tokenizer as Vicuna's and Llama 2's repositories hold it: tokenizer.model alone."""
    folder.mkdir()
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"model_type": "bpe", "byte_fallback": True} | options,
    )
    for leftover in ("corpus.txt", "tokenizer.vocab"):
        (folder / leftover).unlink()
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "legacy": False,
        "model_max_length": 2048,
    }
    config |= {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def logits(folder):
    return mlx_lm.load(str(folder))[0](PROMPT)


def bits(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization", {}).get("bits")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sharded_folder(source, tmp_path):
    convert_base(source, tmp_path / "out")
    model = write_weights(source)
    assert mx.array_equal(logits(tmp_path / "out"), model(PROMPT))
    _, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert [tokenizer.encode(text) for text in TEXTS] == [byte_level().encode(text).ids for text in TEXTS]


@pytest.mark.parametrize(
    ("q_bits", "group", "mode"), [(None, None, "affine"), (8, 32, "affine"), (None, None, "mxfp4")]
)
def test_quantize_then_dequantize(source, tmp_path, q_bits, group, mode):
    convert_base(source, tmp_path / "q", quantize=True, q_bits=q_bits, q_group_size=group, q_mode=mode)
    assert bits(tmp_path / "q") == (q_bits or 4)
    convert_base(tmp_path / "q", tmp_path / "d", dequantize=True)
    assert bits(tmp_path / "d") is None
    assert mx.allclose(logits(tmp_path / "q"), logits(tmp_path / "d"), atol=1e-4)


def test_mixed_bits(source, tmp_path):
    convert_base(source, tmp_path / "q", quantize=True, q_group_size=32, quant_predicate="mixed_3_6")
    model, _ = mlx_lm.load(str(tmp_path / "q"))
    assert {module.bits for _, module in model.named_modules() if hasattr(module, "bits")} == {3, 6}


def test_dtype(source, tmp_path):
    convert_base(source, tmp_path / "out", dtype="bfloat16")
    assert logits(tmp_path / "out").dtype == mx.bfloat16


def widths(folder):
    """The bits of all quantized layers."""
    model, _ = mlx_lm.load(str(folder))
    return {module.bits for _, module in model.named_modules() if hasattr(module, "bits")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"q_bits": 2, "q_group_size": 32}, {2}),
        ({"q_bits": 8}, {8}),
        ({"quant_predicate": "mixed_3_6", "q_group_size": 32}, {3, 6}),
        ({"q_mode": "mxfp4"}, {4}),
    ],
)
def test_quantized_folders_are_quantized_anew(source, tmp_path, options, expected):
    convert_base(source, tmp_path / "q", quantize=True, q_bits=4, q_group_size=32)
    convert_base(tmp_path / "q", tmp_path / "again", quantize=True, **options)
    assert widths(tmp_path / "again") == expected
    convert_base(tmp_path / "q", tmp_path / "d", dequantize=True)
    convert_base(tmp_path / "d", tmp_path / "twice", quantize=True, **options)
    assert mx.array_equal(logits(tmp_path / "again"), logits(tmp_path / "twice"))


def test_what_is_quantized_in_another_mode_is_not_said_to_be_quantized_anew(source, tmp_path):
    convert_base(source, tmp_path / "q", quantize=True, q_mode="mxfp4")
    with pytest.raises(ValueError, match=r"quantized already: dequantize it first \(-d\)"):
        convert_base(tmp_path / "q", tmp_path / "out", quantize=True, q_bits=8)
    convert_base(tmp_path / "q", tmp_path / "d", dequantize=True)  # as the message says
    convert_base(tmp_path / "d", tmp_path / "out", quantize=True, q_bits=8)
    assert widths(tmp_path / "out") == {8}


def test_what_is_not_quantized_is_not_dequantized(source, tmp_path):
    write_model(tmp_path / "m.gguf")
    for name in ("source", "m.gguf"):
        with pytest.raises(ValueError, match=f"{name} is not quantized: leave out --dequantize"):
            convert_base(tmp_path / name, tmp_path / "out", dequantize=True)


def test_dtype_of_a_quantized_folder_stays(source, tmp_path):
    convert_base(source, tmp_path / "q", quantize=True)
    convert_base(tmp_path / "q", tmp_path / "half", dtype="float16")
    convert_base(tmp_path / "half", tmp_path / "again")
    assert (widths(tmp_path / "again"), logits(tmp_path / "again").dtype) == ({4}, mx.float16)
    convert_base(tmp_path / "q", tmp_path / "d", dequantize=True, dtype="bfloat16")
    assert (widths(tmp_path / "d"), logits(tmp_path / "d").dtype) == (set(), mx.bfloat16)


def test_the_card_comes_with_the_model(tmp_path):
    write_model(tmp_path / "m.gguf", kind=2)
    convert_base(tmp_path / "m.gguf", tmp_path / "out")
    assert "m.gguf by mlx-redrafter" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_shards_without_an_index(source, tmp_path):
    (source / "model.safetensors.index.json").unlink()
    convert_base(source, tmp_path / "out")
    assert mx.array_equal(logits(tmp_path / "out"), write_weights(source)(PROMPT))


def test_progress_is_told(source, tmp_path):
    lines = []
    convert_base(source, tmp_path / "out", progress=lines.append)
    assert any("loading" in line for line in lines)


def test_gguf_file_and_folder(tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_model(folder / "m.gguf", kind=2)
    convert_base(folder, tmp_path / "same")
    convert_base(str(folder / "m.gguf"), tmp_path / "float", dequantize=True, dtype="float32")
    convert_base(folder / "m.gguf", tmp_path / "eight", quantize=True, q_bits=8, q_group_size=32)
    assert [bits(tmp_path / name) for name in ("same", "float", "eight")] == [4, None, 8]
    assert mx.allclose(logits(tmp_path / "same"), logits(tmp_path / "float"), atol=0.1)
    assert mx.allclose(logits(tmp_path / "eight"), logits(tmp_path / "float"), atol=0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eight", "float", "gguf", "same"]
    shutil.copy(folder / "m.gguf", folder / "n.gguf")
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        convert_base(folder, tmp_path / "out")


# --- SentencePiece and Vicuna ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"model_type": "unigram"},
        {"user_defined_symbols": ["the", "aaa", "▁x"]},
    ],
    ids=str,
)
def test_sentencepiece_ids(tmp_path, options):
    pieces = sentencepiece_folder(tmp_path / "sp", **options)
    before = contents(tmp_path / "sp")
    tokenizer = load_tokenizer(tmp_path / "sp")
    for text in [*TEXTS, "aaaaaaaaa", " the the\n\n\n      the ", "▁x", "☃", "日本語", "x  "]:
        assert tokenizer.encode(text) == [1, *pieces.encode(text)]
    assert tokenizer.decode(tokenizer.encode("the  dog", add_special_tokens=False)) == pieces.decode(
        pieces.encode("the  dog")
    )
    assert contents(tmp_path / "sp") == before


def test_vicuna_converts(tmp_path):
    pieces = sentencepiece_folder(tmp_path / "Vicuna-7b")
    write_weights(tmp_path / "Vicuna-7b")
    convert_base(tmp_path / "Vicuna-7b", tmp_path / "out")
    _, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert [tokenizer.encode(text) for text in TEXTS] == [[1, *pieces.encode(text)] for text in TEXTS]
    assert tokenizer.has_chat_template
    assert tokenizer.bos_token == "<s>"
    chat = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in chat]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
        "USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:"
    )
    system = [{"role": "system", "content": "Be brief."}, messages[0]]
    assert tokenizer.apply_chat_template(system, tokenize=False) == "<s>Be brief. USER: Hi "


def test_vicuna_is_known_by_folder_name_or_config(tmp_path):
    sentencepiece_folder(tmp_path / "plain")
    assert not load_tokenizer(tmp_path / "plain").has_chat_template
    assert load_tokenizer(tmp_path / "plain", name="lmsys/VICUNA-7b-v1.3").has_chat_template
    (tmp_path / "plain" / "config.json").write_text(json.dumps(CONFIG | {"_name_or_path": "vicuna-7b"}))
    assert load_tokenizer(tmp_path / "plain").has_chat_template


# --- Bad input ---------------------------------------------------------------------------------------


def rewrite(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def spoil(folder):
    name = "model-00001-of-00002.safetensors"
    weights = mx.load(str(folder / name))
    key = next(iter(weights))
    mx.save_safetensors(str(folder / name), weights | {key: weights[key] * mx.nan})


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


INDEX = "model.safetensors.index.json"


def stale(folder):
    """Leave a model of one file beside that of two."""
    weights = mx.load(str(folder / "model-00001-of-00002.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), {name: 0 * x for name, x in weights.items()})


def only_pickle(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "lacks model-00002-of-00002"),
        (
            lambda f: [(f / name).unlink() for name in ("model-00002-of-00002.safetensors", INDEX)],
            "lacks model-00002-of-00002.safetensors, by .* the names of its other files",
        ),
        (stale, "in model-.* and model.safetensors: move model.safetensors elsewhere"),
        (lambda f: stale(f) or (f / INDEX).unlink(), "move model.safetensors elsewhere"),
        (
            lambda f: [p.rename(f / f"x{p.name}") for p in f.glob("model-*")],
            "lacks model-00001|give them that",
        ),
        (lambda f: cut(f / "model-00002-of-00002.safetensors"), "00002.safetensors is damaged"),
        (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b""), "00002.safetensors is damaged"),
        (spoil, "holds NaN"),
        (only_pickle, "pickle file pytorch_model-00001-of-00002.bin.*save_pretrained"),
        (lambda f: rewrite(f / "config.json", model_type="mystery"), "no model_type 'mystery'"),
        (lambda f: rewrite(f / "config.json", model_type=["llama"]), "no model_type"),
        (lambda f: rewrite(f / "config.json", model_type="cache"), "mlx-lm cannot load"),
        (lambda f: rewrite(f / "config.json", hidden_size=32), "mlx-lm cannot load"),
        (lambda f: rewrite(f / "config.json", hidden_size="64"), "mlx-lm cannot load"),
        (lambda f: rewrite(f / "config.json", model_file="evil.py"), "'evil.py': --trust-remote-code runs"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_bad_folders(source, tmp_path, damage, message):
    """``generate`` loads with the same ``load_base``."""
    damage(source)
    with pytest.raises(ValueError, match=message) as raised:
        convert_base(source, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", "nobody/no-such-model is neither a folder nor a repository"),
        ("./missing/folder/deep", "neither a folder nor"),
        ("missing.gguf", "missing.gguf does not exist"),
        ("", "neither a folder nor"),
    ],
)
def test_missing_sources(tmp_path, name, message):
    with pytest.raises(ValueError, match=message) as raised:
        convert_base(name, tmp_path / "out")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickle_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match="pickle file.*safetensors"):
            convert_base(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": True, "dequantize": True}, "not both"),
        ({"dtype": "int8"}, "'int8'"),
        ({"quantize": True, "q_mode": "best"}, "'best'"),
        ({"quantize": True, "q_bits": 7}, "7"),
        ({"quantize": True, "q_group_size": 48}, "48"),
        ({"quantize": True, "q_mode": "mxfp4", "q_bits": 8}, "--q-bits is 8: choose one of 4"),
        ({"quantize": True, "q_mode": "mxfp8", "q_group_size": 64}, "--q-group-size is 64: choose one of 32"),
        ({"quantize": True, "quant_predicate": "mixed_3_6", "q_bits": 4}, "leave out --q-mode and --q-bits"),
        ({"q_bits": 4}, "need -q"),
        ({"q_mode": "mxfp4"}, "need -q"),
        ({"quant_predicate": "mixed_3_6"}, "need -q"),
    ],
)
def test_bad_options(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_base(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept(source, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        convert_base(source, source)
