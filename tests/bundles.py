"""Tiny model folders with a tokenizer, and drafters for them, made on the spot.

In a ``cycle`` model every token follows one other, whatever comes before, so what it says can be
dictated and a drafter knows it all. A ``random`` model says anything, and its drafter is a poor one.
"""

import functools
import importlib
import json
import random
from pathlib import Path

import mlx.core as mx
import sentencepiece
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_redrafter.loading.tokenizer import load_tokenizer
from mlx_redrafter.models.drafter import DrafterConfig
from mlx_redrafter.models.identity import identity_of
from mlx_redrafter.models.save import write_drafter

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and naïve cafés serve tea",
    "你好，世界 🙂🙂 résumé — ٣٤ 👩‍👩‍👧‍👦",
    "one two three four five six seven eight nine ten\n\tdef f(x): return x + 1",
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<says>{% endif %}"
)
BOS, EOS = "<s>", "</s>"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def make_folder(
    folder: Path, says: str | None = None, tokenizer: str = "byte-level", kind: str = "cycle", **config
) -> Path:
    """Write a model with its tokenizer; ``config`` changes its config.json and its sizes.

    Args:
        says: what a ``cycle`` model says after ``>``, before it ends; no token may occur twice in it.
    """
    folder.mkdir(parents=True)
    size = TOKENIZERS[tokenizer](folder)
    config = {**CONFIG, "vocab_size": size, **config}
    (folder / "config.json").write_text(json.dumps(config))
    weights = make_weights(config)
    if kind == "cycle":
        successors = make_cycle(config["vocab_size"], dictated(load_tokenizer(folder), says))
        weights = follow(weights, successors)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def make_weights(config: dict) -> dict[str, mx.array]:
    """Random weights whose next-token distributions are far from uniform."""
    mx.random.seed(3)
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    return {
        name: value + 0.2 * mx.random.normal(value.shape) if value.ndim > 1 else value
        for name, value in tree_flatten(model.parameters())
    }


def dictated(tokenizer: TokenizerWrapper, says: str | None) -> list[int]:
    if says is None:
        return []
    start = tokenizer.encode(">", add_special_tokens=False)[-1]
    tokens = [start, *tokenizer.encode(says, add_special_tokens=False), tokenizer.eos_token_id]
    assert len(set(tokens)) == len(tokens), f"{says!r} has a token twice"
    return tokens


def make_cycle(size: int, first: list[int]) -> list[int]:
    """The successor of every token: those in ``first`` one after another, then all others."""
    others = [token for token in range(size) if token not in first]
    random.Random(0).shuffle(others)
    order = [*first, *others]
    successors = [0] * size
    for token, successor in zip(order, order[1:] + order[:1], strict=True):
        successors[token] = successor
    return successors


def follow(weights: dict[str, mx.array], successors: list[int]) -> dict[str, mx.array]:
    """Let the last token alone decide: layers add nothing, and the head's rows are the tokens before."""
    weights = dict(weights)
    rows = mx.sign(mx.random.normal(weights["lm_head.weight"].shape, key=mx.random.key(7)))  # [V, H]
    weights["model.embed_tokens.weight"] = rows
    weights["lm_head.weight"] = rows[predecessors(successors)]
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    return weights


def predecessors(successors: list[int]) -> mx.array:
    return mx.argsort(mx.array(successors))


def make_drafter(folder: Path, base: Path, record: bool = True, **changes) -> Path:
    """Write the bundle of a drafter that knows what a ``cycle`` model says."""
    weights = mx.load(str(base / "model.safetensors"))
    rows, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    size, width = rows.shape
    config = DrafterConfig(width, size, exit_dim=2 * width, num_draft_layers=0, rnn=True)
    drafter = {
        "lm_head.0.weight": mx.concatenate([mx.zeros(head.shape), nn.silu(head)], axis=1),  # [V, 2H]
        "rnn_w.weight": mx.eye(width),
        "rnn_u.weight": mx.zeros((width, width)),
        "rnn_u.bias": mx.zeros(width),
    }
    identity = identity_of(_Embeddings(rows), "tiny") if record else None
    write_drafter(folder, config, {**drafter, **changes}, identity)
    return folder


class _Embeddings(nn.Module):
    model_type = "llama"

    def __init__(self, rows: mx.array) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(*rows.shape)
        self.embed_tokens.weight = rows


def write_byte_level(folder: Path) -> int:
    """A GPT-2-like tokenizer with a chat template; returns its number of tokens."""
    tokenizer = Tokenizer.from_str(_trained_byte_level())
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return len(fast)


@functools.cache
def _trained_byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[::2], trainer)  # others are spelled in bytes
    return tokenizer.to_str()


def write_sentencepiece(folder: Path) -> int:
    """A Llama-2-like tokenizer.model, without a chat template; rare characters are spelled in bytes."""
    (folder / "corpus.txt").write_text("\n".join([*CORPUS[0].split() * 10, "> " * 10]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")))


TOKENIZERS = {"byte-level": write_byte_level, "sentencepiece": write_sentencepiece}
