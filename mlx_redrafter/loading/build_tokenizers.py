"""Tokenizers for models that bring none mlx-lm can read: GGUF metadata and SentencePiece files."""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType  # SentencePiece numbers its piece types the same way
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from mlx_lm.tokenizer_utils import TokenizerWrapper
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .ends import ENDS as _ENDS
from .ends import token_text
from .read import read_object

VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% set system = "
    "'A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user\\'s questions.' %}{% endif %}"
    "{{ bos_token + system + ' ' }}"
    "{% for message in turns %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_SMALL_FILES = (".json", ".model", ".jinja", ".txt", ".jsonl", ".tiktoken", ".py")
_OBSOLETE = ("auto_map", "legacy", "sp_model_kwargs", "use_default_system_prompt", "added_tokens_decoder")
_MARK = re.compile(r"<[|｜].+[|｜]>|</?s>|<(start|end)_of_turn>")
_LONGEST_MERGED_PIECE = 1024  # characters; bounds the work a hostile vocabulary can ask for


# --- Loading -----------------------------------------------------------------------------------------


def save_ends(folder: Path, tokenizer: TokenizerWrapper) -> None:
    """Write the ends of text that ``load_tokenizer`` found to where ``mlx_lm.load`` looks for them."""
    for name in ("config.json", "generation_config.json"):
        content = read_object(folder / name, optional=True)
        if name == "config.json" or content.get("eos_token_id") is not None:
            content["eos_token_id"] = sorted(tokenizer.eos_token_ids)
            (folder / name).write_text(json.dumps(content, indent=4, sort_keys=True), "utf-8")


@contextmanager
def completed(folder: Path, vicuna: bool) -> Iterator[Path]:
    """A copy of a folder's tokenizer that mlx-lm can read; with Vicuna's chat template if it lacks that."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for path in folder.iterdir():
            if path.suffix in _SMALL_FILES:
                shutil.copy(path, copy)
        ensure_fast_tokenizer(copy)
        if vicuna:
            (copy / "chat_template.jinja").write_text(VICUNA_TEMPLATE, "utf-8")
        yield copy


def ensure_fast_tokenizer(folder: Path) -> None:
    """Write the ``tokenizer.json`` equivalent to ``tokenizer.model`` into a folder that lacks it.

    Does nothing if ``tokenizer.json`` exists or ``tokenizer.model`` is not SentencePiece's (but tiktoken's).
    """
    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    except DecodeError:
        return
    if not proto.pieces or proto.trainer_spec.model_type not in (1, 2):
        return
    pieces = Pieces(
        texts=[piece.piece for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        types=[piece.type for piece in proto.pieces],
        unigram=proto.trainer_spec.model_type == 1,
        charsmap=proto.normalizer_spec.precompiled_charsmap,
        add_prefix=proto.normalizer_spec.add_dummy_prefix,
        isolate=True,
        collapse_spaces=proto.normalizer_spec.remove_extra_whitespaces,
    )
    tokenizer = _sentencepiece_tokenizer(pieces)
    added = folder / "added_tokens.json"
    if added.exists():
        tokens = sorted(read_object(added).items(), key=lambda item: item[1])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token, _ in tokens])
    config = _spm_config(proto) | read_object(folder / "tokenizer_config.json", optional=True)
    save_tokenizer(folder, tokenizer, {key: config[key] for key in config if key not in _OBSOLETE})


def save_tokenizer(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, adding BOS and EOS as ``config`` says.

    ``config`` follows transformers: ``add_bos_token``, ``add_eos_token``, ``bos_token``, ... The class
    is set to the one that reads ``tokenizer.json`` as it stands; others rebuild parts of it.
    """
    ends = [
        config.get(f"add_{name}_token") and token_text(config.get(f"{name}_token")) for name in ("bos", "eos")
    ]
    bos, eos = ([token] if token else [] for token in ends)
    if bos or eos:
        single = [*bos, "$A:0", *eos]
        pair = [*single, *(f"{part}:1" for part in (*bos, "$B", *eos))]
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(bos + eos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, token in config.items():  # transformers takes no other kind of object
        if name.endswith("_token") and isinstance(token, dict) and "__type" not in token:
            config = {**config, name: token_text(token)}
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


# --- SentencePiece -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary and its normalisation: what tokenizer.model and GGUF files hold."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    merges: Sequence[tuple[str, str]] = ()  # empty: derived from the scores
    unigram: bool = False
    charsmap: bytes = b""
    add_prefix: bool = True  # a space in front of the text
    isolate: bool = False  # user-defined pieces are words of their own, not added tokens
    collapse_spaces: bool = False


def _spm_config(proto: Any) -> dict[str, Any]:
    """Return the tokenizer_config.json of a Llama tokenizer with the model's own special tokens."""
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    named = {name: proto.pieces[i].piece for name, i in ids.items() if 0 <= i < len(proto.pieces)}
    return {"add_bos_token": "bos_token" in named, "add_eos_token": False, **named}


def _sentencepiece_tokenizer(pieces: Pieces) -> Tokenizer:
    """Build the tokenizer that gives the ids SentencePiece gives.

    As in Llama's own tokenizer.json, the space in front is added again after a special token.
    """
    byte_fallback = TokenType.BYTE in pieces.types
    unknown = next(iter(_of_type(pieces.texts, pieces.types, TokenType.UNKNOWN)), None)
    if pieces.unigram:
        vocabulary = list(zip(pieces.texts, pieces.scores, strict=True))
        model: models.Model = models.Unigram(vocabulary, unk_id=unknown, byte_fallback=byte_fallback)
    else:
        model = models.BPE(
            _vocabulary(pieces.texts),
            list(pieces.merges) or _merges(pieces),
            unk_token=None if unknown is None else pieces.texts[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.collapse_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if pieces.add_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if pieces.add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special(tokenizer, pieces.texts, pieces.types, user_defined=not pieces.isolate)
    own = _of_type(pieces.texts, pieces.types, TokenType.USER_DEFINED).values()
    if pieces.isolate and own:
        # Added tokens would cut the text too, but get a space in front of what follows them.
        longest_first = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.ignore_merges = True
    return tokenizer


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """List every way to form a piece from two others, best score first: SentencePiece's merge order."""
    normal = _of_type(pieces.texts, pieces.types, TokenType.NORMAL)
    ids = {text: i for i, text in normal.items() if len(text) <= _LONGEST_MERGED_PIECE}
    ranked = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces.scores[i], i, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _vocabulary(texts: Sequence[str]) -> dict[str, int]:
    vocabulary = {text: i for i, text in enumerate(texts)}
    if len(vocabulary) != len(texts):
        twice = next(text for i, text in enumerate(texts) if vocabulary[text] != i)
        raise ValueError(f"The vocabulary holds the token {twice!r} twice: convert the model again.")
    return vocabulary


def _add_special(
    tokenizer: Tokenizer, texts: Sequence[str], types: Sequence[int], *, user_defined: bool = True
) -> None:
    """Register control tokens as special and user-defined ones as tokens found in any text."""
    special = filter(None, _of_type(texts, types, TokenType.CONTROL, TokenType.UNKNOWN).values())
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if user_defined:
        plain = filter(None, _of_type(texts, types, TokenType.USER_DEFINED).values())
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])


def _of_type(texts: Sequence[str], types: Sequence[int], *wanted: int) -> dict[int, str]:
    """The tokens of the wanted types, by their ids."""
    return {i: text for i, (text, kind) in enumerate(zip(texts, types, strict=True)) if kind in wanted}


# --- GGUF --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pre:
    """How a byte-level BPE cuts text into words: each pattern in turn isolates what it matches."""

    patterns: tuple[str, ...] = ()
    gpt2: bool = False  # GPT-2's own pattern after them
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is that token
    add_bos: bool = False  # unless the metadata says otherwise


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"  # % digits
)
_WORDS_AND_MARKS = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
# Escapes where an editor that normalises Unicode would change the character.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎ"
    "ↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    + rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}",
)
_DIGITS = Pre((r"\p{N}",), gpt2=True)
_LLAMA3 = Pre((_WORDS % r"\p{N}{1,3}",), ignore_merges=True, add_bos=True)
_QWEN2 = Pre((_WORDS % r"\p{N}",), nfc=True)
_GPT4O = Pre((_CASED % (_CONTRACTION + "?", _CONTRACTION + "?", r"\p{N}{1,3}"),))

PRE_TOKENIZERS: dict[str, Pre] = {
    **dict.fromkeys(("default", "gpt-2", "jais", "phi-2", "trillion", "exaone4"), Pre(gpt2=True)),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "granite-docling"), Pre(gpt2=True)),
    **dict.fromkeys(("olmo", "mpt"), Pre(gpt2=True, nfc=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b", "mellum2"), _DIGITS),
    **dict.fromkeys(("command-r", "exaone"), Pre((r"\p{N}",), gpt2=True, nfc=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("falcon-h1", "midm-2.0", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Pre((_WORDS % r"\p{N}{1,3}",))),
    **dict.fromkeys(("glm4", "glm5"), Pre((_WORDS % r"\p{N}{1,3}",), ignore_merges=True)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo"), _QWEN2),
    **dict.fromkeys(("hunyuan", "solar-open", "grok-2"), Pre((_WORDS % r"\p{N}",))),
    "qwen35": Pre((_WORDS_AND_MARKS,), nfc=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    **dict.fromkeys(
        ("tiny_aya", "cohere2moe"), Pre((r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O.patterns), nfc=True)
    ),
    "tekken": Pre((_CASED % ("", "", r"\p{N}"),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm"), Pre(_DEEPSEEK_V3)),
    "seed-coder": Pre((_WORDS.replace(r"]+[\r\n]*|", r"\r\n]+|") % r"\p{N}",)),
    "superbpe": Pre((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "deepseek-llm": Pre(_DEEPSEEK_LLM),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-v3": Pre(_DEEPSEEK_V3),
}
_PRE_OF_ARCHITECTURE = {
    **dict.fromkeys(("qwen2", "qwen2moe", "qwen3", "qwen3moe", "qwen3next"), "qwen2"),
    **{"starcoder2": "starcoder", "command-r": "command-r", "cohere2": "command-r", "gpt-oss": "gpt-4o"},
    **{"glm4": "glm4", "exaone4": "exaone4", "olmo2": "dbrx", "smollm3": "smaug-bpe", "lfm2": "lfm2"},
    **{"lfm2moe": "lfm2", "qwen35": "qwen35", "qwen35moe": "qwen35", "falcon-h1": "falcon-h1"},
}
_GGUF_TYPES: dict[str, type] = {
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"), str),
    **{f"tokenizer.ggml.add_{name}": bool for name in ("bos_token", "eos_token", "space_prefix")},
    "tokenizer.ggml.remove_extra_whitespaces": bool,
    **{f"tokenizer.ggml.{name}_token_id": int for name in ("bos", "eos", "unknown", "padding")},
}
_GGUF_LISTS = {"tokens": (str,), "merges": (str,), "token_type": (int,), "scores": (int, float)}


def _check_gguf_types(metadata: Mapping[str, Any]) -> None:
    """Refuse metadata about the tokenizer whose values are not of the type that the format gives them."""
    wrong = [key for key, kind in _GGUF_TYPES.items() if not isinstance(metadata.get(key, kind()), kind)]
    for name, kind in _GGUF_LISTS.items():
        values = metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            wrong.append(f"tokenizer.ggml.{name}")
    if wrong:
        raise ValueError(f"GGUF metadata {wrong[0]} is not of the right type: download the file again.")


def write_gguf_tokenizer(metadata: Mapping[str, Any], folder: Path, context_length: int, name: str) -> None:
    """Rebuild the tokenizer a GGUF file describes and write it to ``folder``.

    Args:
        metadata: the file's key/value pairs; ``tokenizer.ggml.model`` must be "gpt2" (byte-level BPE)
            or "llama" (SentencePiece BPE with scores).
        context_length: tokens; becomes ``model_max_length``.
        name: the file's, looked at for "vicuna" like ``general.name``.

    Raises:
        ValueError: another kind of tokenizer, or lists that do not fit together.
    """
    _check_gguf_types(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"GGUF tokenizer {kind!r} is not supported ('gpt2' and 'llama' are): use the HF repo."
        )
    pre = _pre_of(metadata) if kind == "gpt2" else Pre(add_bos=True)
    try:
        tokenizer = _byte_level_tokenizer(metadata, pre) if kind == "gpt2" else _gguf_sentencepiece(metadata)
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(f"The GGUF tokenizer is inconsistent: {error}. Download the file again.") from error
    config = _gguf_config(metadata, pre, context_length)
    if "chat_template" not in config and "vicuna" in f"{name} {metadata.get('general.name')}".lower():
        config["chat_template"] = VICUNA_TEMPLATE
    save_tokenizer(folder, tokenizer, config)


def _pre_of(metadata: Mapping[str, Any]) -> Pre:
    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        problem = "no tokenizer.ggml.pre" if name is None else f"an unknown pre-tokenizer, {name!r}"
        name = _guess_pre(metadata)
        print(f"warning: the GGUF has {problem}: assuming {name!r}, tokens may differ.", file=sys.stderr)
    return PRE_TOKENIZERS[name]


def _guess_pre(metadata: Mapping[str, Any]) -> str:
    """Name the pattern that the architecture has, or the vocabulary shows: no token spans two words."""
    if known := _PRE_OF_ARCHITECTURE.get(str(metadata.get("general.architecture"))):
        return known
    words = "\n".join(_of_type(*_gguf_tokens(metadata), TokenType.NORMAL).values())
    digits = max(map(len, re.findall("[0-9]+", words)), default=1)
    joined = re.search(r"^[!-&(-/:-@\[-`{-~][A-Za-z]+$", words, re.MULTILINE)  # such as "(self"
    if digits == 1:
        return "qwen2" if joined else "smollm"
    return "llama-bpe" if joined and digits == 3 else "default"


def _byte_level_tokenizer(metadata: Mapping[str, Any], pre: Pre) -> Tokenizer:
    texts, types = _gguf_tokens(metadata)
    if not (merges := _gguf_merges(metadata)):
        raise ValueError("The GGUF has no list tokenizer.ggml.merges: use a file with a whole tokenizer.")
    tokenizer = Tokenizer(models.BPE(_vocabulary(texts), merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, texts, types)
    return tokenizer


def _gguf_sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    texts, types = _gguf_tokens(metadata)
    scores = metadata.get("tokenizer.ggml.scores", [0.0] * len(texts))
    if len(scores) != len(texts):
        raise ValueError(f"The GGUF has {len(scores)} scores for {len(texts)} tokens: download it again.")
    pieces = Pieces(
        texts,
        scores,
        types,
        merges=_gguf_merges(metadata),
        add_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
        collapse_spaces=metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
    )
    return _sentencepiece_tokenizer(pieces)


def _gguf_tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return the tokens in order of id and their types; a mark that the chat template writes is no text."""
    texts = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type") or [
        TokenType.BYTE if text.startswith("<0x") else TokenType.NORMAL for text in texts
    ]
    if len(types) != len(texts):
        raise ValueError(f"The GGUF has {len(types)} token types for {len(texts)} tokens: download it again.")
    template = metadata.get("tokenizer.chat_template", "")
    marks = {text for text in texts if _MARK.fullmatch(text) and text in template}
    pairs, (normal, control) = zip(texts, types, strict=True), (TokenType.NORMAL, TokenType.CONTROL)
    return texts, [control if kind == normal and text in marks else kind for text, kind in pairs]


def gguf_ends(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids that end the text by the metadata; without a chat template those known by name too."""
    texts, types = _gguf_tokens(metadata)
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if not metadata.get("tokenizer.chat_template"):
        special = _of_type(texts, types, TokenType.CONTROL)
        ids += [i for i, text in special.items() if _ENDS.fullmatch(text)]
    return [i for i in ids if type(i) is int and 0 <= i < len(texts)]


def _gguf_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", []):
        left, _, right = merge[1:].partition(" ")  # a token may itself be a space
        merges.append((merge[:1] + left, right))
    return merges


def _gguf_config(metadata: Mapping[str, Any], pre: Pre, context_length: int) -> dict[str, Any]:
    texts, _ = _gguf_tokens(metadata)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{to}_token": metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for to, key in names.items()}
    config: dict[str, Any] = {name: texts[i] for name, i in ids.items() if 0 <= i < len(texts)}
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos)
    config["add_bos_token"] = add_bos and "bos_token" in config
    config["add_eos_token"] = metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in config
    config["model_max_length"] = context_length
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
